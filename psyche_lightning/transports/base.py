"""The contract of the plugin kind ``transport``: small messages by gossip, blobs by hash."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from psyche_lightning.errors import TransportError
from psyche_lightning.protocol.messages import MAX_MESSAGE_SIZE
from psyche_lightning.wire.identity import Identity, short


@dataclass(frozen=True)
class TransportContext:
    """What a transport gets from its node.

    Attributes:
        identity: the node's key. Public keys name peers, and a transport proves its node's key to them.
        scope: names the run and its incarnation; transports of different ones do not talk to each other.
        on_message: the transport calls it with ``(peer, message)`` for each message that arrives, on the event loop. It
            does not block. The peer delivered the message, but another node may have written it. It returns False for a
            bad message, which the transport then does not pass on.
        read_blob: returns the bytes of a blob by SHA-256, or None; any thread may call it.
        on_served: the transport calls it with ``(size of the blob, bytes sent)`` when it sent a blob or a part of one.
    """

    identity: Identity
    scope: str
    on_message: Callable[[bytes, bytes], bool | None]
    read_blob: Callable[[bytes], bytes | None]
    on_served: Callable[[int, int], None] = lambda size, given: None


@dataclass(frozen=True)
class Link:
    """The state of the link to one peer, for people.

    Attributes:
        peer: public key.
        connected: whether a connection is open.
        round_trip: seconds, or None when not measured.
        bytes_up: bytes written to sockets towards the peer, overhead included.
        bytes_down: bytes read from sockets from the peer, overhead included.
        reason: why the link is down, or empty.
        bandwidth: bytes a second of the last blobs from the peer, or None when not measured.
        last_seen: seconds since the peer was last heard, or None when it never was.
        path: how bytes travel, such as ``"direct"`` or ``"relay https://..."``; empty when not known.
        tried: whether an attempt to connect has ended, successfully or not.
        answered: seconds after which the peer, at the last attempt to connect, proved its key and refused this node (as
            it refuses any node outside its run); None when it did not.
    """

    peer: bytes
    connected: bool
    round_trip: float | None
    bytes_up: int
    bytes_down: int
    reason: str = ""
    bandwidth: float | None = None
    last_seen: float | None = None
    path: str = ""
    answered: float | None = None
    tried: bool = True

    def __str__(self) -> str:
        """One line for people."""
        if not self.connected:
            seen = "" if self.last_seen is None else f"; last heard {self.last_seen:.0f} s ago"
            return f"no link to {short(self.peer)}: {self.reason}{seen}"
        trip = "" if self.round_trip is None else f", {1e3 * self.round_trip:.0f} ms"
        speed = "" if self.bandwidth is None else f", {self.bandwidth / 1e6:.1f} MB/s"
        moved = f"up {self.bytes_up / 1e6:.2f} MB, down {self.bytes_down / 1e6:.2f} MB"
        return f"{short(self.peer)} {self.path or 'connected'}{trip}{speed}, {moved}"


Progress = Callable[[int, int], None]
"""Called with ``(bytes received, bytes in all)`` while a blob arrives; on the event loop, must not block."""


class Transport(Protocol):
    """Carries messages and blobs between the nodes of one run.

    Messages may be lost, duplicated or reordered. The transport checks blobs against their hash.
    """

    async def start(self, context: TransportContext) -> str:
        """Start to listen, and return the address at which peers reach this node.

        Raises:
            TransportError: it cannot listen.
        """
        ...

    def set_peers(self, peers: Mapping[bytes, str]) -> None:
        """Replace the peers (public key to address). Connections from and to all others are refused or closed."""

    def send(self, peer: bytes, message: bytes) -> None:
        """Queue a message for one peer.

        The queue is bounded: a peer that does not keep up loses the oldest messages. A message for a node that is not a
        peer is dropped.

        Raises:
            TransportError: the message is longer than ``MAX_MESSAGE_SIZE``.
        """

    def broadcast(self, message: bytes) -> None:
        """Queue a message for every peer, as :meth:`send` does."""

    async def fetch(
        self,
        digest: bytes,
        providers: Sequence[bytes],
        *,
        max_size: int,
        timeout: float,
        progress: Progress | None = None,
    ) -> bytes:
        """Get a blob by SHA-256 from any of the providers.

        The providers come in order of preference. A transport may first ask those that answered better before, and may
        take a large blob from several at once. A provider that does not answer uses up at most half of the remaining
        time when others follow.

        Raises:
            TransportError: no provider delivered matching bytes of at most ``max_size`` within ``timeout`` seconds, or
                the transport was stopped; the text says for each provider what happened. It is an ``AbsentError`` when
                each of them answered that it does not have the blob.
        """
        ...

    def links(self) -> list[Link]:
        """The state of the link to each peer."""
        ...

    async def stop(self) -> None:
        """Close everything within a second or two; idempotent."""


@runtime_checkable
class HandsOut(Protocol):
    """A transport that can send a blob before it is asked for it; others need no such method."""

    def hand_out(self, blob: bytes) -> None:
        """Say that the peers are about to fetch a blob: a message that names it follows.

        The transport may send it at once, so that they need not ask, or do nothing, as for a large blob or many peers.
        """


def check_message(message: bytes) -> None:
    """Refuse a message that is too long for every peer.

    Raises:
        TransportError: it is longer than ``MAX_MESSAGE_SIZE``.
    """
    if len(message) > MAX_MESSAGE_SIZE:
        raise TransportError(
            f"a message of {len(message)} bytes; at most {MAX_MESSAGE_SIZE} can be sent, and larger things as blobs"
        )
