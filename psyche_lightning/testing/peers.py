"""Nodes with real transports, for the conformance kits of transports."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from psyche_lightning.transports.base import Transport, TransportContext
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import Identity

LONG = 60.0  # a timeout in seconds that no test should reach


class Node:
    """A node with a real transport and blobs in memory.

    Args:
        transport: the node's; not started.
        identity: the node's key.
        run_id: the run's name.

    Attributes:
        address: what ``start`` returned.
        messages: ``(peer, message)`` in order of arrival.
        blobs: the bytes that ``read_blob`` returns for each requested hash; a test may enter wrong ones.
        asked: the requested hashes, in order.
        gate: ``read_blob`` waits until it is set; it is set unless a test clears it.
        faulty: whether ``on_message`` and ``read_blob`` raise, after they noted the call.
        refused: messages for which ``on_message`` returns False.
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
        """Add a blob; returns its hash."""
        digest = sha256(data)
        self.blobs[digest] = data
        return digest

    def texts(self, peer: Node | None = None) -> list[bytes]:
        """The received messages, from one peer or from all."""
        return [message for sender, message in self.messages if peer is None or sender == peer.key]

    def connected(self, peer: Node) -> bool:
        """Whether the link to a peer is up."""
        return any(link.connected for link in self.transport.links() if link.peer == peer.key)

    @property
    def given(self) -> int:
        """Bytes of blobs that peers received from this node."""
        return sum(given for _, given in self.served)

    def _on_message(self, peer: bytes, message: bytes) -> bool:
        self.messages.append((peer, message))
        if self.faulty:
            raise RuntimeError("a handler fails because the test says so")
        return message not in self.refused

    def _read_blob(self, digest: bytes) -> bytes | None:
        self.asked.append(digest)
        self.gate.wait(LONG)
        if self.faulty:
            raise RuntimeError("a disk fails because the test says so")
        return self.blobs.get(digest)


async def eventually(condition: Callable[[], object], what: str, act: Callable[[], object] = lambda: None) -> None:
    """Wait until ``condition()`` holds, and call ``act()`` repeatedly, because messages may be lost.

    Args:
        condition: called repeatedly.
        what: the condition in words, for the error.
        act: called after each check that fails.

    Raises:
        AssertionError: the condition does not hold within 20 seconds.
    """
    try:
        await asyncio.wait_for(_poll(condition, act), 20)
    except asyncio.TimeoutError:
        raise AssertionError(f"this did not happen within 20 s: {what}") from None


async def _poll(condition: Callable[[], object], act: Callable[[], object]) -> None:
    while not condition():
        act()
        await asyncio.sleep(0.02)
