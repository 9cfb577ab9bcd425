"""Collects a node core's effects while it handles an event, and schedules repetitions."""

from __future__ import annotations

from collections.abc import Collection

from psyche_lightning.node.events import Effect
from psyche_lightning.node.notices import Notice


class Outbox:
    """Collects effects; repeats things until they succeed, at growing intervals.

    Args:
        first: seconds until the first repetition.
        most: longest interval in seconds; intervals double up to it.

    Attributes:
        now: time of the event that is being handled.
    """

    def __init__(self, first: float, most: float) -> None:
        self.now = 0.0
        self._first = first
        self._most = most
        self._effects: list[Effect] = []
        self._due: dict[object, tuple[int, float]] = {}
        self._pruned = 0.0
        self._said: set[Notice] = set()

    def emit(self, effect: Effect) -> None:
        """Add an effect."""
        self._effects.append(effect)

    def take(self) -> list[Effect]:
        """The effects since the last call, in order."""
        effects, self._effects = self._effects, []
        return effects

    def say(self, notice: Notice) -> None:
        """Emit a notice once an epoch."""
        if notice not in self._said:
            self._said.add(notice)
            self.emit(notice)

    def due(self, key: object, *, after: float = 0.0) -> bool:
        """Whether to do it now: ``after`` seconds after the first call, then ever more rarely."""
        attempt, at = self._due.setdefault(key, (0, self.now + after))
        if self.now < at:
            return False
        self._due[key] = (attempt + 1, self.now + min(self._first * 2**attempt, self._most))
        return True

    def once(self, key: object, *, every: float = float("inf")) -> bool:
        """Whether it was not done within ``every`` seconds; notes that it is done now."""
        if self.now < self._due.get(key, (0, self.now))[1]:
            return False
        self._due[key] = (1, self.now + every)
        return True

    def attempts(self, key: object) -> int:
        """How often it was due."""
        return self._due.get(key, (0, 0.0))[0]

    def forget(self, key: object) -> None:
        """Make it due at once."""
        self._due.pop(key, None)

    def keep_only(self, keys: Collection[object]) -> None:
        """Make other keys due at once."""
        self._due = {key: value for key, value in self._due.items() if key in keys}

    def prune(self) -> None:
        """Forget keys unused for a long time; looks only now and then, because a fast run has many."""
        if self.now < self._pruned + self._most:
            return
        self._pruned = self.now
        past = self.now - 4 * self._most
        self._due = {key: (count, at) for key, (count, at) in self._due.items() if at > past}

    def new_epoch(self) -> None:
        """Allow notices to repeat."""
        self._said.clear()
