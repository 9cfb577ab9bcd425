"""The data provider: a corpus of text files as numbered samples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from psyche_lightning.errors import ConfigError
from psyche_lightning_text.files import DEFAULT_PATTERNS, read_corpus
from psyche_lightning_text.tokens import (
    BYTE_VOCABULARY,
    BYTES,
    byte_tokenizer,
    encode_bytes,
    encode_texts,
    load_tokenizer,
)

DEFAULT_VALIDATION_FRACTION = 0.01


class TextData:
    """Local text or source files as samples of ``seq_len`` tokens.

    The files' tokens, in the order of the files and with an end-of-text id after each, are cut into blocks of
    ``seq_len``; an incomplete last block is dropped. Blocks spread evenly over the corpus are held out for validation.
    Training sample i is block ``order[i mod n]`` of the other n, where ``order`` sorts them by the first n 64-bit words
    of the Philox 4x64 generator with the seed as key: it depends on nothing but the seed and n (numpy guarantees
    the words of its bit generators, not what its shuffles make of them).

    Args:
        path: a file, a folder, a list of these, or ``"stdlib"`` for the running Python's own sources (``"./stdlib"`` is
            a folder of that name).
        seq_len: tokens of a sample, at least 2.
        seed: shuffles the training samples.
        glob: pattern or patterns for the files of folders; see :func:`psyche_lightning_text.files.find_files`. None
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
        path: str | Sequence[str],
        seq_len: int,
        *,
        seed: int,
        glob: str | Sequence[str] | None = None,
        tokenizer: str = BYTES,
        validation_fraction: float | None = None,
        validation_samples: int | None = None,
        max_bytes: int | None = None,
    ) -> None:
        paths = _strings("path", path)
        patterns = DEFAULT_PATTERNS if glob is None else _strings("glob", glob)
        self.seq_len = _whole("seq_len", seq_len, least=2)
        if not isinstance(tokenizer, str):
            raise ConfigError(f"tokenizer is {tokenizer!r}, expected {BYTES!r} or the path of a tokenizer.")

        # Before the corpus is read, so that a wrong path is noticed at once.
        self._loaded = None if tokenizer == BYTES else load_tokenizer(tokenizer)
        self.vocab_size: int = BYTE_VOCABULARY if self._loaded is None else len(self._loaded)

        corpus = read_corpus(paths, patterns, None if max_bytes is None else _whole("max_bytes", max_bytes, least=1))
        texts, self.skipped = corpus.texts, corpus.skipped
        self.files = len(texts)
        self._tokens = encode_bytes(texts) if self._loaded is None else encode_texts(self._loaded, texts)
        little_endian = self._tokens.astype(self._tokens.dtype.newbyteorder("<"), copy=False)
        self.fingerprint = hashlib.sha256(little_endian.view(np.uint8).data).hexdigest()

        blocks = len(self._tokens) // self.seq_len
        held_out = _held_out(blocks, validation_fraction, validation_samples)
        if blocks - held_out < 1:
            raise ConfigError(
                f"There is too little text in {', '.join(paths)}: {len(self._tokens)} tokens make {blocks} samples of "
                f"seq_len={self.seq_len}, of which {held_out} are for validation; expected at least one more for "
                "training. Add text, or choose a smaller seq_len or validation split."
            )
        # The middles of as many equal stretches: distinct, because a stretch has at least one block.
        self._validation = (2 * np.arange(held_out) + 1) * blocks // (2 * held_out or 1)
        training = np.delete(np.arange(blocks), self._validation)
        words = np.random.Philox(key=seed % (1 << 128)).random_raw(len(training))
        self._training: npt.NDArray[np.int64] = training[np.argsort(words, kind="stable")]

    def __len__(self) -> int:
        """How many training samples there are."""
        return len(self._training)

    def samples(self, start: int, end: int) -> list[dict[str, torch.Tensor]]:
        """The training samples with the ids ``start`` to ``end``, both included; ids wrap modulo the length.

        Returns:
            For each id ``input_ids`` and ``labels``, int64 of shape [seq_len], equal (the model shifts the labels).
        """
        return [self._block(int(self._training[index % len(self)])) for index in range(start, end + 1)]

    def validation(self) -> list[dict[str, torch.Tensor]]:
        """The held-out samples, in the order of the corpus; of the same form as those for training."""
        return [self._block(int(index)) for index in self._validation]

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer as a `transformers` object, to be saved with checkpoints."""
        return byte_tokenizer() if self._loaded is None else self._loaded

    def encode(self, text: str) -> list[int]:
        """The token ids of ``text``, without special tokens."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        text: str = self.tokenizer.decode(ids)
        return text

    def _block(self, index: int) -> dict[str, torch.Tensor]:
        block = self._tokens[index * self.seq_len : (index + 1) * self.seq_len].astype(np.int64)
        tokens = torch.from_numpy(block)
        return {"input_ids": tokens, "labels": tokens.clone()}


def _strings(name: str, value: object) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not values or not all(isinstance(x, str) and x for x in values):
        raise ConfigError(f"{name} is {value!r}, expected a string or a list of strings.")
    return list(values)


def _whole(name: str, value: object, least: int) -> int:
    if type(value) is not int or value < least:
        raise ConfigError(f"{name} is {value!r}, expected a whole number, {least} or more.")
    return value


def _held_out(blocks: int, fraction: float | None, samples: int | None) -> int:
    """How many of the blocks are for validation."""
    if samples is not None:
        if fraction is not None:
            raise ConfigError("Both validation_fraction and validation_samples are set; expected one of them.")
        return _whole("validation_samples", samples, least=0)
    if fraction is None:
        fraction = DEFAULT_VALIDATION_FRACTION
    if type(fraction) not in (int, float) or not 0 <= fraction < 1:
        raise ConfigError(f"validation_fraction is {fraction!r}, expected a share of at least 0 and less than 1.")
    return max(1, round(fraction * blocks)) if fraction else 0
