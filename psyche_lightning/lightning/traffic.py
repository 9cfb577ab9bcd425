"""Counts the bytes that a node sends and receives."""

from __future__ import annotations

from collections.abc import Collection

from psyche_lightning.transports.base import Transport
from psyche_lightning.transports.meter import ByteMeter


class Traffic:
    """Bytes of one node.

    Args:
        transport: the node's.
        coordinator: counts the bytes at the sockets to the coordinator.
        sizes: bytes of payloads; a blob of such a size that a peer fetches counts as one.

    Attributes:
        payloads_up: bytes of the payloads that peers fetched from this node.
    """

    def __init__(self, transport: Transport, coordinator: ByteMeter, sizes: Collection[int]) -> None:
        self.payloads_up = 0
        self._transport = transport
        self._coordinator = coordinator
        self._sizes = frozenset(sizes)

    @property
    def total(self) -> tuple[int, int]:
        """Bytes ``(up, down)`` at all sockets; if the transport has no meter, those its links report."""
        meter = getattr(self._transport, "meter", None)
        if isinstance(meter, ByteMeter):
            up, down = meter.up, meter.down
        else:
            links = self._transport.links()
            up, down = sum(link.bytes_up for link in links), sum(link.bytes_down for link in links)
        return self._coordinator.up + up, self._coordinator.down + down

    def served(self, size: int, given: int) -> None:
        """Note that a peer received this much of a blob of ``size`` bytes."""
        if size in self._sizes:
            self.payloads_up += given
