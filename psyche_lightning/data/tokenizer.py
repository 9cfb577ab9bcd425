"""Converts text to token ids: bytes, or a Hugging Face tokenizer."""

# mypy: allow-untyped-calls
# (the tokenizer classes in transformers are partly without annotations)

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from psyche_lightning.errors import ConfigError
from psyche_lightning.logs import redirections

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BYTES = "bytes"
BYTE_VOCABULARY = 256
BYTE_END = 0
"""Ends each text of bytes. No text contains it, so no id beyond the bytes is needed."""

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

    Attributes:
        vocab_size: number of ids.
        dtype: the smallest unsigned type that holds them.

    Raises:
        ConfigError: the tokenizer does not exist.
    """

    def __init__(self, name: str = BYTES, *, download: bool = False) -> None:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"tokenizer is {name!r}, expected {BYTES!r} or the path of a tokenizer.")
        self._loaded = None if name == BYTES else load_tokenizer(name, download=download)
        self.vocab_size: int = BYTE_VOCABULARY if self._loaded is None else len(self._loaded)
        self.dtype = np.dtype(np.min_scalar_type(self.vocab_size - 1))

    @property
    def is_bytes(self) -> bool:
        """Whether the ids are bytes."""
        return self._loaded is None

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer as a ``transformers`` object, to save with checkpoints."""
        return byte_tokenizer() if self._loaded is None else self._loaded

    def encode(self, text: bytes) -> Tokens:
        """Returns the ids of one text and its end-of-text id, if the tokenizer has one, without other special tokens.

        Bytes that are not UTF-8 become U+FFFD, unless the ids are bytes. Long texts are cut at line ends, about every
        million characters.
        """
        if self._loaded is None:
            return np.frombuffer(text + bytes([BYTE_END]), dtype=np.uint8)
        ids: list[npt.NDArray[Any]] = []
        pieces = _pieces(text.decode("utf-8", errors="replace"))
        while batch := list(islice(pieces, _PIECES_AT_ONCE)):
            encoded = self._loaded(batch, add_special_tokens=False, verbose=False)["input_ids"]
            ids.extend(np.asarray(piece, dtype=self.dtype) for piece in encoded)
        end = self._loaded.eos_token_id
        if isinstance(end, int):
            ids.append(np.asarray([end], dtype=self.dtype))
        return np.concatenate(ids) if ids else np.empty(0, self.dtype)

    def encode_all(self, texts: Sequence[bytes]) -> Tokens:
        """Returns the ids of all texts in a row; on a terminal, a progress bar appears after a while."""
        with QuietProgress("Tokenizing", sum(map(len, texts))) as progress:
            ids = []
            for text in texts:
                ids.append(self.encode(text))
                progress.advance(len(text))
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
