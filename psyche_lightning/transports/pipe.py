"""What carries a connection: an open, authenticated and encrypted way to one peer (TLS over TCP, QUIC streams)."""

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
    """The peer closed the connection and gave a reason, which is the text and safe to show."""


class Pipe(Protocol):
    """Carries frames in each direction, in one lane or in two; with two, urgent frames need not wait for bulky ones."""

    @property
    def meter(self) -> ByteMeter:
        """Counts the bytes, up and down, overhead included."""
        ...

    @property
    def batch(self) -> int:
        """Bytes of bulky frames that are best written at once, if no limit says less."""
        ...

    @property
    def lanes(self) -> Sequence[tuple[Source, Collection[int]]]:
        """The streams that frames come from, and the kinds that may come on each."""
        ...

    async def write(self, data: bytes, *, bulk: bool) -> None:
        """Send frames; returns once few of the bytes still wait in this process.

        Raises:
            OSError: the connection broke.
            GoodbyeError: the peer closed it.
        """

    def close(self, reason: str) -> None:
        """Tell the peer why, if possible, and end the connection at once."""

    async def closed(self) -> None:
        """Wait until everything is released."""

    def path(self) -> str:
        """How bytes travel, see :attr:`psyche_lightning.transports.base.Link.path`."""
        ...
