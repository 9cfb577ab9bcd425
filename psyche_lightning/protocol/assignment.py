"""Divides a round's samples among its clients, by the round's seed (Psyche's data_selection.rs)."""

from __future__ import annotations

from collections.abc import Iterable
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


def assign(seed: int, data_index: int, batch_size: int, selection: CommitteeSelection) -> list[tuple[int, int, int]]:
    """Divide a round's samples among its trainers.

    Args:
        seed: the round's u64 seed.
        data_index: the round's first data id.
        batch_size: samples of the round.
        selection: the round's committees.

    Returns:
        ``(client index, start, stop)`` of each non-empty share, ascending by data id; ``stop`` is the first id after
        it. Together the shares cover ``data_index`` to ``data_index + batch_size - 1`` without gap or overlap.
    """
    trainers = shuffle(selection.trainers(), seed)
    if not trainers:
        return []
    base, remainder = divmod(batch_size, len(trainers))
    shares = []
    start = data_index
    for place, client in enumerate(trainers):
        size = base + (place < remainder)
        if not size:
            break
        shares.append((client, start, start + size))
        start += size
    return shares
