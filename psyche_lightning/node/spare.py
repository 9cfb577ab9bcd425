"""Uses the training thread's waits for other work, in small pieces, so that training is hardly slowed."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Protocol

SHARE = 0.01
"""Most of the time by which pieces may delay rounds."""
COMPARED = 8
"""Past waits of a kind by which the next one is judged."""
LEAST = 3
"""Fewer past waits tell nothing."""


class SpareWork(Protocol):
    """Work in pieces, each of which runs on the training thread and cannot be interrupted."""

    def estimate(self) -> float | None:
        """The seconds that the next piece takes at most, as far as is known; None if there is none."""
        ...

    def work(self) -> None:
        """Do the next piece."""
        ...


class SpareTime:
    """Decides when a piece of work may begin.

    Several works take turns: who did a piece comes last.

    A piece begins if it ends before the shortest of the latest waits of this kind did. It also begins if it would not
    matter much: if the delays of all pieces so far, and this whole piece, are within :data:`SHARE` of the time. So a
    slow piece waits until its time has come, and a node that never waits gives that share of its time.

    Args:
        clock: seconds of a monotonic clock.

    Attributes:
        late: seconds by which pieces delayed what had arrived meanwhile.
        used: seconds that pieces took.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.late = self.used = 0.0
        self._clock = clock
        self._works: deque[SpareWork] = deque()
        self._start = 0.0
        self._past: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=COMPARED))
        self._kind = ""
        self._since = 0.0
        self._piece = 0.0, 0.0  # when the last one began and ended

    def give(self, work: SpareWork) -> None:
        """Add work."""
        if not self._works:
            self._start = self._clock()
        self._works.append(work)

    def withdraw(self, work: SpareWork) -> None:
        """Do nothing more of a work that was given."""
        if work in self._works:
            self._works.remove(work)

    @property
    def seconds(self) -> float:
        """Seconds since work was given."""
        return self._clock() - self._start

    def rest(self, kind: str) -> None:
        """A wait begins.

        Args:
            kind: waits of one kind take about equally long.
        """
        self._kind, self._since = kind, self._clock()

    def resume(self, arrived: float) -> None:
        """The wait is over.

        Args:
            arrived: when what it waited for came, by the same clock.
        """
        self._past[self._kind].append(max(0.0, arrived - self._since))
        began, ended = self._piece
        if began >= self._since:
            self.late += max(0.0, ended - max(began, arrived))

    def use(self, *, here: bool = False) -> bool:
        """Do a piece if it may begin now; returns whether it did.

        Args:
            here: whether what the wait is for is here already.
        """
        first = True
        for work in self._works:
            seconds = work.estimate()
            if seconds is None:
                continue
            now, past = self._clock(), self._past[self._kind]
            fits = not here and len(past) >= LEAST and now - self._since + seconds <= min(past)
            spent = self.used if here else self.late  # who has waits to use delays nothing on purpose
            # The share of the time is for whose turn it is, or small pieces would take it from large ones.
            if (fits or first) and spent + (0.0 if fits else seconds) <= SHARE * (now - self._start):
                work.work()
                self._piece = now, self._clock()
                self.used += self._piece[1] - now
                if work in self._works:  # it may have withdrawn itself
                    self._works.remove(work)
                    self._works.append(work)
                return True
            first = False
        return False
