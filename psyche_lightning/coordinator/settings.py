"""What a run's manifest says of model, data and compression, as far as people look at it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from psyche_lightning.distro.config import DistroConfig
from psyche_lightning.errors import ConfigError

_FLOAT32 = 4
_LONGEST = 200
"""Characters of a name; a node may have put megabytes there."""
_MOST = 1 << 48
_MOST_DIMENSIONS = 16


@dataclass(frozen=True)
class Settings:
    """What a manifest says; None for what it does not.

    Attributes:
        distro: the compression.
        overlap: whether results travel while the next round computes.
        model: the model's name.
        dtype: the dtype of its parameters.
        parameters: how many are trained.
        data: the data's name.
        seq_len: tokens of a sample.
        recipe: whether it is the manifest of a recipe.
    """

    distro: DistroConfig | None = None
    overlap: bool | None = None
    model: str | None = None
    dtype: str | None = None
    parameters: int | None = None
    data: str | None = None
    seq_len: int | None = None
    recipe: bool = False

    @classmethod
    def of(cls, manifest: Mapping[str, Any] | None) -> Settings:
        """Those of a manifest, in which a node may have written anything."""
        if manifest is None:
            return cls()
        run, model, data = (_section(manifest, name) for name in ("run", "model", "data"))
        return cls(
            _distro(manifest.get("distro")),
            _typed(run, "overlap", bool),
            _typed(model, "name", str),
            _typed(model, "dtype", str),
            _trained(model.get("parameters")),
            _typed(data, "name", str),
            _typed(data, "seq_len", int),
            "join" in manifest or "schedule" in _section(manifest, "optimizer"),
        )

    def at(self, step: int) -> dict[str, int | None]:
        """``k``, ``local_steps`` and ``chunk`` of a step; None without a compression that is known."""
        now = None if self.distro is None else self.distro.at(step)
        if now is None:
            return {"k": None, "local_steps": None, "chunk": None}
        return {"k": now.k, "local_steps": now.local_steps, "chunk": now.chunk}

    def after(self, step: int) -> dict[str, int] | None:
        """The next change after a step: ``from_step``, ``k`` and ``local_steps``; None without one."""
        stages = () if self.distro is None else self.distro.stages
        coming = next(((first, stage) for first, stage in stages if first > step), None)
        return coming and {"from_step": coming[0], "k": coming[1].k, "local_steps": coming[1].local_steps}


def all_reduce(parameters: int, nodes: int, steps: int) -> float:
    """Bytes that each node would send in ring all-reduces of float32 gradients.

    Args:
        parameters: how many are trained.
        nodes: how many take part.
        steps: how many all-reduces: one for each step that a node makes in a round.
    """
    return steps * 2 * (nodes - 1) / nodes * _FLOAT32 * parameters


def _section(manifest: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = manifest.get(name)
    return section if isinstance(section, dict) else {}


def _typed(section: Mapping[str, Any], name: str, kind: type) -> Any:
    value = section.get(name)
    if isinstance(value, str):
        value = value[:_LONGEST]
    if type(value) is int and not 0 <= value < _MOST:
        return None
    return value if type(value) is kind else None


def _distro(section: Any) -> DistroConfig | None:
    try:
        return DistroConfig(**section)
    except (ConfigError, TypeError, ValueError):
        return None


def _trained(parameters: Any) -> int | None:
    """How many numbers the trained ones of ``[name, shape, dtype, trained]`` have; None if that cannot be."""
    try:
        shapes = [shape for _, shape, _, trained in parameters if trained]
        for shape in shapes:
            if len(shape) > _MOST_DIMENSIONS or any(type(size) is not int or not 0 <= size < _MOST for size in shape):
                return None
        found = sum(map(math.prod, shapes))
    except (TypeError, ValueError):
        return None
    return found if 0 < found < _MOST else None
