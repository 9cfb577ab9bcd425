"""One authenticated TCP connection to a peer: messages, pings and blobs, side by side.

Writing goes by turns: everything small that waits, then one piece of one blob, so that a blob never holds up a message
for longer than a piece takes. The kernel is asked to keep little unsent, for the same reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import socket
import struct
from collections import deque
from dataclasses import dataclass, field

from psyche_lightning.errors import TransportError, WireError
from psyche_lightning.transports.base import TransportContext
from psyche_lightning.transports.framing import LIMITS, PIECE_SIZE, Kind, frame, goodbye, goodbye_text, read_frame
from psyche_lightning.transports.meter import ByteMeter
from psyche_lightning.transports.waiting import within
from psyche_lightning.wire.identity import short

MAX_SERVED = 8  # blobs of one peer in memory at a time
MAX_WANTED = 64  # requests of one peer that wait
_OPEN = frozenset(kind for kind in LIMITS if kind not in (Kind.HELLO, Kind.PROOF, Kind.WELCOME))
_REQUEST = struct.Struct("!I")
_FOUND = struct.Struct("!IQ")
_BATCH = 64 * 1024
_log = logging.getLogger(__name__)


class Outbox:
    """Messages that wait for a peer; the oldest gives way.

    Args:
        max_messages: how many wait at most.
        max_bytes: how many bytes they have together at most.
    """

    def __init__(self, max_messages: int = 1024, max_bytes: int = 4 << 20) -> None:
        self._messages: deque[bytes] = deque()
        self._size = 0
        self._max_messages = max_messages
        self._max_bytes = max_bytes

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: bytes) -> None:
        """Add a message."""
        self._messages.append(message)
        self._size += len(message)
        while len(self._messages) > self._max_messages or self._size > self._max_bytes:
            self.pop()

    def pop(self) -> bytes:
        """Take the oldest message."""
        message = self._messages.popleft()
        self._size -= len(message)
        return message


@dataclass
class _Request:
    """A blob that this side asked for."""

    digest: bytes
    max_size: int
    done: asyncio.Future[bytes]
    size: int | None = None
    received: int = 0
    pieces: list[bytes] = field(default_factory=list)
    hash: hashlib._Hash = field(default_factory=hashlib.sha256)


@dataclass
class _Served:
    """A blob on its way to the peer."""

    request: int
    data: memoryview
    sent: int = 0


class Connection:
    """An open connection to one proven peer.

    Args:
        peer: its public key.
        dialled: whether this node made the connection.
        reader: the TLS stream after the handshake.
        writer: the same.
        context: handlers of messages and blobs.
        outbox: the messages for this peer; it outlives the connection.
        meter: what counts the bytes of the socket.
        stall: seconds without progress after which a blob transfer counts as failed.

    Attributes:
        since: loop time at which it was opened.
        heard: loop time of the last complete frame from the peer.
        stuck: loop time since which the peer takes no more bytes, or None.
        round_trip: seconds of the last ping, or None.
        reason: why it is closed, or empty.
    """

    def __init__(
        self,
        peer: bytes,
        dialled: bool,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        context: TransportContext,
        outbox: Outbox,
        meter: ByteMeter,
        stall: float,
    ) -> None:
        self.peer = peer
        self.dialled = dialled
        self.meter = meter
        self.round_trip: float | None = None
        self.reason = ""
        self.stuck: float | None = None
        self._reader = reader
        self._writer = writer
        self._context = context
        self._outbox = outbox
        self._stall = stall
        self._loop = asyncio.get_running_loop()
        self.since = self.heard = self._loop.time()
        self._pinged: float | None = None
        self._ping_next = self.since
        self._control: deque[bytes] = deque()  # what this node asks
        self._answers: deque[bytes] = deque()  # what the peer asked for, apart from pieces
        self._wake = asyncio.Event()
        self._numbers = 0
        self._requests: dict[int, _Request] = {}
        self._slots = asyncio.Semaphore(MAX_SERVED)
        self._last_wanted = 0
        self._wanted: deque[tuple[int, bytes]] = deque()
        self._loading: dict[int, asyncio.Task[None]] = {}
        self._cancelled: set[int] = set()  # requests that are being loaded for nobody
        self._served: deque[_Served] = deque()
        with contextlib.suppress(OSError, AttributeError):
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 2 * PIECE_SIZE)
        writer.transport.set_write_buffer_limits(high=PIECE_SIZE)

    async def run(self) -> None:
        """Serve the connection until it ends; :attr:`reason` says why it did."""
        writing = asyncio.create_task(self._write())
        try:
            while True:
                kind, body = await read_frame(self._reader, _OPEN)
                self.heard = self._loop.time()
                self._handle(kind, body)
        except WireError as error:
            self.close(f"it broke the protocol: {error}")
        except (EOFError, OSError) as error:
            self.close(f"the connection broke ({error.strerror if isinstance(error, OSError) else 'end of stream'})")
        except asyncio.CancelledError:
            self.close("this node stopped")
            raise
        finally:
            tasks = [writing, *self._loading.values()]
            for task in tasks:
                task.cancel()
            for request in self._requests.values():
                if not request.done.done():
                    request.done.set_exception(TransportError(f"was lost: {self.reason}"))
            await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(Exception):
                await within(1.0, self._writer.wait_closed())

    def wake(self) -> None:
        """Say that the outbox has something."""
        self._wake.set()

    def close(self, reason: str) -> None:
        """Tell the peer (if it listens) and end the connection now; the first reason stays."""
        if self.reason:
            return
        self.reason = reason
        if self.stuck is None:
            self._writer.write(goodbye(reason))
        self._writer.transport.abort()

    def ping(self, now: float, interval: float) -> None:
        """Send a ping when the last one was answered and is old enough."""
        if self._pinged is None and now >= self._ping_next:
            self._pinged, self._ping_next = now, now + interval
            self._post(frame(Kind.PING))

    async def fetch(self, digest: bytes, max_size: int, timeout: float) -> bytes:
        """Ask the peer for a blob.

        Raises:
            TransportError: it does not have it, did not deliver it in time, or delivered something else.
        """
        deadline = self._loop.time() + timeout
        try:
            await within(timeout, self._slots.acquire())
        except asyncio.TimeoutError:
            raise TransportError(f"was busy with other requests for {timeout:.1f} s") from None
        self._numbers += 1
        number = self._numbers
        request = _Request(digest, max_size, self._loop.create_future())
        try:
            if self.reason:
                raise TransportError(f"was lost: {self.reason}")
            self._requests[number] = request
            self._post(frame(Kind.WANT, _REQUEST.pack(number), digest))
            await self._progress(request, deadline, timeout)
            return request.done.result()
        finally:
            self._slots.release()
            self._requests.pop(number, None)
            if not request.done.done():
                request.done.cancel()
            if request.size is None or request.received < request.size:
                self._post(frame(Kind.CANCEL, _REQUEST.pack(number)))

    async def _progress(self, request: _Request, deadline: float, timeout: float) -> None:
        """Wait until the request is done, as long as it makes progress."""
        while True:
            before = request.size, request.received
            left = deadline - self._loop.time()
            await asyncio.wait([request.done], timeout=max(0.0, min(left, self._stall)))
            if request.done.done():
                return
            got = f"{request.received} of {request.size} bytes" if request.size is not None else "no answer"
            if self._loop.time() >= deadline:
                raise TransportError(f"took too long ({got} after {timeout:.1f} s)")
            if before == (request.size, request.received):
                raise TransportError(f"stalled ({got}, then nothing for {self._stall:.1f} s)")

    def _post(self, data: bytes) -> None:
        self._control.append(data)
        self._wake.set()

    def _reply(self, kind: Kind, body: bytes = b"") -> None:
        self._answers.append(frame(kind, body))
        self._wake.set()

    def _check_patience(self) -> None:
        if len(self._wanted) > MAX_WANTED or len(self._answers) > 2 * MAX_WANTED:
            raise WireError("it asks for more without reading the answers")

    async def _write(self) -> None:
        """Write what waits, by turns."""
        try:
            while True:
                data = self._next()
                if not data:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                self.stuck = self._loop.time()
                self._writer.write(data)
                await self._writer.drain()
                self.stuck = None
        except OSError as error:
            self.close(f"the connection broke ({error.strerror})")

    def _next(self) -> bytes:
        parts = [*self._control, *self._answers]
        self._control.clear()
        self._answers.clear()
        size = 0
        while self._outbox and size < _BATCH:
            message = self._outbox.pop()
            size += len(message)
            parts.append(frame(Kind.MESSAGE, message))
        if self._served:
            served = self._served.popleft()
            piece = served.data[served.sent : served.sent + PIECE_SIZE]
            parts.append(frame(Kind.PIECE, _REQUEST.pack(served.request), piece))
            served.sent += len(piece)
            if served.sent < len(served.data):
                self._served.append(served)
            else:
                self._load_more()
        return b"".join(parts)

    def _handle(self, kind: int, body: bytes) -> None:
        if kind == Kind.MESSAGE:
            try:
                self._context.on_message(self.peer, body)
            except Exception:
                _log.exception("handling a message from %s failed", short(self.peer))
        elif kind == Kind.PING:
            self._check_patience()
            self._reply(Kind.PONG)
        elif kind == Kind.PONG:
            if self._pinged is not None:
                self.round_trip, self._pinged = self._loop.time() - self._pinged, None
        elif kind == Kind.GOODBYE:
            self.close(f"it said goodbye: {goodbye_text(body)}")
        elif kind == Kind.WANT:
            self._want(_REQUEST.unpack_from(body)[0], body[4:])
        elif kind == Kind.CANCEL:
            self._cancel(_REQUEST.unpack(body)[0])
        else:
            self._answer(kind, body)

    def _answer(self, kind: int, body: bytes) -> None:
        """FOUND, PIECE or ABSENT: something about a request of this side."""
        (number,) = _REQUEST.unpack_from(body)
        if not 0 < number <= self._numbers:
            raise WireError(f"an answer to request {number}, which was never made")
        request = self._requests.get(number)
        if request is None or request.done.done():
            return  # given up meanwhile
        if kind == Kind.ABSENT:
            request.size = 0  # nothing is left to cancel
            request.done.set_exception(TransportError("does not have it"))
            return
        if kind == Kind.FOUND:
            _, size = _FOUND.unpack(body)
            if request.size is not None:
                raise WireError("a blob was announced twice")
            request.size = size
            if size > request.max_size:
                text = f"has {size} bytes, more than the {request.max_size} expected"
                request.done.set_exception(TransportError(text))
                return
        else:
            piece = body[4:]
            if request.size is None or len(piece) != min(PIECE_SIZE, request.size - request.received):
                raise WireError("a piece of a blob has the wrong length")
            request.pieces.append(piece)
            request.hash.update(piece)
            request.received += len(piece)
        if request.received == request.size:
            if request.hash.digest() == request.digest:
                request.done.set_result(b"".join(request.pieces))
            else:
                request.done.set_exception(TransportError("delivered other bytes"))

    def _want(self, number: int, digest: bytes) -> None:
        if number <= self._last_wanted:
            raise WireError(f"request {number} after request {self._last_wanted}")
        self._last_wanted = number
        self._wanted.append((number, digest))
        self._check_patience()
        self._load_more()

    def _load_more(self) -> None:
        while self._wanted and len(self._loading) + len(self._served) < MAX_SERVED:
            number, digest = self._wanted.popleft()
            self._loading[number] = asyncio.create_task(self._load(number, digest))

    async def _load(self, number: int, digest: bytes) -> None:
        """Read a blob, possibly from a slow disk, and begin to send it."""
        try:
            data = await self._loop.run_in_executor(None, self._context.read_blob, digest)
        except Exception:
            _log.exception("reading blob %s failed", short(digest))
            data = None
        finally:
            del self._loading[number]
        if number in self._cancelled:
            self._cancelled.discard(number)
        elif data is None:
            self._reply(Kind.ABSENT, _REQUEST.pack(number))
        else:
            self._reply(Kind.FOUND, _FOUND.pack(number, len(data)))
            self._context.on_served(len(data), len(data))
            if data:
                self._served.append(_Served(number, memoryview(data)))
        self._load_more()

    def _cancel(self, number: int) -> None:
        if number in self._loading:
            self._cancelled.add(number)
        self._wanted = deque(item for item in self._wanted if item[0] != number)
        self._served = deque(item for item in self._served if item.request != number)
        self._load_more()
