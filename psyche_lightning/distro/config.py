"""What all nodes of a run must agree on about the compression."""

from __future__ import annotations

import math
from dataclasses import dataclass

from psyche_lightning.errors import ConfigError

WIRE_VERSION = 2
"""First byte of every payload; also part of :meth:`Layout.digest`."""


@dataclass(frozen=True)
class DistroConfig:
    """Run configuration of DisTrO (spec S4.2, S4.3).

    Attributes:
        chunk: side of the square blocks that are transformed; a power of two from 8 to 64.
        k: coefficients kept per chunk; from 1 to a quarter of the chunk's area, and at most 128.
        decay: factor on the accumulated update (delta) per step, 0 to 1.
        removal: fraction of the sent component that is subtracted from delta after encoding, 0 to 1.
        lookahead: whether gradients are taken at ``p - lr * sign(delta)`` (S4.3).

    Raises:
        ConfigError: a value is out of its range.
    """

    chunk: int = 64
    k: int = 8
    decay: float = 0.999
    removal: float = 1.0
    lookahead: bool = False

    def __post_init__(self) -> None:
        if self.chunk not in (8, 16, 32, 64):
            raise ConfigError(f"distro chunk is {self.chunk!r}; choose 8, 16, 32 or 64")
        if not isinstance(self.k, int) or isinstance(self.k, bool) or not 1 <= self.k <= self.most:
            raise ConfigError(
                f"distro k is {self.k!r}; with chunk {self.chunk} choose a whole number from 1 to {self.most}"
            )
        for name in ("decay", "removal"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or not 0 <= value <= 1:
                raise ConfigError(f"distro {name} is {value!r}; choose a number from 0 to 1")

    @property
    def area(self) -> int:
        """Coefficients in a chunk."""
        return self.chunk * self.chunk

    @property
    def most(self) -> int:
        """The largest k for this chunk."""
        return min(self.area // 4, 128)
