"""Figures of a step for people: sizes of gradients and delta, and how far a node's votes agree with the others'."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from psyche_lightning.distro.votes import Votes

SPAN = 4096  # chunks looked at together


def norms(values: Sequence[float], owners: Sequence[int], groups: int) -> list[float]:
    """The norm of each parameter group, from the norms of parameters and the group of each."""
    sums = [0.0] * groups
    for value, owner in zip(values, owners, strict=True):
        sums[owner] += value * value
    return [math.sqrt(value) for value in sums]


def agreement(
    own: bytes,
    payloads: Sequence[bytes],
    decode: Callable[[bytes, int, int], Votes],
    owners: NDArray[np.int64],
    groups: int,
    area: int,
) -> list[float]:
    """The share of a node's votes with the sign of the sum of the others' votes on the same coefficient, by group.

    0.5 is what nodes that have nothing in common would have. Votes on coefficients on which the others' are no
    majority do not count.

    Args:
        own: the node's payload, one of ``payloads``.
        payloads: the agreed ones.
        decode: gives the votes of a payload for the chunks from one number to another.
        owners: the parameter group of each chunk.
        groups: number of parameter groups.
        area: coefficients of a chunk.

    Returns:
        A share for each group, from 0 to 1; NaN where no vote counts.
    """
    same, counted = np.zeros(groups), np.zeros(groups)
    for first in range(0, len(owners), SPAN):
        last = min(first + SPAN, len(owners))
        rows = np.arange(last - first)[:, None]
        sums = np.zeros((last - first, area), np.int32)
        for payload in payloads:
            votes = decode(payload, first, last)
            np.add.at(sums, (rows, votes.positions), np.sign(votes.signs))
        mine = decode(own, first, last)
        signs = np.sign(mine.signs)
        others = np.sign(sums[rows, mine.positions] - signs)
        counts = (others != 0) & (signs != 0)
        for group in range(groups):
            here = counts & (owners[first:last] == group)[:, None]
            counted[group] += here.sum()
            same[group] += (here & (others == signs)).sum()
    return [float(s / c) if c else math.nan for s, c in zip(same, counted, strict=True)]
