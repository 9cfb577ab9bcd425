"""The provider ``text``: a corpus of text files as numbered samples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from psyche_lightning.data.corpus import DEFAULT_PATTERNS, read_corpus
from psyche_lightning.data.options import strings, whole
from psyche_lightning.data.order import Order, Table
from psyche_lightning.data.packed import PackedData
from psyche_lightning.data.tokenizer import BYTES, Encoder, Tokens
from psyche_lightning.errors import ConfigError

DEFAULT_VALIDATION_FRACTION = 0.01


class TextData(PackedData):
    """Local text or source files as samples of ``seq_len`` tokens.

    The files' tokens, in the order of the files and with an end-of-text id after each, are cut into blocks of
    ``seq_len``; an incomplete last block is dropped. Blocks spread evenly over the corpus are held out for validation.
    Training sample i is block ``order[i mod n]`` of the other n, where ``order`` sorts them by the first n 64-bit words
    of the Philox 4x64 generator with the seed as key: it depends on nothing but the seed and n (numpy guarantees
    the words of its bit generators, not what its shuffles make of them).

    Args:
        seed: the run's; shuffles the training samples.
        seq_len: tokens of a sample, at least 2.
        path: a file, a folder, a list of these, or ``"stdlib"`` for the running Python's own sources (``"./stdlib"`` is
            a folder of that name).
        glob: pattern or patterns for the files of folders; see :func:`psyche_lightning.data.corpus.read_corpus`. None
            for the common suffixes of text and source files.
        tokenizer: ``"bytes"`` (ids 0 to 255), or the path of a Hugging Face tokenizer.
        validation_fraction: share of the blocks that is held out, 0 <= share < 1 (at least one block unless it is 0);
            0.01 when neither this nor ``validation_samples`` is given.
        validation_samples: how many blocks are held out, instead of a share.
        max_bytes: read no more than the first so many bytes of the corpus; None for all.

    Attributes:
        seq_len: tokens of a sample.
        vocab_size: number of token ids.
        fingerprint: SHA-256 of all tokens, in hex: nodes whose corpora differ have different ones.
        files: how many files the corpus has.
        skipped: files of folders that are not text, in order.

    Raises:
        ConfigError: an argument is wrong, or there is not enough text.
    """

    def __init__(
        self,
        seed: int,
        seq_len: int,
        *,
        path: str | Sequence[str],
        glob: str | Sequence[str] | None = None,
        tokenizer: str = BYTES,
        validation_fraction: float | None = None,
        validation_samples: int | None = None,
        max_bytes: int | None = None,
    ) -> None:
        paths = strings("path", path)
        patterns = DEFAULT_PATTERNS if glob is None else strings("glob", glob)
        whole("seq_len", seq_len, least=2)
        encoder = Encoder(tokenizer)  # before the corpus is read, so that a wrong path is noticed at once
        corpus = read_corpus(paths, patterns, None if max_bytes is None else whole("max_bytes", max_bytes, least=1))
        self.files = len(corpus.texts)
        self.skipped = corpus.skipped
        blocks = _MemoryBlocks(encoder.encode_all(corpus.texts), seq_len)
        super().__init__(
            blocks,
            seq_len=seq_len,
            vocab_size=encoder.vocab_size,
            order=lambda length: _order(length, seed),
            encoder=encoder,
            validation_samples=_held_out(blocks.count, validation_fraction, validation_samples),
            source=", ".join(paths),
        )


class _MemoryBlocks:
    """Blocks of tokens in memory."""

    def __init__(self, tokens: Tokens, seq_len: int) -> None:
        self.count = len(tokens) // seq_len
        little_endian = tokens.astype(tokens.dtype.newbyteorder("<"), copy=False)
        self.fingerprint = hashlib.sha256(little_endian.view(np.uint8).data).hexdigest()
        self._blocks = tokens[: self.count * seq_len].reshape(self.count, seq_len)

    def read(self, numbers: Sequence[int]) -> list[npt.NDArray[Any]]:
        return list(self._blocks[numbers])

    def ahead(self, numbers: Sequence[int]) -> None:
        """Nothing: all is here."""


def _order(length: int, seed: int) -> Order:
    words = np.random.Philox(key=seed % (1 << 128)).random_raw(length)
    return Table(np.argsort(words, kind="stable"))


def _held_out(blocks: int, fraction: float | None, samples: int | None) -> int:
    """How many of the blocks are for validation."""
    if samples is not None:
        if fraction is not None:
            raise ConfigError("Both validation_fraction and validation_samples are set; expected one of them.")
        return whole("validation_samples", samples, least=0)
    if fraction is None:
        fraction = DEFAULT_VALIDATION_FRACTION
    if type(fraction) not in (int, float) or not 0 <= fraction < 1:
        raise ConfigError(f"validation_fraction is {fraction!r}, expected a share of at least 0 and less than 1.")
    return max(1, round(fraction * blocks)) if fraction else 0
