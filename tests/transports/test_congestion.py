"""Which congestion control connections use: one that does not take each lost packet for a full link."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from psyche_lightning.testing.peers import Node, eventually
from psyche_lightning.transports import tcp
from psyche_lightning.transports.meter import MeteredSocket
from psyche_lightning.wire.identity import Identity

ALLOWED = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
pytestmark = pytest.mark.skipif(
    not ALLOWED.exists() or not {"bbr", "reno"} <= set(ALLOWED.read_text().split()),
    reason="this kernel has one congestion control, or lets this process choose none",
)


class Reno(tcp.TcpTransport):
    """On a machine whose default is Reno: what a listener accepts is as the listener."""

    async def _listen(self) -> MeteredSocket:
        listener = await super()._listen()
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        return listener


def used() -> bytes:
    """What the accepting end of a connection between two nodes uses."""

    async def scene() -> bytes:
        a, b = (Node(transport, Identity.generate()) for transport in (Reno(), Reno()))
        try:
            for node in (a, b):
                await node.start()
            a.transport.set_peers({b.key: ""})  # so that b dials
            b.transport.set_peers({a.key: a.address})
            await eventually(lambda: a.connected(b), "the nodes are connected")
            assert isinstance(a.transport, Reno)
            connection = a.transport._peers[b.key].connection
            assert connection is not None
            assert isinstance(connection.pipe, tcp.TlsPipe)
            sock = connection.pipe._writer.get_extra_info("socket")
            name: bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
            return name.rstrip(b"\0")
        finally:
            for node in (a, b):
                await node.transport.stop()

    return asyncio.run(scene())


def test_bbr_is_used_if_the_kernel_has_it() -> None:
    assert used() == b"bbr"


def test_the_machines_default_is_used_without_bbr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "CONGESTION", b"not there")
    assert used() == b"reno"
