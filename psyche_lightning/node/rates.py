"""Learning rates of results: which ones a result may have, and which one of them is agreed. No I/O or clock."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from psyche_lightning.errors import WireError, counted

INFINITE = 0x7F800000
"""From these bits on, a 32-bit float is infinite, not a number, or negative."""
TOLERANCE = 1e-3
"""Largest difference from the schedule, as a share of its rate: machines round differently."""


@dataclass(frozen=True)
class Rates:
    """The learning rates that a result may have. A result with others is refused, so it is never agreed.

    Attributes:
        groups: number of the optimizer's parameter groups.
        planned: the rate of each step, from 1, by the schedule in the run's manifest; None if there is none.
    """

    groups: int = 1
    planned: Callable[[int], float] | None = None

    def check(self, lrs: Sequence[int], step: int, who: str) -> None:
        """Refuse rates with which no node could apply a result, or that are not the schedule's.

        Args:
            lrs: fp32 bits of the rate of each parameter group.
            step: the result's.
            who: its trainer, for the message.

        Raises:
            WireError: they are refused.
        """
        if len(lrs) != self.groups:
            raise WireError(
                f"{who} announced {counted(len(lrs), 'learning rate')}; the optimizer has "
                f"{counted(self.groups, 'parameter group')}"
            )
        if any(bits >= INFINITE for bits in lrs):
            raise WireError(f"{who} announced a learning rate that is negative or not finite")
        if self.planned is None:
            return
        due = self.planned(step)
        for rate in map(_value, lrs):
            if abs(rate - due) > TOLERANCE * due:
                raise WireError(f"{who} trained step {step} with the learning rate {rate:g}; the run has {due:g}")


ONE_GROUP = Rates()
"""One parameter group, and no schedule."""


def agreed_rates(rates: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """The lower median of each parameter group's learning rate, as fp32 bits; empty without results.

    Less than half of the trainers can move it no further than to another honest trainer's rate. The bits of numbers
    that are not negative are in the order of the numbers.
    """
    columns = (sorted(column) for column in zip(*rates, strict=False))
    return tuple(column[(len(column) - 1) // 2] for column in columns)


def _value(bits: int) -> float:
    rate: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return rate
