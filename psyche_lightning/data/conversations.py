"""The provider ``datasets`` for conversations, prompts with completions, and token ids with labels of their own.

Answers are trained, the rest is not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from psyche_lightning.data.chat import Chat, Completion, Text, messages_of, special_ids
from psyche_lightning.data.options import whole
from psyche_lightning.data.order import make_order, psyche_seed
from psyche_lightning.data.packed import PackedData
from psyche_lightning.data.parquet import IGNORED
from psyche_lightning.data.splits import DataSet
from psyche_lightning.data.spool import Spool
from psyche_lightning.data.tokenizer import BYTES, Encoder
from psyche_lightning.errors import ConfigError, DataError, counted

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

IDS, LABELS, MASK = "input_ids", "labels", "attention_mask"
TOKENIZED = (IDS, LABELS)
MESSAGES, PROMPT, COMPLETION, TOOLS = "messages", "prompt", "completion", "tools"
_KNOWN = (MESSAGES, "conversations", "conversation")
_OPTIONS = {MESSAGES, PROMPT, COMPLETION, "packed", "chat_template", "each_answer"}
_BATCH = 16
_OPEN_ROWS = 32
# A row in the file: the ids, and in their upper bits where a text begins and what is trained.
_TRAINED, _BEGINS = 1 << 31, 1 << 30
_CODES = 1 << 32


def holds_conversations(data: DataSet, options: Mapping[str, Any]) -> bool:
    """Whether a configuration of ``datasets`` is for conversations: by its options, or else by the data's columns.

    Args:
        data: the data set.
        options: the provider's other options.

    Raises:
        ConfigError: the data set cannot be opened.
    """
    if _OPTIONS & options.keys():
        return True
    if "text" in options or options.get("streaming") or (data.path is None) == (data.dataset is None):
        return False
    opened, source = data.rows(), data.where
    columns = _columns(opened, source)
    found = _find(columns)
    if found == TOKENIZED and not _labelled(opened):
        return False
    if "text" in columns and found is not None:
        logger.info("%s has texts and %s; set data.config.messages to train on the latter", source, " and ".join(found))
    return "text" not in columns and found is not None


class ConversationData(PackedData):
    """Conversations of a data set as samples, with labels on the answers alone.

    A row has ``messages``, which the tokenizer's chat template writes; or ``prompt`` and ``completion``: texts, or
    messages; or ``input_ids`` with ``labels``, which are -100 where a token is not trained. A text that is longer than
    ``seq_len`` is cut; one that has no answer then, or never had one, is left out, and a warning says how many. Texts
    are not divided among samples. What remains of a sample is filled up without labels. The rows are in a temporary
    file (in ``TMPDIR``).

    Args:
        seed: the run's seed, for ``shuffle: true``.
        data: the data set.
        seq_len: tokens of a sample, at least 2.
        messages: the column with the messages; None for ``messages``, ``conversations`` or ``conversation``.
        prompt: the column with the prompts; None for ``prompt``.
        completion: the column with the completions; None for ``completion``.
        tokenizer: ``"bytes"``, a path, or the name of a tokenizer on the Hub; None for bytes. For token ids, the one
            that made them.
        chat_template: a chat template, or a file (``*.jinja``) with it, in place of the tokenizer's own. It is saved
            with checkpoints.
        bos: whether a prompt begins with the tokenizer's beginning-of-text id; a chat template decides that itself.
        packed: whether several texts share a sample, with positions that count from 0 in each. The model must keep them
            apart. Without it each text has a sample of its own, without positions.
        each_answer: whether each answer becomes a text of its own, with the conversation before it. For templates that
            write an answer otherwise when the conversation goes on.
        max_samples: the most samples to make.
        shuffle: true for an order by the run's seed, false for the data set's order, or the 32 numbers of one of
            Psyche's seeds.
        validation_samples: number of samples to hold out, spread evenly over the data.

    Raises:
        ConfigError: an option is wrong, the data set or a column does not exist, a conversation cannot be encoded, or
            no answer is left.
        DataError: the data set cannot be read, or there is no space for its rows.
    """

    def __init__(
        self,
        seed: int,
        data: DataSet,
        seq_len: int,
        *,
        messages: str | None = None,
        prompt: str | None = None,
        completion: str | None = None,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        bos: bool = False,
        packed: bool = True,
        each_answer: bool = False,
        max_samples: int | None = None,
        shuffle: Any = True,
        validation_samples: int = 0,
    ) -> None:
        whole("seq_len", seq_len, least=2)
        whole("validation_samples", validation_samples, least=0)
        if max_samples is not None:
            whole("max_samples", max_samples, least=1)
        psyche_seed(shuffle)
        for option, value in (("packed", packed), ("each_answer", each_answer)):
            if not isinstance(value, bool):
                raise ConfigError(f"{option} is {value!r}, expected true or false.")
        opened, source = data.rows(), data.where
        columns = _find(_columns(opened, source), messages, prompt, completion)
        if columns is None:
            raise ConfigError(
                f"{source} has the columns {', '.join(_columns(opened, source))}, expected one with conversations "
                f"({', '.join(_KNOWN)}), or {PROMPT} and {COMPLETION}. Name others as data.config.messages, or as "
                "data.config.prompt and data.config.completion."
            )
        texts: _Texts | _Tokenized
        if columns == TOKENIZED:
            if tokenizer is None or bos or chat_template is not None or each_answer:
                raise ConfigError(
                    f"{source} has token ids with labels: set data.config.tokenizer to the tokenizer that made them, "
                    "and remove bos, chat_template and each_answer, which are for texts."
                )
            texts = _Tokenized(opened, source, tokenizer)
        else:
            texts = _Texts(opened, source, columns, tokenizer or BYTES, bos, chat_template, each_answer)
        rows = _Rows(texts, seq_len, packed)
        spool = Spool(rows, texts.encoder, seq_len, vocab_size=_CODES, most=max_samples)
        self._packed = packed
        rows.report(source)
        self._end = rows.end
        super().__init__(
            spool,
            seq_len=seq_len,
            vocab_size=texts.encoder.vocab_size,
            order=partial(make_order, shuffle=shuffle, seed=seed),
            encoder=texts.encoder,
            validation_samples=validation_samples,
            source=source,
        )

    @property
    def end_of_text(self) -> int | None:
        """The id that ends all answers; None if they end differently."""
        return self._end

    def _sample(self, block: NDArray[Any]) -> dict[str, torch.Tensor]:
        import torch

        codes = block.astype(np.int64)
        ids = codes & (_BEGINS - 1)
        sample = {"input_ids": ids, "labels": np.where(codes & _TRAINED, ids, IGNORED)}
        if self._packed:
            places = np.arange(len(ids))
            sample["position_ids"] = places - np.maximum.accumulate(np.where(codes & _BEGINS, places, 0))
        return {name: torch.from_numpy(values) for name, values in sample.items()}


class _Texts:
    """The texts of a data set's rows.

    Args:
        rows: a data set of the ``datasets`` library.
        source: where it comes from, for messages.
        columns: the column of messages, or those of prompts and completions.
        tokenizer: its name.
        bos: whether a prompt begins with the beginning-of-text id.
        template: the chat template; None for the tokenizer's own.
        each_answer: see :class:`~psyche_lightning.data.chat.Chat`.

    Attributes:
        encoder: has the tokenizer.
    """

    def __init__(
        self,
        rows: Any,
        source: str,
        columns: tuple[str, ...],
        tokenizer: str,
        bos: bool,
        template: str | None,
        each_answer: bool,
    ) -> None:
        self._rows = rows
        self._source = source
        self._columns = columns
        first: Mapping[str, list[Any]] = next(iter(rows.iter(batch_size=_BATCH)), {})
        kinds = [next((one for one in first.get(column, []) if one is not None), None) for column in columns]
        strings = len(columns) == 2 and all(isinstance(one, str) for one in kinds)
        if not strings and bos:
            raise ConfigError("bos is for prompts that are texts; of messages, the chat template decides what begins.")
        if strings and (template is not None or each_answer):
            raise ConfigError("chat_template and each_answer are for messages, but the prompts are texts; remove them.")
        self.encoder = Encoder(tokenizer, download=True, bos=bos if strings else None)
        self._completion = Completion(self.encoder, bos=bos) if strings else None
        self._chat = None if strings else Chat(self.encoder, template, each_answer=each_answer)

    def __iter__(self) -> Iterator[list[Text]]:
        """The texts of each row."""
        number = 0
        for batch in self._rows.iter(batch_size=_BATCH):
            for place in range(len(batch[self._columns[0]])):
                yield self._texts({name: column[place] for name, column in batch.items()}, number)
                number += 1

    def _texts(self, row: Mapping[str, Any], number: int) -> list[Text]:
        where = f"Row {number} of {self._source}"
        values = [row[name] for name in self._columns]
        if self._completion is not None:
            values = ["" if value is None else value for value in values]
            if not all(isinstance(value, str) for value in values):
                raise ConfigError(f"{where} has {str(values)[:60]}, expected texts like the rows before it.")
            return self._completion.texts(values[0], values[1], where)
        assert self._chat is not None
        parts = [[] if value is None else messages_of(value, where) for value in values]
        leading = len(parts[0]) if len(parts) > 1 else 0
        return self._chat.texts([one for part in parts for one in part], where, first=leading, tools=row.get(TOOLS))


class _Tokenized:
    """The texts of rows with token ids, and labels that say which of them are trained.

    Args:
        rows: a data set of the ``datasets`` library.
        source: where it comes from, for messages.
        tokenizer: the name of the tokenizer that made the ids.

    Attributes:
        encoder: has the tokenizer.
    """

    def __init__(self, rows: Any, source: str, tokenizer: str) -> None:
        self._rows = rows
        self._source = source
        self.encoder = Encoder(tokenizer, download=True, bos=None)

    def __iter__(self) -> Iterator[list[Text]]:
        """The text of each row, without its padding."""
        for number, (ids, labels) in enumerate(_labels(self._rows, self._source)):
            where = f"Row {number} of {self._source}"
            if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < self.encoder.vocab_size):
                raise ConfigError(
                    f"{where} has token ids from {ids.min()} to {ids.max()}, but the tokenizer has "
                    f"{self.encoder.vocab_size}: another one made the data."
                )
            answers = labels != IGNORED
            if (labels[answers] != ids[answers]).any():
                raise ConfigError(
                    f"{where} has labels that are neither its token ids nor {IGNORED}. Do not shift labels: the model "
                    "does that."
                )
            yield [Text(ids, answers)] if answers.any() else []


class _Rows:
    """Rows of ``seq_len`` codes from texts, as :data:`~psyche_lightning.data.spool.Documents`.

    Args:
        texts: the texts.
        seq_len: tokens of a row.
        packed: whether several texts share a row.

    Attributes:
        end: the id that ends all answers; None if they differ, or end with an ordinary token.
    """

    def __init__(self, texts: _Texts | _Tokenized, seq_len: int, packed: bool) -> None:
        self.end: int | None = None
        self._texts = texts
        self._seq_len = seq_len
        self._packed = packed
        tokenizer = texts.encoder.tokenizer
        pad = getattr(tokenizer, "pad_token_id", None)
        self._pad = pad if isinstance(pad, int) else texts.encoder.end or 0
        self._conversations = self._kept = self._cut = self._late = self._without = self._filled = self._rows = 0

    def __call__(self, first: int) -> Iterator[NDArray[np.int64]]:
        """Yields the rows from number ``first`` on."""
        self._conversations = self._kept = self._cut = self._late = self._without = self._filled = self._rows = 0
        for row in islice(self._pack() if self._packed else map(self._row, map(_only, self._coded())), first, None):
            self._rows += 1
            yield row

    def report(self, source: str) -> None:
        """Say what became of the conversations.

        Raises:
            ConfigError: no answer is left.
        """
        late = f"{self._late} of them because no answer begins within seq_len={self._seq_len}"
        if not self._kept:
            raise ConfigError(
                f"No answer is left to train of the {counted(self._conversations, 'row')} of {source}: {late}. Answers "
                "are messages of the role 'assistant', or completions; raise data.seq_len if they come late."
            )
        if self._late or self._without:
            logger.warning(
                "%d texts of %s have no answer and are left out, %s",
                self._late + self._without, source, late,
            )  # fmt: skip
        logger.info(
            "%d texts of %d rows in %d samples, of which %.0f %% are filled up; %d texts are cut at seq_len=%d",
            self._kept, self._conversations, self._rows, 100 * self._filled / (self._rows * self._seq_len), self._cut,
            self._seq_len,
        )  # fmt: skip
        if self.end is None:
            logger.warning(
                "the answers in %s do not end with one special token, so what a model trained on them generates may "
                "not end; use a chat template that ends each answer with one, or a tokenizer with an end-of-text id",
                source,
            )

    def _coded(self) -> Iterator[NDArray[np.int64]]:
        """Codes of the texts that have an answer, at most ``seq_len`` each."""
        ends: set[int] = set()
        special = special_ids(self._texts.encoder)
        for texts in self._texts:
            self._conversations += 1
            self._without += not texts
            for text in texts:
                codes = text.ids.copy()
                codes[text.answers] |= _TRAINED
                codes[0] = text.ids[0] | _BEGINS  # nothing comes before it
                whole = codes
                codes = codes[: self._seq_len]
                if not (codes & _TRAINED).any():
                    self._late += bool((whole & _TRAINED).any())
                    self._without += not (whole & _TRAINED).any()
                    continue
                ends.add(int(text.ids[np.flatnonzero(text.answers)[-1]]))
                self.end = next(iter(ends)) if len(ends) == 1 and ends <= special else None
                self._kept += 1
                self._cut += len(whole) > len(codes)
                yield codes

    def _pack(self) -> Iterator[NDArray[np.int64]]:
        """Puts each text into the first open row with room, and closes the fullest row when too many are open."""
        rows: list[list[NDArray[np.int64]]] = []
        room: list[int] = []
        for codes in self._coded():
            place = next((place for place, free in enumerate(room) if free >= len(codes)), len(rows))
            if place == len(rows):
                rows.append([])
                room.append(self._seq_len)
            rows[place].append(codes)
            room[place] -= len(codes)
            if room[place] == 0 or len(rows) > _OPEN_ROWS:
                place = room.index(min(room))
                del room[place]
                yield self._row(rows.pop(place))
        yield from map(self._row, rows)

    def _row(self, texts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        codes = np.concatenate(texts)
        rest = np.full(self._seq_len - len(codes), self._pad, np.int64)
        rest[:1] |= _BEGINS
        self._filled += len(rest)
        return np.concatenate([codes, rest])


def _labels(rows: Any, source: str) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The ids and labels of each row, without what ``attention_mask`` marks as padding; nothing of an empty row.

    Raises:
        ConfigError: they are not lists of integers of one length.
    """
    number = 0
    for batch in rows.iter(batch_size=_BATCH):
        for place in range(len(batch[IDS])):
            given = [batch[name][place] for name in (*TOKENIZED, MASK) if name in batch]
            if all(value is None or not len(value) for value in given[:2]):
                given = [np.empty(0, np.int64)] * 2
            values = [np.asarray(value) for value in given if value is not None]
            shapes = {value.shape for value in values}
            if (
                len(values) < 2
                or len(shapes) > 1
                or values[0].ndim != 1
                or any(one.dtype.kind not in "iu" for one in values)
            ):
                raise ConfigError(
                    f"Row {number} of {source} has not as many {LABELS} and {MASK} as {IDS}, each a list of integers."
                )
            kept = values[2] == 1 if len(values) > 2 else np.ones(len(values[0]), bool)
            yield values[0][kept].astype(np.int64), values[1][kept].astype(np.int64)
            number += 1


def _labelled(rows: Any) -> bool:
    """Whether labels of the first rows differ from their token ids."""
    return any((ids != labels).any() for ids, labels in islice(_labels(rows, "the data"), _BATCH))


def _only(codes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [codes]


def _columns(rows: Any, source: str) -> list[str]:
    """The columns of a data set.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return list(next(iter(rows.iter(batch_size=1)), {}))
    except Exception as error:  # errors of data sets have no common type
        raise DataError(f"the rows of {source} cannot be read ({type(error).__name__}: {error})") from error


def _find(
    columns: list[str], messages: str | None = None, prompt: str | None = None, completion: str | None = None
) -> tuple[str, ...] | None:
    """The column of messages, or those of prompts and completions; None if they do not exist."""
    if messages is not None and (prompt is not None or completion is not None):
        raise ConfigError("messages is set, and prompt or completion; expected one kind of conversation.")
    pair = (prompt or PROMPT, completion or COMPLETION)
    if messages is None and (prompt is not None or completion is not None):
        candidates: list[tuple[str, ...]] = [pair]
    else:
        candidates = [(one,) for one in ((messages,) if messages is not None else _KNOWN)]
        candidates += [pair, TOKENIZED] if messages is None else []
    return next((one for one in candidates if set(one) <= set(columns)), None)
