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
        rates: points of an epoch, on a chain: shared by all, and taken from an ejected node; None for none.
        mint: the token in which points are paid, on a chain; None if they are only counted.
        name: the run's name for people, on a chain; None leaves it.
        description: of the run, on a chain; None leaves it.
        client_version: the version of psyche-lightning that nodes need, on a chain; empty for any, None leaves it.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] | None = None
    seed: int | None = None
    max_seq_len: int = 1
    recipe: Any = None
    everybody: bool = True
    by_link: bool = False
    rates: tuple[int | None, int | None] = (None, None)
    mint: str | None = None
    name: str | None = None
    description: str | None = None
    client_version: str | None = None

    @property
    def described(self) -> bool:
        """Whether it has what only a chain keeps: a name, a description, or a version."""
        return not (self.name is self.description is self.client_version is None)


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

    def restart_from(self, digest: str | None, step: int) -> str:
        """Go on from other parameters than the newest; returns in words what that means.

        Args:
            digest: their digest in hex; None for those that a quorum named after that step, on a chain.
            step: training steps that they contain.
        """
        ...

    def points(self) -> list[dict[str, Any]]:
        """Returns ``node``, ``earned``, ``slashed`` and ``claimed`` of each participant."""
        ...

    def rates(self, earned: int | None, slashed: int | None) -> str:
        """Change the points of future epochs, on a chain; returns in words how many an epoch gives.

        Args:
            earned: shared by all that are there when an epoch ends; None leaves it.
            slashed: taken from a node that is ejected; None leaves it.
        """
        ...

    def fund(self, amount: int) -> str:
        """Give tokens, in base units, to the treasurer that pays points; returns in words what it holds."""
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
        seen: the IP address from which this machine's requests come there; empty if that is not told.
    """

    offset: float
    uncertainty: float
    answer_seconds: float
    seen: str = ""
