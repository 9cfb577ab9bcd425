"""One open connection to an authenticated peer, over any :class:`Pipe`: messages, pings and blobs side by side.

Two lanes keep urgent frames (messages, requests, pings) apart from bulky ones (blocks of blobs). Blobs take turns, one
block each, and go only as fast as the node's limit allows. So a blob never delays a message for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from psyche_lightning.aio import within
from psyche_lightning.errors import AbsentError, TransportError, WireError
from psyche_lightning.transports.base import TransportContext
from psyche_lightning.transports.framing import Kind, Source, frame, goodbye_text, read_frame
from psyche_lightning.transports.limits import FRAME_RATE, FRAME_STORE, PING, Bucket, FloodError
from psyche_lightning.transports.pipe import GoodbyeError, Pipe
from psyche_lightning.transports.throttle import Throttle

MAX_SERVED = 8  # blobs of one peer in memory at a time
MAX_WANTED = 64  # waiting requests of one peer
_NUMBER = struct.Struct("!I")
_WANT = struct.Struct("!I32sQQ")
_FOUND = struct.Struct("!IQ")
_ENOUGH = struct.Struct("!IQ")
_BATCH = 64 * 1024
_log = logging.getLogger(__name__)


class SendQueue:
    """Frames that wait to be sent to a peer; drops the oldest when it is full.

    Args:
        max_frames: the most frames that wait.
        max_bytes: the most bytes that they have together.
    """

    def __init__(self, max_frames: int = 1024, max_bytes: int = 4 << 20) -> None:
        self._frames: deque[bytes] = deque()
        self._size = 0
        self._max_frames = max_frames
        self._max_bytes = max_bytes

    def __len__(self) -> int:
        return len(self._frames)

    def put(self, data: bytes) -> None:
        """Add a frame."""
        self._frames.append(data)
        self._size += len(data)
        while len(self._frames) > self._max_frames or self._size > self._max_bytes:
            self.pop()

    def pop(self) -> bytes:
        """Take the oldest frame."""
        data = self._frames.popleft()
        self._size -= len(data)
        return data


class Part(Protocol):
    """A part of a blob that this node wants, such as :class:`~psyche_lightning.transports.download.Span`."""

    at: int
    end: int
    shortened: Callable[[], None] | None  # called when ``end`` decreases while the part arrives

    @property
    def digest(self) -> bytes:
        """SHA-256 of the whole blob."""
        ...

    def found(self, size: int, now: float) -> bool:
        """Learn the size of the blob. Returns whether the part is still wanted; raises TransportError to refuse it."""
        ...

    def write(self, block: bytes | memoryview, now: float) -> bool:
        """Take the next bytes. Returns whether more are wanted."""
        ...


class BlobReader(Protocol):
    """Reads the blobs that peers ask for."""

    async def read(self, digest: bytes) -> bytes | None:
        """Returns the blob, or None; never raises."""
        ...


class StalledError(TransportError):
    """A peer stopped delivering."""


@dataclass
class _Request:
    """A part of a blob that this node asked for."""

    part: Part
    offset: int
    length: int
    done: asyncio.Future[None]
    expected: int | None = None
    received: int = 0

    @property
    def moved(self) -> tuple[int | None, int]:
        return self.expected, self.received


@dataclass
class _Served:
    """A part of a blob that goes to the peer."""

    number: int
    data: memoryview
    size: int
    sent: int = 0


@dataclass(frozen=True)
class ConnectionContext:
    """What all connections of a node share.

    Attributes:
        context: what the transport got from its node.
        blobs: reads the blobs that peers ask for.
        upload: the limit on sending.
        download: the limit on receiving; downloads of blobs wait for it themselves.
        message: called with ``(peer, message)``; raises FloodError when the peer sends too many.
        gossip: called with ``(peer, body)`` of a GOSSIP frame; raises WireError when the frame is malformed, too.
        handed: called with ``(peer, blob)`` when a peer sends a blob that nobody asked for.
        stall: seconds without progress after which a request fails.
    """

    context: TransportContext
    blobs: BlobReader
    upload: Throttle
    download: Throttle
    message: Callable[[bytes, bytes], None]
    gossip: Callable[[bytes, bytes], None]
    handed: Callable[[bytes, bytes], None]
    stall: float


class Connection:
    """An open connection.

    Args:
        peer: the peer's public key, proven.
        dialled: whether this node opened the connection.
        pipe: carries the bytes.
        queue: frames for this peer; it outlives the connection.
        shared: what all connections of the node share.

    Attributes:
        since: loop time at which the connection was opened.
        heard: loop time of the last complete frame from the peer.
        round_trip: seconds that the last ping took, or None.
        reason: why the connection is closed, or empty.
        offence: whether it is closed because the peer broke the protocol.
        flood: whether it is closed because the peer sent far too much.
    """

    def __init__(self, peer: bytes, dialled: bool, pipe: Pipe, queue: SendQueue, shared: ConnectionContext) -> None:
        self.peer = peer
        self.dialled = dialled
        self.pipe = pipe
        self.round_trip: float | None = None
        self.reason = ""
        self.offence = False
        self.flood = False
        self._queue = queue
        self._shared = shared
        self._loop = asyncio.get_running_loop()
        self.since = self.heard = self._loop.time()
        self._writing: dict[bool, float] = {}  # bulk or not -> when the write that still waits began
        self._pinged: float | None = None
        self._ping_next = self.since
        self._control: deque[bytes] = deque()
        self._answers: deque[bytes] = deque()  # FOUND and ABSENT
        self._urgent = asyncio.Event()
        self._bulk = asyncio.Event()
        self._frames = Bucket(FRAME_RATE, FRAME_STORE, self.since)
        self._numbers = 0
        self._requests: dict[int, _Request] = {}
        self._late = 0  # bytes that may still come for requests that were given up
        self._slots = asyncio.Semaphore(MAX_SERVED)
        self._last_wanted = 0
        self._wanted: deque[tuple[int, bytes, int, int]] = deque()
        self._loading: dict[int, asyncio.Task[None]] = {}
        self._enough: dict[int, int] = {}  # request that is being loaded -> its new length
        self._served: deque[_Served] = deque()

    @property
    def stuck(self) -> float | None:
        """Loop time at which the oldest unfinished write began, or None."""
        return min(self._writing.values(), default=None)

    async def run(self) -> None:
        """Serve the connection until it ends; :attr:`reason` then says why."""
        lanes = [asyncio.create_task(self._read(source, kinds)) for source, kinds in self.pipe.lanes]
        lanes += [asyncio.create_task(self._write_urgent()), asyncio.create_task(self._write_bulk())]
        try:
            await asyncio.wait(lanes, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self.close("this node stopped")
            raise
        finally:
            tasks = [*lanes, *self._loading.values()]
            for task in tasks:
                task.cancel()
            for request in self._requests.values():
                if not request.done.done():
                    request.done.set_exception(TransportError(f"was lost: {self.reason}"))
            await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(Exception):
                await within(1.0, self.pipe.closed())

    def wake(self) -> None:
        """Tell the connection that the queue has frames."""
        self._urgent.set()

    def close(self, reason: str) -> None:
        """Tell the peer why, if possible, and end the connection at once; the first reason stays."""
        if not self.reason:
            self.reason = reason
            self.pipe.close(reason)

    def forgive(self, seconds: float) -> None:
        """Do not count the last ``seconds`` as silence or as being stuck, because this process slept."""
        self.heard += seconds
        self._writing = {lane: since + seconds for lane, since in self._writing.items()}

    def ping(self, now: float, interval: float) -> None:
        """Send a ping if the last one was answered and ``interval`` has passed."""
        if self._pinged is None and now >= self._ping_next:
            self._pinged, self._ping_next = now, now + interval
            self._post(frame(Kind.PING))

    # -- blobs that this node wants -----------------------------------------------------------------------------------

    async def pull(self, part: Part) -> None:
        """Get a part of a blob from the peer, or as much of it as is still wanted.

        Raises:
            TransportError: the peer does not have the blob, stops delivering it, or has one that the part refuses.
        """
        async with self._slots:
            self._numbers += 1
            number = self._numbers
            request = _Request(part, part.at, part.end - part.at, self._loop.create_future())
            try:
                if self.reason:
                    raise TransportError(f"was lost: {self.reason}")
                self._requests[number] = request
                self._post(frame(Kind.WANT, _WANT.pack(number, part.digest, request.offset, request.length)))
                part.shortened = lambda: self._post(
                    frame(Kind.ENOUGH, _ENOUGH.pack(number, max(0, part.end - request.offset)))
                )
                await self._progress(request)
            finally:
                part.shortened = None
                if self._requests.pop(number, None) is not None:
                    asked = request.length if request.expected is None else request.expected
                    self._late += asked - request.received
                if not request.done.done():
                    request.done.cancel()
                if request.expected is None or request.received < request.expected:
                    self._post(frame(Kind.ENOUGH, _ENOUGH.pack(number, 0)))

    async def _progress(self, request: _Request) -> None:
        """Wait until the request is done; give up when it makes no progress."""
        while True:
            before = request.moved
            await asyncio.wait([request.done], timeout=self._shared.stall)
            if request.done.done():
                return request.done.result()
            if before == request.moved:
                got = f"{request.received} of {request.expected} bytes" if request.expected else "no answer"
                raise StalledError(f"stalled ({got}, then nothing for {self._shared.stall:.1f} s)")

    def _answer(self, kind: int, body: bytes) -> None:
        """Handle FOUND, BLOCK or ABSENT, an answer to a request of this node."""
        (number,) = _NUMBER.unpack_from(body)
        if not 0 < number <= self._numbers:
            raise WireError(f"it answered request {number}, which this node never made")
        request = self._requests.get(number)
        if request is None or request.done.done():  # given up in the meantime
            self._late -= len(body) - _NUMBER.size if kind == Kind.BLOCK else 0
            if self._late < -self._outstanding():
                raise WireError("it goes on sending what this node gave up")
            return
        if kind == Kind.ABSENT:
            request.expected = 0  # nothing is left to cancel
            request.done.set_exception(AbsentError("does not have it"))
            return
        if kind == Kind.FOUND:
            _, size = _FOUND.unpack(body)
            if request.expected is not None:
                raise WireError("it announced a blob twice")
            request.expected = min(request.length, max(0, size - request.offset))
            try:
                wanted = request.part.found(size, self._loop.time())
            except TransportError as error:
                request.done.set_exception(error)
                return
        else:
            block = memoryview(body)[_NUMBER.size :]
            if request.expected is None or len(block) > request.expected - request.received:
                raise WireError("it sent a block with a wrong length")
            request.received += len(block)
            wanted = request.part.write(block, self._loop.time())
        if not wanted or request.received == request.expected:
            request.done.set_result(None)

    def _outstanding(self) -> int:
        """Bytes that may still come for requests that are done, whose tasks have not noticed yet."""
        done = [request for request in self._requests.values() if request.done.done()]
        return sum((r.length if r.expected is None else r.expected) - r.received for r in done)

    # -- sending ------------------------------------------------------------------------------------------------------

    def _post(self, data: bytes) -> None:
        self._control.append(data)
        self._urgent.set()

    def _reply(self, kind: Kind, body: bytes) -> None:
        self._answers.append(frame(kind, body))
        self._bulk.set()

    def _check_patience(self) -> None:
        if len(self._wanted) > MAX_WANTED or len(self._control) + len(self._answers) > 4 * MAX_WANTED:
            raise WireError("it asks for more without reading the answers")

    async def _write_urgent(self) -> None:
        while True:
            parts = [*self._control]
            self._control.clear()
            size = 0
            while self._queue and size < _BATCH:
                parts.append(self._queue.pop())
                size += len(parts[-1])
            if not parts:
                self._urgent.clear()
                await self._urgent.wait()
            elif not await self._write(b"".join(parts), bulk=False):
                return

    async def _write_bulk(self) -> None:
        while True:
            data = self._next_bulk()
            if not data:
                self._bulk.clear()
                await self._bulk.wait()
            elif not await self._write(data, bulk=True):
                return

    async def _write(self, data: bytes, *, bulk: bool) -> bool:
        """Write when the limit allows; returns whether the connection is still open."""
        await self._shared.upload.acquire(len(data), urgent=not bulk)
        self._writing[bulk] = self._loop.time()
        try:
            await self.pipe.write(data, bulk=bulk)
        except OSError as error:
            self._lost(error)
            return False
        self._writing.pop(bulk, None)
        return True

    def _next_bulk(self) -> bytes:
        """Waiting answers, and one block of each blob in turn, up to one batch."""
        parts = [*self._answers]
        self._answers.clear()
        most = min(self.pipe.batch, self._shared.upload.batch)
        size = 0
        while self._served and size < most:
            served = self._served.popleft()
            block = served.data[served.sent : served.sent + self._shared.upload.block]
            parts.append(frame(Kind.BLOCK, _NUMBER.pack(served.number), block))
            served.sent += len(block)
            size += len(block)
            self._shared.context.on_served(served.size, len(block))
            if served.sent < len(served.data):
                self._served.append(served)
            else:
                self._load_more()
        return b"".join(parts)

    # -- receiving ----------------------------------------------------------------------------------------------------

    async def _read(self, source: Source, kinds: Collection[int]) -> None:
        try:
            while True:
                kind, body = await read_frame(source, kinds)
                self.heard = self._loop.time()
                self._handle(kind, body)
                if kind != Kind.BLOCK:
                    pause = self._frames.wait(PING if kind in (Kind.PING, Kind.BLOB) else 1.0, self.heard)
                    if pause:
                        await asyncio.sleep(pause)
        except FloodError as error:
            self.offence = self.flood = True
            self.close(f"it floods this node: {error}")
        except WireError as error:
            self.offence = True
            self.close(f"it broke the protocol: {error}")
        except (EOFError, OSError) as error:
            self._lost(error)

    def _lost(self, error: OSError | EOFError) -> None:
        if isinstance(error, GoodbyeError):
            self.close(f"it said goodbye: {error}")
            return
        text = (error.strerror or str(error)) if isinstance(error, OSError) else "end of stream"
        self.close(f"the connection broke ({text})")

    def _handle(self, kind: int, body: bytes) -> None:
        shared = self._shared
        unasked = {Kind.MESSAGE: shared.message, Kind.GOSSIP: shared.gossip, Kind.BLOB: shared.handed}
        if kind in unasked:
            shared.download.charge(len(body))
            unasked[Kind(kind)](self.peer, body)
        elif kind == Kind.PING:
            self._check_patience()
            self._post(frame(Kind.PONG))
        elif kind == Kind.PONG:
            if self._pinged is not None:
                self.round_trip, self._pinged = self._loop.time() - self._pinged, None
        elif kind == Kind.GOODBYE:
            self.close(f"it said goodbye: {goodbye_text(body)}")
        elif kind == Kind.WANT:
            self._want(*_WANT.unpack(body))
        elif kind == Kind.ENOUGH:
            self._shorten(*_ENOUGH.unpack(body))
        else:
            self._answer(kind, body)

    # -- blobs that the peer wants ------------------------------------------------------------------------------------

    def _want(self, number: int, digest: bytes, offset: int, length: int) -> None:
        if number <= self._last_wanted:
            raise WireError(f"it made request {number} after request {self._last_wanted}")
        self._last_wanted = number
        self._wanted.append((number, digest, offset, length))
        self._check_patience()
        self._load_more()

    def _load_more(self) -> None:
        while self._wanted and len(self._loading) + len(self._served) < MAX_SERVED:
            wanted = self._wanted.popleft()
            self._loading[wanted[0]] = asyncio.create_task(self._load(*wanted))

    async def _load(self, number: int, digest: bytes, offset: int, length: int) -> None:
        """Read a blob, perhaps from a slow disk, and start to send the part."""
        try:
            data = await self._shared.blobs.read(digest)
        finally:
            del self._loading[number]
        limit = self._enough.pop(number, length)
        if limit == 0 < length:
            pass  # not wanted any more
        elif data is None:
            self._reply(Kind.ABSENT, _NUMBER.pack(number))
        else:
            self._reply(Kind.FOUND, _FOUND.pack(number, len(data)))
            part = memoryview(data)[offset : offset + min(length, limit)]
            if part:
                self._served.append(_Served(number, part, len(data)))
        self._load_more()

    def _shorten(self, number: int, length: int) -> None:
        if number in self._loading:
            self._enough[number] = min(length, self._enough.get(number, length))
        for item in [item for item in self._wanted if item[0] == number]:
            self._wanted.remove(item)
            if length:
                self._wanted.appendleft((*item[:3], min(length, item[3])))
        for served in self._served:
            if served.number == number:
                served.data = served.data[:length]
        self._served = deque(served for served in self._served if served.sent < len(served.data))
        self._load_more()
