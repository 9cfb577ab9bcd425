from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from psyche_lightning.testing.network import Intruder, NetworkTransportContract
from psyche_lightning.testing.peers import Node
from psyche_lightning.testing.transport import TransportContract
from psyche_lightning.transports.base import Transport
from psyche_lightning.transports.handshake import Handshake
from psyche_lightning.transports.memory import MemoryNetwork, MemoryTransport
from psyche_lightning.transports.tcp import TcpTransport, _locate
from psyche_lightning.wire.identity import Identity


class TestMemory(TransportContract):
    @pytest.fixture(autouse=True)
    def _network(self) -> None:
        self.network = MemoryNetwork()

    def make_transport(self) -> Transport:
        return MemoryTransport(self.network)


class Socket:
    """A connection to a node's port, with or without TLS."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self._writer.write(data)
            await self._writer.drain()

    async def ended(self) -> None:
        with contextlib.suppress(OSError):
            while await self._reader.read(65536):
                pass


class TestTcp(NetworkTransportContract):
    nowhere = "tcp://127.0.0.1:9"

    def make_network_transport(self, **options: Any) -> Transport:
        return TcpTransport(**options)

    @contextlib.asynccontextmanager
    async def outside(self, node: Node) -> AsyncIterator[Intruder]:
        reader, writer = await asyncio.open_connection(*_locate(node.address))
        try:
            yield Socket(reader, writer)
        finally:
            writer.transport.abort()

    @contextlib.asynccontextmanager
    async def inside(self, node: Node, guest: Identity) -> AsyncIterator[Intruder]:
        handshake = Handshake(guest, node.run_id)
        host, port = _locate(node.address)
        reader, writer = await asyncio.open_connection(host, port, ssl=handshake.client_context, server_hostname="")
        try:
            await handshake.meet(reader, writer, node.key)
            yield Socket(reader, writer)
        finally:
            writer.transport.abort()
