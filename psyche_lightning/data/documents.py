"""The provider ``datasets``: the texts of a Hugging Face data set, tokenized and packed into samples."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psyche_lightning.data.client import FetchOptions
from psyche_lightning.data.options import whole
from psyche_lightning.data.order import make_order, psyche_seed
from psyche_lightning.data.packed import PackedData
from psyche_lightning.data.splits import DataSet
from psyche_lightning.data.spool import Spool
from psyche_lightning.data.tokenizer import BYTES, Encoder
from psyche_lightning.data.tokens import vocabulary
from psyche_lightning.errors import ConfigError, DataError, counted

logger = logging.getLogger(__name__)

_ROWS = 16
_FEW = 4
"""Fewer rows do not show whether all begin or end alike."""
TEXT, IDS, LABELS, MASK = "text", "input_ids", "labels", "attention_mask"


class DocumentData(PackedData):
    """The texts of a data set as samples.

    The tokens of all texts, in order and with an end-of-text id after each, are cut into blocks of ``seq_len``. An
    incomplete last block is dropped. The tokens are in a temporary file (in ``TMPDIR``), so memory is bounded. With
    ``streaming`` nothing is downloaded in advance: texts are fetched and tokenized, in the order of the data set, up to
    the requested sample.

    Args:
        seed: the run's seed, for ``shuffle: true``.
        data: the data set.
        seq_len: tokens of a sample, at least 2.
        text: the column with the texts, or with the ids of an already tokenized data set; None for ``text`` or, without
            that, ``input_ids``.
        tokenizer: ``"bytes"``, a path, or the name of a tokenizer on the Hub; None for bytes.
        vocab_size: number of token ids of an already tokenized data set; None for the tokenizer's.
        bos: whether each text begins with the tokenizer's beginning-of-text id.
        streaming: whether to read the data set during the run.
        max_samples: the most samples to make; required for streaming.
        shuffle: true for an order by the run's seed, another one in each pass; ``"once"`` for the same in each pass;
            false for the data set's order; or the 32 numbers of one of Psyche's
            seeds. The default is true, or false with streaming.
        validation_samples: number of samples to hold out, spread evenly over the data; none with streaming.
        fetch: see :class:`~psyche_lightning.data.client.FetchOptions`.

    Raises:
        ConfigError: an option is wrong, or the data set or the column does not exist.
        DataError: the data set cannot be read, or there is no space for its tokens.
    """

    def __init__(
        self,
        seed: int,
        data: DataSet,
        seq_len: int,
        *,
        text: str | None = None,
        tokenizer: str | None = None,
        vocab_size: int | None = None,
        bos: bool = False,
        streaming: bool = False,
        max_samples: int | None = None,
        shuffle: Any = None,
        validation_samples: int = 0,
        fetch: Any = None,
    ) -> None:
        whole("seq_len", seq_len, least=2)
        whole("validation_samples", validation_samples, least=0)
        if max_samples is not None:
            whole("max_samples", max_samples, least=1)
        shuffle = not streaming if shuffle is None else shuffle
        psyche_seed(shuffle)
        if streaming and (max_samples is None or shuffle is not False or validation_samples):
            raise ConfigError(
                "A streamed data set is read in its own order: set max_samples to the samples that the run may use, "
                "and remove shuffle and validation_samples."
            )
        fetching = FetchOptions.of(fetch)
        opened, source = data.rows(streaming=streaming), data.where
        column = Column(opened, text, source)
        if column.tokenized and bos:
            raise ConfigError("bos is for texts; a data set of token ids has what its tokenizer put into it.")
        encoding = None if column.tokenized else bos
        encoder = Encoder(BYTES if tokenizer is None else tokenizer, download=True, bos=encoding)
        if column.tokenized:
            size = vocabulary(vocab_size, None if tokenizer is None else encoder)
        elif vocab_size is not None:
            raise ConfigError("vocab_size is for data sets of token ids; texts have the vocabulary of their tokenizer.")
        else:
            size = encoder.vocab_size
        spool = Spool(
            column,
            encoder,
            seq_len,
            vocab_size=size,
            most=max_samples,
            lazily=streaming,
            retry_seconds=0.0 if data.path is not None else fetching.retry_seconds,
        )
        column.report()
        super().__init__(
            spool,
            seq_len=seq_len,
            vocab_size=size,
            order=partial(make_order, shuffle=shuffle, seed=seed),
            encoder=None if column.tokenized and tokenizer is None else encoder,
            validation_samples=validation_samples,
            source=source,
        )


class Column:
    """The texts, or the token ids, in a column of a data set, as :data:`~psyche_lightning.data.spool.Documents`.

    Args:
        dataset: a data set of the ``datasets`` library, iterable or not.
        name: the column; None for ``text`` or, without that, ``input_ids``.
        source: where the data comes from, for messages.

    Attributes:
        tokenized: whether its rows are token ids.

    Raises:
        ConfigError: the column does not exist.
        DataError: the data set cannot be read.
    """

    def __init__(self, dataset: Any, name: str | None, source: str) -> None:
        self._dataset = dataset
        self._source = source
        try:
            first: dict[str, list[Any]] = next(iter(dataset.iter(batch_size=_ROWS)), {})
        except Exception as error:  # errors of data sets have no common type
            raise DataError(f"the documents of {source} cannot be read ({type(error).__name__}: {error})") from error
        self._name = name or (IDS if TEXT not in first and IDS in first else TEXT)
        if first and self._name not in first:
            raise ConfigError(
                f"{source} has no column {self._name!r}. Columns: {', '.join(first)}. Set data.config.text to the "
                "column with the texts, or with the token ids."
            )
        values = [value for value in first.get(self._name, []) if value is not None]
        self.tokenized = bool(values) and isinstance(values[0], (list, np.ndarray))
        self._empty = 0
        if self.tokenized and not _apart(first, self._name, source):
            logger.warning(
                "the rows of %s neither begin nor end with the same token id, so they are joined without a separator, "
                "and a model trained on them never ends a text; tokenize them with an end-of-text id",
                source,
            )

    def report(self) -> None:
        """Say how many rows that were read have nothing in the column."""
        if self._empty:
            logger.warning(
                "%s of %s: nothing is in the column %r, so they are left out",
                counted(self._empty, "row"), self._source, self._name,
            )  # fmt: skip

    def __call__(self, first: int) -> Iterator[bytes | NDArray[np.int64]]:
        """Yields the texts from number ``first`` on; of a tokenized data set the ids, without the padding.

        A row with an empty text, or none, yields no ids, so that numbers count rows.

        Raises:
            ConfigError: the column contains something else.
        """
        rest = self._dataset.skip(first) if first else self._dataset
        number = first
        for rows in rest.iter(batch_size=_ROWS):  # in batches, because __iter__ divides the rows among workers
            for place, value in enumerate(rows[self._name]):
                where = f"Row {number} of {self._source}"
                if value is None or (isinstance(value, (str, list)) and not value):
                    self._empty += 1
                    yield np.empty(0, np.int64)
                elif self.tokenized:
                    yield _ids({name: column[place] for name, column in rows.items()}, self._name, where)
                elif isinstance(value, str):
                    yield value.encode("utf-8", errors="replace")
                else:
                    raise ConfigError(f"{where} has {str(value)[:40]!r} in the column {self._name!r}, expected a text.")
                number += 1


def _apart(rows: dict[str, list[Any]], name: str, source: str) -> bool:
    """Whether rows of token ids begin or end alike; true if there are too few to tell."""
    each = [
        _ids({key: column[place] for key, column in rows.items()}, name, f"Row {place} of {source}")
        for place, value in enumerate(rows[name])
        if value is not None
    ]
    found = [ids for ids in each if len(ids)]
    return len(found) < _FEW or any(len({int(ids[place]) for ids in found}) == 1 for place in (0, -1))


def _ids(row: dict[str, Any], name: str, where: str) -> NDArray[np.int64]:
    """The token ids of a row without its padding."""
    ids = np.asarray(row[name])
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ConfigError(f"{where} has {str(row[name])[:40]!r} in the column {name!r}, expected a list of token ids.")
    kept = np.ones(len(ids), bool)
    if name == IDS and row.get(MASK) is not None:
        kept = np.asarray(row[MASK]) == 1
        if kept.shape != ids.shape:
            raise ConfigError(f"{where} has {len(ids)} token ids and {kept.size} values of {MASK!r}, expected as many.")
    if name == IDS and row.get(LABELS) is not None:
        labels = np.asarray(row[LABELS])
        if labels.shape != ids.shape or (labels[kept] != ids[kept]).any():
            raise ConfigError(
                f"{where} has {LABELS!r} that differ from its {IDS!r}, but here rows are trained whole. Set "
                "data.config.packed to true or false, and remove text, so that all labels count."
            )
    return ids[kept].astype(np.int64)
