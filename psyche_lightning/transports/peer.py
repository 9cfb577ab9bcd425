"""What a node knows about one peer, across connections."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque

from psyche_lightning.aio import is_set_within
from psyche_lightning.errors import TransportError
from psyche_lightning.logs import Outage
from psyche_lightning.transports.base import Link
from psyche_lightning.transports.connection import Connection, SendQueue, StalledError
from psyche_lightning.transports.download import Span
from psyche_lightning.transports.limits import MOVE_RATE, MOVE_STORE, Allowance, Bucket, Said
from psyche_lightning.transports.meter import ByteMeter
from psyche_lightning.wire.identity import short

CONNECT_WAIT = 5.0  # seconds that a fetch waits for a link that is down
USUAL_BANDWIDTH = 2.5e6  # bytes a second that are expected of a peer that has not delivered anything yet
USUAL_ROUND_TRIP = 0.05
KEPT = 2  # blobs that a peer handed out and this node has not asked for, or has
ALLOWANCE = 15.0  # seconds before a peer that was never reached is reported: they learn of each other one by one
MEASURED = 64 * 1024  # bytes from which on a transfer is long enough to measure the bandwidth
_log = logging.getLogger(__name__)


class Peer:
    """A peer and its link.

    Args:
        key: public key.
        address: where it listens.
        said: what this node sent.
        now: loop time.

    Attributes:
        allowance: what it may still send.
        moves: how often its address may still change.
        queue: frames to send to it.
        connection: the link, or None.
        up: set while there is a connection.
        down: set while there is none.
        reason: why there is none.
        tried: whether an attempt to connect has ended.
        lost: why the last connection ended.
        outage: reports that it is away.
        answered: seconds after which it refused the last attempt to connect; None when it did not.
        seen: loop time at which an earlier connection last heard it.
        bandwidth: bytes a second of the last parts of blobs from it; None when not measured.
        trusted: whether it has always delivered the right bytes.
        handed: the newest blobs that it sent unasked, with their SHA-256.
        dialler: the task that keeps the link up.
    """

    def __init__(self, key: bytes, address: str, said: Said, now: float) -> None:
        self.key = key
        self.address = address
        self.allowance = Allowance(key, said)
        self.moves = Bucket(MOVE_RATE, MOVE_STORE, now)
        self.queue = SendQueue()
        self.connection: Connection | None = None
        self.up = asyncio.Event()
        self.down = asyncio.Event()
        self.down.set()
        self.reason = "not connected yet"
        self.tried = False
        self.lost = ""
        self.outage = Outage(_log, f"peer {short(key)}", level=logging.INFO, allowance=ALLOWANCE)
        self.answered: float | None = None
        self.seen: float | None = None
        self.bandwidth: float | None = None
        self.trusted = True
        self.handed: deque[tuple[bytes, bytes]] = deque(maxlen=KEPT)
        self.dialler: asyncio.Task[None] | None = None
        self._past_up = self._past_down = 0  # bytes of earlier connections and failed attempts

    def put(self, data: bytes) -> None:
        """Queue a frame."""
        self.queue.put(data)
        if self.connection is not None:
            self.connection.wake()

    def absorb(self, meter: ByteMeter) -> None:
        """Add the bytes of a connection that has ended."""
        self._past_up += meter.up
        self._past_down += meter.down

    def link(self, now: float) -> Link:
        """The state of the link, for people."""
        up, down, connection = self._past_up, self._past_down, self.connection
        if connection is None:
            seen = None if self.seen is None else now - self.seen
            reason, answered, tried = self.reason, self.answered, self.tried
            return Link(self.key, False, None, up, down, reason, self.bandwidth, seen, answered=answered, tried=tried)
        meter, seen = connection.pipe.meter, now - connection.heard
        up, down, path = up + meter.up, down + meter.down, connection.pipe.path()
        return Link(self.key, True, connection.round_trip, up, down, "", self.bandwidth, seen, path)

    def rank(self, size: int) -> tuple[bool, bool, int]:
        """Sort key by which peers that deliver a blob sooner come first; a difference below a factor of 4 is ignored.

        Args:
            size: the largest size of the blob in bytes.
        """
        trip = self.connection.round_trip if self.connection is not None else None
        expected = (USUAL_ROUND_TRIP if trip is None else trip) + size / (self.bandwidth or USUAL_BANDWIDTH)
        return not self.trusted, self.connection is None, round(math.log(max(expected, 0.05), 4))

    # -- as a provider of a download ----------------------------------------------------------------------------------

    async def pull(self, span: Span) -> None:
        """Fill a span over the link; wait for the link if it is down.

        Raises:
            TransportError: the peer is not connected, does not have the blob, or does not deliver it.
        """
        loop = asyncio.get_running_loop()
        if self.connection is None:
            await is_set_within(self.up, CONNECT_WAIT)
        if self.connection is None:
            raise TransportError(f"is not connected ({self.reason})")
        begun = loop.time()
        try:
            await self.connection.pull(span)
        except StalledError:
            self.bandwidth = (self.bandwidth or USUAL_BANDWIDTH) / 2
            raise
        finally:
            got = span.at - span.start
            if got >= MEASURED:
                rate = got / max(loop.time() - begun, 1e-6)
                self.bandwidth = rate if self.bandwidth is None else (self.bandwidth + rate) / 2

    def lied(self, what: str) -> None:
        """Record and log that it delivered wrong bytes."""
        self.trusted = False
        _log.warning("%s %s; this node asks it last from now on", short(self.key), what)
