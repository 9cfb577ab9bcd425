"""Ranges of files in bounded memory: what was used last, and what is on its way."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future

from psyche_lightning.data.files import Lost, Range

Piece = bytes | Lost


class RangeCache:
    """The ranges that were used last, up to a number of bytes; and a future for each that is being fetched.

    Nothing is fetched twice at a time, whoever asks. Failures are not kept.

    Args:
        limit: bytes of ranges that are kept.

    Attributes:
        size: bytes that are kept now.
    """

    def __init__(self, limit: int) -> None:
        self.size = 0
        self._limit = limit
        self._lock = threading.Lock()
        self._kept: OrderedDict[Range, bytes] = OrderedDict()
        self._coming: dict[Range, Future[Piece]] = {}
        self._coming_size = 0

    def want(self, ranges: Sequence[Range], *, room: bool = False) -> tuple[dict[Range, Future[Piece]], list[Range]]:
        """Look ranges up.

        Args:
            ranges: what is wanted.
            room: whether only as many are wanted as fit into half of the limit, together with what is coming.

        Returns:
            A future for each range, and those ranges that the caller has to fetch and to :meth:`bring`.
        """
        found: dict[Range, Future[Piece]] = {}
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

    def bring(self, part: Range, piece: Piece) -> None:
        """Give what was fetched to all who wait for it."""
        with self._lock:
            future = self._coming.pop(part)
            self._coming_size -= part.length
            if isinstance(piece, bytes):
                self._kept[part] = piece
                self.size += part.length
                while self.size > self._limit:
                    self.size -= self._kept.popitem(last=False)[0].length
        future.set_result(piece)
