"""Counts bytes at the sockets, where they enter and leave the process, with TLS and all framing included.

This works with asyncio's selector event loop (the default on Unix), which reads and writes through the socket object. A
loop written in C, such as uvloop, bypasses it. Bytes that the kernel adds (TCP/IP headers, retransmissions) are not
counted.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


class ByteMeter:
    """Counts bytes; threads may share it. Its parent counts them as well.

    Args:
        parent: the meter of the whole of which this one counts a part.

    Attributes:
        up: bytes written.
        down: bytes read.
    """

    def __init__(self, parent: ByteMeter | None = None) -> None:
        self.up = 0
        self.down = 0
        self._parent = parent
        self._lock = threading.Lock()

    def count(self, up: int = 0, down: int = 0) -> None:
        """Add bytes."""
        with self._lock:
            self.up += up
            self.down += down
        if self._parent is not None:
            self._parent.count(up, down)


class MeteredSocket(socket.socket):
    """A socket that counts its bytes in :attr:`meter`.

    An accepted socket has a meter of its own, whose parent is the listener's.
    """

    def __init__(
        self,
        family: int = -1,
        type: int = -1,
        proto: int = -1,
        fileno: int | None = None,
        *,
        meter: ByteMeter | None = None,
    ) -> None:
        super().__init__(family, type, proto, fileno)
        self.meter = meter or ByteMeter()

    def accept(self) -> tuple[MeteredSocket, Any]:
        """As in ``socket.socket``."""
        plain, address = super().accept()
        # As in the standard library, by family, type and number. These do not carry the blocking mode.
        timeout = plain.gettimeout()
        accepted = MeteredSocket(
            plain.family, plain.type, plain.proto, fileno=plain.detach(), meter=ByteMeter(self.meter)
        )
        accepted.settimeout(timeout)
        return accepted, address

    def send(self, data: ReadableBuffer, flags: int = 0, /) -> int:
        """As in ``socket.socket``."""
        sent = super().send(data, flags)
        self.meter.count(up=sent)
        return sent

    def sendall(self, data: ReadableBuffer, flags: int = 0, /) -> None:
        """As in ``socket.socket``, but through :meth:`send`, so a part sent before an error counts too."""
        view = memoryview(data).cast("B")
        while view:
            view = view[self.send(view, flags) :]

    if sys.platform != "win32":  # whose sockets have no such method

        def sendmsg(self, buffers: Iterable[ReadableBuffer], /, *rest: Any) -> int:
            """As in ``socket.socket``."""
            sent = super().sendmsg(buffers, *rest)
            self.meter.count(up=sent)
            return sent

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """As in ``socket.socket``; bytes that are only peeked at do not count."""
        data = super().recv(bufsize, flags)
        self._received(len(data), flags)
        return data

    def recv_into(self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0) -> int:
        """As in ``socket.socket``; bytes that are only peeked at do not count."""
        size = super().recv_into(buffer, nbytes, flags)
        self._received(size, flags)
        return size

    def _received(self, size: int, flags: int) -> None:
        if not flags & socket.MSG_PEEK:
            self.meter.count(down=size)


def socket_factory(meter: ByteMeter) -> Callable[[Any], socket.socket]:
    """The ``socket_factory`` of an ``aiohttp.TCPConnector`` that counts a client's traffic in ``meter``."""

    def make(info: Any) -> socket.socket:
        family, kind, proto, *_ = info
        return MeteredSocket(family, kind, proto, meter=meter)

    return make
