"""Divides a round's samples among its clients, by the round's seed and the clients' weights.

With equal weights the shares are those of Psyche's data_selection.rs.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

from psyche_lightning.protocol.committee import CommitteeSelection

_T = TypeVar("_T")
_MULTIPLIER = 6364136223846793005
_INCREMENT = 1442695040888963407
_MASK = (1 << 64) - 1


class Lcg:
    """Knuth's 64-bit linear congruential generator; the output is the state itself."""

    def __init__(self, seed: int) -> None:
        self._state = seed & _MASK

    def next(self) -> int:
        """The next u64."""
        self._state = (self._state * _MULTIPLIER + _INCREMENT) & _MASK
        return self._state


def shuffle(items: Iterable[_T], seed: int) -> list[_T]:
    """Fisher-Yates from the top, driven by :class:`Lcg`."""
    out = list(items)
    generator = Lcg(seed)
    for i in range(len(out) - 1, 0, -1):
        j = generator.next() % (i + 1)
        out[i], out[j] = out[j], out[i]
    return out


def divide(total: int, weights: Sequence[int]) -> list[int]:
    """Divide samples among places of different speed, so that the last one is done as early as possible.

    The next sample goes to the place that would be done with it first, the first one of several. So equal weights give
    parts of nearly equal size, the larger ones first, and a place that is too slow for a whole sample gets none.

    Args:
        total: samples.
        weights: the places' speeds, whole numbers from 1 in any common unit.

    Returns:
        The samples of each place.
    """
    whole, unit = sum(weights), math.lcm(*weights)
    steps = [unit // weight for weight in weights]  # how long a place takes for a sample
    sizes = [total * weight // whole for weight in weights]  # these are done before all are, in any case
    ends = [((size + 1) * step, place) for place, (size, step) in enumerate(zip(sizes, steps, strict=True))]
    heapq.heapify(ends)
    for _ in range(total - sum(sizes)):
        end, place = ends[0]
        sizes[place] += 1
        heapq.heapreplace(ends, (end + steps[place], place))
    return sizes


def assign(
    seed: int, data_index: int, batch_size: int, selection: CommitteeSelection, weights: Sequence[int] = ()
) -> list[tuple[int, int, int]]:
    """Divide a round's samples among its trainers.

    Args:
        seed: the round's u64 seed.
        data_index: the round's first data id.
        batch_size: samples of the round.
        selection: the round's committees.
        weights: how fast each client of the round is, as of :class:`~psyche_lightning.protocol.state.Round`; empty for
            equal shares.

    Returns:
        ``(client index, start, stop)`` of each non-empty share, ascending by data id; ``stop`` is the first id after
        it. Together the shares cover ``data_index`` to ``data_index + batch_size - 1`` without gap or overlap.
    """
    trainers = shuffle(selection.trainers(), seed)
    if not trainers:
        return []
    shares = []
    start = data_index
    sizes = divide(batch_size, [weights[client] for client in trainers] if weights else [1] * len(trainers))
    for client, size in zip(trainers, sizes, strict=True):
        if size:
            shares.append((client, start, start + size))
        start += size
    return shares
