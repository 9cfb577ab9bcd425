"""The compression settings that all nodes of a run share."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from psyche_lightning.errors import ConfigError

WIRE_VERSION = 2
"""First byte of every payload of signs; also part of :meth:`Layout.digest`."""

STEPS_VERSION = 3
"""The same for payloads of local steps, whose votes have magnitudes."""


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

    def __post_init__(self) -> None:
        if type(self.chunk) is not int or self.chunk not in (8, 16, 32, 64):
            raise ConfigError(f"distro.chunk is {self.chunk!r}; choose 8, 16, 32 or 64.")
        if not isinstance(self.k_for, Mapping) or not all(isinstance(pattern, str) for pattern in self.k_for):
            raise ConfigError(f"distro.k_for is {self.k_for!r}; expected a mapping from patterns of names to k.")
        for name, k in {"k": self.k, **{f"k_for of {pattern!r}": k for pattern, k in self.k_for.items()}}.items():
            if type(k) is not int or not 1 <= k <= self.k_limit:
                raise ConfigError(
                    f"distro.{name} is {k!r}; with distro.chunk={self.chunk} choose a whole number from 1 to "
                    f"{self.k_limit}."
                )
        for name in ("decay", "removal"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
                raise ConfigError(f"distro.{name} is {value!r}; choose a number from 0 to 1.")
        for name in ("lookahead", "float32_gradients"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"distro.{name} is {getattr(self, name)!r}; choose true or false.")
        if type(self.local_steps) is not int or not 0 <= self.local_steps <= 1000:
            raise ConfigError(f"distro.local_steps is {self.local_steps!r}; choose a whole number from 0 to 1000.")
        if type(self.scale) not in (int, float) or not 2**-10 <= self.scale <= 2**10:
            raise ConfigError(f"distro.scale is {self.scale!r}; choose a number from {2**-10} to {2**10}.")
        if self.local_steps:
            self.check_local()
        elif self.scale != 1:
            raise ConfigError(
                f"distro.scale is {self.scale!r}, but it belongs to local steps; set distro.local_steps to a number "
                "from 1 on, or leave distro.scale out."
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
