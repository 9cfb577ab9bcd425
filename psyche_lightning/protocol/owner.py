"""What an owner does with a run, the same for every kind of coordinator; ``psyche run`` is its command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Creation:
    """The run that an owner wants to create.

    Attributes:
        config: values of :class:`~psyche_lightning.protocol.state.CoordinatorConfig`; the others are defaults, or
            the first node fixes them.
        manifest: the sections that are known; the first node fixes the others.
        seed: decides committees and assignments, if the coordinator does not draw it itself.
        max_seq_len: tokens of a sample.
        recipe: the :class:`~psyche_lightning.recipe.config.Recipe` of the run, if there is one.
        everybody: whether every node may join; if not, ``authorize`` names those that may.
        by_link: whether nodes need the run's join link, where the kind of coordinator has such links.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] | None = None
    seed: int | None = None
    max_seq_len: int = 1
    recipe: Any = None
    everybody: bool = True
    by_link: bool = False


class RunAdmin(Protocol):
    """What people can do with one run. Calls block, do only what is not done yet, and so may be repeated.

    A status is what :func:`psyche_lightning.server.status.run_status` returns. All methods raise
    :class:`~psyche_lightning.errors.CoordinatorError`.
    """

    def create(self, wanted: Creation) -> dict[str, Any]:
        """Create the run, if possible not yet open; returns its status."""
        ...

    def update(self, wanted: Creation) -> dict[str, Any]:
        """Change a halted run; returns its status."""
        ...

    def start(self) -> dict[str, Any]:
        """Open the run to nodes; returns its status."""
        ...

    def pause(self) -> dict[str, Any]:
        """Pause the run at the end of its epoch, or at once if no epoch has begun; returns its status."""
        ...

    def resume(self) -> dict[str, Any]:
        """Open a paused run again; returns its status."""
        ...

    def status(self) -> dict[str, Any]:
        """Returns the run's status."""
        ...

    def close(self) -> str:
        """Remove a halted run; returns in words what happened."""
        ...

    def authorize(self, node: str | None) -> str:
        """Let a node (its key, or its wallet on a chain) or everybody join; returns in words what that means."""
        ...

    def revoke(self, node: str | None) -> str:
        """Undo :meth:`authorize`; returns in words what that means."""
        ...

    def kick(self, node: str) -> str:
        """Remove a node at once, also from the epoch, and revoke it; returns in words what that means."""
        ...

    def link(self, *, new: bool = False) -> str:
        """Returns what a node gives as its coordinator to join the run: a link, or the coordinator's URL.

        Args:
            new: whether to make a new link, so that the former one lets nobody in any more.
        """
        ...

    def restart_from(self, digest: str, step: int) -> str:
        """Go on from other parameters than the newest; returns in words what that means.

        Args:
            digest: their digest in hex.
            step: training steps that they contain.
        """
        ...

    def points(self) -> list[dict[str, Any]]:
        """Returns ``node``, ``earned``, ``slashed`` and ``claimed`` of each participant."""
        ...

    def claim(self, points: int | None) -> str:
        """Have points paid, by default all; returns in words what was paid."""
        ...


@dataclass(frozen=True)
class ClockReading:
    """Another clock as seen from this machine; all in seconds.

    Attributes:
        offset: how far it is ahead of this machine's clock.
        uncertainty: how far off the offset may be.
        answer_seconds: how long the fastest answer took, with connecting.
    """

    offset: float
    uncertainty: float
    answer_seconds: float
