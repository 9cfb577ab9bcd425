"""Which sample a data id stands for: the same on every node, without a table, for data of any size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from psyche_lightning.wire.hashing import sha256

ROUNDS = 4


class DataOrder:
    """Data ids to indices of samples.

    Ids wrap around at the end of the data. With ``shuffle``, each pass over the data is a permutation of its own: a
    Feistel network on the smallest even number of bits that holds all indices, walked until it is back in range.

    Args:
        length: samples of the data.
        shuffle: whether to permute.
        seed: the run's.
    """

    def __init__(self, length: int, shuffle: bool, seed: int) -> None:
        self.length = length
        self.shuffle = shuffle
        self._seed = seed
        self._half = max(1, ((length - 1).bit_length() + 1) // 2)

    def indices(self, start: int, end: int) -> list[int]:
        """The indices of the closed interval of ids ``[start, end]``."""
        found: list[int] = []
        while start <= end:
            epoch, first = divmod(start, self.length)
            last = min(self.length - 1, first + end - start)
            places = np.arange(first, last + 1, dtype=np.uint64)
            found += (self._permuted(places, epoch) if self.shuffle else places).tolist()
            start += last - first + 1
        return found

    def _permuted(self, places: NDArray[np.uint64], epoch: int) -> NDArray[np.uint64]:
        key = sha256(b"psyche data order\0", self._seed.to_bytes(8, "little"), epoch.to_bytes(8, "little"))
        keys = np.frombuffer(key, "<u8")  # one for each round
        out: NDArray[np.uint64] = self._network(places, keys)
        while (outside := out >= self.length).any():
            out[outside] = self._network(out[outside], keys)
        return out

    def _network(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = values >> half, values & mask
        for key in keys[:ROUNDS]:
            left, right = right, left ^ (_mixed(right + key) & mask)
        joined: NDArray[np.uint64] = (left << half) | right
        return joined


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014): every bit of the result depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed
