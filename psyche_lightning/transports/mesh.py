"""What the network transports share: one link to each peer, gossip, blobs from several peers, limits, liveness.

Each pair of nodes has one connection for both directions, so one of the two must be reachable. The node with the
smaller key dials at once. The other one dials only if no connection comes for a moment. A newer connection replaces an
older one. But a young connection that the smaller key dialled stays, so that two connections made at the same time do
not end each other.
"""

from __future__ import annotations

import abc
import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Awaitable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from psyche_lightning.aio import is_set_within, within
from psyche_lightning.crowd import network, surplus
from psyche_lightning.errors import TransportError, WireError, cause
from psyche_lightning.logs import next_reminder
from psyche_lightning.text import plain
from psyche_lightning.transports.base import Link, Progress, TransportContext, check_message
from psyche_lightning.transports.cache import KEPT_SECONDS, BlobCache
from psyche_lightning.transports.connection import Connection, ConnectionContext
from psyche_lightning.transports.download import Download, DownloadAttempt
from psyche_lightning.transports.framing import MAX_HANDED, MAX_HANDED_OUT, Kind, frame
from psyche_lightning.transports.gossip import Gossip
from psyche_lightning.transports.handshake import RefusedError, UnwelcomeError
from psyche_lightning.transports.limits import Allowance, Bucket, Quarantine, Said
from psyche_lightning.transports.meter import ByteMeter
from psyche_lightning.transports.peer import Peer
from psyche_lightning.transports.pipe import Pipe
from psyche_lightning.transports.reach import Reach
from psyche_lightning.transports.throttle import Throttle
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import KEY_SIZE, short

MAX_ARRIVING = 256  # connections that have not proved their key
MAX_ARRIVING_OF_HOST = 64  # of these from one address
ARRIVAL_RATE, ARRIVAL_STORE = 10.0, 256.0  # connections of one address in a second, and in advance
MAX_HOSTS = 4096  # addresses whose connections are counted
GRACE = 2.0  # seconds that the node with the larger key waits for the other to dial
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0  # seconds between attempts to connect
PARTIAL_BYTES = 256 << 20  # bytes of incomplete blobs that are kept for the next attempt
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class MeshTransport(abc.ABC):
    """A :class:`~psyche_lightning.transports.base.Transport` over connections, which a subclass makes.

    Args:
        meter: counts all bytes, also those of refused strangers; a new one by default.
        upload: bytes a second that this node sends at most; None for no limit.
        download: bytes a second that it receives at most; None for no limit.
        rng: spreads the attempts to reconnect, and chooses who passes messages on.
        ping_interval: seconds between pings on each link.
        silence: seconds after which a peer that sends nothing or takes nothing is disconnected.
        handshake_timeout: seconds in which a new connection must prove its key.
        overhead: bytes on the wire for each byte, headers included.

    Raises:
        ConfigError: a limit is not a positive number.
    """

    def __init__(
        self,
        *,
        meter: ByteMeter | None = None,
        upload: float | None = None,
        download: float | None = None,
        rng: random.Random | None = None,
        ping_interval: float = 5.0,
        silence: float = 20.0,
        handshake_timeout: float = 10.0,
        overhead: float = 1.0,
    ) -> None:
        self._meter = meter or ByteMeter()
        self._upload = Throttle(upload, overhead=overhead, what="upload")
        self._download = Throttle(download, overhead=overhead, what="download")
        self._rng = rng or random.Random()
        self._ping_interval = ping_interval
        self._silence = silence
        self._handshake_timeout = handshake_timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running = False
        self._context: TransportContext | None = None
        self._shared: ConnectionContext | None = None
        self._gossip: Gossip | None = None
        self._cache: BlobCache | None = None
        self._peers: dict[bytes, Peer] = {}
        self._said = Said()
        self._allowances: list[Allowance] = []
        self._quarantine = Quarantine()
        self._reach = Reach(())
        self._partial: OrderedDict[bytes, Download] = OrderedDict()
        self._arriving: dict[asyncio.Task[None], str] = {}  # in order of arrival, with their hosts
        self._arrivals: OrderedDict[str, Bucket] = OrderedDict()  # by host
        self._tasks: set[asyncio.Task[None]] = set()
        self._complaints: dict[str, tuple[float, float]] = {}  # who -> when it began, and when to say it again

    @property
    def meter(self) -> ByteMeter:
        """Counts all bytes."""
        return self._meter

    # -- what a subclass does -----------------------------------------------------------------------------------------

    @abc.abstractmethod
    async def _open(self, context: TransportContext) -> str:
        """Start to listen, give each new connection to :meth:`_arrive`, and return the node's address.

        It also sets ``self._reach``.

        Raises:
            TransportError: it cannot listen.
        """

    @abc.abstractmethod
    async def _dial(self, key: bytes, address: str, meter: ByteMeter) -> Pipe:
        """Connect to a peer, prove this node's key in this run, and have the peer prove its own.

        It has ``self._reach`` check each IP address before it sends anything there.

        Raises:
            TransportError, WireError, OSError, EOFError: the attempt failed.
        """
        ...

    @abc.abstractmethod
    def _hosts(self, address: str) -> Collection[str]:
        """The IP addresses and names in a peer's address; none if it is malformed."""

    @abc.abstractmethod
    async def _shut(self) -> None:
        """Stop listening. Called once all connections are closed, perhaps without an :meth:`_open` before."""

    # -- the contract -------------------------------------------------------------------------------------------------

    async def start(self, context: TransportContext) -> str:
        """See the contract."""
        if self._loop is not None:
            raise TransportError("this transport was started before; make a new one")
        self._loop = asyncio.get_running_loop()
        self._context = context
        self._cache = BlobCache(context.read_blob)
        self._gossip = Gossip(context.identity.public, self._rng)
        self._shared = ConnectionContext(
            context,
            self._cache,
            self._upload,
            self._download,
            self._told,
            self._heard,
            self._handed,
            stall=self._silence / 2,
        )
        address = await self._open(context)
        self._running = True
        self._spawn(self._maintain())
        peers, self._peers = self._peers, {}
        self.set_peers({key: peer.address for key, peer in peers.items()})
        return address

    def set_peers(self, peers: Mapping[bytes, str]) -> None:
        """See the contract."""
        own = self._context.identity.public if self._context else None
        now = self._now() if self._loop is not None else 0.0
        self._reach.learn([self._hosts(address) for key, address in peers.items() if key != own])
        for key in [key for key in self._peers if key not in peers]:
            peer = self._peers.pop(key)
            if peer.dialler is not None:
                peer.dialler.cancel()
            if peer.connection is not None:
                peer.connection.close("you are no longer a peer in this run")
        for key, address in peers.items():
            if key != own:
                self._peers[key] = self._peers.get(key) or Peer(key, address, self._said, now)
        self._allowances = [peer.allowance for peer in self._peers.values()]
        for key, peer in self._peers.items():
            address = peers[key]
            if not self._running or (peer.dialler is not None and peer.address == address):
                continue
            peer.address, pause = address, 0.0
            if peer.dialler is not None:
                peer.dialler.cancel()
                pause = peer.moves.wait(1.0, now)
            peer.dialler = self._spawn(self._keep_linked(peer, pause))

    def send(self, peer: bytes, message: bytes) -> None:
        """See the contract. An unconnected peer gets the message once it is connected, and at once through others."""
        check_message(message)
        known = self._peers.get(peer)
        if known is None:
            return
        if self._context is not None and message[:KEY_SIZE] == self._context.identity.public:
            self._said.note(message, 1 / len(self._peers))
        known.put(frame(Kind.MESSAGE, message))
        if known.connection is None and self._gossip is not None:
            self._deliver(self._gossip.send_via_others(peer, bytes(message), self._now(), self._near()))

    def broadcast(self, message: bytes) -> None:
        """See the contract. The message also reaches peers to which only others are connected."""
        check_message(message)
        if self._gossip is not None and self._running:
            near = self._near()
            self._said.note(message)
            self._deliver(self._gossip.broadcast(bytes(message), self._now(), near, self._peers.keys() - near))

    def hand_out(self, blob: bytes) -> None:
        """See the contract. Large blobs, and those for many peers, wait until they are asked for: others share that."""
        near = self._near()
        if self._context is None or not 0 < len(blob) <= min(MAX_HANDED, MAX_HANDED_OUT // max(1, len(near))):
            return
        data = frame(Kind.BLOB, blob)
        for key in near:
            self._peers[key].put(data)
            self._context.on_served(len(blob), len(blob))

    async def fetch(
        self,
        digest: bytes,
        providers: Sequence[bytes],
        *,
        max_size: int,
        timeout: float,
        progress: Progress | None = None,
    ) -> bytes:
        """See the contract.

        A blob that one of them handed out is here. Else it first asks those that are connected and whose blobs came
        fastest before; takes a large blob from several at once. Keeps the bytes of a blob that nobody completed for the
        next attempt.
        """
        unknown = [key for key in providers if key not in self._peers]
        if not self._running:
            raise TransportError(f"nobody delivered blob {short(digest)}: this node's transport is not running")
        known = [self._peers[key] for key in dict.fromkeys(providers) if key in self._peers]
        for peer in known:
            for its, blob in peer.handed:
                if its == digest and len(blob) <= max_size:
                    if progress is not None:
                        progress(len(blob), len(blob))
                    return blob
        download = self._partial.pop(digest, None)
        if download is None or download.size is None or download.size > max_size:
            download = Download(digest, max_size)
        known.sort(key=lambda peer: peer.rank(download.max_size))
        fetch = DownloadAttempt(download, known, timeout, self._download, progress)
        try:
            return await fetch.run()
        except TransportError as error:
            if not unknown:
                raise
            text = "".join(f"; {short(key)} is not a peer" for key in unknown)
            raise TransportError(f"{error}{text}") from None
        finally:
            if not download.complete and download.received:
                self._keep(download)

    def links(self) -> list[Link]:
        """See the contract; may be called from any thread."""
        now = self._now() if self._loop is not None else 0.0
        return [peer.link(now) for peer in list(self._peers.values())]

    async def stop(self) -> None:
        """See the contract."""
        self._running = False
        for peer in self._peers.values():
            peer.reason = "this node stopped"
            peer.up.set()  # wakes those who wait for it
        for _ in range(4):  # a library that we use may lose a cancellation
            tasks = [*self._tasks, *self._arriving]
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=0.5)
        self._upload.close()
        self._download.close()
        self._partial.clear()
        await self._shut()

    # -- messages -----------------------------------------------------------------------------------------------------

    def _near(self) -> set[bytes]:
        return {key for key, peer in self._peers.items() if peer.connection is not None}

    def _deliver(self, deliveries: Iterable[tuple[bytes, bytes]]) -> None:
        for key, data in deliveries:
            self._peers[key].put(data)

    def _heard(self, sender: bytes, body: bytes) -> None:
        """Act on a GOSSIP frame; raises WireError when it is malformed or one too many."""
        peer = self._peers.get(sender)
        if peer is None or self._gossip is None:
            return
        near, known = self._near(), self._peers.keys()
        allow, take = partial(self._allow, peer), partial(self._take, peer)
        self._deliver(self._gossip.receive(body, sender, self._now(), known, near, allow, take))

    def _told(self, sender: bytes, message: bytes) -> None:
        """Act on a MESSAGE frame; raises FloodError when it is one too many."""
        peer = self._peers.get(sender)
        if peer is not None and self._allow(peer, message):
            self._take(peer, message)

    def _allow(self, peer: Peer, message: bytes) -> bool:
        return peer.allowance.take(message, self._now(), self._allowances)

    def _take(self, peer: Peer, message: bytes) -> bool:
        assert self._context is not None
        try:
            good = self._context.on_message(peer.key, message) is not False
        except Exception:
            _log.exception("handling a message from %s failed", short(peer.key))
            return True
        if not good:
            peer.allowance.refused(message)
        return good

    def _handed(self, sender: bytes, blob: bytes) -> None:
        """Keep a blob that came unasked for the fetch that may follow."""
        peer = self._peers.get(sender)
        if peer is not None:
            peer.handed.append((sha256(blob), blob))

    # -- blobs --------------------------------------------------------------------------------------------------------

    def _keep(self, download: Download) -> None:
        self._partial[download.digest] = download
        while sum(one.received for one in self._partial.values()) > PARTIAL_BYTES:
            self._partial.popitem(last=False)

    # -- links --------------------------------------------------------------------------------------------------------

    async def _keep_linked(self, peer: Peer, pause: float) -> None:
        """Dial while there is no connection, with growing pauses, and the first time after ``pause`` seconds."""
        if pause:
            await asyncio.sleep(pause)
        patient = self._context is not None and self._context.identity.public > peer.key
        attempts = 0
        while self._running:
            if peer.connection is not None:
                begun = self._now()
                await peer.down.wait()
                attempts = 0 if self._now() - begun > self._ping_interval else attempts + 1
            if (left := self._quarantine.left(peer.key, self._now())) > 0:
                peer.reason = f"kept away for {left:.0f} s: {peer.lost}"
                await asyncio.sleep(left)
                continue
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(attempts - 1, 10)) if attempts else 0.0
            pause = pause * self._rng.uniform(0.5, 1.5) + (GRACE * self._rng.uniform(1.0, 1.5) if patient else 0.0)
            if pause and await is_set_within(peer.up, pause):
                continue
            meter, dialled = ByteMeter(self._meter), self._now()
            try:
                pipe = await self._timed(self._dial(peer.key, peer.address, meter))
            except (TransportError, WireError, OSError, EOFError) as error:
                peer.absorb(meter)
                peer.answered = self._now() - dialled if isinstance(error, RefusedError) else None
                peer.tried = True
                attempts += 1
                if peer.connection is None:
                    peer.reason = f"cannot connect to {plain(peer.address[:100])}: {reason(error)}"
                    if peer.lost:
                        peer.reason += f" (the last connection ended: {peer.lost})"
                    if peer.answered is None:
                        peer.outage.fails(peer.reason)
                    else:  # it is there, and does not count this node in, yet or any more
                        _log.debug("%s: %s", short(peer.key), peer.reason)
            else:
                self._adopt(peer, pipe, dialled=True)

    def _adopt(self, peer: Peer, pipe: Pipe, *, dialled: bool) -> None:
        """Make an authenticated connection the link of its peer."""
        assert self._shared is not None
        assert self._gossip is not None
        connection = Connection(peer.key, dialled, pipe, peer.queue, self._shared)
        self._spawn(self._serve(peer, connection))
        if not self._running or self._peers.get(peer.key) is not peer:
            connection.close("you are no longer a peer in this run")
            return
        old, peer.connection, peer.tried = peer.connection, connection, True
        if old is not None:
            old.close("a newer connection replaced it")
        for data in self._gossip.repeat(peer.key, self._now()):
            peer.put(data)
        peer.down.clear()
        peer.up.set()
        _log.debug("%s is connected (%s)", short(peer.key), pipe.path())
        peer.outage.works()

    async def _serve(self, peer: Peer, connection: Connection) -> None:
        try:
            await connection.run()
        finally:
            peer.absorb(connection.pipe.meter)
            peer.seen = max(peer.seen or 0.0, connection.heard)
            kept = f"; kept away for {self._quarantine.begin(peer.key, self._now()):g} s" if connection.flood else ""
            if connection.offence:
                self._complain(short(peer.key), connection.reason + kept)
            if peer.connection is connection:
                peer.connection = None
                peer.reason = peer.lost = connection.reason
                peer.up.clear()
                peer.down.set()
                if self._running and self._peers.get(peer.key) is peer:
                    peer.outage.fails(connection.reason)

    # -- arrivals -----------------------------------------------------------------------------------------------------

    def _arrive(self, admission: Awaitable[tuple[bytes, Pipe]], origin: str) -> None:
        """Run the handshake of a new connection.

        When too many are open, the oldest of the host that has most is ended: an honest node is quick.

        Args:
            admission: proves the peer's key; fails like :meth:`_dial`.
            origin: where the connection comes from.
        """
        host = network(origin.rpartition(":")[0])
        oldest = surplus(self._arriving, host, MAX_ARRIVING, MAX_ARRIVING_OF_HOST)
        if oldest is not None:
            worst = self._arriving.pop(oldest)
            self._end(oldest)
            self._complain(worst, "too many connections that do not prove their key; the oldest is closed")
        task = asyncio.create_task(self._receive(admission, origin))
        self._arriving[task] = host
        task.add_done_callback(lambda done: self._arriving.pop(done, None))

    def _welcome(self, host: str) -> bool:
        """Whether a new connection from a host is worth a handshake, which costs: False if it makes too many."""
        host = network(host)
        bucket = self._arrivals.pop(host, None) or Bucket(ARRIVAL_RATE, ARRIVAL_STORE, self._now())
        self._arrivals[host] = bucket
        while len(self._arrivals) > MAX_HOSTS:
            self._arrivals.popitem(last=False)
        bucket.fill(self._now())
        if bucket.left < 1:
            self._complain(host, f"more than {ARRIVAL_RATE:g} connections a second")
            return False
        bucket.left -= 1
        return True

    def _crowded(self, host: str) -> bool:
        """Whether a host has made half of the connections that it may make in advance."""
        bucket = self._arrivals.get(network(host))
        if bucket is not None:
            bucket.fill(self._now())
        return bucket is not None and bucket.left < ARRIVAL_STORE / 2

    async def _receive(self, admission: Awaitable[tuple[bytes, Pipe]], origin: str) -> None:
        try:
            key, pipe = await self._timed(admission)
        except UnwelcomeError as error:  # peers learn of each other at different times
            _log.debug("refused a connection from %s: %s", origin, error)
        except (TransportError, WireError, OSError, EOFError) as error:
            self._complain(origin.rpartition(":")[0], f"refused a connection: {reason(error)}")
        else:
            if key in self._peers:
                self._adopt(self._peers[key], pipe, dialled=False)
            else:
                pipe.close("you are no longer a peer in this run")

    def _objection(self, key: bytes) -> str | None:
        """Why a node with this key is refused, or None."""
        peer = self._peers.get(key)
        if peer is None or self._context is None:
            return "you are not a peer in this run"
        left = self._quarantine.left(key, self._now())
        if left > 0:
            return f"you flooded this node, which talks to you again in {left:.0f} s"
        old, own = peer.connection, self._context.identity.public
        young = old is not None and self._now() - old.since < 2 * GRACE
        if old is not None and young and old.dialled and own < key:
            return "a connection to you was made at the same time"
        return None

    def _complain(self, who: str, what: str) -> None:
        """Log who misbehaves, but not again and again."""
        now = self._now()
        began, due = self._complaints.get(who, (now, now))
        if now < due:
            _log.debug("%s: %s", who, what)
            return
        if len(self._complaints) >= 1024:
            self._complaints.clear()
        self._complaints[who] = began, began + next_reminder(now - began)
        _log.warning("%s: %s", who, what)

    # -- maintenance --------------------------------------------------------------------------------------------------

    async def _maintain(self) -> None:
        """Ping, close links that send nothing or take nothing, and drop old blobs."""
        period = min(1.0, self._ping_interval / 2)
        last = self._now()
        while True:
            await asyncio.sleep(period)
            now = self._now()
            late, last = now - last - period, now
            assert self._cache is not None
            self._cache.forget(now - KEPT_SECONDS)
            for peer in self._peers.values():
                connection = peer.connection
                if connection is None:
                    continue
                if late > period:  # this process slept, and has not yet read what came
                    connection.forgive(late)
                if now - connection.heard > self._silence:
                    connection.close(f"silent for {self._silence:g} s")
                elif connection.stuck is not None and now - connection.stuck > self._silence:
                    connection.close(f"took no bytes for {self._silence:g} s")
                else:
                    connection.ping(now, self._ping_interval)

    def _now(self) -> float:
        assert self._loop is not None
        return self._loop.time()

    async def _timed(self, handshake: Awaitable[_T]) -> _T:
        try:
            return await within(self._handshake_timeout, handshake)
        except asyncio.TimeoutError:
            raise TransportError(f"no connection within {self._handshake_timeout:g} s") from None

    def _end(self, task: asyncio.Task[None]) -> None:
        task.cancel()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def reason(error: Exception) -> str:
    """The text of an error, in few words."""
    if isinstance(error, OSError):
        return cause(error)
    if isinstance(error, EOFError):
        return "the connection was closed during the handshake"
    return str(error)
