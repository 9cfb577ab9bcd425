"""A bounded memory of ranges of files: the last used ones, and those that are being fetched."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future

from psyche_lightning.data.files import Lost, Range

Found = bytes | Lost


class RangeCache:
    """Keeps the last used ranges up to a number of bytes, and a future for each range that is being fetched.

    It never fetches a range twice at a time. It does not keep failures.

    Args:
        limit: the most bytes of ranges to keep.

    Attributes:
        size: bytes of the ranges that it keeps now.
    """

    def __init__(self, limit: int) -> None:
        self.size = 0
        self._limit = limit
        self._lock = threading.Lock()
        self._kept: OrderedDict[Range, bytes] = OrderedDict()
        self._coming: dict[Range, Future[Found]] = {}
        self._coming_size = 0

    def request(self, ranges: Sequence[Range], *, room: bool = False) -> tuple[dict[Range, Future[Found]], list[Range]]:
        """Look up ranges.

        Args:
            ranges: the wanted ranges.
            room: take only as many as fit into half of the limit, together with those being fetched.

        Returns:
            A future for each range, and the ranges that the caller must fetch and pass to :meth:`deliver`.
        """
        found: dict[Range, Future[Found]] = {}
        missing = []
        with self._lock:
            for part in ranges:
                if part in found:
                    continue
                if part in self._kept:
                    self._kept.move_to_end(part)
                    found[part] = Future()
                    found[part].set_result(self._kept[part])
                elif part in self._coming:
                    found[part] = self._coming[part]
                elif room and self._coming_size + part.length > self._limit // 2:
                    break
                else:
                    found[part] = self._coming[part] = Future()
                    self._coming_size += part.length
                    missing.append(part)
        return found, missing

    def deliver(self, part: Range, piece: Found) -> None:
        """Give a fetched range to all who wait for it."""
        with self._lock:
            future = self._coming.pop(part)
            self._coming_size -= part.length
            if isinstance(piece, bytes):
                self._kept[part] = piece
                self.size += part.length
                while self.size > self._limit:
                    self.size -= self._kept.popitem(last=False)[0].length
        future.set_result(piece)
