"""What lies under a connection: an open, authenticated and encrypted way to one peer (TLS over TCP, QUIC streams)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from psyche_lightning.transports.framing import LIMITS, Kind, Source
from psyche_lightning.transports.meter import ByteMeter

HANDSHAKE = frozenset({Kind.HELLO, Kind.PROOF, Kind.WELCOME})
BULK = frozenset({Kind.FOUND, Kind.BLOCK, Kind.ABSENT})
"""Answers to requests for blobs; everything else is urgent."""
URGENT = frozenset(LIMITS) - HANDSHAKE - BULK


class GoodbyeError(OSError):
    """The peer closed the connection and said why; the text is the reason, fit to be shown."""


class Pipe(Protocol):
    """Frames in each direction: in two lanes, so that what is urgent does not wait for what is bulky, or in one."""

    @property
    def meter(self) -> ByteMeter:
        """Counts the bytes, up and down, with everything that is put around them."""
        ...

    @property
    def batch(self) -> int:
        """Bytes of something bulky that are best written at once, where no limit says less."""
        ...

    @property
    def lanes(self) -> Sequence[tuple[Source, Collection[int]]]:
        """Where frames come from, and which kinds may come there."""
        ...

    async def write(self, data: bytes, *, bulk: bool) -> None:
        """Send frames; returns once little of them waits in this process.

        Raises:
            OSError: the connection broke.
            GoodbyeError: the peer closed it.
        """

    def close(self, reason: str) -> None:
        """Tell the peer why, if it listens, and end the connection now."""

    async def closed(self) -> None:
        """Wait until everything is released."""

    def path(self) -> str:
        """How the bytes travel, as of :attr:`psyche_lightning.transports.base.Link.path`."""
        ...
