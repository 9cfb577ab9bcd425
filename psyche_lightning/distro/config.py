"""The compression settings that all nodes of a run share."""

from __future__ import annotations

import fnmatch
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from itertools import pairwise

from psyche_lightning.errors import ConfigError

WIRE_VERSION = 2
"""First byte of every payload of signs; also part of :meth:`Layout.digest`."""

STEPS_VERSION = 3
"""The same for payloads of local steps, whose votes have magnitudes."""

MOST_STEPS = 1000
"""Local steps of a round."""
MOST_CHANGES = 100
"""Entries of a schedule."""
_CHANGED = ("k", "local_steps")


@dataclass(frozen=True)
class DistroConfig:
    """How updates are compressed: the section ``distro`` of a recipe and of a run's manifest.

    Attributes:
        chunk: side of the square chunks that are transformed: 8, 16, 32 or 64.
        k: coefficients that are sent per chunk; from 1 to a quarter of the chunk's area, and at most 128.
        decay: fraction of delta that remains before a gradient is added, 0 to 1.
        removal: fraction of the sent component that is subtracted from delta, 0 to 1.
        lookahead: whether gradients are computed ahead of the published parameters, at ``p - lr * sign(delta)``.
        k_for: another k for parameters whose names match a pattern (``{"*embed*": 2}``); the first match counts.
        float32_gradients: whether gradients of low-precision parameters are accumulated over micro-batches in float32.
            This needs their memory, but keeps small gradients that the parameters' dtype would lose.
        local_steps: steps that each node makes with its own optimizer in a round, before it sends the strongest entries
            of where they lead; at most 1000. 0 for DisTrO's form, votes on the gradients of one step.
        scale: with local steps, the factor on the mean of what nodes send, from 2^-10 to 2^10.
        schedule: other values of ``k`` and ``local_steps`` from given steps of the run on, in ascending order:
            ``[{"from_step": 0, "k": 96}, {"from_step": 200, "k": 6}]``. What an entry leaves out stays as it was, at
            first as above. Steps count from 1. Parameters that ``k_for`` names keep their k.

    Raises:
        ConfigError: a value has a wrong type or is out of range.
    """

    chunk: int = 64
    k: int = 8
    decay: float = 0.999
    removal: float = 1.0
    lookahead: bool = False
    k_for: Mapping[str, int] = field(default_factory=dict, hash=False)
    float32_gradients: bool = False
    local_steps: int = 0
    scale: float = 1.0
    schedule: Sequence[Mapping[str, int]] = field(default_factory=list, hash=False)

    def __post_init__(self) -> None:
        if type(self.chunk) is not int or self.chunk not in (8, 16, 32, 64):
            raise ConfigError(f"distro.chunk is {self.chunk!r}; choose 8, 16, 32 or 64.")
        if not isinstance(self.k_for, Mapping) or not all(isinstance(pattern, str) for pattern in self.k_for):
            raise ConfigError(f"distro.k_for is {self.k_for!r}; expected a mapping from patterns of names to k.")
        for name, k in {"k": self.k, **{f"k_for of {pattern!r}": k for pattern, k in self.k_for.items()}}.items():
            self._check_k(name, k)
        for name in ("decay", "removal"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
                raise ConfigError(f"distro.{name} is {value!r}; choose a number from 0 to 1.")
        for name in ("lookahead", "float32_gradients"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"distro.{name} is {getattr(self, name)!r}; choose true or false.")
        if type(self.local_steps) is not int or not 0 <= self.local_steps <= MOST_STEPS:
            raise ConfigError(
                f"distro.local_steps is {self.local_steps!r}; choose a whole number from 0 to {MOST_STEPS}."
            )
        if type(self.scale) not in (int, float) or not 2**-10 <= self.scale <= 2**10:
            raise ConfigError(f"distro.scale is {self.scale!r}; choose a number from {2**-10} to {2**10}.")
        if self.local_steps:
            self.check_local()
        elif self.scale != 1:
            raise ConfigError(
                f"distro.scale is {self.scale!r}, but it belongs to local steps; set distro.local_steps to a number "
                "from 1 on, or leave distro.scale out."
            )
        self._check_schedule()

    def _check_k(self, name: str, k: object) -> None:
        if type(k) is not int or not 1 <= k <= self.k_limit:
            raise ConfigError(
                f"distro.{name} is {k!r}; with distro.chunk={self.chunk} choose a whole number from 1 to "
                f"{self.k_limit}."
            )

    def _check_schedule(self) -> None:
        """Refuse a schedule that has another form or order, and keep it as plain JSON values."""
        given = self.schedule
        if not isinstance(given, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in given):
            raise ConfigError(
                f"distro.schedule is {given!r}; expected a list such as "
                "[{from_step: 0, k: 96}, {from_step: 200, k: 6}]."
            )
        if len(given) > MOST_CHANGES:
            raise ConfigError(f"distro.schedule has {len(given)} entries; give at most {MOST_CHANGES}.")
        for number, entry in enumerate(given):
            name = f"schedule.{number}"
            unknown = [key for key in entry if key not in ("from_step", *_CHANGED)]
            if unknown:
                hint = " Parameters that distro.k_for names keep their k." * (unknown[0] == "k_for")
                raise ConfigError(
                    f"distro.{name} has the key {unknown[0]!r}; choose from from_step, {', '.join(_CHANGED)}.{hint}"
                )
            step = entry.get("from_step")
            if type(step) is not int or not 0 <= step < 1 << 32:
                raise ConfigError(
                    f"distro.{name}.from_step is {step!r}; choose the first step with it, a whole number from 0 on."
                )
            if not any(key in entry for key in _CHANGED):
                raise ConfigError(f"distro.{name} changes nothing; give {' or '.join(_CHANGED)}, or both.")
            if "k" in entry:
                self._check_k(f"{name}.k", entry["k"])
            if "local_steps" in entry:
                self._check_local_steps(f"{name}.local_steps", entry["local_steps"])
        for before, after in pairwise(given):
            if _begin(before) >= _begin(after):
                raise ConfigError(
                    f"distro.schedule has from_step {before['from_step']} before {after['from_step']}; steps count "
                    "from 1, and each entry begins after the one before it. Put them into ascending order."
                )
        object.__setattr__(self, "schedule", [dict(entry) for entry in given])

    def _check_local_steps(self, name: str, steps: object) -> None:
        if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
            raise ConfigError(
                f"distro.{name} is {steps!r}; choose a whole number from 1 to {MOST_STEPS}, since a run has local "
                "steps from its first step to its last, or in none."
            )
        if not self.local_steps:
            raise ConfigError(
                f"distro.{name} is {steps}, but distro.local_steps is 0, so the run has none; set distro.local_steps "
                "to a number from 1 on, or leave local_steps out of distro.schedule."
            )

    def check_local(self) -> None:
        """Refuse what has no meaning with local steps.

        Raises:
            ConfigError: such a value is set.
        """
        for name, value, why in (
            ("lookahead", False, "their parameters move ahead anyway"),
            ("removal", 1, "they keep all that they did not send, and nothing else"),
            ("float32_gradients", False, "gradients belong to the optimizer that makes the steps"),
        ):
            if getattr(self, name) != value:
                raise ConfigError(
                    f"distro.{name} is {getattr(self, name)!r}, but local steps have no use for it: {why}. Leave "
                    f"distro.{name} out, or set distro.local_steps to 0."
                )

    @cached_property
    def stages(self) -> tuple[tuple[int, DistroConfig], ...]:
        """The configurations of the run's stages, each with its first step and without a schedule; one if it has none.

        Stages follow each other from step 1 on, without gaps.
        """
        now = replace(self, schedule=[]) if self.schedule else self
        found = {1: now}
        for entry in self.schedule:
            now = replace(now, k=entry.get("k", now.k), local_steps=entry.get("local_steps", now.local_steps))
            found[_begin(entry)] = now
        return tuple(found.items())

    def at(self, step: int) -> DistroConfig:
        """The configuration of a step of the run, from 1, without a schedule."""
        place = bisect_right(self.stages, step, key=lambda stage: stage[0])
        return self.stages[max(0, place - 1)][1]

    @property
    def densest(self) -> DistroConfig:
        """The stage with the largest k, and so the largest payloads; the first of several."""
        return max((stage for _, stage in self.stages), key=lambda stage: stage.k)

    def rounds(self, last: int) -> list[int]:
        """How many of the steps from 1 to ``last`` belong to each of the stages."""
        firsts = [min(first, last + 1) for first, _ in self.stages]
        return [after - first for first, after in pairwise([*firsts, last + 1])]

    def stretched(self, share: Fraction) -> list[dict[str, int]]:
        """The schedule of a run that is ``share`` times as long; of entries that then coincide the later one counts."""
        found: dict[int, dict[str, int]] = {}
        for entry in self.schedule:
            first = 1 + int((_begin(entry) - 1) * share)
            found[first] = {**found.get(first, {}), **entry, "from_step": first}
        return list(found.values())

    @property
    def version(self) -> int:
        """The version of payloads."""
        return STEPS_VERSION if self.local_steps else WIRE_VERSION

    @property
    def area(self) -> int:
        """Coefficients in a chunk."""
        return self.chunk * self.chunk

    def k_of(self, name: str) -> int:
        """The k of a parameter."""
        return next((k for pattern, k in self.k_for.items() if fnmatch.fnmatchcase(name, pattern)), self.k)

    def uniform(self, k: int) -> DistroConfig:
        """This configuration with one k for all parameters."""
        return replace(self, k=k, k_for={}) if self.k_for else self

    @property
    def max_k(self) -> int:
        """The largest k of any parameter."""
        return max(self.k, *self.k_for.values()) if self.k_for else self.k

    @property
    def k_limit(self) -> int:
        """The largest k for this chunk."""
        return min(self.area // 4, 128)


def _begin(entry: Mapping[str, int]) -> int:
    """The first step of an entry of a schedule: 0 stands for the beginning, too."""
    return max(1, entry["from_step"])
