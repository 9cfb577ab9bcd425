"""Counts slots, and gives their time: that of the wall clock, or a virtual one."""

from __future__ import annotations

import time
from collections.abc import Callable


def _steady() -> Callable[[], float]:
    """A clock that begins with the wall clock's seconds since 1970, and never steps with it."""
    ahead = time.time() - time.monotonic()
    return lambda: ahead + time.monotonic()


class SlotClock:
    """Counts slots of equal length. Each slot has one time, which is constant within the slot.

    Args:
        slot_ms: length of a slot in milliseconds.
        now: returns seconds since 1970; None for a clock that begins as the wall clock and never steps with it.
        running: whether slots pass with the wall clock, or only by :meth:`advance`.
        slot: the first slot.
        unix_ms: time of the first slot in milliseconds since 1970; None for the wall clock's time.

    Attributes:
        slot: the current slot.
        slot_ms: as given.
        running: whether slots pass by themselves.
    """

    def __init__(
        self,
        slot_ms: int = 400,
        *,
        now: Callable[[], float] | None = None,
        running: bool = True,
        slot: int = 0,
        unix_ms: int | None = None,
    ) -> None:
        self.slot_ms = slot_ms
        self.running = running
        self._now = _steady() if now is None else now
        self._ahead = 0  # of the wall clock, in milliseconds
        self.begin(slot, self._wall_ms() if unix_ms is None else unix_ms)

    def begin(self, slot: int, unix_ms: int) -> None:
        """Restart at a slot and its time."""
        self.slot = slot
        self._origin = unix_ms - slot * self.slot_ms
        if self.running:
            self.resume()

    def unix_ms(self, slot: int | None = None) -> int:
        """Time of a slot in milliseconds since 1970; of the current slot by default."""
        return self._origin + (self.slot if slot is None else slot) * self.slot_ms

    def unix_time(self, slot: int | None = None) -> int:
        """Time of a slot in whole seconds since 1970, as programs see it."""
        return self.unix_ms(slot) // 1000

    def due(self) -> int:
        """Number of slots that are due; 0 while frozen."""
        if not self.running:
            return 0
        late = self._wall_ms() + self._ahead - self.unix_ms()
        if late < 0:  # the wall clock was set back; the chain's time never goes back
            self.resume()
            return 0
        return late // self.slot_ms

    def until_next(self) -> float:
        """Seconds until the next slot is due, if the clock runs."""
        late = self._wall_ms() + self._ahead - self.unix_ms()
        return max(0.0, (self.slot_ms - late) / 1000)

    def passed(self, slots: int) -> None:
        """Count slots that were due."""
        self.slot += slots

    def advance(self, slots: int) -> None:
        """Let slots pass at once; the time advances with them, and a running clock continues from there."""
        self.slot += slots
        self._ahead += slots * self.slot_ms

    def freeze(self) -> None:
        """Freeze the clock: slots no longer pass by themselves."""
        self.running = False

    def resume(self) -> None:
        """Let slots pass at the wall clock's pace, from the chain's time on."""
        self.running = True
        self._ahead = self.unix_ms() - self._wall_ms()

    def follow_wall(self) -> None:
        """Let slots pass up to the wall clock's time, and at its pace; all missed slots are due at once."""
        self.running = True
        self._ahead = max(0, self.unix_ms() - self._wall_ms())

    def _wall_ms(self) -> int:
        return int(self._now() * 1000)
