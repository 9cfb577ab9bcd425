"""Measures the link between two machines by two doctors, before there is a run.

One doctor listens and prints an invitation, ``ADDRESS#SECRET``; the other one dials it. The keys of both follow from
the secret. So each proves with the transport's own handshake that it holds the invitation, and nobody else gets in.
Both sides limit the traffic: the caller by what it requests, the listener by what it grants.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from psyche_lightning.errors import ConfigError, TransportError, WireError
from psyche_lightning.transports.base import Link, Transport, TransportContext
from psyche_lightning.wire.canonical import pack, sha256, unpack
from psyche_lightning.wire.identity import Identity

logger = logging.getLogger(__name__)

SECRET_SIZE = 16
CONNECT_SECONDS = 20.0
ANSWER_SECONDS = 5.0
PINGS = 12
FIRST_BLOB = 256_000
MOST_BYTES, MOST_SECONDS = 1_000_000_000, 120.0
"""The most that a listener grants, whatever the caller requests."""
BACK_SECONDS = 10.0
_MESSAGE_SIZE = 4096
_POLL = 0.02

MakeTransport = Callable[[], Transport]
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Invitation:
    """The address of a listening doctor, and the secret by which the two know each other.

    Attributes:
        address: the transport's address.
        secret: random bytes.
    """

    address: str
    secret: bytes

    def __str__(self) -> str:
        return f"{self.address}#{self.secret.hex()}"

    @classmethod
    def parse(cls, text: str) -> Invitation:
        """Read the text that the other doctor printed.

        Raises:
            ConfigError: it is not an invitation.
        """
        address, mark, secret = text.strip().rpartition("#")
        try:
            raw = bytes.fromhex(secret)
        except ValueError:
            raw = b""
        if not mark or "://" not in address or len(raw) != SECRET_SIZE:
            raise ConfigError(
                f"{text[:100]!r} is not an invitation; run `psyche doctor --listen` on the other machine and copy what "
                "it prints, such as tcp://192.168.1.11:4000#0123... (in quotes)"
            )
        return cls(address, raw)

    @property
    def scheme(self) -> str:
        """The transport's name in the address."""
        return self.address.partition("://")[0]

    @property
    def run_id(self) -> str:
        """A name that takes the place of a run's name."""
        return f"doctor-{sha256(b'run' + self.secret)[:8].hex()}"

    def identity(self, role: str) -> Identity:
        """The key of the ``listener``, of the ``caller``, or the ``second`` key of the listener, which dials back."""
        return Identity(sha256(b"psyche-lightning doctor 1 " + role.encode() + b" " + self.secret))


@dataclass(frozen=True)
class MeasuredLink:
    """A link as the caller sees it; rates in bytes a second, times in seconds.

    Attributes:
        address: where the peer listens.
        path: the transport's word for the path, such as ``"direct"``.
        round_trip: median round trip of small messages.
        upload: rate to the peer; None if nothing arrived in time.
        download: rate from the peer; None if nothing arrived in time.
        clock_offset: how far the peer's clock is ahead.
        clock_uncertainty: how far off the offset may be.
        own_address: where this machine listens.
        called_back: the path by which the peer reached that address; empty if it could not, None if it could not try.
        why_not: why the peer could not reach it, or could not try.
    """

    address: str
    path: str
    round_trip: float
    upload: float | None
    download: float | None
    clock_offset: float
    clock_uncertainty: float
    own_address: str
    called_back: str | None
    why_not: str = ""


def new_secret() -> bytes:
    """A secret for which the caller's key is the smaller one, so that the caller dials at once."""
    while True:
        secret = os.urandom(SECRET_SIZE)
        invitation = Invitation("", secret)
        if invitation.identity("caller").public < invitation.identity("listener").public:
            return secret


# -- the caller -------------------------------------------------------------------------------------------------------


@dataclass
class _Caller:
    """Sends requests to the listener, and matches answers to them."""

    transport: Transport
    peer: bytes
    answers: dict[int, asyncio.Future[list[Any]]] = field(default_factory=dict)
    number: int = 0

    def hear(self, peer: bytes, message: bytes) -> bool:
        """Take an answer."""
        try:
            number, *rest = _open(message)
        except WireError:
            return False
        waiting = self.answers.pop(number, None)
        if peer == self.peer and waiting is not None and not waiting.done():
            waiting.set_result(rest)
        return True

    async def ask(
        self,
        what: str,
        *arguments: Any,
        kinds: tuple[type, ...],
        seconds: float = ANSWER_SECONDS,
        least: int | None = None,
    ) -> list[Any]:
        """Send a request, and wait for its answer, whose values have these types.

        Another release may say more, which is left out.

        Args:
            what: the request.
            *arguments: its values.
            kinds: types of the answer's values.
            seconds: the most seconds to wait.
            least: how many of them must be there, as an earlier release may say less; by default all.

        Raises:
            TransportError: no answer came, or one of another form.
        """
        self.number += 1
        number, answer = self.number, asyncio.get_running_loop().create_future()
        self.answers[number] = answer
        self.transport.send(self.peer, pack([number, what, *arguments]))
        try:
            values: list[Any] = await asyncio.wait_for(answer, seconds)
        except asyncio.TimeoutError:
            raise TransportError(f"the other doctor did not answer ({what}) within {seconds:g} s") from None
        values = values[: len(kinds)]
        enough = len(values) >= (len(kinds) if least is None else least)
        if not enough or any(type(value) is not kind for value, kind in zip(values, kinds, strict=False)):
            raise TransportError(f"the other doctor sent a malformed answer ({what}); does it have the same version?")
        return values


async def call(
    make: MakeTransport,
    invitation: Invitation,
    *,
    most_bytes: int,
    seconds: float,
    progress: Progress = lambda what, done: None,
) -> MeasuredLink:
    """Measure the link to a listening doctor.

    Args:
        make: makes the transport with this machine's options.
        invitation: the other doctor's invitation.
        most_bytes: the most bytes to send each way.
        seconds: the most seconds for each way.
        progress: called with what is measured, and the fraction of it that is done.

    Raises:
        TransportError: this machine cannot listen, or the other one cannot be reached or stops answering.
    """
    transport, blobs = make(), _Blobs()
    caller = _Caller(transport, invitation.identity("listener").public)
    context = TransportContext(invitation.identity("caller"), invitation.run_id, caller.hear, blobs.get)
    try:
        own = await transport.start(context)
        progress("connecting", 0.0)
        # The second key has no address: only the listener can dial with it.
        transport.set_peers({caller.peer: invitation.address, invitation.identity("second").public: ""})
        link = await _connected(transport, caller.peer, CONNECT_SECONDS)
        if not link.connected:
            raise TransportError(
                f"cannot reach the other doctor: {link.reason}. Is `psyche doctor --listen` running there, with an "
                "address that this machine can reach?"
            )
        trips, offset, uncertainty = await _ping(caller, progress)
        download = await _download(caller, most_bytes, seconds, progress)
        upload = await _upload(caller, blobs, most_bytes, seconds, progress)
        progress("dialling back", 0.0)
        back, why_not, *tried = await caller.ask(
            "call", own, kinds=(str, str, bool), least=2, seconds=BACK_SECONDS + ANSWER_SECONDS
        )
        link = next(one for one in transport.links() if one.peer == caller.peer)
        return MeasuredLink(
            address=invitation.address,
            path=link.path or "connected",
            round_trip=statistics.median(trips),
            upload=upload,
            download=download,
            clock_offset=offset,
            clock_uncertainty=uncertainty,
            own_address=own,
            called_back=None if tried == [False] else back,
            why_not=why_not,
        )
    finally:
        await transport.stop()


async def _ping(caller: _Caller, progress: Progress) -> tuple[list[float], float, float]:
    """Round trips, and offset and uncertainty of the other clock, by the fastest of them."""
    found = []
    for number in range(PINGS):
        progress("latency", number / PINGS)
        sent = time.time()
        began = time.perf_counter()
        (theirs,) = await caller.ask("ping", kinds=(int,))
        trip = time.perf_counter() - began
        found.append((trip, theirs / 1e6 - (sent + trip / 2)))
    quickest = min(found)
    return [trip for trip, _ in found], quickest[1], quickest[0] / 2


async def _download(caller: _Caller, most_bytes: int, seconds: float, progress: Progress) -> float | None:
    """Bytes a second from the peer, measured with a small blob and then with one whose size fits the rate."""
    rate, spent = None, 0.0
    for size in _sizes(most_bytes):
        wanted = size(rate, seconds - spent)
        if wanted <= 0:
            break
        (digest,) = await caller.ask("give", wanted, kinds=(bytes,))
        got, took = await _fetch(
            caller.transport, digest, caller.peer, wanted, seconds - spent, lambda part: progress("download", part)
        )
        rate = got / took if got else rate
        spent += took
        if got < wanted:
            break
    return rate


async def _upload(caller: _Caller, blobs: _Blobs, most_bytes: int, seconds: float, progress: Progress) -> float | None:
    """Bytes a second to the peer, as the peer counts what arrives."""
    rate, spent = None, 0.0
    for number, size in enumerate(_sizes(most_bytes)):
        wanted = size(rate, seconds - spent)
        if wanted <= 0:
            break
        progress("upload", number / 2)
        digest = await blobs.make(wanted)
        left = seconds - spent
        got, micros = await caller.ask(
            "take", digest, wanted, round(1e3 * left), kinds=(int, int), seconds=left + ANSWER_SECONDS
        )
        took = max(micros / 1e6, 1e-6)
        rate = got / took if got else rate
        spent += took
        if got < wanted:
            break
    return rate


def _sizes(most_bytes: int) -> list[Callable[[float | None, float], int]]:
    """Functions for the size of the first and the second blob, from the first one's rate and the seconds left."""
    return [
        lambda rate, left: min(FIRST_BLOB, most_bytes),
        lambda rate, left: 0 if rate is None or left <= 0 else min(most_bytes - FIRST_BLOB, int(0.7 * rate * left)),
    ]


# -- the listener -----------------------------------------------------------------------------------------------------


async def listen(
    make: MakeTransport, make_back: MakeTransport, announce: Callable[[Invitation], None], stop: asyncio.Event
) -> None:
    """Be the other end for a doctor that has the invitation, until told to stop.

    Args:
        make: makes the transport with this machine's options.
        make_back: makes another one beside it, on a port of its own, which dials back.
        announce: called with the invitation.
        stop: ends it when set.

    Raises:
        TransportError: this machine cannot listen.
    """
    secret = new_secret()
    shared = Invitation("", secret)
    transport, caller = make(), shared.identity("caller").public
    listener = _Listener(transport, make_back, shared)
    context = TransportContext(shared.identity("listener"), shared.run_id, listener.hear, listener.blobs.get)
    try:
        address = await transport.start(context)
        transport.set_peers({caller: ""})
        announce(Invitation(address, secret))
        there = False
        while not stop.is_set():
            link = next(iter(transport.links()))
            if link.connected != there:
                there = link.connected
                if there:
                    logger.info("the other doctor is connected (%s)", link.path or "connected")
                else:
                    logger.info("the other doctor has left")
            await _within(_POLL * 10, stop)
    finally:
        listener.close()
        await transport.stop()


class _Listener:
    """Answers the requests of one caller, one after another."""

    def __init__(self, transport: Transport, make_back: MakeTransport, shared: Invitation) -> None:
        self.blobs = _Blobs()
        self._transport = transport
        self._make_back = make_back
        self._shared = shared
        self._busy: asyncio.Task[None] | None = None

    def hear(self, peer: bytes, message: bytes) -> bool:
        """Take a request; drops one that comes while another one is in progress."""
        try:
            number, what, *arguments = _open(message)
        except (WireError, ValueError):
            return False
        if self._busy is not None and not self._busy.done():
            return True
        known: dict[str, Callable[..., Any]] = {
            "ping": self._ping, "give": self._give, "take": self._take, "call": self._call
        }  # fmt: skip
        if what not in known:
            return False
        work = known[what]
        self._busy = asyncio.ensure_future(self._work(peer, number, work, arguments))
        return True

    def close(self) -> None:
        """Stop the request in progress."""
        if self._busy is not None:
            self._busy.cancel()

    async def _work(self, peer: bytes, number: int, work: Callable[..., Any], arguments: list[Any]) -> None:
        try:
            answer = await work(peer, *arguments)
        except (TypeError, ValueError):  # a doctor does not send such values
            return
        self._transport.send(peer, pack([number, *answer]))

    # A later release may send more than these values.

    async def _ping(self, peer: bytes, *_: Any) -> list[Any]:
        return [round(1e6 * time.time())]

    async def _give(self, peer: bytes, size: int, *_: Any) -> list[Any]:
        return [await self.blobs.make(_bounded(size, MOST_BYTES))]

    async def _take(self, peer: bytes, digest: bytes, size: int, millis: int, *_: Any) -> list[Any]:
        if not isinstance(digest, bytes) or len(digest) != 32:
            raise ValueError(digest)
        seconds = _bounded(millis, int(1e3 * MOST_SECONDS)) / 1e3
        got, took = await _fetch(self._transport, digest, peer, _bounded(size, MOST_BYTES), seconds)
        if got:
            logger.info("received %.1f MB at %.2f MB/s", got / 1e6, got / took / 1e6)
        return [got, round(1e6 * took)]

    async def _call(self, peer: bytes, address: str, *_: Any) -> list[Any]:
        transport = self._make_back()
        context = TransportContext(
            self._shared.identity("second"), self._shared.run_id, lambda peer, message: True, lambda digest: None
        )
        try:
            try:
                await transport.start(context)
            except TransportError as error:  # this machine's trouble, not the caller's
                logger.warning("cannot dial back: %s", error)
                return ["", str(error)[:500], False]
            transport.set_peers({peer: str(address)})
            link = await _connected(transport, peer, BACK_SECONDS)
        except TransportError as error:
            return ["", str(error)[:500], True]
        finally:
            await transport.stop()
        found = (link.path or "connected") if link.connected else ""
        found_out = f"is reachable from here ({found})" if found else "is not reachable"
        logger.info("their address %s %s", address[:100], found_out)
        return [found, link.reason[:500], True]


# -- both sides -------------------------------------------------------------------------------------------------------


class _Blobs:
    """Holds the last blob that was made."""

    def __init__(self) -> None:
        self._kept: tuple[bytes, bytes] = b"", b""

    async def make(self, size: int) -> bytes:
        """Make a blob of random bytes, which nothing can compress. Returns its hash."""

        def fresh() -> tuple[bytes, bytes]:
            data = os.urandom(size)
            return sha256(data), data

        self._kept = await asyncio.get_running_loop().run_in_executor(None, fresh)
        return self._kept[0]

    def get(self, digest: bytes) -> bytes | None:
        """Returns the blob with this hash, or None."""
        return self._kept[1] if digest == self._kept[0] else None


def _open(message: bytes) -> list[Any]:
    value = unpack(message, max_size=_MESSAGE_SIZE)
    if not isinstance(value, list) or len(value) < 2 or not isinstance(value[0], int):
        raise WireError("not a doctor's message")
    return value


def _bounded(number: int, most: int) -> int:
    """A requested size or time; raises ValueError if it is out of range."""
    if not isinstance(number, int) or not 0 < number <= most:
        raise ValueError(number)
    return number


async def _fetch(
    transport: Transport,
    digest: bytes,
    peer: bytes,
    size: int,
    seconds: float,
    progress: Callable[[float], None] = lambda part: None,
) -> tuple[int, float]:
    """Fetch a blob within a number of seconds. Returns the bytes that arrived and the seconds that they took."""
    here = 0

    def came(so_far: int, whole: int) -> None:
        nonlocal here
        here = so_far
        progress(so_far / max(whole, 1))

    began = time.perf_counter()
    with contextlib.suppress(TransportError):  # the bytes that arrived still count
        here = len(await transport.fetch(digest, [peer], max_size=size, timeout=seconds, progress=came))
    return here, max(time.perf_counter() - began, 1e-6)


async def _connected(transport: Transport, peer: bytes, seconds: float) -> Link:
    """Returns the link to a peer once it is up, or as it is when time is up."""
    until = time.monotonic() + seconds
    while True:
        link = next(one for one in transport.links() if one.peer == peer)
        if link.connected or time.monotonic() > until:
            return link
        await asyncio.sleep(_POLL)


async def _within(seconds: float, event: asyncio.Event) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
