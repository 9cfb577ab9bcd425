"""Text to token ids: bytes, or a Hugging Face tokenizer on disk."""

# mypy: allow-untyped-calls
# (the tokenizer classes in transformers are partly without annotations)

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from psyche_lightning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BYTES = "bytes"
BYTE_VOCABULARY = 256
# Ends each file of a byte-level corpus: no text has it, so that no id beyond the bytes is needed.
BYTE_END = 0

_PIECE_CHARACTERS = 1 << 20
_PIECES_AT_ONCE = 16
_QUIET_SECONDS = 2.0

Tokens = npt.NDArray[np.unsignedinteger[Any]]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the bytes of UTF-8, 0 to 255.

    Byte-level BPE without merges, saved and loaded like any other fast tokenizer. It has no special tokens: a text's
    end is byte 0, which belongs in the model's ``eos_token_id``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab={_letter(byte): byte for byte in range(BYTE_VOCABULARY)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or a ``tokenizer.json``, without network and without running its code.

    Raises:
        ConfigError: there is none at ``path``.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    place = Path(path).expanduser()
    expected = (
        f"expected {BYTES!r}, a folder written by a Hugging Face tokenizer's save_pretrained, or a tokenizer.json. "
        "Names of the Hub are not looked up: download the tokenizer first."
    )
    if not place.exists():
        raise ConfigError(f"The tokenizer {path!r} does not exist (looked for {place.absolute()}); {expected}")
    try:
        if place.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(place))
        return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception for a malformed file
        raise ConfigError(f"The tokenizer {path!r} cannot be loaded ({error}); {expected}") from error


def encode_bytes(texts: Sequence[bytes]) -> Tokens:
    """The texts' bytes, each text followed by `BYTE_END`, as one uint8 array."""
    return np.frombuffer(b"".join(text + bytes([BYTE_END]) for text in texts), dtype=np.uint8)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[bytes]) -> Tokens:
    """Tokenize texts without special tokens, each followed by the tokenizer's end-of-text id if it has one.

    Bytes that are not UTF-8 become U+FFFD. Texts are cut at line ends into pieces of about a million characters. A
    progress bar appears on a terminal's stderr when this takes longer than two seconds.

    Returns:
        One array of the smallest of uint16 and uint32 that holds the vocabulary.
    """
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    end = tokenizer.eos_token_id
    ids: list[npt.NDArray[Any]] = []
    with _Progress(sum(map(len, texts))) as progress:
        for text in texts:
            pieces = _pieces(text.decode("utf-8", errors="replace"))
            while batch := list(islice(pieces, _PIECES_AT_ONCE)):
                encoded = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
                ids.extend(np.asarray(piece, dtype=dtype) for piece in encoded)
            if isinstance(end, int):
                ids.append(np.asarray([end], dtype=dtype))
            progress.advance(len(text))
    return np.concatenate(ids)


def _letter(byte: int) -> str:
    """The character for a byte in byte-level BPE (GPT-2's table): printable ones stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    if byte in printable:
        return chr(byte)
    return chr(256 + sum(other not in printable for other in range(byte)))


def _pieces(text: str) -> Iterator[str]:
    """Cut ``text`` after line ends, at least `_PIECE_CHARACTERS` apart."""
    start = 0
    while start < len(text):
        newline = text.find("\n", start + _PIECE_CHARACTERS)
        end = len(text) if newline < 0 else newline + 1
        yield text[start:end]
        start = end


class _Progress:
    """A progress bar in bytes that appears only on a terminal, and only when there is time to look at it."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("Tokenizing", total=total)
        self._begin = time.monotonic()
        self._shown = False

    def __enter__(self) -> _Progress:
        return self

    def advance(self, size: int) -> None:
        """Count ``size`` more bytes as done."""
        self._bar.advance(self._task, size)
        if not self._shown and self._bar.console.is_terminal and time.monotonic() - self._begin > _QUIET_SECONDS:
            self._bar.start()
            self._shown = True

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._bar.stop()
