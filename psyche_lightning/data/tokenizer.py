"""Converts text to token ids: bytes, or a Hugging Face tokenizer."""

# mypy: allow-untyped-calls
# (the tokenizer classes in transformers are partly without annotations)

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from psyche_lightning.errors import ConfigError, counted
from psyche_lightning.logs import redirections

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

BYTES = "bytes"
BYTE_VOCABULARY = 256
BYTE_END = 0
"""Ends each text of bytes. No text contains it, so no id beyond the bytes is needed."""

_PROMPT = "a"
_PIECE_CHARACTERS = 1 << 20
_PIECES_AT_ONCE = 16
_QUIET_SECONDS = 2.0

Tokens = npt.NDArray[np.unsignedinteger[Any]]


class Encoder:
    """Converts texts to ids, with an end-of-text id after each text.

    Args:
        name: ``"bytes"`` (ids 0 to 255), a folder or ``tokenizer.json`` on disk, or with ``download`` the name of a
            tokenizer on the Hugging Face Hub.
        download: whether to look up a name on the Hub if it is not a path.
        bos: whether a text begins with the tokenizer's beginning-of-text id. The tokenizer that is saved with
            checkpoints does the same, so that a prompt is encoded like a text in training. None, for ids that were
            made elsewhere, leaves the tokenizer as it is.

    Attributes:
        vocab_size: number of ids.
        dtype: the smallest unsigned type that holds them.
        end: id after each text; None if the tokenizer has none.

    Raises:
        ConfigError: the tokenizer does not exist, or has no beginning-of-text id for ``bos``.
    """

    def __init__(self, name: str = BYTES, *, download: bool = False, bos: bool | None = None) -> None:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"tokenizer is {name!r}, expected {BYTES!r} or the path of a tokenizer.")
        if bos not in (None, True, False):
            raise ConfigError(f"bos is {bos!r}, expected true or false.")
        self._loaded = None if name == BYTES else load_tokenizer(name, download=download)
        self.vocab_size: int = BYTE_VOCABULARY if self._loaded is None else len(self._loaded)
        self.dtype = np.dtype(np.min_scalar_type(self.vocab_size - 1))
        self.replaced = 0
        self.end = BYTE_END if self._loaded is None else _special(self._loaded, "eos")
        begin = None if self._loaded is None else _special(self._loaded, "bos")
        if bos and begin is None:
            raise ConfigError(
                f"bos is true, but the tokenizer {name!r} has no beginning-of-text id. Remove bos, or name one as "
                "bos_token in its tokenizer_config.json."
            )
        self._begin = begin if bos else None
        if bos is not None and self.end is None:
            logger.warning(
                "the tokenizer %r has no end-of-text id, so texts are joined without a separator, and a model trained "
                "on them never ends a text; name one as eos_token in its tokenizer_config.json",
                name,
            )
        if bos is not None and self._loaded is not None:
            _encode_like(self._loaded, bool(bos), name)

    @property
    def is_bytes(self) -> bool:
        """Whether the ids are bytes."""
        return self._loaded is None

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer as a ``transformers`` object, to save with checkpoints."""
        return byte_tokenizer() if self._loaded is None else self._loaded

    def encode(self, text: bytes) -> Tokens:
        """Returns the ids of one text, after its beginning-of-text id, with ``bos``, and before its end-of-text id.

        Bytes that are not UTF-8 become U+FFFD, unless the ids are bytes. Long texts are cut at line ends, about every
        million characters.
        """
        if self._loaded is None:
            return np.frombuffer(text + bytes([BYTE_END]), dtype=np.uint8)
        ids: list[npt.NDArray[Any]] = [] if self._begin is None else [np.asarray([self._begin], dtype=self.dtype)]
        try:
            letters = text.decode("utf-8")
        except UnicodeDecodeError:
            letters = text.decode("utf-8", errors="replace")
            self.replaced += 1
        pieces = _pieces(letters)
        while batch := list(islice(pieces, _PIECES_AT_ONCE)):
            encoded = self._loaded(batch, add_special_tokens=False, verbose=False)["input_ids"]
            ids.extend(np.asarray(piece, dtype=self.dtype) for piece in encoded)
        if self.end is not None:
            ids.append(np.asarray([self.end], dtype=self.dtype))
        return np.concatenate(ids) if ids else np.empty(0, self.dtype)

    def encode_all(self, texts: Sequence[bytes]) -> Tokens:
        """Returns the ids of all texts in a row; on a terminal, a progress bar appears after a while."""
        with QuietProgress("Tokenizing", sum(map(len, texts))) as progress:
            ids = []
            for text in texts:
                ids.append(self.encode(text))
                progress.advance(len(text))
        if self.replaced:
            logger.warning("%s not in UTF-8: their other bytes became U+FFFD", counted(self.replaced, "text"))
        return np.concatenate(ids) if ids else np.empty(0, self.dtype)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the bytes of UTF-8, 0 to 255.

    It is a byte-level BPE without merges, saved and loaded like any other fast tokenizer. It has no special tokens: a
    text ends with byte 0, which belongs in the model's ``eos_token_id``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab={_letter(byte): byte for byte in range(BYTE_VOCABULARY)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def load_tokenizer(name: str, *, download: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or a ``tokenizer.json``, or from the Hub, without running its code.

    Args:
        name: a path or, with ``download``, a name on the Hub if there is no such path.
        download: whether to ask the Hub.

    Raises:
        ConfigError: the tokenizer does not exist or cannot be loaded.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    place = Path(name).expanduser()
    expected = f"expected {BYTES!r}, a folder written by a Hugging Face tokenizer's save_pretrained, a tokenizer.json"
    expected += (
        ", or the name of a tokenizer on the Hub, which needs a network (or HF_HUB_OFFLINE=1 and the Hub's cache)."
        if download
        else ". Names on the Hub are not looked up: download the tokenizer first."
    )
    if not place.exists() and not download:
        raise ConfigError(f"The tokenizer {name!r} does not exist (looked for {place.absolute()}); {expected}")
    try:
        if place.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(place))
        local = place.exists()
        source = str(place) if local else name
        return AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception for a malformed file
        raise ConfigError(f"The tokenizer {name!r} cannot be loaded ({error}); {expected}") from error


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of the beginning of a text, as in training: with what the tokenizer puts before a text, not after it."""
    whole: list[int] = tokenizer(text)["input_ids"]
    bare: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    for end in range(len(bare), len(whole) + 1):
        if whole[end - len(bare) : end] == bare:
            return whole[:end]
    return whole


def _special(tokenizer: PreTrainedTokenizerBase, kind: str) -> int | None:
    """The id that begins (``bos``) or ends (``eos``) a text; None if there is none."""
    found = getattr(tokenizer, f"{kind}_token_id", None)
    return found if isinstance(found, int) else None


def _encode_like(tokenizer: Any, bos: bool, name: str) -> None:
    """Let a tokenizer put what training puts around a text, without the end: it is saved with checkpoints."""
    prompt = tokenizer(_PROMPT, add_special_tokens=False)["input_ids"]
    wanted = [tokenizer.bos_token_id, *prompt] if bos else prompt
    own = tokenizer(_PROMPT)["input_ids"]
    if own == wanted:
        return
    if not bos and own[: len(own) - len(prompt)] and own[0] == tokenizer.bos_token_id:
        logger.warning(
            "the tokenizer %r begins each text with %r, but this training does not, and neither will the tokenizer of "
            "its checkpoints; data.config.bos=true trains with it",
            name,
            tokenizer.bos_token,
        )
    if hasattr(type(tokenizer), "add_bos_token"):
        tokenizer.add_eos_token = False
        tokenizer.add_bos_token = bos


def _letter(byte: int) -> str:
    """The character for a byte in byte-level BPE (GPT-2's table); printable bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    if byte in printable:
        return chr(byte)
    return chr(256 + sum(other not in printable for other in range(byte)))


def _pieces(text: str) -> Iterator[str]:
    """Cut ``text`` after line ends that are at least `_PIECE_CHARACTERS` apart."""
    start = 0
    while start < len(text):
        newline = text.find("\n", start + _PIECE_CHARACTERS)
        end = len(text) if newline < 0 else newline + 1
        yield text[start:end]
        start = end


class QuietProgress:
    """A progress bar on stderr that appears only on a terminal, and only after a while.

    Args:
        what: what is being done, for people.
        total: the sum of all :meth:`advance` calls; None if it is not known.
    """

    def __init__(self, what: str, total: float | None) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), transient=True, **redirections())
        self._task = self._bar.add_task(what, total=total)
        self._begin = time.monotonic()
        self._shown = False

    def __enter__(self) -> QuietProgress:
        return self

    def advance(self, size: float) -> None:
        """Add ``size`` to what is done."""
        self._bar.advance(self._task, size)
        if not self._shown and self._bar.console.is_terminal and time.monotonic() - self._begin > _QUIET_SECONDS:
            self._bar.start()
            self._shown = True

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._bar.stop()
