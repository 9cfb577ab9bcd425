"""A list that only grows, of which a coordinator keeps the newest entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from psyche_lightning.errors import WireError
from psyche_lightning.protocol.codec import from_json, to_json

_T = TypeVar("_T")


class Tail(Generic[_T]):
    """The newest entries of a list that only grows; entries keep their places.

    Args:
        limit: number of entries to keep.
        items: the entries so far; the first one has place ``first``.
        first: number of entries before those.

    Attributes:
        first: as above, now.
    """

    def __init__(self, limit: int, items: list[_T] | None = None, first: int = 0) -> None:
        self._limit = limit
        self._items = items or []
        self.first = first

    @property
    def count(self) -> int:
        """The number of entries ever added."""
        return self.first + len(self._items)

    def add(self, item: _T) -> list[_T]:
        """Append an entry; returns those that are no longer kept, oldest first."""
        self._items.append(item)
        dropped = self._items[: max(0, len(self._items) - self._limit)]
        del self._items[: len(dropped)]
        self.first += len(dropped)
        return dropped

    def change(self, update: Callable[[_T], _T], newest: int) -> None:
        """Replace each of the newest entries by the result of ``update``."""
        self._items[-newest:] = map(update, self._items[-newest:])

    def since(self, place: int) -> list[_T]:
        """The entries from a place on, as far as they are kept."""
        return self._items[max(0, place - self.first) :]

    def newest(self, count: int) -> list[_T]:
        """At most so many of the newest entries, oldest first."""
        return self._items[-count:]

    def dump(self, place: int = 0) -> dict[str, Any]:
        """The entries as JSON values, which :meth:`load` reads."""
        first = max(self.first, min(place, self.count))
        return {"first": first, "items": [to_json(item) for item in self.since(first)]}

    @classmethod
    def load(cls, limit: int, kind: type[_T], data: Any, **added: Any) -> Tail[_T]:
        """Read what :meth:`dump` wrote, or an earlier version without the fields ``added``, of which it gives values.

        Raises:
            WireError: it is something else.
        """
        if not (isinstance(data, dict) and type(data.get("first")) is int and isinstance(data.get("items"), list)):
            raise WireError(f"a list of {kind.__name__} must have a first place and items")
        items = [{**added, **item} if isinstance(item, dict) else item for item in data["items"]]
        return cls(limit, [from_json(kind, item) for item in items], data["first"])
