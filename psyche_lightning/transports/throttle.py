"""Limits how many bytes a second a node sends and receives: a token bucket in which urgent bytes go first."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

from psyche_lightning.errors import ConfigError

SMALLEST_BLOCK, LARGEST_BLOCK = 4 * 1024, 64 * 1024  # bytes sent at once
BLOCK_SECONDS = 0.05  # a block takes this long, between these limits; urgent bytes wait no longer for it
BURST = 0.1  # seconds of the rate that an idle bucket saves up
_DEBT = 1.0  # seconds of the rate that unrequested bytes cost at most


@dataclass(eq=False)
class Waiter:
    """A place in the queue of a bucket.

    Attributes:
        size: bytes to move.
        granted: called when they may move.
        given_up: set it to leave the queue.
    """

    size: int
    granted: Callable[[], object]
    given_up: bool = False


class TokenBucket:
    """Decides who may move bytes next, and when. Has no I/O: every method takes the time in seconds.

    It grants a waiter when it is not empty, and may then go into debt. So in any time ``t`` it grants at most
    ``rate * t`` + :attr:`burst` + the size of one waiter. Urgent waiters come first, the others in the order in which
    they came, so several who come again after each grant share the rate.

    Args:
        rate: bytes a second.
        now: the time.

    Attributes:
        burst: bytes that it saves up.
    """

    def __init__(self, rate: float, now: float) -> None:
        self.rate = rate
        self.burst = max(BURST * rate, SMALLEST_BLOCK)
        self._tokens = self.burst
        self._then = now
        self._queue: list[tuple[bool, int, Waiter]] = []
        self._numbers = itertools.count()

    def enqueue(self, waiter: Waiter, *, urgent: bool) -> None:
        """Add a waiter; :meth:`grant` grants it."""
        heapq.heappush(self._queue, (not urgent, next(self._numbers), waiter))

    def grant(self, now: float) -> float | None:
        """Grant all waiters that are due.

        Returns:
            Seconds until the next one is due, or None when no one waits.
        """
        self._refill(now)
        while self._queue:
            waiter = self._queue[0][2]
            if not waiter.given_up:
                if self._tokens <= 0:
                    return max(1e-3, -self._tokens / self.rate)
                self._tokens -= waiter.size
                waiter.granted()
            heapq.heappop(self._queue)
        return None

    def charge(self, size: int, now: float) -> None:
        """Subtract bytes that nobody requested; a flood of them delays others for a bounded time."""
        self._refill(now)
        self._tokens = min(self._tokens, max(self._tokens - size, -_DEBT * self.rate))

    def refund(self, size: int, now: float) -> None:
        """Put back bytes that were granted but not used."""
        self._refill(now)
        self._tokens = min(self.burst, self._tokens + size)

    def _refill(self, now: float) -> None:
        self._tokens = min(self.burst, self._tokens + self.rate * max(0.0, now - self._then))
        self._then = max(self._then, now)


class Throttle:
    """The limit on one direction of a node's traffic, on its event loop.

    Args:
        rate: bytes a second; None for no limit.
        overhead: bytes on the wire for each byte, headers included.
        what: the option's name, for messages.
        clock: seconds, as ``time.monotonic``.

    Attributes:
        rate: the limit, or infinity.
        block: bytes of a blob that one frame should carry.
        batch: bytes of blobs to write at once; practically unlimited without a rate.

    Raises:
        ConfigError: the rate is not a positive number.
    """

    def __init__(
        self,
        rate: float | None,
        *,
        overhead: float = 1.0,
        what: str = "rate",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 1 <= rate < 1e12):
            raise ConfigError(
                f"the option {what} is {rate!r}; expected bytes a second from 1, such as 2500000 for 20 Mbit/s, or "
                "null for no limit"
            )
        self.rate = float("inf") if rate is None else float(rate)
        self._clock = clock
        self._overhead = overhead
        self._bucket = None if rate is None else TokenBucket(rate, clock())
        self._timer: asyncio.TimerHandle | None = None
        self.batch = 1 << 30 if rate is None else 1
        self.block = int(min(LARGEST_BLOCK, max(SMALLEST_BLOCK, BLOCK_SECONDS * self.rate)))

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self._bucket is not None

    async def acquire(self, size: int, *, urgent: bool = False) -> None:
        """Wait until ``size`` bytes may move."""
        if self._bucket is None:
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = Waiter(self._cost(size), lambda: None if granted.done() else granted.set_result(None))
        self._bucket.enqueue(waiter, urgent=urgent)
        self._go_on()
        try:
            await granted
        except asyncio.CancelledError:
            waiter.given_up = True
            if not granted.cancelled():  # granted at the same time
                self.refund(size)
            raise

    def charge(self, size: int) -> None:
        """Count bytes that moved without waiting."""
        if self._bucket is not None:
            self._bucket.charge(self._cost(size), self._clock())

    def refund(self, size: int) -> None:
        """Put back bytes that were granted and did not move."""
        if self._bucket is not None and size > 0:
            self._bucket.refund(self._cost(size), self._clock())
            self._go_on()

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _cost(self, size: int) -> int:
        return int(size * self._overhead) + 1

    def _go_on(self) -> None:
        assert self._bucket is not None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        left = self._bucket.grant(self._clock())
        if left is not None:
            self._timer = asyncio.get_running_loop().call_later(left, self._go_on)
