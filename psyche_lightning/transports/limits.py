"""How much a peer may send, by the kind of message, and how long one that floods is kept away.

All of it is counted before a message is verified, because verifying is what costs. In a run each node says about as
much as the others, whatever the pace of the rounds. So a node measures a peer by itself and by the others: the peer may
send, of each kind, a few messages a second, several times what this node or the median of the other peers sends, and a
store of them in advance. Beyond that its messages are dropped unread; whoever goes on nevertheless is disconnected and
kept away for a while.

A peer also passes on what others signed. An honest one cannot know how much of that its peer had from elsewhere, so
what exceeds the limit is dropped without blame.
"""

from __future__ import annotations

import statistics
from collections import OrderedDict
from collections.abc import Collection

from psyche_lightning.errors import WireError
from psyche_lightning.wire.identity import KEY_SIZE, SIGNATURE_SIZE

RATE = 5.0
"""Messages a second of one kind that a peer may always send."""
SHARE = 4.0
"""Messages of one kind that a peer may send for each that this node, or the median of the other peers, sends."""
STORE = 1000.0
"""Messages of one kind that a peer may send in advance."""
DROPPED = 0.25
"""Messages as which one counts that was dropped; so a peer that sends a little too much does not flood."""
UNIT = 1024
"""Bytes that count as one more message."""
REFUSED = 50.0
"""Messages as which one counts that its own sender got refused."""
FRAME_RATE, FRAME_STORE = 1000.0, 5000.0
"""Frames of all kinds but blocks that a connection delivers in a second, and in advance; further ones wait."""
PING = 20.0
"""Frames as which a PING counts, and a BLOB."""
MOVE_RATE, MOVE_STORE = 1 / 60, 4.0
"""Changes of a peer's address that this node follows in a second, and in advance."""
SHORTEST_QUARANTINE, LONGEST_QUARANTINE = 60.0, 3600.0
MAX_QUARANTINED = 1024
_KINDS = 16  # that are counted apart; all others count together
_KIND_AT = KEY_SIZE + SIGNATURE_SIZE + 1  # in an envelope, see psyche_lightning.protocol.messages.seal


class FloodError(WireError):
    """A peer sends more than any honest node would."""


class Bucket:
    """A store that fills with time and with what is put in. Has no I/O: every method takes the time in seconds.

    Args:
        rate: units a second.
        store: the most units it holds, and what it holds at first.
        now: the time.

    Attributes:
        left: units it holds; negative after more was taken.
    """

    def __init__(self, rate: float, store: float, now: float) -> None:
        self.left = store
        self._rate = rate
        self._store = store
        self._then = now

    def fill(self, now: float, extra: float = 0.0) -> None:
        """Add what time brings, and ``extra``."""
        self.left = min(self._store, self.left + self._rate * max(0.0, now - self._then) + extra)
        self._then = max(self._then, now)

    def wait(self, units: float, now: float) -> float:
        """Take units; returns the seconds until the store makes up for them, 0 while it holds some."""
        self.fill(now)
        self.left -= units
        return max(0.0, -self.left / self._rate)


class Said:
    """What a node has said so far, by kind."""

    def __init__(self) -> None:
        self.by_kind = [0.0] * (_KINDS + 1)

    def note(self, message: bytes, weight: float = 1.0) -> None:
        """Count a message; ``weight`` is the fraction of peers that get it."""
        self.by_kind[_kind(message)] += weight * _cost(message)


def _usual(kind: int, own: Said, others: Collection[Allowance], peer: Allowance) -> float:
    """What a node in this peer's place would have said by now."""
    heard = [other.said.by_kind[kind] for other in others if other is not peer]
    return max(own.by_kind[kind], statistics.median_low(heard) if heard else 0.0)


class Allowance:
    """What one peer may still send; it outlives connections.

    Args:
        peer: the peer's key.
        own: what this node said.

    Attributes:
        said: what the peer itself said and this node took.
    """

    def __init__(self, peer: bytes, own: Said) -> None:
        self.said = Said()
        self._peer = peer
        self._own = own
        self._buckets: dict[tuple[bool, int], Bucket] = {}
        self._credited: dict[tuple[bool, int], float] = {}

    def take(self, message: bytes, now: float, peers: Collection[Allowance]) -> bool:
        """Count a message that the peer delivered.

        Args:
            message: not verified yet.
            now: seconds.
            peers: those of all peers of this node, whose messages the peer may pass on.

        Returns:
            Whether to look at it; one that exceeds the limit is dropped.

        Raises:
            FloodError: the peer goes on after much was dropped.
        """
        own, kind = message[:KEY_SIZE] == self._peer, _kind(message)
        size = 1 if own else len(peers) + 1
        bucket = self._buckets.get((own, kind))
        if bucket is None:
            bucket = self._buckets[own, kind] = Bucket(RATE * size, STORE * size, now)
            self._credited[own, kind] = _usual(kind, self._own, peers, self)
        bucket.fill(now)
        if bucket.left < STORE * size / 2:  # else it has enough, and what is usual need not be known
            usual = _usual(kind, self._own, peers, self)
            bucket.fill(now, SHARE * size * max(0.0, usual - self._credited[own, kind]))
            self._credited[own, kind] = usual
        welcome = bucket.left > 0
        if welcome and own:
            self.said.note(message)
        if welcome or own:
            bucket.left -= _cost(message) if welcome else DROPPED * _cost(message)
        if own and bucket.left <= -STORE:
            bucket.left = 0.0  # when its quarantine is over, it begins with little
            raise FloodError(
                f"it sends messages of kind {kind} far beyond what a node takes: {RATE:g} a second, and {SHARE:g} for "
                "each that the others send"
            )
        return welcome

    def refused(self, message: bytes) -> None:
        """Count a message that was refused: one that the peer claims to have written counts as many."""
        found = self._buckets.get((True, _kind(message)))
        if found is not None and message[:KEY_SIZE] == self._peer:
            found.left -= REFUSED


class Quarantine:
    """The peers that flooded, and until when this node has no link to them; each time takes twice as long."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, tuple[float, float]] = OrderedDict()  # key -> until when, seconds of it

    def begin(self, key: bytes, now: float) -> float:
        """Keep a peer away; returns for how many seconds."""
        _, last = self._known.pop(key, (0.0, SHORTEST_QUARANTINE / 2))
        seconds = min(LONGEST_QUARANTINE, 2 * last)
        self._known[key] = now + seconds, seconds
        while len(self._known) > MAX_QUARANTINED:
            self._known.popitem(last=False)
        return seconds

    def left(self, key: bytes, now: float) -> float:
        """Seconds for which a peer is still kept away."""
        return max(0.0, self._known.get(key, (now, 0.0))[0] - now)


def _kind(message: bytes) -> int:
    """The kind that an envelope claims to have."""
    return min(message[_KIND_AT], _KINDS) if len(message) > _KIND_AT else _KINDS


def _cost(message: bytes) -> float:
    return 1.0 + len(message) / UNIT
