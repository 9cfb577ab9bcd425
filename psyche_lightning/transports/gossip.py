"""Decides who passes which message on to whom. Has no I/O; time and randomness come in.

A node sends its messages to all peers to which it is connected. For peers that it cannot reach (because both are behind
home routers, or a link is down at the moment) it names them in the message and asks a few neighbours to pass it on. The
neighbours do the same, so a message floods only as far as needed. A node acts once on each message, however often it
arrives, and never passes on a message that it refuses. When a link comes up, the node repeats the messages of the last
minute, because nobody knows what the old link lost.

A private message to one peer that the node cannot reach travels in the same way. The nodes that pass it on do not act
on it (but can read it, like all participants of the run).

Body of a GOSSIP frame::

    number u64 | hops u8 | private u8 | names u8 | origin 32 | names x 8 bytes | message

``number`` is new for each message of its origin. ``hops`` (1 to 4) says how often the message may still be passed on.
The names are the first bytes of the keys of the nodes that have not been reached, in ascending order.
"""

from __future__ import annotations

import itertools
import random
import struct
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from psyche_lightning.errors import WireError
from psyche_lightning.protocol.messages import MAX_MESSAGE_SIZE
from psyche_lightning.transports.framing import Kind, frame
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import KEY_SIZE

MAX_HOPS = 4
MAX_NAMES = 32
FANOUT = 4  # neighbours that are asked to pass a message on
RECENT = 60.0  # seconds for which a message is repeated on a new link
RECENT_BYTES, RECENT_COUNT = 1 << 20, 512
SEEN_COUNT = 16384  # messages that a node remembers, to act on each of them once
_HEAD = struct.Struct("!QBBB32s")
_NAME = 8

Delivery = tuple[bytes, bytes]
"""A peer, and a frame to send to it."""


@dataclass(frozen=True)
class Rumor:
    """A message that nodes pass on.

    Attributes:
        number: new for each message of its origin.
        hops: how often it may still be passed on.
        private: whether only the named nodes act on it.
        origin: key of the node that wrote it; not proven.
        names: first bytes of the keys of the nodes that have not been reached.
        message: its content.
    """

    number: int
    hops: int
    private: bool
    origin: bytes
    names: tuple[bytes, ...]
    message: bytes

    def frame(self) -> bytes:
        """The whole GOSSIP frame."""
        head = _HEAD.pack(self.number, self.hops, self.private, len(self.names), self.origin)
        return frame(Kind.GOSSIP, head, *self.names, self.message)

    @classmethod
    def decode(cls, body: bytes) -> Rumor:
        """Read the body of a GOSSIP frame.

        Raises:
            WireError: the body is not the canonical encoding of a rumor.
        """
        if len(body) < _HEAD.size:
            raise WireError(f"a GOSSIP frame of {len(body)} bytes; its head alone has {_HEAD.size}")
        number, hops, private, count, origin = _HEAD.unpack_from(body)
        end = _HEAD.size + count * _NAME
        names = tuple(body[at : at + _NAME] for at in range(_HEAD.size, end, _NAME))
        message = body[end:]
        if not 1 <= hops <= MAX_HOPS or private > 1 or count > MAX_NAMES or len(body) < end:
            raise WireError(f"a GOSSIP frame with hops {hops}, private {private}, {count} names in {len(body)} bytes")
        if any(a >= b for a, b in itertools.pairwise(names)) or (private and not names):
            raise WireError("a GOSSIP frame whose names are missing or not in ascending order")
        if len(message) > MAX_MESSAGE_SIZE:
            raise WireError(f"a GOSSIP frame with a message of {len(message)} bytes; at most {MAX_MESSAGE_SIZE}")
        return cls(number, hops, bool(private), origin, names, message)

    @property
    def id(self) -> bytes:
        """Identifies the message, however it got here."""
        return sha256(_HEAD.pack(self.number, 0, self.private, 0, self.origin) + self.message)[:16]


class Gossip:
    """The messages that one node has sent and seen.

    Args:
        own: the node's key.
        rng: chooses numbers and neighbours.
    """

    def __init__(self, own: bytes, rng: random.Random) -> None:
        self._own = own
        self._rng = rng
        self._number = rng.getrandbits(63)
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._recent: OrderedDict[bytes, tuple[float, Rumor]] = OrderedDict()
        self._recent_bytes = 0

    def broadcast(self, message: bytes, now: float, near: Collection[bytes], far: Collection[bytes]) -> list[Delivery]:
        """Send a message to all peers.

        Args:
            message: the message.
            now: seconds.
            near: the peers to which the node is connected.
            far: its other peers.
        """
        rumor = self._new(message, False, far)
        self._remember(rumor, now)
        plain = replace(rumor, names=()).frame()
        helpers = self._choose(near) if far else ()
        return [(peer, rumor.frame() if peer in helpers else plain) for peer in near]

    def send_via_others(self, peer: bytes, message: bytes, now: float, near: Collection[bytes]) -> list[Delivery]:
        """Let others pass a message on to a peer that has no connection; arguments as in :meth:`broadcast`."""
        rumor = self._new(message, True, [peer])
        return [(neighbour, rumor.frame()) for neighbour in self._choose(near)]

    def receive(
        self,
        body: bytes,
        sender: bytes,
        now: float,
        peers: Collection[bytes],
        near: Collection[bytes],
        allow: Callable[[bytes], bool],
        take: Callable[[bytes], bool],
    ) -> list[Delivery]:
        """Act on a GOSSIP frame.

        Args:
            body: body of the frame.
            sender: the peer that sent it.
            now: seconds.
            peers: all peers of the node.
            near: those to which it is connected.
            allow: returns whether to look at the message; it counts as not seen if not, or if this raises.
            take: gives the node the message; returns False if the node refuses it.

        Returns:
            The frames to send.

        Raises:
            WireError: the frame is malformed.
        """
        rumor = Rumor.decode(body)
        if rumor.origin not in peers or rumor.id in self._seen or not allow(rumor.message):
            return []  # a node is not its own peer
        self._seen[rumor.id] = None
        while len(self._seen) > SEEN_COUNT:
            self._seen.popitem(last=False)
        mine = self._own[:_NAME]
        if (not rumor.private or mine in rumor.names) and not take(rumor.message):
            return []
        named = [peer for peer in near if peer[:_NAME] in rumor.names and peer not in (sender, rumor.origin)]
        reached = {mine, *(peer[:_NAME] for peer in named)}
        left = tuple(name for name in rumor.names if name not in reached)
        if left and not rumor.private:
            self._remember(replace(rumor, names=left, hops=1), now)
        helpers: Collection[bytes] = ()
        if left and rumor.hops > 1:
            helpers = self._choose([peer for peer in near if peer not in (sender, rumor.origin)])
        deliveries = []
        for peer in sorted({*named, *helpers}):
            names = (*(left if peer in helpers else ()), *([peer[:_NAME]] if rumor.private and peer in named else ()))
            onward = replace(rumor, names=tuple(sorted(names)), hops=max(1, rumor.hops - 1))
            deliveries.append((peer, onward.frame()))
        return deliveries

    def repeat(self, peer: bytes, now: float) -> list[bytes]:
        """Frames for a peer whose link has just come up: this node's recent messages, and those that name the peer."""
        self._forget(now)
        return [
            replace(rumor, names=(), hops=1).frame()
            for _, rumor in self._recent.values()
            if rumor.origin == self._own or peer[:_NAME] in rumor.names
        ]

    def _new(self, message: bytes, private: bool, far: Collection[bytes]) -> Rumor:
        self._number = (self._number + 1) % (1 << 64)
        names = [peer[:_NAME] for peer in far]
        if len(names) > MAX_NAMES:
            names = self._rng.sample(names, MAX_NAMES)
        return Rumor(self._number, MAX_HOPS, private, self._own, tuple(sorted(set(names))), message)

    def _choose(self, peers: Collection[bytes]) -> Sequence[bytes]:
        return self._rng.sample(sorted(peers), min(FANOUT, len(peers)))

    def _remember(self, rumor: Rumor, now: float) -> None:
        self._recent[rumor.id] = (now, rumor)
        self._recent_bytes += len(rumor.message)
        self._forget(now)

    def _forget(self, now: float) -> None:
        while self._recent:
            then, rumor = next(iter(self._recent.values()))
            full = len(self._recent) > RECENT_COUNT or self._recent_bytes > RECENT_BYTES
            if not full and now - then < RECENT:
                return
            self._recent.popitem(last=False)
            self._recent_bytes -= len(rumor.message)


assert _HEAD.size == 11 + KEY_SIZE
