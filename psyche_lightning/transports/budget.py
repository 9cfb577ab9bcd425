"""How many bytes a second a node sends and receives: a token bucket, and turns in which what is urgent goes first."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

from psyche_lightning.errors import ConfigError

SMALLEST, LARGEST = 4 * 1024, 64 * 1024  # bytes that go at once
TURN = 0.05  # seconds that they take, between these limits: how long something urgent waits for them
BURST = 0.1  # seconds of the rate that can be saved up
_DEBT = 1.0  # seconds of the rate that what was not asked for can cost at most


@dataclass(eq=False)
class Ticket:
    """Someone who waits for a turn.

    Attributes:
        size: bytes.
        granted: call when the turn has come.
        given_up: set it to leave the queue.
    """

    size: int
    granted: Callable[[], object]
    given_up: bool = False


class Scheduler:
    """Who may move bytes next, and when. Without I/O: every method takes the time in seconds.

    A turn is granted when the bucket is not empty, and may leave it in debt. In any time ``t`` the granted bytes are
    so at most ``rate * t`` + :attr:`burst` + the size of one ticket. Urgent tickets come before all others; else the
    order is that of asking, so that several who ask again after each turn share the rate.

    Args:
        rate: bytes a second.
        now: the time.

    Attributes:
        burst: bytes that can be saved up.
    """

    def __init__(self, rate: float, now: float) -> None:
        self.rate = rate
        self.burst = max(BURST * rate, SMALLEST)
        self._tokens = self.burst
        self._then = now
        self._queue: list[tuple[bool, int, Ticket]] = []
        self._numbers = itertools.count()

    def ask(self, ticket: Ticket, *, urgent: bool) -> None:
        """Queue a ticket; :meth:`grant` gives it its turn."""
        heapq.heappush(self._queue, (not urgent, next(self._numbers), ticket))

    def grant(self, now: float) -> float | None:
        """Give out the turns that are due.

        Returns:
            Seconds until the next one is, or None when nobody waits.
        """
        self._refill(now)
        while self._queue:
            ticket = self._queue[0][2]
            if not ticket.given_up:
                if self._tokens <= 0:
                    return max(1e-3, -self._tokens / self.rate)
                self._tokens -= ticket.size
                ticket.granted()
            heapq.heappop(self._queue)
        return None

    def charge(self, size: int, now: float) -> None:
        """Account for bytes that nobody asked for; a flood of them costs others a bounded time."""
        self._refill(now)
        self._tokens = min(self._tokens, max(self._tokens - size, -_DEBT * self.rate))

    def refund(self, size: int, now: float) -> None:
        """Give back what a turn was granted for and not used."""
        self._refill(now)
        self._tokens = min(self.burst, self._tokens + size)

    def _refill(self, now: float) -> None:
        self._tokens = min(self.burst, self._tokens + self.rate * max(0.0, now - self._then))
        self._then = max(self._then, now)


class Throttle:
    """One direction of a node's traffic, on its event loop.

    Args:
        rate: bytes a second; None for no limit.
        overhead: what a byte costs on the wire, with everything that is put around it.
        what: the option's name, for messages.
        clock: seconds, as ``time.monotonic``.

    Attributes:
        rate: the limit, or infinity.
        block: how many bytes of something bulky should go in one frame.
        batch: how many of them should be written at once; without a limit, as many as may be.

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
        self._scheduler = None if rate is None else Scheduler(rate, clock())
        self._timer: asyncio.TimerHandle | None = None
        self.batch = 1 << 30 if rate is None else 1
        self.block = int(min(LARGEST, max(SMALLEST, TURN * self.rate)))

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self._scheduler is not None

    async def turn(self, size: int, *, urgent: bool = False) -> None:
        """Wait until ``size`` bytes may move."""
        if self._scheduler is None:
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ticket = Ticket(self._cost(size), lambda: None if granted.done() else granted.set_result(None))
        self._scheduler.ask(ticket, urgent=urgent)
        self._go_on()
        try:
            await granted
        except asyncio.CancelledError:
            ticket.given_up = True
            if not granted.cancelled():  # its turn came at the same time
                self.refund(size)
            raise

    def charge(self, size: int) -> None:
        """Account for bytes that moved without a turn."""
        if self._scheduler is not None:
            self._scheduler.charge(self._cost(size), self._clock())

    def refund(self, size: int) -> None:
        """Give back bytes that had a turn and did not move."""
        if self._scheduler is not None and size > 0:
            self._scheduler.refund(self._cost(size), self._clock())
            self._go_on()

    def close(self) -> None:
        """Forget those who wait."""
        if self._timer is not None:
            self._timer.cancel()

    def _cost(self, size: int) -> int:
        return int(size * self._overhead) + 1

    def _go_on(self) -> None:
        assert self._scheduler is not None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        left = self._scheduler.grant(self._clock())
        if left is not None:
            self._timer = asyncio.get_running_loop().call_later(left, self._go_on)
