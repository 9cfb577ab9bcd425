"""A blob that arrives from one or several peers.

A blob begins as one span, which the best provider is asked for. An idle provider takes a span that nobody delivers, or
the second half of the largest span in delivery, or the rest of a span that hardly moves. So requests stay few,
providers share the work by their speed, and the bytes from a lost provider are kept.

The hash covers the whole blob only. When it is wrong and several providers delivered parts, the blob is fetched again
from one provider at a time. The first correct copy shows which of them delivered wrong bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from psyche_lightning.errors import AbsentError, TransportError
from psyche_lightning.transports.base import Progress
from psyche_lightning.transports.throttle import Throttle
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import short

MAX_PROVIDERS = 6  # peers that deliver parts of one blob at a time
SPLIT = 512 * 1024  # bytes from which on a span is worth splitting
STRIDE = 64 * 1024  # bytes that count as progress
PATIENCE = 1.5  # seconds without progress after which another provider is asked, too; longer each time
WRONG_BYTES = "delivered wrong bytes"
LOOK = 0.2  # seconds between looks at the progress
REQUEST_SECONDS = 0.25  # with a limit on downloads: seconds of the rate that one request may take
SMALLEST_REQUEST, LARGEST_REQUEST = 16 * 1024, 4 << 20


class OtherSizeError(TransportError):
    """A provider's blob has another size than the first provider's; only the hash can tell which one is right."""


class Provider(Protocol):
    """A peer that may have the blob, as a download sees it."""

    @property
    def key(self) -> bytes:
        """Its public key."""
        ...

    @property
    def trusted(self) -> bool:
        """Whether it has always delivered the right bytes."""
        ...

    async def pull(self, span: Span) -> None:
        """Fill a span.

        Raises:
            TransportError: the peer does not have the blob, is not connected, stalls, or breaks the protocol.
        """

    def lied(self, what: str) -> None:
        """Record that it delivered wrong bytes."""


@dataclass(eq=False)
class Span:
    """A part of a blob, with or without a provider that delivers it.

    Attributes:
        download: the blob.
        start: first byte.
        at: next byte to come.
        end: where the span ends; other providers may take from its end. Until the size of the blob is known, the
            largest size that is accepted.
        provider: who delivers it or delivered it.
        moved: time of the last progress.
        patience: seconds without progress after which another provider may take the rest.
        blocks: its bytes.
        shortened: called when ``end`` decreases while the provider delivers.
    """

    download: Download
    start: int
    at: int
    end: int
    provider: bytes | None = None
    moved: float = 0.0
    patience: float = PATIENCE
    blocks: list[bytes | memoryview] = field(default_factory=list)
    shortened: Callable[[], None] | None = None

    @property
    def digest(self) -> bytes:
        """SHA-256 of the blob."""
        return self.download.digest

    @property
    def left(self) -> int:
        """Bytes that are still to come."""
        return self.end - self.at

    def shorten(self, end: int) -> None:
        """Let the span end earlier, and tell its provider."""
        self.end = end
        if self.shortened is not None:
            self.shortened()

    def found(self, size: int, now: float) -> bool:
        """Learn the size of the blob.

        Returns:
            Whether this provider shall deliver more.

        Raises:
            TransportError: the blob cannot have that size.
        """
        self.moved = now
        self.download.found(self, size)
        return self.left > 0

    def write(self, block: bytes | memoryview, now: float) -> bool:
        """Take the next bytes as far as they belong to the span.

        Returns:
            Whether this provider shall deliver more.
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
    """The bytes of a blob that have arrived; it outlives an attempt to fetch it, and the next attempt goes on.

    Attributes:
        digest: SHA-256 of the blob.
        max_size: the largest size that is accepted.
        size: bytes of the blob, once a provider has said it.
        received: how many of them have arrived.
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
        """Whether all bytes have arrived, right or wrong."""
        return self.received == self.size

    def join(self) -> bytes:
        """The blob; only when it is complete."""
        return b"".join(block for span in sorted(self.spans, key=lambda span: span.start) for block in span.blocks)

    def reset(self) -> None:
        """Forget all bytes."""
        self.size, self.received, self.spans = None, 0, []
        self.known.clear()

    def found(self, span: Span, size: int) -> None:
        """Learn the size of the blob from the provider of a span; see :meth:`Span.found`."""
        if size > self.max_size:
            raise TransportError(f"has {size} bytes, more than the {self.max_size} expected")
        if self.size is None:
            self.size = size
            for other in self.spans:  # a provider that answers late takes another part
                other.end = min(other.end, size) if other is span else 0
            if span.end < size:
                self.spans.append(Span(self, span.end, span.end, size))
            self.known.set()
        elif self.size != size:
            raise OtherSizeError(f"has {size} bytes, but another provider has {self.size}")

    def take(self, provider: bytes, now: float, most: int | None) -> Span | None:
        """The span that an idle provider should deliver now; None if the others deliver all that is left.

        Args:
            provider: its key.
            now: seconds.
            most: bytes of one request; None for no limit.
        """
        span = self._unknown(now) if self.size is None else self._idle() or self._shared(provider) or self._stuck(now)
        if span is None:
            return None
        if most is not None and span.left > most:
            if self.size is not None:
                self.spans.append(Span(self, span.at + most, span.at + most, span.end))
            span.end = span.at + most
        span.provider, span.moved = provider, now
        return span

    def release(self, span: Span) -> None:
        """End a provider's work on a span; another one may deliver the rest."""
        if self.size is None:
            self.spans.remove(span)
        elif span.left:
            self._new(span.at, span.end)
            span.end = span.at

    def shares(self) -> dict[bytes, list[slice]]:
        """Which bytes each provider delivered."""
        shares: dict[bytes, list[slice]] = {}
        for span in self.spans:
            if span.provider is not None and span.at > span.start:
                shares.setdefault(span.provider, []).append(slice(span.start, span.at))
        return shares

    def _new(self, start: int, end: int, patience: float = PATIENCE) -> Span:
        span = Span(self, start, start, end, patience=patience)
        self.spans.append(span)
        return span

    def _unknown(self, now: float) -> Span | None:
        """The whole blob of unknown size, unless another provider was asked for it a moment ago."""
        if any(now - span.moved < span.patience for span in self.spans):
            return None
        return self._new(0, self.max_size)

    def _idle(self) -> Span | None:
        return next((span for span in self.spans if span.provider is None and span.left), None)

    def _others(self, provider: bytes) -> Iterator[Span]:
        return (span for span in self.spans if span.provider != provider and span.left)

    def _shared(self, provider: bytes) -> Span | None:
        """The second half of what is left of the largest span of another provider."""
        largest = max(self._others(provider), key=lambda span: span.left, default=None)
        if largest is None or largest.left < SPLIT:
            return None
        middle = largest.at + (largest.left + 1) // 2
        span = self._new(middle, largest.end)
        largest.shorten(middle)
        return span

    def _stuck(self, now: float) -> Span | None:
        """The rest of a span that hardly moves. Its own provider may take it, too, and be quicker the second time."""
        for span in self.spans:
            if span.left and now - span.moved >= span.patience:
                rest = self._new(span.at, span.end, 2 * span.patience)
                span.shorten(span.at)
                return rest
        return None


class DownloadAttempt:
    """One attempt to complete a download.

    Args:
        download: what is wanted, and what has arrived of it.
        providers: who may have it, the best first.
        timeout: seconds.
        throttle: the node's limit on receiving.
        progress: called as bytes arrive.
    """

    def __init__(
        self,
        download: Download,
        providers: Sequence[Provider],
        timeout: float,
        throttle: Throttle,
        progress: Progress | None = None,
    ) -> None:
        self._download = download
        self._providers = providers
        self._timeout = timeout
        self._throttle = throttle
        self._progress = progress
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + timeout
        self._failures: dict[bytes, str] = {}
        self._odd: set[bytes] = set()  # the failed providers that gave another size
        self._absent: set[bytes] = set()  # the failed providers that do not have the blob
        self._most = None
        if throttle.limited:
            self._most = int(min(LARGEST_REQUEST, max(SMALLEST_REQUEST, REQUEST_SECONDS * throttle.rate)))

    async def run(self) -> bytes:
        """Returns the blob, checked against its hash.

        Raises:
            TransportError: no provider delivered it in time; the text says for each provider what happened.
        """
        await self._fill(self._providers, self._deadline)
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
            await self._fill(self._providers, self._deadline)
        raise self._failure()

    async def _one_by_one(self, wrong: bytes, shares: dict[bytes, list[slice]]) -> bytes:
        """Find one provider with the right bytes, and thereby those that delivered wrong ones."""
        self._forgive_sizes()
        order = [one for one in self._providers if one.key not in self._failures]
        for number, provider in enumerate(order):
            left = self._deadline - self._loop.time()
            share = left if number == len(order) - 1 else left / 2
            self._download.reset()
            await self._fill([provider], self._loop.time() + share)
            if not self._download.complete:
                continue
            data = self._download.join()
            if await self._matches(data):
                for key, parts in shares.items():
                    if any(wrong[part] != data[part] for part in parts) or len(wrong) != len(data):
                        self._blame(key)
                return data
            self._blame(provider.key)
        self._download.reset()
        raise self._failure()

    async def _matches(self, data: bytes) -> bool:
        if len(data) < 1 << 20:
            return sha256(data) == self._download.digest
        return await self._loop.run_in_executor(None, sha256, data) == self._download.digest

    def _blame(self, *keys: bytes) -> None:
        for provider in self._providers:
            if provider.key in keys and self._failures.get(provider.key) != WRONG_BYTES:
                self._failures[provider.key] = WRONG_BYTES
                provider.lied(f"{WRONG_BYTES} for blob {short(self._download.digest)}")

    def _forgive_sizes(self) -> None:
        for key in self._odd:
            self._failures.pop(key, None)
        self._odd.clear()

    def _failure(self) -> TransportError:
        download = self._download
        keys = [provider.key for provider in self._providers]
        texts = [f"{short(key)} {self._failures.get(key, 'was not asked, because time ran out')}" for key in keys]
        kept = f" ({download.received} of {download.size} bytes are kept)" if download.received else ""
        reasons = "; ".join(texts) or "no provider is known"
        kind = AbsentError if keys and self._absent.issuperset(keys) else TransportError
        return kind(f"nobody delivered blob {short(download.digest)}{kept}: {reasons}")

    async def _fill(self, providers: Sequence[Provider], deadline: float) -> None:
        """Let providers deliver until the download is complete, no provider is left, or time is up."""
        download = self._download
        running: dict[asyncio.Task[None], tuple[Provider, Span]] = {}
        known = asyncio.ensure_future(download.known.wait())
        told = -1
        try:
            while not download.complete and (now := self._loop.time()) < deadline:
                idle = self._start(providers, running, now)
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
            for provider, span in running.values():
                got = f"{span.at - span.start} of {span.end - span.start} bytes" if download.size else "no answer"
                self._failures.setdefault(provider.key, f"took too long ({got} after {self._timeout:.1f} s)")
        finally:
            known.cancel()
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            for _, span in running.values():
                download.release(span)

    def _start(
        self, providers: Sequence[Provider], running: dict[asyncio.Task[None], tuple[Provider, Span]], now: float
    ) -> bool:
        """Give work to idle providers. Returns whether one of them stays idle."""
        width = 1 if self._most is None else 2  # send the next request while one is being answered
        busy = [provider.key for provider, _ in running.values()]
        for _ in range(width):
            for provider in providers:
                if provider.key in self._failures or busy.count(provider.key) >= width:
                    continue
                if len(set(busy)) >= MAX_PROVIDERS and provider.key not in busy:
                    continue
                if busy and not provider.trusted:  # its bytes could spoil those of the others
                    continue
                span = self._download.take(provider.key, now, self._most)
                if span is None:
                    return True
                running[asyncio.create_task(self._pull(provider, span))] = provider, span
                busy.append(provider.key)
        return False

    async def _pull(self, provider: Provider, span: Span) -> None:
        if not self._throttle.limited:
            return await provider.pull(span)
        asked = span.left
        span.moved = float("inf")  # no provider is quicker while the limit holds back
        await self._throttle.acquire(asked)
        span.moved = self._loop.time()
        try:
            await provider.pull(span)
        finally:
            self._throttle.refund(asked - (span.at - span.start))

    def _finished(self, task: asyncio.Task[None], provider: Provider, span: Span) -> None:
        self._download.release(span)
        try:
            task.result()
        except TransportError as error:
            self._failures[provider.key] = str(error)
            if isinstance(error, AbsentError):
                self._absent.add(provider.key)
            if isinstance(error, OtherSizeError):
                self._odd.add(provider.key)
