"""The built-in network transport: TCP with TLS 1.3 bound to the nodes' keys, for processes and machines on a LAN.

Each pair of nodes has one connection for both directions, so it is enough when one of the two can be reached. The node
with the smaller key dials at once, the other one only when no connection has come for a moment; a newer connection
takes the place of an older one, except that one dialled by the smaller key is left alone while it is young, so that
two made at the same time do not end each other.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
from collections.abc import Awaitable, Mapping, Sequence
from typing import TypeVar
from urllib.parse import urlsplit

from psyche_lightning.errors import TransportError, WireError
from psyche_lightning.transports.base import Link, Progress, TransportContext, check_message
from psyche_lightning.transports.connection import Connection, Outbox
from psyche_lightning.transports.handshake import Handshake
from psyche_lightning.transports.meter import ByteMeter, MeteredSocket
from psyche_lightning.transports.waiting import happens, within
from psyche_lightning.wire.identity import short

MAX_ARRIVING = 256  # connections that have not proved who they are
GRACE = 2.0  # seconds that the node with the larger key waits for the other to dial
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0  # seconds between attempts to connect
CONNECT_WAIT = 5.0  # seconds that a fetch waits for a link that is down
_READ_LIMIT = 256 * 1024
_WILDCARDS = ("", "0.0.0.0", "::")
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class _Peer:
    """What is known about one peer, across connections."""

    def __init__(self, key: bytes, address: str) -> None:
        self.key = key
        self.address = address
        self.outbox = Outbox()
        self.connection: Connection | None = None
        self.up = asyncio.Event()
        self.down = asyncio.Event()
        self.down.set()
        self.reason = "not connected yet"
        self.lost = ""  # why the last connection ended
        self.dialler: asyncio.Task[None] | None = None
        self.past_up = self.past_down = 0  # bytes of earlier connections and failed attempts

    def absorb(self, meter: ByteMeter) -> None:
        """Add the bytes of a connection that has ended."""
        self.past_up += meter.up
        self.past_down += meter.down

    def link(self) -> Link:
        """For people to look at."""
        up, down, connection = self.past_up, self.past_down, self.connection
        if connection is None:
            return Link(self.key, False, None, up, down, self.reason)
        meter = connection.meter
        return Link(self.key, True, connection.round_trip, up + meter.up, down + meter.down)


class TcpTransport:
    """A :class:`~psyche_lightning.transports.base.Transport` over TCP; addresses look like ``tcp://10.0.0.7:4000``.

    Args:
        host: interface to listen on; ``0.0.0.0`` or ``::`` for all, which needs ``advertise``.
        port: port to listen on; 0 takes a free one.
        advertise: ``HOST`` or ``HOST:PORT`` that peers are to dial, when it is not ``host`` and ``port``.
        meter: counts the bytes of all sockets, refused strangers included; one of its own by default.
        rng: spreads the attempts to reconnect.
        ping_interval: seconds between pings on each link.
        silence: seconds after which a peer that sends nothing, or takes nothing, is disconnected.
        handshake_timeout: seconds in which a new connection must have proved who it is.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str | None = None,
        meter: ByteMeter | None = None,
        *,
        rng: random.Random | None = None,
        ping_interval: float = 5.0,
        silence: float = 20.0,
        handshake_timeout: float = 10.0,
    ) -> None:
        self.meter = meter or ByteMeter()
        self._host = host
        self._port = port
        self._advertise = advertise
        self._rng = rng or random.Random()
        self._ping_interval = ping_interval
        self._silence = silence
        self._handshake_timeout = handshake_timeout
        self._context: TransportContext | None = None
        self._handshake: Handshake | None = None
        self._listener: MeteredSocket | None = None
        self._peers: dict[bytes, _Peer] = {}
        self._arriving: dict[asyncio.Task[None], None] = {}  # in order of arrival
        self._tasks: set[asyncio.Task[None]] = set()
        self._running = False

    async def start(self, context: TransportContext) -> str:
        """See the contract."""
        if self._context is not None:
            raise TransportError("this transport was started before; make a new one")
        if self._host in _WILDCARDS and self._advertise is None:
            raise TransportError(
                f"listening on every interface (host={self._host!r}) says nothing about where peers find this node: "
                "give advertise='HOST' or 'HOST:PORT' too, as they can reach it"
            )
        self._context = context
        self._handshake = Handshake(context.identity, context.run_id)
        self._listener = await self._listen()
        port = self._listener.getsockname()[1]
        address = _address(self._advertise or self._host, port)
        _locate(address)
        self._running = True
        self._spawn(self._accept(self._listener))
        self._spawn(self._tend())
        peers, self._peers = self._peers, {}
        self.set_peers({key: peer.address for key, peer in peers.items()})
        return address

    def set_peers(self, peers: Mapping[bytes, str]) -> None:
        """See the contract."""
        own = self._context.identity.public if self._context else None
        for key in [key for key in self._peers if key not in peers]:
            peer = self._peers.pop(key)
            if peer.dialler is not None:
                peer.dialler.cancel()
            if peer.connection is not None:
                peer.connection.close("you are not among the peers any more")
        for key, address in peers.items():
            if key == own:
                continue
            peer = self._peers.setdefault(key, _Peer(key, address))
            if not self._running or (peer.dialler is not None and peer.address == address):
                continue
            peer.address = address
            if peer.dialler is not None:
                peer.dialler.cancel()
            peer.dialler = self._spawn(self._keep_linked(peer))

    def send(self, peer: bytes, message: bytes) -> None:
        """See the contract."""
        check_message(message)
        known = self._peers.get(peer)
        if known is None:
            return
        known.outbox.put(bytes(message))
        if known.connection is not None:
            known.connection.wake()

    def broadcast(self, message: bytes) -> None:
        """See the contract."""
        check_message(message)
        for peer in self._peers:
            self.send(peer, message)

    async def fetch(
        self,
        digest: bytes,
        providers: Sequence[bytes],
        *,
        max_size: int,
        timeout: float,
        progress: Progress | None = None,
    ) -> bytes:
        """See the contract; providers whose link is down are tried after the others."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        order = sorted(providers, key=lambda key: self._connection(key) is None)
        failures = []
        for index, provider in enumerate(order):
            left = deadline - loop.time()
            allowance = left if index == len(order) - 1 else left / 2
            try:
                data = await self._fetch_from(provider, digest, max_size, allowance)
                if progress is not None:
                    progress(len(data), len(data))
                return data
            except TransportError as error:
                failures.append(f"{short(provider)} {error}")
        raise TransportError(f"nobody delivered blob {short(digest)}: {'; '.join(failures) or 'no provider is known'}")

    def links(self) -> list[Link]:
        """See the contract."""
        return [peer.link() for peer in self._peers.values()]

    async def stop(self) -> None:
        """See the contract."""
        self._running = False
        for peer in self._peers.values():
            peer.reason = "this node stopped"
            peer.up.set()  # nobody waits for it any longer
        for _ in range(4):  # a library below may lose a cancellation
            tasks = [*self._tasks, *self._arriving]
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=0.5)
        if self._listener is not None:
            self._listener.close()

    # -- links --------------------------------------------------------------------------------------------------------

    def _connection(self, key: bytes) -> Connection | None:
        peer = self._peers.get(key)
        return peer.connection if peer is not None else None

    async def _fetch_from(self, key: bytes, digest: bytes, max_size: int, allowance: float) -> bytes:
        peer = self._peers.get(key)
        if peer is None:
            raise TransportError("is not a peer")
        if allowance <= 0:
            raise TransportError("was not asked for lack of time")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + allowance
        if self._running and peer.connection is None:
            await happens(peer.up, min(allowance, CONNECT_WAIT))
        connection = peer.connection
        if not self._running or connection is None:
            raise TransportError(f"is not connected ({peer.reason})")
        return await connection.fetch(digest, max_size, deadline - loop.time())

    async def _keep_linked(self, peer: _Peer) -> None:
        """Dial whenever there is no connection, with growing pauses."""
        loop = asyncio.get_running_loop()
        patient = self._context is not None and self._context.identity.public > peer.key
        attempts = 0
        while self._running:
            if peer.connection is not None:
                begun = loop.time()
                await peer.down.wait()
                attempts = 0 if loop.time() - begun > self._ping_interval else attempts + 1
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(attempts - 1, 10)) if attempts else 0.0
            pause = pause * self._rng.uniform(0.5, 1.5) + (GRACE * self._rng.uniform(1.0, 1.5) if patient else 0.0)
            if pause and await happens(peer.up, pause):
                continue
            meter = ByteMeter(self.meter)
            try:
                connection = await self._timed(self._dial(peer, meter))
            except (TransportError, WireError, OSError, EOFError) as error:
                peer.absorb(meter)
                attempts += 1
                if peer.connection is None:
                    peer.reason = f"cannot connect to {peer.address[:100]}: {_reason(error)}"
                    if peer.lost:
                        peer.reason += f" (the last connection ended: {peer.lost})"
                    _log.debug("%s: %s", short(peer.key), peer.reason)
            else:
                self._adopt(peer, connection)

    async def _dial(self, peer: _Peer, meter: ByteMeter) -> Connection:
        assert self._handshake is not None
        loop = asyncio.get_running_loop()
        host, port = _locate(peer.address)
        failure: OSError = OSError("the name has no address")
        for family, kind, proto, _, target in (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[:4]:
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
                await self._handshake.meet(reader, writer, peer.key)
            except BaseException:
                transport.abort()
                raise
            return self._connect(peer, True, reader, writer, meter)
        raise failure

    def _connect(
        self, peer: _Peer, dialled: bool, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, meter: ByteMeter
    ) -> Connection:
        assert self._context is not None
        stall = self._silence / 2
        return Connection(peer.key, dialled, reader, writer, self._context, peer.outbox, meter, stall)

    def _adopt(self, peer: _Peer, connection: Connection) -> None:
        """Make a proven connection the link of its peer."""
        if not self._running or self._peers.get(peer.key) is not peer:
            self._spawn(self._serve(peer, connection))
            connection.close("you are not among the peers any more")
            return
        old, peer.connection = peer.connection, connection
        if old is not None:
            old.close("a newer connection took its place")
        peer.down.clear()
        peer.up.set()
        self._spawn(self._serve(peer, connection))

    async def _serve(self, peer: _Peer, connection: Connection) -> None:
        try:
            await connection.run()
        finally:
            peer.absorb(connection.meter)
            if peer.connection is connection:
                peer.connection = None
                peer.reason = peer.lost = connection.reason
                peer.up.clear()
                peer.down.set()

    # -- arrivals -----------------------------------------------------------------------------------------------------

    async def _listen(self) -> MeteredSocket:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(
                self._host or None, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            family, kind, proto, _, target = found[0]
            listener = MeteredSocket(family, kind, proto, meter=self.meter)
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
                f"cannot listen on {self._host}:{self._port}: {_reason(error)}. Choose a free port (0 finds one) and "
                "an address of this machine"
            ) from error
        return listener

    async def _accept(self, listener: MeteredSocket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:  # no descriptor left, or the client was gone before it was accepted
                _log.warning("accepting a connection failed: %s", _reason(error))
                await asyncio.sleep(0.2)
                continue
            if len(self._arriving) >= MAX_ARRIVING:
                next(iter(self._arriving)).cancel()  # the oldest: honest ones are quick
            assert isinstance(sock, MeteredSocket)
            task = asyncio.create_task(self._receive(sock))
            self._arriving[task] = None
            task.add_done_callback(lambda done: self._arriving.pop(done, None))

    async def _receive(self, sock: MeteredSocket) -> None:
        """Bring a new connection through the handshake, or drop it."""
        try:
            peer, connection = await self._timed(self._admit(sock))
        except (TransportError, WireError, OSError, EOFError) as error:
            _log.debug("refused a connection: %s", _reason(error))
        else:
            self._adopt(peer, connection)

    async def _admit(self, sock: MeteredSocket) -> tuple[_Peer, Connection]:
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
        peer = self._peers[key]
        return peer, self._connect(peer, False, reader, writer, sock.meter)

    def _objection(self, key: bytes) -> str | None:
        """Why a node with this key is not let in, or None."""
        peer = self._peers.get(key)
        if peer is None or self._context is None:
            return "you are not among the peers"
        old, own = peer.connection, self._context.identity.public
        young = old is not None and asyncio.get_running_loop().time() - old.since < 2 * GRACE
        if old is not None and young and old.dialled and own < key:
            return "a connection to you was made at the same time"
        return None

    # -- upkeep -------------------------------------------------------------------------------------------------------

    async def _tend(self) -> None:
        """Ping, and close what is silent or takes nothing."""
        loop = asyncio.get_running_loop()
        period = min(1.0, self._ping_interval / 2)
        last = loop.time()
        while True:
            await asyncio.sleep(period)
            now = loop.time()
            late, last = now - last - period, now
            for peer in self._peers.values():
                connection = peer.connection
                if connection is None:
                    continue
                if late > period:  # this process slept: what came meanwhile has not been read yet
                    connection.heard += late
                    if connection.stuck is not None:
                        connection.stuck += late
                if now - connection.heard > self._silence:
                    connection.close(f"silent for {self._silence:g} s")
                elif connection.stuck is not None and now - connection.stuck > self._silence:
                    connection.close(f"took no bytes for {self._silence:g} s")
                else:
                    connection.ping(now, self._ping_interval)

    async def _timed(self, handshake: Awaitable[_T]) -> _T:
        try:
            return await within(self._handshake_timeout, handshake)
        except asyncio.TimeoutError:
            raise TransportError(f"no connection within {self._handshake_timeout:g} s") from None

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _stream_protocol(loop: asyncio.AbstractEventLoop) -> tuple[asyncio.StreamReader, asyncio.StreamReaderProtocol]:
    reader = asyncio.StreamReader(limit=_READ_LIMIT, loop=loop)
    return reader, asyncio.StreamReaderProtocol(reader, loop=loop)


def _address(host: str, port: int) -> str:
    """``tcp://HOST:PORT`` from ``HOST`` or ``HOST:PORT``; IPv6 hosts are put in brackets."""
    if host.count(":") > 1 and not host.startswith("["):
        host = f"[{host}]"
    has_port = ":" in host.rpartition("]")[2]
    return f"tcp://{host}" if has_port else f"tcp://{host}:{port}"


def _locate(address: str) -> tuple[str, int]:
    """Host and port of an address.

    Raises:
        TransportError: it is not one of this transport.
    """
    try:
        parts = urlsplit(address)
        if parts.scheme == "tcp" and parts.hostname and parts.port and not parts.path and not parts.username:
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise TransportError(f"{address[:100]!r} is not an address of the tcp transport, such as tcp://10.0.0.7:4000")


def _reason(error: Exception) -> str:
    """What an error says, in few words."""
    if isinstance(error, OSError):
        return error.strerror or (os.strerror(error.errno) if error.errno else type(error).__name__)
    if isinstance(error, EOFError):
        return "the connection was closed during the handshake"
    return str(error)
