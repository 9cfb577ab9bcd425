"""The provider ``text``: a corpus of text files as numbered samples."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from psyche_lightning.data.corpus import DEFAULT_PATTERNS, read_corpus
from psyche_lightning.data.named import ALL
from psyche_lightning.data.options import strings, whole
from psyche_lightning.data.order import ONCE, Order, Repeated, make_order, psyche_seed
from psyche_lightning.data.packed import PackedData
from psyche_lightning.data.tokenizer import BYTES, Encoder, Tokens
from psyche_lightning.errors import ConfigError, counted

logger = logging.getLogger(__name__)

DEFAULT_VALIDATION_FRACTION = 0.01


class TextData(PackedData):
    """Local text or source files as samples of ``seq_len`` tokens.

    The tokens of all files, in the order of the files and with an end-of-text id after each, are cut into blocks of
    ``seq_len``. An incomplete last block is dropped. Blocks spread evenly over the corpus are held out for validation.
    Training sample i is block ``order[i mod n]`` of the other n, where ``order`` sorts them by the first n 64-bit words
    of the Philox 4x64 generator with the seed as key and the number of the pass, ``i // n``, in the upper half of its
    counter. So it depends only on the seed, n and the pass (numpy guarantees the words of its bit generators, but not
    the results of its shuffles).

    Args:
        seed: the run's seed; shuffles the training samples.
        seq_len: tokens of a sample, at least 2.
        path: a file, a folder, a list of these, or ``"stdlib"`` for the running Python's own sources (``"./stdlib"`` is
            a folder of that name).
        glob: pattern or patterns for the files of folders; see :func:`psyche_lightning.data.corpus.read_corpus`. None
            for the common suffixes of text and source files.
        split: the split of the files in folders, by the names of files and folders (``train.txt``, ``test/a.md``).
        tokenizer: ``"bytes"`` (ids 0 to 255), or the path of a Hugging Face tokenizer.
        bos: whether each file begins with the tokenizer's beginning-of-text id.
        validation_fraction: fraction of the blocks to hold out, 0 <= fraction < 1 (at least one block unless it is 0);
            0.01 if neither this nor ``validation_samples`` is given, but never the only block.
        validation_samples: number of blocks to hold out, instead of a fraction.
        shuffle: true for an order by the run's seed, another one in each pass; ``"once"`` for the same in each pass;
            false for that of the corpus; or the 32 numbers of one of Psyche's seeds.
        max_bytes: the most bytes of the corpus to read; None for all.

    Attributes:
        seq_len: tokens of a sample.
        vocab_size: number of token ids.
        fingerprint: SHA-256 of all tokens, in hex, which differs between nodes with different corpora.
        files: number of files in the corpus.
        skipped: files in folders that are not text, in order.

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
        split: str = ALL,
        tokenizer: str = BYTES,
        bos: bool = False,
        validation_fraction: float | None = None,
        validation_samples: int | None = None,
        shuffle: Any = True,
        max_bytes: int | None = None,
    ) -> None:
        psyche_seed(shuffle)
        paths = strings("path", path)
        patterns = DEFAULT_PATTERNS if glob is None else strings("glob", glob)
        whole("seq_len", seq_len, least=2)
        encoder = Encoder(tokenizer, bos=bos)  # first, so that a wrong path fails at once
        most = None if max_bytes is None else whole("max_bytes", max_bytes, least=1)
        corpus = read_corpus(paths, patterns, most, split)
        self.files = len(corpus.texts)
        self.skipped = corpus.skipped
        if self.skipped:
            logger.warning("%s left out, not text, such as %s", counted(len(self.skipped), "file"), self.skipped[0])
        blocks = _MemoryBlocks(encoder.encode_all(corpus.texts), seq_len)
        super().__init__(
            blocks,
            seq_len=seq_len,
            vocab_size=encoder.vocab_size,
            order=partial(_order, shuffle=shuffle, seed=seed),
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

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Do nothing: all blocks are in memory."""


def _order(length: int, *, shuffle: object, seed: int) -> Order:
    if shuffle is not True and shuffle != ONCE:
        return make_order(length, shuffle=shuffle, seed=seed)
    order = _Sorted(length, seed)
    return order if shuffle is True else Repeated(order)


class _Sorted:
    """The order by Philox words; keeps the table of the last pass."""

    def __init__(self, length: int, seed: int) -> None:
        self._length = length
        self._seed = seed
        self._made: tuple[int, npt.NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def __call__(self, ids: npt.NDArray[np.int64], epoch: int = 0) -> npt.NDArray[np.int64]:
        made, table = self._made
        if made != epoch:
            words = np.random.Philox(key=self._seed % (1 << 128), counter=(epoch % (1 << 128)) << 128).random_raw(
                self._length
            )
            table = np.argsort(words, kind="stable")
            self._made = epoch, table
        return table[ids]


def _held_out(blocks: int, fraction: float | None, samples: int | None) -> int:
    """The number of blocks for validation."""
    if samples is not None:
        if fraction is not None:
            raise ConfigError("Both validation_fraction and validation_samples are set; expected one of them.")
        return whole("validation_samples", samples, least=0)
    if fraction is None:
        return min(max(1, round(DEFAULT_VALIDATION_FRACTION * blocks)), max(0, blocks - 1))
    if type(fraction) not in (int, float) or not 0 <= fraction < 1:
        raise ConfigError(f"validation_fraction is {fraction!r}, expected a fraction of at least 0 and less than 1.")
    return max(1, round(fraction * blocks)) if fraction else 0
