"""Reads blobs for peers: one read from the store serves all peers that ask for parts of the blob."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable

from psyche_lightning.wire.identity import short

KEPT_BYTES = 64 << 20
KEPT_SECONDS = 10.0
_log = logging.getLogger(__name__)


class BlobCache:
    """Reads blobs in other threads, and keeps the last ones for some seconds.

    Args:
        read_blob: returns the bytes of a blob, or None; called from other threads.
    """

    def __init__(self, read_blob: Callable[[bytes], bytes | None]) -> None:
        self._read_blob = read_blob
        self._kept: OrderedDict[bytes, tuple[float, bytes]] = OrderedDict()
        self._size = 0
        self._reading: dict[bytes, asyncio.Future[bytes | None]] = {}

    async def read(self, digest: bytes) -> bytes | None:
        """Returns the blob, or None when it is not here or cannot be read."""
        if digest in self._kept:
            self._kept.move_to_end(digest)
            return self._kept[digest][1]
        reading = self._reading.get(digest)
        if reading is None:
            reading = asyncio.get_running_loop().run_in_executor(None, self._read_blob, digest)
            self._reading[digest] = reading
            reading.add_done_callback(lambda done: self._keep(digest, done))
        try:
            return await asyncio.shield(reading)
        except Exception:
            _log.exception("reading blob %s failed", short(digest))
            return None

    def forget(self, before: float) -> None:
        """Drop blobs that were read before this loop time."""
        for digest in [digest for digest, (then, _) in self._kept.items() if then < before]:
            self._size -= len(self._kept.pop(digest)[1])

    def _keep(self, digest: bytes, done: asyncio.Future[bytes | None]) -> None:
        self._reading.pop(digest, None)
        data = None if done.cancelled() or done.exception() else done.result()
        if data is None or len(data) > KEPT_BYTES:
            return
        self._kept[digest] = asyncio.get_running_loop().time(), data
        self._size += len(data)
        while self._size > KEPT_BYTES:
            self._size -= len(self._kept.popitem(last=False)[1][1])
