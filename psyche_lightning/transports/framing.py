"""Frames of the network transports: body length (u32, big-endian), kind (u8), body.

The reader checks the length against the limits of the kind before it reads or allocates anything.
=========  ==========================================================================================================
HELLO      version u8 | server key 32 | challenge 32 | signature 64 (see :mod:`~psyche_lightning.transports.handshake`)
PROOF      client key 32 | signature 64
WELCOME    empty: the client is a peer, and the link is open
GOODBYE    up to 200 bytes of UTF-8: why the sender closes the connection
MESSAGE    the message, up to ``MAX_MESSAGE_SIZE``
PING       empty; the answer is PONG
PONG       empty
WANT       request u32 | SHA-256 32 | offset u64 | length u64: send that part of that blob
FOUND      request u32 | size of the whole blob u64: the part follows, up to the end of the blob
BLOCK      request u32 | the next bytes of the part, at most 64 KiB
ABSENT     request u32: the sender does not have the blob
ENOUGH     request u32 | length u64: send no more than this many bytes of the part; 0 cancels the request
GOSSIP     a message to pass on (see :mod:`~psyche_lightning.transports.gossip`)
BLOB       a small blob that the receiver is about to want, up to ``MAX_HANDED``
=========  ==========================================================================================================
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Collection
from typing import Protocol

from psyche_lightning.errors import WireError
from psyche_lightning.protocol.messages import MAX_MESSAGE_SIZE
from psyche_lightning.text import plain

BLOCK_SIZE = 64 * 1024
MAX_HANDED = 8 * 1024
"""Largest blob, in bytes, that a node sends before it is asked for it."""
MAX_HANDED_OUT = 64 * 1024
"""Bytes of such a blob for all peers together up to which it does so."""
_HEADER = struct.Struct("!IB")


class Kind(enum.IntEnum):
    """The kind of a frame."""

    HELLO = 0
    PROOF = 1
    WELCOME = 2
    GOODBYE = 3
    MESSAGE = 4
    PING = 5
    PONG = 6
    WANT = 7
    FOUND = 8
    BLOCK = 9
    ABSENT = 10
    ENOUGH = 11
    GOSSIP = 12
    BLOB = 13


LIMITS: dict[int, tuple[int, int]] = {
    Kind.HELLO: (129, 129),
    Kind.PROOF: (96, 96),
    Kind.WELCOME: (0, 0),
    Kind.GOODBYE: (0, 200),
    Kind.MESSAGE: (0, MAX_MESSAGE_SIZE),
    Kind.PING: (0, 0),
    Kind.PONG: (0, 0),
    Kind.WANT: (52, 52),
    Kind.FOUND: (12, 12),
    Kind.BLOCK: (5, 4 + BLOCK_SIZE),
    Kind.ABSENT: (4, 4),
    Kind.ENOUGH: (12, 12),
    Kind.GOSSIP: (43, 43 + 8 * 32 + MAX_MESSAGE_SIZE),
    Kind.BLOB: (1, MAX_HANDED),
}


class Source(Protocol):
    """A stream of bytes to read frames from, such as an ``asyncio.StreamReader``."""

    async def readexactly(self, n: int) -> bytes:
        """The next ``n`` bytes.

        Raises:
            EOFError: the stream ends earlier.
            OSError: the connection broke.
        """
        ...


def frame(kind: Kind, *parts: bytes | memoryview) -> bytes:
    """Encode one frame."""
    return b"".join((_HEADER.pack(sum(map(len, parts)), kind), *parts))


def goodbye(reason: str) -> bytes:
    """A GOODBYE frame; cuts a reason that is too long."""
    return frame(Kind.GOODBYE, reason.encode()[: LIMITS[Kind.GOODBYE][1]])


def goodbye_text(body: bytes) -> str:
    """The reason in a GOODBYE frame, safe to show."""
    return plain(body.decode(errors="replace"))


async def read_frame(reader: Source, allowed: Collection[int]) -> tuple[int, bytes]:
    """Read one frame.

    Args:
        reader: the stream.
        allowed: the kinds that may come now.

    Returns:
        Kind and body.

    Raises:
        WireError: the kind is not allowed, or its length is outside the limits.
        EOFError: the connection ended.
        OSError: the connection broke.
    """
    length, kind = _HEADER.unpack(await reader.readexactly(_HEADER.size))
    if kind not in allowed:
        raise WireError(f"a frame of kind {kind} is not allowed here")
    smallest, largest = LIMITS[kind]
    if not smallest <= length <= largest:
        raise WireError(f"a {Kind(kind).name} frame of {length} bytes; {smallest} to {largest} are accepted")
    return kind, await reader.readexactly(length) if length else b""
