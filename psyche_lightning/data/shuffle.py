"""Psyche's orders of samples, bit for bit (its data_shuffle.rs): ChaCha8, shuffles, weighted index."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

MAX_TABLE = 1 << 28
"""The most samples of a table, which is a gigabyte of u32."""
_BLOCKS = 1 << 12
_AT_ONCE = 1 << 16
_WORD = 1 << 32


class ChaCha8:
    """The generator's u32 outputs in order: 64-bit block counter from 0, stream 0 (the layout of ``rand_chacha``).

    Args:
        seed: 32 bytes, the key.
    """

    def __init__(self, seed: bytes) -> None:
        self._key = np.frombuffer(seed, "<u4").astype(np.uint32)
        if len(self._key) != 8:
            raise ValueError(f"the seed has {len(seed)} bytes, expected 32")
        self._counter = 0
        self._words: Words = np.empty(0, np.uint32)
        self._place = 0

    def u32(self) -> int:
        """The next word."""
        return int(self.words(1)[0])

    def words(self, count: int) -> Words:
        """The next ``count`` words."""
        while len(self._words) - self._place < count:
            left = self._words[self._place :]
            self._words, self._place = np.concatenate([left, self._more()]), 0
        found = self._words[self._place : self._place + count]
        self._place += count
        return found

    def back(self, count: int) -> None:
        """Put back the last ``count`` words of :meth:`words`."""
        self._place -= count

    def below(self, bound: int) -> int:
        """A number from 0 to ``bound - 1``: the high half of ``u32 * bound``, with a bias correction (rand 0.9)."""
        high, low = divmod(self.u32() * bound, _WORD)
        if low > _WORD - bound:
            high += (low + (self.u32() * bound >> 32)) >> 32
        return high

    def _more(self) -> Words:
        """The words of the next blocks, computed all at once."""
        counter = np.arange(self._counter, self._counter + _BLOCKS, dtype=np.uint64)
        self._counter += _BLOCKS
        start = np.empty((16, _BLOCKS), np.uint32)
        start[:4] = np.frombuffer(b"expand 32-byte k", "<u4")[:, None]
        start[4:12] = self._key[:, None]
        start[12] = (counter & np.uint64(_WORD - 1)).astype(np.uint32)
        start[13] = (counter >> np.uint64(32)).astype(np.uint32)
        start[14:] = 0
        x = list(start.copy())
        for _ in range(4):  # eight rounds: first columns, then diagonals
            for a in range(4):
                _quarter(x, a, 4 + a, 8 + a, 12 + a)
            for a in range(4):
                _quarter(x, a, 4 + (a + 1) % 4, 8 + (a + 2) % 4, 12 + (a + 3) % 4)
        words: Words = (np.stack(x) + start).T.reshape(-1)
        return words


def _quarter(x: list[Words], a: int, b: int, c: int, d: int) -> None:
    for left, right, out, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        x[left] = x[left] + x[right]
        mixed = x[out] ^ x[left]
        x[out] = (mixed << np.uint32(turn)) | (mixed >> np.uint32(32 - turn))


def _swaps(length: int, generator: ChaCha8) -> Iterator[int]:
    """For each i the place to swap it with: rand 0.9's "increasing uniform", which draws several places at once."""
    n, chunk, left = 0, 0, 1
    while n < length:
        m = n + 1
        if left == 0:
            if m * (m + 1) >= _WORD:
                break
            bound, c = m, m + 1
            while bound * c < _WORD:
                bound, c = bound * c, c + 1
            chunk, left = generator.below(bound), c - m
        left -= 1
        if left:
            chunk, j = divmod(chunk, m)
            yield j
        else:
            yield chunk
        n = m
    yield from _draws(generator, range(n + 1, length + 1))


def _draws(generator: ChaCha8, bounds: range) -> Iterator[int]:
    """``generator.below`` for each bound. Nearly all take one word, so many are computed at once."""
    place = 0
    while place < len(bounds):
        expected = max(64, _WORD // bounds[place])  # expected draws before one takes a second word
        part = bounds[place : place + min(_AT_ONCE, expected)]
        many = np.arange(part.start, part.stop, part.step, dtype=np.int64).astype(np.uint64)
        words = generator.words(len(many)).astype(np.uint64)
        products = words * many
        second = np.flatnonzero((products & np.uint64(_WORD - 1)) > np.uint64(_WORD) - many)
        used = int(second[0]) if len(second) else len(many)
        yield from (products[:used] >> np.uint64(32)).tolist()
        generator.back(len(many) - used)
        place += used
        if used < len(many):
            yield generator.below(bounds[place])
            place += 1


def psyche_shuffle(length: int, seed: bytes) -> NDArray[np.uint32]:
    """The permutation of ``range(length)`` by Psyche's seeded shuffle.

    Args:
        length: at most :data:`MAX_TABLE`; a million takes a fraction of a second.
        seed: 32 bytes.
    """
    out = array("I", bytes(4 * length))
    for i, j in enumerate(_swaps(length, ChaCha8(seed))):
        out[i] = out[j]
        out[j] = i
    return np.frombuffer(out, np.uint32)


def shuffle_from_top(length: int, seed: bytes) -> NDArray[np.uint32]:
    """The permutation by which Psyche shuffles a weighted index: Fisher-Yates from the last place."""
    out = array("I", range(length))
    bounds = range(length, 1, -1)
    for bound, j in zip(bounds, _draws(ChaCha8(seed), bounds), strict=True):
        out[bound - 1], out[j] = out[j], out[bound - 1]
    return np.frombuffer(out, np.uint32)


def weighted_order(weights: Sequence[float], sizes: Sequence[int]) -> tuple[NDArray[np.uint16], NDArray[np.uint32]]:
    """The sample of a source at each place of a weighted mix.

    At place s, the source with the largest ``weight * max(s, 1) - drawn`` gives its next sample; the first one wins a
    tie. A source starts again at its end, and empty sources give no samples.

    Args:
        weights: weights of the sources; only their ratios count.
        sizes: samples of the sources; the mix is as long as their sum.

    Returns:
        The source and its sample for each place.
    """
    total, norm = sum(sizes), sum(weights)
    shares = [weight / norm for weight in weights]
    drawn = [0] * len(sizes)
    usable = [source for source, size in enumerate(sizes) if size]
    sources, samples = array("H", bytes(2 * total)), array("I", bytes(4 * total))
    for place in range(total):
        step = place or 1
        best, most = usable[0], shares[usable[0]] * step - drawn[usable[0]]
        for source in usable[1:]:
            wanted = shares[source] * step - drawn[source]
            if wanted > most:
                best, most = source, wanted
        sources[place], samples[place] = best, drawn[best] % sizes[best]
        drawn[best] += 1
    return np.frombuffer(sources, np.uint16), np.frombuffer(samples, np.uint32)
