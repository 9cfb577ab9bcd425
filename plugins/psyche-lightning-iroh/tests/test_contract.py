from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import iroh
import pytest
from psyche_lightning_iroh import IrohTransport
from psyche_lightning_iroh.address import Address

from psyche_lightning.testing.network import Intruder, NetworkTransportContract
from psyche_lightning.testing.peers import Node
from psyche_lightning.transports.base import Transport
from psyche_lightning.transports.framing import Kind, frame
from psyche_lightning.wire.identity import Identity


class Stream:
    """The urgent stream of a connection to a node."""

    def __init__(self, connection: Any, stream: Any) -> None:
        self._connection = connection
        self._stream = stream

    async def send(self, data: bytes) -> None:
        with contextlib.suppress(iroh.IrohError):
            await self._stream.send().write_all(data)

    async def ended(self) -> None:
        await self._connection.closed()


class Datagrams:
    """Bytes to the node's UDP port that are no QUIC: nothing comes of them, so there is no end to wait for."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.connect(target)

    async def send(self, data: bytes) -> None:
        for at in range(0, len(data), 1200):
            with contextlib.suppress(OSError):
                self._socket.send(data[at : at + 1200])
        await asyncio.sleep(0.05)

    async def ended(self) -> None:
        pass

    def close(self) -> None:
        self._socket.close()


class TestIroh(NetworkTransportContract):
    nowhere = "iroh://127.0.0.1:9"

    @pytest.fixture(autouse=True)
    def _reach(self, reach: Callable[..., Any]) -> None:
        self.reach = reach

    def make_network_transport(self, **options: Any) -> Transport:
        return IrohTransport(**options)

    @contextlib.asynccontextmanager
    async def outside(self, node: Node) -> AsyncIterator[Intruder]:
        (target,) = Address.parse(node.address).hosts
        datagrams = Datagrams(target)
        try:
            yield datagrams
        finally:
            datagrams.close()

    @contextlib.asynccontextmanager
    async def inside(self, node: Node, guest: Identity) -> AsyncIterator[Intruder]:
        transport: Any = node.transport
        endpoint, connection = await self.reach(node, guest, transport._alpn)
        try:
            streams = [await connection.open_bi() for _ in range(2)]
            for stream in streams:
                await stream.send().write_all(frame(Kind.WELCOME))
            await streams[0].recv().read_exact(len(frame(Kind.WELCOME)))
            yield Stream(connection, streams[0])
        finally:
            connection.close(0, b"")
            await endpoint.close()
