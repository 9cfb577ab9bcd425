"""Things that are repeated until they succeed, ever more rarely; time is passed in."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass
class Retries:
    """When each pending thing is due again.

    Attributes:
        first: seconds until the first repetition.
        most: longest interval in seconds; intervals double up to it.
    """

    first: float
    most: float
    _due: dict[object, tuple[int, float]] = field(default_factory=dict)

    def due(self, key: object, now: float, *, after: float = 0.0) -> bool:
        """Whether to do it now: ``after`` seconds from the first question on, then ever rarer."""
        attempt, at = self._due.setdefault(key, (0, now + after))
        if now < at:
            return False
        self._due[key] = (attempt + 1, now + min(self.first * 2**attempt, self.most))
        return True

    def once(self, key: object, now: float, *, every: float = float("inf")) -> bool:
        """Whether it was not done yet, or not within ``every`` seconds; notes that it is done now."""
        _, at = self._due.get(key, (0, now))
        if now < at:
            return False
        self._due[key] = (1, now + every)
        return True

    def attempts(self, key: object) -> int:
        """How often it was due."""
        return self._due.get(key, (0, 0.0))[0]

    def forget(self, key: object) -> None:
        """Make it due at once."""
        self._due.pop(key, None)

    def keep_only(self, keys: Collection[object]) -> None:
        """Forget all but these."""
        self._due = {key: value for key, value in self._due.items() if key in keys}
