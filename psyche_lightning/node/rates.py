"""Learning rates of results: which ones a result may have, and which one of them is agreed. No I/O or clock."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from psyche_lightning.errors import WireError, counted
from psyche_lightning.protocol.state import RunState

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
        shares: the factor of each group on the planned rate; empty for 1.
        cold_start: steps over which all rates rise from 0 in the epoch after a pause, as in Psyche; 0 for none.
        cold_from: first step of such an epoch; None in other epochs.
    """

    groups: int = 1
    planned: Callable[[int], float] | None = None
    shares: tuple[float, ...] = ()
    cold_start: int = 0
    cold_from: int | None = None

    def of_epoch(self, state: RunState) -> Rates:
        """The rates of the epoch of a state: the coordinator's record says whether it follows a pause."""
        return replace(self, cold_from=state.start_step if state.cold_start_epoch and self.cold_start else None)

    def factor(self, step: int) -> float:
        """The factor on all rates of a step: less than 1 while they rise after a pause."""
        return 1.0 if self.cold_from is None else min(1.0, (step - self.cold_from) / self.cold_start)

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
        planned = self.planned(step) * self.factor(step)
        for rate, share in zip(map(_value, lrs), self.shares or (1.0,) * self.groups, strict=True):
            due = planned * share
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
