"""Sets as numbers: a vectorized combinatorial number system, and the plan that makes it short and fast.

A set of k of n positions ``q_0 < ... < q_(k-1)`` has the rank ``C(q_0, 1) + C(q_1, 2) + ... + C(q_(k-1), k)``. Each
rank below ``C(n, k)`` belongs to exactly one set. Ranks may need hundreds of bits, so they consist of limbs of 56 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import comb

import numpy as np
from numpy.typing import NDArray

LIMB = 56
"""Bits of a limb: whole bytes, and the sum of 128 limbs still fits into int64."""
_MASK = (1 << LIMB) - 1
_TOLERANCE = Fraction(1, 100)


@dataclass(frozen=True)
class Plan:
    """How the votes of chunks are cut into fields; ``docs/wire-format.md`` gives the rule.

    Attributes:
        low: low bits of each position that are sent unchanged.
        group: chunks whose ranks share one word.
        word: bits of that word.
        universe: n, the number of values of the high parts after they were made distinct.
        states: values of a chunk's digit in a word: no votes, or one of the ``C(n, k)`` sets.
    """

    low: int
    group: int
    word: int
    universe: int
    states: int

    @property
    def limbs(self) -> int:
        """Limbs of a word."""
        return -(-self.word // LIMB)


@cache
def plan(area: int, k: int) -> Plan:
    """The plan with the most low bits that is at most 1 % longer than the shortest; a shared word fits one limb."""
    best: list[tuple[Fraction, Plan]] = []
    for low in range(area.bit_length() - 1):
        universe = (area >> low) + (k - 1 if low else 0)
        states = comb(universe, k) + 1
        options = []
        for group in range(1, 9):
            word = (states**group - 1).bit_length()
            if group == 1 or word <= LIMB:
                options.append((Fraction(word, group) + k * low + k, Plan(low, group, word, universe, states)))
        best.append(min(options, key=lambda option: option[0]))
    allowed = min(cost for cost, _ in best) * (1 + _TOLERANCE)
    return [option for cost, option in best if cost <= allowed][-1]


class Ranks:
    """Converts between k-subsets of ``range(universe)`` and their ranks.

    Args:
        universe: n.
        k: size of the sets, at most 128.
        limbs: limbs of a rank, the most significant first.
    """

    def __init__(self, universe: int, k: int, limbs: int) -> None:
        self.k, self.limbs = k, limbs
        self.tables, self.guesses = [], []
        for size in range(1, k + 1):
            values = [comb(position, size) for position in range(universe + 1)]  # one more than needed, for guesses
            self.tables.append(to_limbs(values, -(-values[-1].bit_length() // LIMB)))  # C(q, size) for all q
            self.guesses.append(_Guess(values, size))

    def rank(self, sets: NDArray[np.integer]) -> NDArray[np.int64]:
        """Ranks, [limbs, count], of sets, [k, count], which are in ascending order."""
        total = np.zeros((self.limbs, sets.shape[1]), np.int64)
        for table, chosen in zip(self.tables, sets, strict=True):
            for limb, column in zip(total[self.limbs - len(table) :], table, strict=True):
                limb += column[chosen]
        return carry(total)

    def unrank(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sets, [k, count], of ranks below ``C(universe, k)``, [limbs, count]; undoes :meth:`rank`."""
        sets = np.empty((self.k, ranks.shape[1]), np.int64)
        rest = ranks
        for size in reversed(range(self.k)):
            table = self.tables[size]
            rest = rest[len(rest) - len(table) :]  # below the last binomial, so the higher limbs are zero
            found = self.guesses[size].find(rest)
            left = carry(rest - table.take(found, axis=1))
            (high,) = (left[0] < 0).nonzero()
            if len(high):
                found[high] -= 1
                left[:, high] = carry(rest[:, high] - table[:, found[high]])
            sets[size], rest = found, left
        return sets


class _Guess:
    """Finds the position of the largest binomial that is not above a rank, or the next position.

    It looks at exponent and leading bits. Neighbours ``C(q, size)`` and ``C(q + 1, size)`` differ by more than one part
    in q / size, so a few leading bits distinguish all but neighbours.
    """

    def __init__(self, values: list[int], size: int) -> None:
        self.drop = 52 - (len(values) // size).bit_length()  # bits of float64's mantissa that do not matter
        ends = np.array(values, np.float64)
        self.first, last = (np.array([0.5, ends[-1]]).view(np.int64) >> self.drop).tolist()
        tops = (np.arange(self.first, last + 2) + 1 << self.drop).view(np.float64)
        self.positions = np.searchsorted(ends, tops, side="left") - 1

    def find(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Guesses for ranks, [limbs, count]."""
        value = ranks[0].astype(np.float64)
        for limb in ranks[1:]:
            value *= 2.0**LIMB
            value += limb
        value *= 1 + 2.0**-40  # more than the rounding error, less than neighbours differ
        keys = np.maximum(value, 0.5, out=value).view(np.int64)
        keys >>= self.drop
        keys -= self.first
        found: NDArray[np.int64] = self.positions.take(keys)
        return found


def carry(limbs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bring all limbs but the first into range, in place; a negative number keeps a negative first limb."""
    for limb in range(len(limbs) - 1, 0, -1):
        limbs[limb - 1] += limbs[limb] >> LIMB
        limbs[limb] &= _MASK
    return limbs


def to_limbs(values: list[int], limbs: int) -> NDArray[np.int64]:
    """Numbers as limbs, [limbs, count]."""
    raw = b"".join(value.to_bytes(limbs * LIMB // 8, "big") for value in values)
    return from_bytes(np.frombuffer(raw, np.uint8).reshape(len(values), -1))


def from_bytes(raw: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Big-endian bytes, [count, 7 limbs], as limbs, [limbs, count]."""
    count, size = raw.shape
    wide = np.zeros((size // 7, count, 8), np.uint8)
    wide[:, :, 1:] = raw.reshape(count, size // 7, 7).swapaxes(0, 1)
    return wide.view(">i8")[:, :, 0].astype(np.int64)


def to_bytes(limbs: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Undo :func:`from_bytes`."""
    wide = np.ascontiguousarray(limbs.T, ">i8").view(np.uint8).reshape(limbs.shape[1], -1, 8)
    return np.ascontiguousarray(wide[:, :, 1:]).reshape(limbs.shape[1], -1)
