"""What a node sends and receives, counted where it happens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from psyche_lightning.transports.base import Link, Progress, Transport, TransportContext
from psyche_lightning.transports.meter import ByteMeter


class Traffic:
    """Bytes of one node.

    Attributes:
        coordinator: counts the sockets to the coordinator.
        payload_size: bytes of a payload; a blob of this size that a peer fetched counts as one.
        payloads_up: bytes of the payloads that peers fetched from this node.
    """

    def __init__(self) -> None:
        self.coordinator = ByteMeter()
        self.payload_size = 0
        self.payloads_up = 0
        self._transport: Transport | None = None

    def watch(self, transport: Transport) -> Transport:
        """The transport to use in place of ``transport``."""
        self._transport = transport
        return _Watched(transport, self)

    @property
    def total(self) -> tuple[int, int]:
        """Bytes ``(up, down)`` at all sockets; of a transport without a meter, those that its links tell."""
        meter = getattr(self._transport, "meter", None)
        if isinstance(meter, ByteMeter):
            up, down = meter.up, meter.down
        else:
            links = self._transport.links() if self._transport is not None else []
            up, down = sum(link.bytes_up for link in links), sum(link.bytes_down for link in links)
        return self.coordinator.up + up, self.coordinator.down + down

    def gave(self, size: int, given: int) -> None:
        """Note what a peer was given of a blob of ``size`` bytes."""
        if size == self.payload_size:
            self.payloads_up += given


class _Watched:
    """A transport that tells which blobs it gives out."""

    def __init__(self, transport: Transport, traffic: Traffic) -> None:
        self._transport = transport
        self._traffic = traffic

    async def start(self, context: TransportContext) -> str:
        return await self._transport.start(replace(context, on_served=self._traffic.gave))

    def set_peers(self, peers: Mapping[bytes, str]) -> None:
        self._transport.set_peers(peers)

    def send(self, peer: bytes, message: bytes) -> None:
        self._transport.send(peer, message)

    def broadcast(self, message: bytes) -> None:
        self._transport.broadcast(message)

    async def fetch(
        self,
        digest: bytes,
        providers: Sequence[bytes],
        *,
        max_size: int,
        timeout: float,
        progress: Progress | None = None,
    ) -> bytes:
        return await self._transport.fetch(digest, providers, max_size=max_size, timeout=timeout, progress=progress)

    def links(self) -> list[Link]:
        return self._transport.links()

    async def stop(self) -> None:
        await self._transport.stop()
