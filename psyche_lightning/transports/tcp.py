"""The built-in network transport: TCP with TLS 1.3 bound to the nodes' keys, for processes and machines on a LAN."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Collection, Sequence
from urllib.parse import urlsplit

from psyche_lightning.errors import TransportError
from psyche_lightning.transports.base import TransportContext
from psyche_lightning.transports.framing import BLOCK_SIZE, Source, goodbye
from psyche_lightning.transports.handshake import Handshake
from psyche_lightning.transports.mesh import MAX_ARRIVING, MeshTransport, reason
from psyche_lightning.transports.meter import ByteMeter, MeteredSocket
from psyche_lightning.transports.pipe import BULK, URGENT, Pipe
from psyche_lightning.transports.reach import Reach

OVERHEAD = 1.04
"""Bytes on the wire for each byte: TLS records, and headers of TCP, IP and Ethernet, in packets of 1500 bytes."""
CONGESTION = b"bbr"
"""Congestion control, if the kernel has it: others slow down at each lost packet, as if the link were full."""
_READ_LIMIT = 256 * 1024
_WILDCARDS = ("", "0.0.0.0", "::")


class TcpTransport(MeshTransport):
    """A :class:`~psyche_lightning.transports.base.Transport` over TCP; addresses look like ``tcp://10.0.0.7:4000``.

    Args:
        host: interface to listen on; ``0.0.0.0`` or ``::`` for all, which needs ``advertise``.
        port: port to listen on; 0 takes a free one.
        advertise: ``HOST`` or ``HOST:PORT`` that peers dial, if it differs from ``host`` and ``port``.
        meter: counts the bytes of all sockets, also those of refused strangers; a new one by default.
        upload: bytes a second that this node sends at most, network headers included; None for no limit.
        download: bytes a second that it receives at most; None for no limit.
        rng: spreads the attempts to reconnect, and chooses who passes messages on.
        ping_interval: seconds between pings on each link.
        silence: seconds after which a peer that sends nothing or takes nothing is disconnected.
        handshake_timeout: seconds in which a new connection must prove its key.

    Raises:
        ConfigError: a limit is not a positive number.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str | None = None,
        meter: ByteMeter | None = None,
        *,
        upload: float | None = None,
        download: float | None = None,
        rng: random.Random | None = None,
        ping_interval: float = 5.0,
        silence: float = 20.0,
        handshake_timeout: float = 10.0,
    ) -> None:
        super().__init__(
            meter=meter,
            upload=upload,
            download=download,
            rng=rng,
            ping_interval=ping_interval,
            silence=silence,
            handshake_timeout=handshake_timeout,
            overhead=OVERHEAD,
        )
        self._host = host
        self._port = port
        self._advertise = advertise
        self._handshake: Handshake | None = None
        self._listener: MeteredSocket | None = None

    async def _open(self, context: TransportContext) -> str:
        if self._host in _WILDCARDS and self._advertise is None:
            raise TransportError(
                f"a node that listens on every interface (host={self._host!r}) does not know at which address peers "
                "reach it: also give advertise='HOST' or 'HOST:PORT'"
            )
        self._handshake = Handshake(context.identity, context.scope)
        self._listener = await self._listen()
        port = self._listener.getsockname()[1]
        address = _address(self._advertise or self._host, port)
        self._reach = Reach([ip for host in {self._host, _locate(address)[0]} for ip in await _lookup(host)])
        self._spawn(self._accept(self._listener))
        return address

    async def _shut(self) -> None:
        if self._listener is not None:
            self._listener.close()

    async def _dial(self, key: bytes, address: str, meter: ByteMeter) -> Pipe:
        assert self._handshake is not None
        loop = asyncio.get_running_loop()
        host, port = _locate(address)
        failure: Exception = OSError("the name has no address")
        for family, kind, proto, _, target in (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[:4]:
            try:
                self._reach.check(str(target[0]))
            except TransportError as error:
                failure = error
                continue
            sock = MeteredSocket(family, kind, proto, meter=meter)
            try:
                sock.setblocking(False)
                await loop.sock_connect(sock, target)
            except OSError as error:
                sock.close()
                failure = error
                continue
            except BaseException:
                sock.close()
                raise
            reader, protocol = _stream_protocol(loop)
            transport, _ = await loop.create_connection(
                lambda protocol=protocol: protocol,  # type: ignore[misc]
                sock=sock,
                ssl=self._handshake.client_context,
                server_hostname="",
                ssl_handshake_timeout=self._handshake_timeout,
            )
            writer = asyncio.StreamWriter(transport, protocol, reader, loop)
            try:
                await self._handshake.meet(reader, writer, key)
            except BaseException:
                transport.abort()
                raise
            return TlsPipe(reader, writer, meter)
        raise failure

    def _hosts(self, address: str) -> Collection[str]:
        try:
            return [_locate(address)[0]]
        except TransportError:
            return []

    async def _listen(self) -> MeteredSocket:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(
                self._host or None, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            family, kind, proto, _, target = found[0]
            listener = MeteredSocket(family, kind, proto, meter=self._meter)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.setblocking(False)
                listener.bind(target)
                listener.listen(MAX_ARRIVING)
            except BaseException:
                listener.close()
                raise
        except (OSError, OverflowError) as error:
            raise TransportError(
                f"cannot listen on {self._host}:{self._port}: {reason(error)}. Choose a free port (0 finds one) and "
                "an address of this machine"
            ) from error
        return listener

    async def _accept(self, listener: MeteredSocket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, target = await loop.sock_accept(listener)
            except OSError as error:  # no descriptor is left, or the client has already gone
                self._complain("this node", f"accepting a connection failed: {reason(error)}")
                await asyncio.sleep(0.2)
                continue
            assert isinstance(sock, MeteredSocket)
            if self._welcome(target[0]):
                self._arrive(self._admit(sock), f"{target[0]}:{target[1]}")
            else:
                sock.close()

    async def _admit(self, sock: MeteredSocket) -> tuple[bytes, Pipe]:
        assert self._handshake is not None
        loop = asyncio.get_running_loop()
        reader, protocol = _stream_protocol(loop)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol,
            sock,
            ssl=self._handshake.server_context,
            ssl_handshake_timeout=self._handshake_timeout,
        )
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        try:
            key = await self._handshake.admit(reader, writer, self._objection)
        except BaseException:
            transport.abort()
            raise
        return key, TlsPipe(reader, writer, sock.meter)


class TlsPipe:
    """A TLS connection after the handshake. Its one lane carries urgent and bulky frames, a few of each in turn.

    Args:
        reader: the stream.
        writer: the same.
        meter: counts the bytes of its socket.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, meter: ByteMeter) -> None:
        self._meter = meter
        self._reader = reader
        self._writer = writer
        self._turn = asyncio.Lock()
        # The fewer bytes wait in the kernel, the sooner an urgent frame leaves.
        writer.transport.set_write_buffer_limits(high=BLOCK_SIZE)
        sock = writer.get_extra_info("socket")
        if sock is not None and hasattr(socket, "TCP_NOTSENT_LOWAT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 2 * BLOCK_SIZE)
        if sock is not None and hasattr(socket, "TCP_CONGESTION"):
            with contextlib.suppress(OSError):  # the kernel lacks it, or does not allow it
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, CONGESTION)

    @property
    def meter(self) -> ByteMeter:
        """See :class:`~psyche_lightning.transports.pipe.Pipe`."""
        return self._meter

    @property
    def batch(self) -> int:
        """One block: urgent frames wait for it."""
        return BLOCK_SIZE

    @property
    def lanes(self) -> Sequence[tuple[Source, Collection[int]]]:
        """See :class:`~psyche_lightning.transports.pipe.Pipe`."""
        return [(self._reader, URGENT | BULK)]

    async def write(self, data: bytes, *, bulk: bool) -> None:
        """See :class:`~psyche_lightning.transports.pipe.Pipe`."""
        async with self._turn:
            self._writer.write(data)
            await self._writer.drain()

    def close(self, reason: str) -> None:
        """See :class:`~psyche_lightning.transports.pipe.Pipe`."""
        if not self._turn.locked():
            self._writer.write(goodbye(reason))
        self._writer.transport.abort()

    async def closed(self) -> None:
        """See :class:`~psyche_lightning.transports.pipe.Pipe`."""
        await self._writer.wait_closed()

    def path(self) -> str:
        """See :class:`~psyche_lightning.transports.pipe.Pipe`."""
        return "direct"


async def _lookup(host: str) -> list[str]:
    """The IP addresses of a host of this node; none of all interfaces, or of a name that only others know."""
    if host in _WILDCARDS:
        return []
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [str(entry[4][0]) for entry in found]


def _stream_protocol(loop: asyncio.AbstractEventLoop) -> tuple[asyncio.StreamReader, asyncio.StreamReaderProtocol]:
    reader = asyncio.StreamReader(limit=_READ_LIMIT, loop=loop)
    return reader, asyncio.StreamReaderProtocol(reader, loop=loop)


def _address(host: str, port: int) -> str:
    """``tcp://HOST:PORT`` from ``HOST`` or ``HOST:PORT``; puts IPv6 hosts in brackets."""
    if host.count(":") > 1 and not host.startswith("["):
        host = f"[{host}]"
    has_port = ":" in host.rpartition("]")[2]
    return f"tcp://{host}" if has_port else f"tcp://{host}:{port}"


def _locate(address: str) -> tuple[str, int]:
    """Host and port of an address.

    Raises:
        TransportError: it is not an address of this transport.
    """
    try:
        parts = urlsplit(address)
        if parts.scheme == "tcp" and parts.hostname and parts.port and not parts.path and not parts.username:
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise TransportError(f"{address[:100]!r} is not an address of the tcp transport, such as tcp://10.0.0.7:4000")
