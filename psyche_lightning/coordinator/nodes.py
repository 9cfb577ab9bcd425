"""What a coordinator knows of each node that is or was in a run, for people. It decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from psyche_lightning.coordinator.delivery import Mark
from psyche_lightning.errors import WireError
from psyche_lightning.protocol.codec import from_json, to_json

MAX_NODES = 512
"""Nodes that are remembered after they left; those who left first are forgotten first."""


@dataclass(frozen=True)
class Check:
    """What was found out about a node.

    Attributes:
        time: as in :class:`~psyche_lightning.coordinator.history.Event`.
        kind: ``warmup`` or ``digest`` for the parameters that it holds, ``health_check`` or ``accusation`` for what
            others showed of it.
        good: whether it was as it should be.
        text: what, in words.
        by: who found it, in hex; empty for the coordinator.
    """

    time: float
    kind: str
    good: bool
    text: str
    by: str = ""


@dataclass(frozen=True)
class Node:
    """A node.

    Attributes:
        signer: its key.
        number: counts the nodes of the run.
        joined: when it joined first, as in :class:`~psyche_lightning.coordinator.history.Event`.
        joins: how often it joined.
        address: the newest address of its transport.
        left: when it left; None while it is a member.
        status: empty while it is a member; then ``left``, ``finished``, ``dropped``, ``ejected`` or ``kicked``.
        reason: why it left, in words.
        seen: when it reported last; None if never.
        up: bytes a second that it sent between its two newest reports; None if unknown.
        down: bytes a second that it received.
        delivered: rounds to which it contributed.
        late: rounds for which it was too late.
        absent: rounds of which nothing came from it.
        excluded: rounds that came to nothing though it delivered.
        rested: rounds in which no samples were its.
        checks: the newest check of each kind and result, oldest first.
        region: where it says that it is; None if it does not say.
    """

    signer: bytes
    number: int
    joined: float
    joins: int = 0
    address: str = ""
    left: float | None = None
    status: str = ""
    reason: str = ""
    seen: float | None = None
    up: float | None = None
    down: float | None = None
    delivered: int = 0
    late: int = 0
    absent: int = 0
    excluded: int = 0
    rested: int = 0
    checks: tuple[Check, ...] = ()
    region: str | None = None

    def marked(self, mark: Mark, count: int = 1) -> Node:
        """The node with that many more rounds of a mark."""
        name = mark.name.lower()
        return replace(self, **{name: getattr(self, name) + count})

    def checked(self, check: Check) -> Node:
        """The node with a check in place of the one before of its kind and result."""
        others = [one for one in self.checks if (one.kind, one.good) != (check.kind, check.good)]
        return replace(self, checks=(*others, check))


class Nodes:
    """The nodes of a run, by their keys.

    Args:
        nodes: those so far.
        count: how many there were in all.

    Attributes:
        version: grows with every change.
        count: as above, now.
    """

    def __init__(self, nodes: list[Node] | None = None, count: int = 0) -> None:
        self._nodes = {node.signer: node for node in nodes or []}
        self._changed = dict.fromkeys(self._nodes, 0)
        self.version = 0
        self.count = count

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def get(self, signer: bytes) -> Node | None:
        """A node; None if it never joined or is forgotten."""
        return self._nodes.get(signer)

    def since(self, version: int) -> list[Node]:
        """The nodes that changed after a version."""
        return [self._nodes[signer] for signer, changed in self._changed.items() if changed > version]

    def joined(self, signer: bytes, time: float) -> None:
        """Note that a node has joined, for the first time or again."""
        if signer not in self._nodes:
            self._nodes[signer] = Node(signer, self.count, time)
            self.count += 1
            self._forget()
        self.change(signer, lambda node: replace(node, joins=node.joins + 1, left=None, status="", reason=""))

    def change(self, signer: bytes, update: Callable[[Node], Node]) -> None:
        """Replace a node by the result of ``update``, if it is known."""
        node = self._nodes.get(signer)
        if node is None or (after := update(node)) == node:
            return
        self.version += 1
        self._nodes[signer], self._changed[signer] = after, self.version

    def _forget(self) -> None:
        gone = [node for node in self if node.left is not None]
        for node in sorted(gone, key=lambda node: node.left or 0.0)[: max(0, len(self._nodes) - MAX_NODES)]:
            del self._nodes[node.signer], self._changed[node.signer]

    def dump(self, version: int = -1) -> dict[str, Any]:
        """The nodes that changed after a version as JSON values, which :meth:`load` reads."""
        return {"count": self.count, "items": [to_json(node) for node in self.since(version)]}

    @classmethod
    def load(cls, data: Any) -> Nodes:
        """Read what :meth:`dump` wrote.

        Raises:
            WireError: it is something else.
        """
        if not (isinstance(data, dict) and type(data.get("count")) is int and isinstance(data.get("items"), list)):
            raise WireError("the nodes of a run must have a count and items")
        return cls([from_json(Node, item) for item in data["items"]], data["count"])
