"""The sample for each data id: the same on every node, for data of any size."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from psyche_lightning.data.shuffle import MAX_TABLE, psyche_shuffle
from psyche_lightning.errors import ConfigError
from psyche_lightning.wire.canonical import sha256

ROUNDS = 4
SEED_SIZE = 32

ONCE = "once"
"""The ``shuffle`` that repeats the order of the first pass."""


class Order(Protocol):
    """Maps ids below a length to places below it, one to one, for each pass over the data."""

    def __call__(self, ids: NDArray[np.int64], epoch: int = 0) -> NDArray[np.int64]:
        """The places of these ids in the pass ``epoch``, from 0."""
        ...


def in_passes(order: Order, length: int, start: int, stop: int) -> list[int]:
    """The places of the ids from ``start`` up to, but not including, ``stop``; after ``length`` ids a pass follows."""
    found: list[int] = []
    while start < stop:
        epoch, first = divmod(start, length)
        end = min(length, first + stop - start)
        found += order(np.arange(first, end, dtype=np.int64), epoch).tolist()
        start += end - first
    return found


class DataOrder:
    """Maps data ids to indices of samples.

    Ids wrap around at the end of the data. With ``shuffle``, each pass over the data has its own permutation: a Feistel
    network on the smallest even number of bits that holds all indices, repeated until the result is in range.

    Args:
        length: samples of the data.
        shuffle: whether to permute.
        seed: the run's seed.
    """

    def __init__(self, length: int, shuffle: bool, seed: int) -> None:
        self.length = length
        self.shuffle = shuffle
        self._seed = seed
        self._half = max(1, ((length - 1).bit_length() + 1) // 2)

    def indices(self, start: int, stop: int) -> list[int]:
        """The indices of the ids from ``start`` up to, but not including, ``stop``."""
        return in_passes(self, self.length, start, stop)

    def __call__(self, ids: NDArray[np.int64], epoch: int = 0) -> NDArray[np.int64]:
        """The indices of ids below the length in the pass ``epoch``, as an :class:`Order`."""
        return self._permuted(ids.astype(np.uint64), epoch).astype(np.int64) if self.shuffle else ids

    def _permuted(self, places: NDArray[np.uint64], epoch: int) -> NDArray[np.uint64]:
        key = sha256(
            b"psyche data order\0", self._seed.to_bytes(8, "little"), (epoch % (1 << 64)).to_bytes(8, "little")
        )
        keys = np.frombuffer(key, "<u8")  # one for each round of the network
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
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014): each bit of the result depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


class Table:
    """An order in the form of a table, the same in each pass.

    Args:
        table: the place of each id.
    """

    def __init__(self, table: NDArray[Any]) -> None:
        self._table = table

    def __call__(self, ids: NDArray[np.int64], epoch: int = 0) -> NDArray[np.int64]:
        """The places of these ids."""
        return self._table[ids].astype(np.int64)


class Repeated:
    """The first pass of an order, in each pass.

    Args:
        order: the order.
    """

    def __init__(self, order: Order) -> None:
        self._order = order

    def __call__(self, ids: NDArray[np.int64], epoch: int = 0) -> NDArray[np.int64]:
        """The places of these ids in the first pass."""
        return self._order(ids)


def psyche_seed(shuffle: object) -> bytes | None:
    """The 32 bytes of ``shuffle``, if it is one of Psyche's seeds as 32 numbers; None if it is true, false or ``once``.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(shuffle, bool) or shuffle == ONCE:
        return None
    numbers = list(shuffle) if isinstance(shuffle, (list, tuple)) else []
    if len(numbers) == SEED_SIZE and all(type(value) is int and 0 <= value < 256 for value in numbers):
        return bytes(numbers)
    raise ConfigError(
        f"shuffle is {shuffle!r}, expected true (an order by the run's seed, another one in each pass), {ONCE!r} (the "
        f"same in each pass), false, or a seed of Psyche's shuffle: a list of {SEED_SIZE} numbers from 0 to 255."
    )


def make_order(length: int, *, shuffle: object, seed: int) -> Order:
    """The order of ``length`` samples.

    Args:
        length: number of samples.
        shuffle: true for a permutation that needs no memory, another one in each pass; ``once`` for the first of them
            in each pass; false for no permutation; 32 numbers for Psyche's permutation (data_shuffle.rs), the same in
            each pass, a table of four bytes per sample.
        seed: the run's seed, used if ``shuffle`` is true.

    Raises:
        ConfigError: ``shuffle`` is wrong, or the table would be too large.
    """
    key = psyche_seed(shuffle)
    if key is None:
        order = DataOrder(length, bool(shuffle), seed % (1 << 64))
        return Repeated(order) if shuffle == ONCE else order
    check_table(length)
    return Table(psyche_shuffle(length, key))


def check_table(length: int) -> None:
    """Refuse a table for too many samples.

    Raises:
        ConfigError: there are more than :data:`~psyche_lightning.data.shuffle.MAX_TABLE`.
    """
    if length > MAX_TABLE:
        raise ConfigError(
            f"Psyche's orders are tables of at most {MAX_TABLE:,} samples, and there are {length:,}. Use token files "
            "with shuffle: true, which needs no memory, or with false."
        )
