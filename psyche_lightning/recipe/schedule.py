"""Psyche's learning-rate schedules as pure functions of the run's step, so a node that joins late has the same rate.

Steps count from 1, like the coordinator's rounds. Every schedule warms up linearly while ``step < warmup_steps``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from psyche_lightning.errors import ConfigError, counted


@dataclass(frozen=True)
class Constant:
    """The base rate, after the warm-up.

    Attributes:
        base_lr: the rate after the warm-up.
        warmup_steps: length of the linear warm-up; 0 for none.
        warmup_init_lr: the rate at which the warm-up begins.
    """

    base_lr: float
    warmup_steps: int = 0
    warmup_init_lr: float = 0.0

    def __call__(self, step: int) -> float:
        """The learning rate of ``step``."""
        if step < self.warmup_steps:
            return self.warmup_init_lr + (self.base_lr - self.warmup_init_lr) * step / self.warmup_steps
        return self._after_warmup(step - self.warmup_steps)

    def _after_warmup(self, step: int) -> float:
        """The rate ``step`` steps after the warm-up."""
        return self.base_lr


@dataclass(frozen=True)
class Linear(Constant):
    """A straight line from the base rate to ``final_lr`` at ``total_steps``, where the rate stays.

    Attributes:
        total_steps: the step at which the final rate is reached, warm-up included.
        final_lr: the last rate.
    """

    total_steps: int = 1
    final_lr: float = 0.0

    def __post_init__(self) -> None:
        if self.total_steps <= self.warmup_steps:
            raise ConfigError(
                f"A schedule of {counted(self.total_steps, 'step')} has no steps left after a warm-up of "
                f"{self.warmup_steps}. Lower optimizer.schedule.warmup_steps, or train more steps."
            )

    def _after_warmup(self, step: int) -> float:
        fraction = min(step / (self.total_steps - self.warmup_steps), 1.0)
        return self.base_lr + (self.final_lr - self.base_lr) * fraction


@dataclass(frozen=True)
class Cosine(Linear):
    """Half a cosine from the base rate to ``final_lr`` at ``total_steps``; not clamped after it, as in Psyche."""

    def _after_warmup(self, step: int) -> float:
        fraction = step / (self.total_steps - self.warmup_steps)
        return _half_cosine(self.base_lr, self.final_lr, fraction)


@dataclass(frozen=True)
class WarmupStableDecay(Constant):
    """The base rate for a while, then half a cosine, then a straight line, at whose end the rate stays.

    Attributes:
        stable_steps: steps at the base rate.
        cosine_decay_steps: length of the cosine.
        cosine_decay_final_lr: rate at the end of the cosine.
        linear_decay_steps: length of the line.
        linear_decay_final_lr: rate at the end of the line.
    """

    stable_steps: int = 0
    cosine_decay_steps: int = 0
    cosine_decay_final_lr: float = 0.0
    linear_decay_steps: int = 0
    linear_decay_final_lr: float = 0.0

    def __post_init__(self) -> None:
        if not self.linear_decay_final_lr <= self.cosine_decay_final_lr <= self.base_lr:
            raise ConfigError(
                "A schedule 'wsd' must not rise: linear_decay_final_lr <= cosine_decay_final_lr <= lr, not "
                f"{self.linear_decay_final_lr} <= {self.cosine_decay_final_lr} <= {self.base_lr}."
            )

    def _after_warmup(self, step: int) -> float:
        if step < self.stable_steps:
            return self.base_lr
        step -= self.stable_steps
        if step < self.cosine_decay_steps:
            return _half_cosine(self.base_lr, self.cosine_decay_final_lr, step / self.cosine_decay_steps)
        step -= self.cosine_decay_steps
        if step < self.linear_decay_steps:
            fraction = step / self.linear_decay_steps
            return self.cosine_decay_final_lr + (self.linear_decay_final_lr - self.cosine_decay_final_lr) * fraction
        return self.linear_decay_final_lr


Schedule = Constant
"""The type of all schedules: a call with a step returns the rate."""
KINDS: dict[str, type[Schedule]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "wsd": WarmupStableDecay,
}
"""The schedules by their names in a recipe and in a run's manifest."""


def _half_cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * fraction))
