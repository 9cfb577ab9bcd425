"""A blob on its way from one or several peers.

A blob begins as one span that the best source is asked for. Whoever is idle takes what nobody delivers, or the second
half of the largest span that somebody else is delivering, or all that is left of one that hardly moves. So the number
of requests stays small, sources share the work by their speed, and what a lost source had delivered stays.

The whole is checked against its hash. When several sources delivered parts of something else, the blob is fetched again
from one of them after the other: the first that is right shows who was wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from psyche_lightning.errors import AbsentError, TransportError
from psyche_lightning.transports.base import Progress
from psyche_lightning.transports.budget import Throttle
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import short

MAX_SOURCES = 6  # peers that deliver parts of one blob at a time
SPLIT = 512 * 1024  # bytes from which on a span is worth sharing
STRIDE = 64 * 1024  # bytes that count as progress
PATIENCE = 1.5  # seconds without progress after which someone else is asked, too; longer each time
LOOK = 0.2  # seconds between looks at the progress
REQUEST_SECONDS = 0.25  # with a limit on the download: how much is asked for at once
SMALLEST_REQUEST, LARGEST_REQUEST = 16 * 1024, 4 << 20


class OtherSizeError(TransportError):
    """A source gives a blob another size than the first one did; only the hash can tell who is right."""


class Supplier(Protocol):
    """A peer that may have the blob, as a download sees it."""

    @property
    def key(self) -> bytes:
        """Its public key."""
        ...

    @property
    def trusted(self) -> bool:
        """Whether it never delivered other bytes than were asked for."""
        ...

    async def pull(self, span: Span) -> None:
        """Fill a span.

        Raises:
            TransportError: it does not have the blob, is not connected, stalls, or breaks the protocol.
        """

    def lied(self, what: str) -> None:
        """Note that it delivered other bytes than were asked for."""


@dataclass(eq=False)
class Span:
    """A part of a blob, delivered by one source or not yet.

    Attributes:
        download: the blob.
        start: first byte.
        at: next byte to come.
        end: where it ends; others may take from it. As long as the size of the blob is not known, the most that is
            accepted.
        source: who delivers it, or did.
        moved: time of the last progress.
        patience: seconds without progress after which the rest may be taken away.
        blocks: its bytes.
        shortened: called when the end has come nearer, while the source delivers.
    """

    download: Download
    start: int
    at: int
    end: int
    source: bytes | None = None
    moved: float = 0.0
    patience: float = PATIENCE
    blocks: list[bytes | memoryview] = field(default_factory=list)
    shortened: Callable[[], None] | None = None

    @property
    def digest(self) -> bytes:
        """Of the blob."""
        return self.download.digest

    @property
    def left(self) -> int:
        """Bytes that are still to come."""
        return self.end - self.at

    def shorten(self, end: int) -> None:
        """Let the span end earlier, and its source know."""
        self.end = end
        if self.shortened is not None:
            self.shortened()

    def found(self, size: int, now: float) -> bool:
        """Learn the size of the blob.

        Returns:
            Whether something is still wanted from this source.

        Raises:
            TransportError: the blob cannot have that size.
        """
        self.moved = now
        self.download.found(self, size)
        return self.left > 0

    def write(self, block: bytes | memoryview, now: float) -> bool:
        """Take the next bytes, as far as they belong to the span.

        Returns:
            Whether more is wanted.
        """
        size = min(len(block), self.left)
        self.blocks.append(block[:size])
        if self.at // STRIDE != (self.at + size) // STRIDE:
            self.moved = now
        self.at += size
        self.download.received += size
        return self.left > 0


@dataclass(eq=False)
class Download:
    """What is here of a blob; it outlives an attempt to fetch it, so that the next one goes on from there.

    Attributes:
        digest: SHA-256 of the blob.
        max_size: the most that is accepted.
        size: bytes of the blob, once a source has told.
        received: how many of them are here.
        spans: all parts.
        known: set once the size is known.
    """

    digest: bytes
    max_size: int
    size: int | None = None
    received: int = 0
    spans: list[Span] = field(default_factory=list)
    known: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def complete(self) -> bool:
        """Whether all bytes are here, right or wrong."""
        return self.received == self.size

    def join(self) -> bytes:
        """The blob, when it is complete."""
        return b"".join(block for span in sorted(self.spans, key=lambda span: span.start) for block in span.blocks)

    def reset(self) -> None:
        """Forget everything."""
        self.size, self.received, self.spans = None, 0, []
        self.known.clear()

    def found(self, span: Span, size: int) -> None:
        """Learn the size of the blob from the source of a span; see :meth:`Span.found`."""
        if size > self.max_size:
            raise TransportError(f"has {size} bytes, more than the {self.max_size} expected")
        if self.size is None:
            self.size = size
            for other in self.spans:  # they may take their parts once their sources are back
                other.end = min(other.end, size) if other is span else 0
            if span.end < size:
                self.spans.append(Span(self, span.end, span.end, size))
            self.known.set()
        elif self.size != size:
            raise OtherSizeError(f"has {size} bytes where another has {self.size}")

    def take(self, source: bytes, now: float, most: int | None) -> Span | None:
        """What a source that is idle should deliver now; None if others are at it.

        Args:
            source: its key.
            now: seconds.
            most: bytes of one request; None for no limit.
        """
        span = self._unknown(now) if self.size is None else self._idle() or self._shared(source) or self._stuck(now)
        if span is None:
            return None
        if most is not None and span.left > most:
            if self.size is not None:
                self.spans.append(Span(self, span.at + most, span.at + most, span.end))
            span.end = span.at + most
        span.source, span.moved = source, now
        return span

    def release(self, span: Span) -> None:
        """A source no longer works on a span; somebody else may deliver what is left."""
        if self.size is None:
            self.spans.remove(span)
        elif span.left:
            self._new(span.at, span.end)
            span.end = span.at

    def shares(self) -> dict[bytes, list[slice]]:
        """Who delivered which bytes."""
        shares: dict[bytes, list[slice]] = {}
        for span in self.spans:
            if span.source is not None and span.at > span.start:
                shares.setdefault(span.source, []).append(slice(span.start, span.at))
        return shares

    def _new(self, start: int, end: int, patience: float = PATIENCE) -> Span:
        span = Span(self, start, start, end, patience=patience)
        self.spans.append(span)
        return span

    def _unknown(self, now: float) -> Span | None:
        """The whole blob, whatever its size, when nobody else has been asked for it just now."""
        if any(now - span.moved < span.patience for span in self.spans):
            return None
        return self._new(0, self.max_size)

    def _idle(self) -> Span | None:
        return next((span for span in self.spans if span.source is None and span.left), None)

    def _others(self, source: bytes) -> Iterator[Span]:
        return (span for span in self.spans if span.source != source and span.left)

    def _shared(self, source: bytes) -> Span | None:
        """Half of what is left of the largest span of somebody else."""
        largest = max(self._others(source), key=lambda span: span.left, default=None)
        if largest is None or largest.left < SPLIT:
            return None
        middle = largest.at + (largest.left + 1) // 2
        span = self._new(middle, largest.end)
        largest.shorten(middle)
        return span

    def _stuck(self, now: float) -> Span | None:
        """The rest of a span that hardly moves; from its own source, too, which may be quicker the second time."""
        for span in self.spans:
            if span.left and now - span.moved >= span.patience:
                rest = self._new(span.at, span.end, 2 * span.patience)
                span.shorten(span.at)
                return rest
        return None


class Fetch:
    """One attempt to complete a download.

    Args:
        download: what is wanted, and what is here of it.
        suppliers: those who may have it, the best first.
        timeout: seconds.
        throttle: the node's limit on what comes in.
        progress: is told what is here.
    """

    def __init__(
        self,
        download: Download,
        suppliers: Sequence[Supplier],
        timeout: float,
        throttle: Throttle,
        progress: Progress | None = None,
    ) -> None:
        self._download = download
        self._suppliers = suppliers
        self._timeout = timeout
        self._throttle = throttle
        self._progress = progress
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + timeout
        self._failures: dict[bytes, str] = {}
        self._odd: set[bytes] = set()  # of the failed, those that gave another size
        self._absent: set[bytes] = set()  # of the failed, those that do not have it
        self._most = None
        if throttle.limited:
            self._most = int(min(LARGEST_REQUEST, max(SMALLEST_REQUEST, REQUEST_SECONDS * throttle.rate)))

    async def run(self) -> bytes:
        """The blob, checked.

        Raises:
            TransportError: nobody delivered it in time; the text says for each supplier what happened.
        """
        await self._fill(self._suppliers, self._deadline)
        while self._download.complete:
            data = self._download.join()
            if await self._matches(data):
                return data
            shares = self._download.shares()
            if len(shares) > 1:
                return await self._one_by_one(data, shares)
            self._blame(*shares)
            self._forgive_sizes()
            self._download.reset()
            await self._fill(self._suppliers, self._deadline)
        raise self._failure()

    async def _one_by_one(self, wrong: bytes, shares: dict[bytes, list[slice]]) -> bytes:
        """Find one source that is right, and so those who were not."""
        self._forgive_sizes()
        order = [one for one in self._suppliers if one.key not in self._failures]
        for number, supplier in enumerate(order):
            left = self._deadline - self._loop.time()
            share = left if number == len(order) - 1 else left / 2
            self._download.reset()
            await self._fill([supplier], self._loop.time() + share)
            if not self._download.complete:
                continue
            data = self._download.join()
            if await self._matches(data):
                for key, parts in shares.items():
                    if any(wrong[part] != data[part] for part in parts) or len(wrong) != len(data):
                        self._blame(key)
                return data
            self._blame(supplier.key)
        self._download.reset()
        raise self._failure()

    async def _matches(self, data: bytes) -> bool:
        if len(data) < 1 << 20:
            return sha256(data) == self._download.digest
        return await self._loop.run_in_executor(None, sha256, data) == self._download.digest

    def _blame(self, *keys: bytes) -> None:
        for supplier in self._suppliers:
            if supplier.key in keys:
                self._failures[supplier.key] = "delivered other bytes"
                supplier.lied(f"delivered other bytes than those of blob {short(self._download.digest)}")

    def _forgive_sizes(self) -> None:
        for key in self._odd:
            self._failures.pop(key, None)
        self._odd.clear()

    def _failure(self) -> TransportError:
        download = self._download
        keys = [supplier.key for supplier in self._suppliers]
        texts = [f"{short(key)} {self._failures.get(key, 'was not asked for lack of time')}" for key in keys]
        kept = f" ({download.received} of {download.size} bytes are kept)" if download.received else ""
        reasons = "; ".join(texts) or "no provider is known"
        kind = AbsentError if keys and self._absent.issuperset(keys) else TransportError
        return kind(f"nobody delivered blob {short(download.digest)}{kept}: {reasons}")

    async def _fill(self, suppliers: Sequence[Supplier], deadline: float) -> None:
        """Let suppliers deliver until the download is complete, nobody is left, or time is up."""
        download = self._download
        running: dict[asyncio.Task[None], tuple[Supplier, Span]] = {}
        known = asyncio.ensure_future(download.known.wait())
        told = -1
        try:
            while not download.complete and (now := self._loop.time()) < deadline:
                idle = self._start(suppliers, running, now)
                if not running:
                    break
                wait = min(deadline - now, LOOK) if idle or self._progress else deadline - now
                waiting = [*running, *([] if known.done() else [known])]
                done, _ = await asyncio.wait(waiting, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
                for task in running.keys() & done:
                    self._finished(task, *running.pop(task))
                if self._progress and download.size is not None and download.received > told:
                    told = download.received
                    self._progress(told, download.size)
            for supplier, span in running.values():
                got = f"{span.at - span.start} of {span.end - span.start} bytes" if download.size else "no answer"
                self._failures.setdefault(supplier.key, f"took too long ({got} after {self._timeout:.1f} s)")
        finally:
            known.cancel()
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            for _, span in running.values():
                download.release(span)

    def _start(
        self, suppliers: Sequence[Supplier], running: dict[asyncio.Task[None], tuple[Supplier, Span]], now: float
    ) -> bool:
        """Give work to whoever is idle; whether somebody stays idle."""
        width = 1 if self._most is None else 2  # the next request is under way while one is answered
        busy = [supplier.key for supplier, _ in running.values()]
        for _ in range(width):
            for supplier in suppliers:
                if supplier.key in self._failures or busy.count(supplier.key) >= width:
                    continue
                if len(set(busy)) >= MAX_SOURCES and supplier.key not in busy:
                    continue
                if busy and not supplier.trusted:  # it would spoil what the others deliver
                    continue
                span = self._download.take(supplier.key, now, self._most)
                if span is None:
                    return True
                running[asyncio.create_task(self._pull(supplier, span))] = supplier, span
                busy.append(supplier.key)
        return False

    async def _pull(self, supplier: Supplier, span: Span) -> None:
        if not self._throttle.limited:
            return await supplier.pull(span)
        asked = span.left
        span.moved = float("inf")  # nobody is quicker while the limit lets nothing in
        await self._throttle.turn(asked)
        span.moved = self._loop.time()
        try:
            await supplier.pull(span)
        finally:
            self._throttle.refund(asked - (span.at - span.start))

    def _finished(self, task: asyncio.Task[None], supplier: Supplier, span: Span) -> None:
        self._download.release(span)
        try:
            task.result()
        except TransportError as error:
            self._failures[supplier.key] = str(error)
            if isinstance(error, AbsentError):
                self._absent.add(supplier.key)
            if isinstance(error, OtherSizeError):
                self._odd.add(supplier.key)
