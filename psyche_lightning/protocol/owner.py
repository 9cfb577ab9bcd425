"""The owner's side of a run, the same for every kind of coordinator; ``psyche run`` is this with a command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Creation:
    """What a run shall be.

    Attributes:
        config: values of :class:`~psyche_lightning.protocol.state.CoordinatorConfig`; the rest is default, or fixed
            by the first node.
        manifest: the sections that are known; the first node fixes the others.
        seed: from which committees and assignments follow, where the coordinator does not draw it itself.
        max_seq_len: tokens of a sample.
        recipe: the :class:`~psyche_lightning.recipe.config.Recipe` that it was made from, if one.
        everybody: whether every node may join; otherwise ``authorize`` says who.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] | None = None
    seed: int | None = None
    max_seq_len: int = 1
    recipe: Any = None
    everybody: bool = True


class RunAdmin(Protocol):
    """What people do with one run. Blocking; each call does only what is not done yet, so it may be repeated.

    A status is what :func:`psyche_lightning.server.status.run_status` gives. All methods raise
    :class:`~psyche_lightning.errors.CoordinatorError`.
    """

    def create(self, wanted: Creation) -> dict[str, Any]:
        """Make the run, not yet open where that can be; returns its status."""
        ...

    def update(self, wanted: Creation) -> dict[str, Any]:
        """Change a halted run; returns its status."""
        ...

    def start(self) -> dict[str, Any]:
        """Open the run to nodes; returns its status."""
        ...

    def pause(self) -> dict[str, Any]:
        """Halt it when its epoch has ended, at once when none is under way; returns its status."""
        ...

    def resume(self) -> dict[str, Any]:
        """Open a paused run again; returns its status."""
        ...

    def status(self) -> dict[str, Any]:
        """Where it stands."""
        ...

    def close(self) -> str:
        """Remove a halted run; returns what became of it, in words."""
        ...

    def authorize(self, node: str | None) -> str:
        """Let a node (its key, or its wallet on a chain) join, or everybody; returns what that means, in words."""
        ...

    def revoke(self, node: str | None) -> str:
        """Take that back; returns what that means, in words."""
        ...

    def points(self) -> list[dict[str, Any]]:
        """``node``, ``earned``, ``slashed`` and ``claimed`` of everyone who took part."""
        ...

    def claim(self, points: int | None) -> str:
        """Have points paid, all unless given; returns what was paid, in words."""
        ...


@dataclass(frozen=True)
class ClockReading:
    """Another clock, seen from here; all in seconds.

    Attributes:
        offset: by how much it is ahead of this machine's.
        uncertainty: by how much that may be wrong.
        answer_seconds: how long the quickest answer took, connecting included.
    """

    offset: float
    uncertainty: float
    answer_seconds: float
