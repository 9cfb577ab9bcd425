"""Nodes with real transports, as the conformance kits of transports play with them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from psyche_lightning.transports.base import Transport, TransportContext
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import Identity

LONG = 60.0  # a timeout that an answer must not need


class Node:
    """A node with a real transport and blobs in memory.

    Args:
        transport: not started yet.
        identity: the node's key.
        run_id: the run.

    Attributes:
        address: what ``start`` returned.
        messages: ``(peer, message)`` in order of arrival.
        blobs: what ``read_blob`` answers with, by the hash that is asked for (right or wrong).
        asked: the hashes that ``read_blob`` was called with.
        gate: ``read_blob`` waits for it; set unless a test clears it.
        faulty: whether both handlers raise, after they noted the call.
        refused: messages that ``on_message`` calls bad.
        served: ``(size, given)`` of each call of ``on_served``.
    """

    def __init__(self, transport: Transport, identity: Identity, run_id: str = "run") -> None:
        self.transport = transport
        self.identity = identity
        self.run_id = run_id
        self.address = ""
        self.messages: list[tuple[bytes, bytes]] = []
        self.blobs: dict[bytes, bytes] = {}
        self.asked: list[bytes] = []
        self.gate = threading.Event()
        self.gate.set()
        self.faulty = False
        self.refused: set[bytes] = set()
        self.served: list[tuple[int, int]] = []

    @property
    def key(self) -> bytes:
        """The public key."""
        return self.identity.public

    async def start(self) -> None:
        """Start the transport."""
        context = TransportContext(
            self.identity,
            self.run_id,
            self._on_message,
            self._read_blob,
            lambda size, given: self.served.append((size, given)),
        )
        self.address = await self.transport.start(context)

    def add(self, data: bytes) -> bytes:
        """Have a blob; returns its hash."""
        digest = sha256(data)
        self.blobs[digest] = data
        return digest

    def texts(self, peer: Node | None = None) -> list[bytes]:
        """The messages that came, from one peer or from all."""
        return [message for sender, message in self.messages if peer is None or sender == peer.key]

    def connected(self, peer: Node) -> bool:
        """Whether the link to a peer is up."""
        return any(link.connected for link in self.transport.links() if link.peer == peer.key)

    @property
    def given(self) -> int:
        """Bytes of blobs that it gave out."""
        return sum(given for _, given in self.served)

    def _on_message(self, peer: bytes, message: bytes) -> bool:
        self.messages.append((peer, message))
        if self.faulty:
            raise RuntimeError("a handler failed, as the test wants it to")
        return message not in self.refused

    def _read_blob(self, digest: bytes) -> bytes | None:
        self.asked.append(digest)
        self.gate.wait(LONG)
        if self.faulty:
            raise RuntimeError("a disk failed, as the test wants it to")
        return self.blobs.get(digest)


async def eventually(condition: Callable[[], object], what: str, act: Callable[[], object] = lambda: None) -> None:
    """Wait until ``condition()`` holds, calling ``act()`` again and again (messages may be lost)."""
    try:
        await asyncio.wait_for(_poll(condition, act), 20)
    except asyncio.TimeoutError:
        raise AssertionError(f"waited in vain until {what}") from None


async def _poll(condition: Callable[[], object], act: Callable[[], object]) -> None:
    while not condition():
        act()
        await asyncio.sleep(0.02)
