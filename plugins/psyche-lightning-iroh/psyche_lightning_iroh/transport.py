"""The transport ``iroh``: QUIC links between nodes that know each other by their keys and prove them.

A connection has two bidirectional streams: one with priority for urgent frames, and one for blobs. iroh's handshake is
TLS 1.3 with the two Ed25519 node keys. Its protocol name (ALPN) is a hash of the run's name, so nodes of different runs
cannot connect.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import random
import re
import socket
from collections.abc import Collection, Sequence
from typing import Any

import iroh

from psyche_lightning.aio import within
from psyche_lightning.errors import ConfigError, TransportError, WireError
from psyche_lightning.transports.base import TransportContext
from psyche_lightning.transports.framing import Kind, Source, frame, goodbye_text, read_frame
from psyche_lightning.transports.handshake import RefusedError, UnwelcomeError
from psyche_lightning.transports.mesh import MeshTransport
from psyche_lightning.transports.meter import ByteMeter
from psyche_lightning.transports.pipe import BULK, URGENT, GoodbyeError, Pipe
from psyche_lightning.transports.reach import Reach
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import short
from psyche_lightning_iroh.address import Address, is_ip, split, usable
from psyche_lightning_iroh.binding import use_fast_copy

VERSION = 2
OVERHEAD = 1.03
"""Bytes on the wire for each byte: headers of QUIC, UDP, IP and Ethernet, and acknowledgements."""
READ_SIZE = WRITE_SIZE = 256 * 1024
ONLINE_WAIT = 10.0  # seconds to wait for a relay
CLOSE_WAIT = 1.0
ROUTER_WAIT = 2.0  # seconds to wait for a router to open a port
_CLOSED_BY_PEER = "closed by peer: "
_RUST_LOCATION = re.compile(r" *\(\S*\.rs:\d+:\d+\)")
_log = logging.getLogger(__name__)


class IrohTransport(MeshTransport):
    """A :class:`~psyche_lightning.transports.base.Transport` over iroh.

    Addresses look like ``iroh://10.0.0.7:4433`` or ``iroh://10.0.0.7:4433?relay=https://relay.example/``.

    Args:
        host: interface to listen on (UDP); ``0.0.0.0`` for all, whose addresses peers then try.
        port: port to listen on; 0 takes a free one.
        advertise: ``HOST`` or ``HOST:PORT`` that peers try as well, such as a router's forwarded port.
        relay: who helps nodes that cannot reach each other. ``"off"`` (or False): nobody; the node contacts only peers
            and the local network's router, which iroh always asks for a port. ``"on"`` (or True): the public relays of
            iroh's makers. One or several URLs: your own relays. A relay sees who talks to whom, but not what they say.
            Paths become direct where routers allow it.
        upload: bytes a second that this node sends at most, network headers included; None for no limit.
        download: bytes a second that it receives at most; None for no limit.
        meter: counts the bytes of all connections; a new one by default.
        rng: spreads the attempts to reconnect, and chooses who passes messages on.
        ping_interval: seconds between pings on each link.
        silence: seconds after which a peer that sends nothing or takes nothing is disconnected.
        handshake_timeout: seconds in which a new connection must prove its key.

    Raises:
        ConfigError: ``relay`` or a limit is wrong.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str | None = None,
        relay: str | bool | Sequence[str] = "off",
        *,
        upload: float | None = None,
        download: float | None = None,
        meter: ByteMeter | None = None,
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
        self._relays = _relays(relay)
        self._endpoint: Any = None
        self._alpn = b""
        self._pipes: set[QuicPipe] = set()

    @property
    def meter(self) -> ByteMeter:
        """Counts the bytes of all connections, without the headers of UDP and IP."""
        for pipe in list(self._pipes):
            pipe.count()
        return self._meter

    async def _open(self, context: TransportContext) -> str:
        use_fast_copy()
        self._alpn = b"psyche-lightning/%d/" % VERSION + sha256(context.scope.encode())[:16].hex().encode()
        host = await _lookup(self._host)
        self._endpoint = await self._bind(host, context.identity.secret_bytes())
        relay = await self._online()
        self._spawn(self._accept())
        found = await self._found(host)
        if self._advertise is not None:
            try:
                found.insert(0, split(self._advertise, default=self._own_port()))
            except ValueError:
                raise TransportError(
                    f"advertise={self._advertise!r} is not HOST or HOST:PORT, such as home.example:4433"
                ) from None
        if not found and relay is None:
            raise TransportError(
                f"a node that listens on {self._host} has no address that peers could try: set advertise='HOST:PORT', "
                "or use a relay"
            )
        address = str(Address(tuple(dict.fromkeys(found)), relay))
        Address.parse(address)
        self._reach = Reach([host, *(one for one, _ in found)])
        return address

    async def _bind(self, host: str, secret: bytes) -> Any:
        """Make the endpoint; it listens only on one address of this machine if ``host`` is one."""
        is_v6 = ":" in host
        exact = not ipaddress.ip_address(host).is_unspecified
        other = ("127.0.0.1:0" if is_v6 else "[::1]:0") if exact else None
        text = f"[{host}]:{self._port}" if is_v6 else f"{host}:{self._port}"
        # iroh always listens on IPv4 and IPv6. The family that nobody asked for listens on loopback, if there is one.
        for addresses in ([other, text], [text]) if other else ([text],):
            options = iroh.EndpointOptions(
                preset=_Preset(addresses),
                secret_key=secret,
                alpns=[self._alpn],
                relay_mode=_relay_mode(self._relays),
            )
            try:
                return await iroh.Endpoint.bind(options)
            except iroh.IrohError as error:
                failure = _text(error)
        raise TransportError(
            f"cannot listen on {self._host}:{self._port}: {failure}. Choose a free UDP port (0 finds one) and an "
            "address of this machine"
        )

    async def _online(self) -> str | None:
        """Wait for a relay if the options name any. Returns its URL."""
        if self._relays == []:
            return None
        try:
            await within(ONLINE_WAIT, self._endpoint.online())
        except asyncio.TimeoutError:
            _log.warning("no relay answered within %g s; only direct paths work until a relay answers", ONLINE_WAIT)
            return self._relays[0] if self._relays else None
        url: str | None = self._endpoint.addr().relay_url()
        _log.info("nodes that cannot reach this node directly use the relay %s", url)
        return url

    async def _found(self, host: str) -> list[tuple[str, int]]:
        """Addresses of this node; if it listens on all interfaces, wait a moment for a public one."""
        deadline = self._now() + (ROUTER_WAIT if ipaddress.ip_address(host).is_unspecified else 0.0)
        while True:
            found = usable(self._endpoint.addr().direct_addresses(), host)
            public = any(ipaddress.ip_address(one).is_global for one, _ in found)
            if public or self._advertise is not None or self._now() >= deadline:
                return found
            await asyncio.sleep(0.1)

    def _own_port(self) -> int:
        ports = [split(text) for text in self._endpoint.bound_sockets()]
        family = ":" in self._host
        return next(port for host, port in ports if (":" in host) == family)

    async def _shut(self) -> None:
        if self._endpoint is not None:
            with contextlib.suppress(asyncio.TimeoutError, iroh.IrohError):
                await within(CLOSE_WAIT, self._endpoint.close())

    # -- connections --------------------------------------------------------------------------------------------------

    async def _dial(self, key: bytes, address: str, meter: ByteMeter) -> Pipe:
        where = Address.parse(address)
        relay = where.relay if self._relays != [] else None
        addresses = self._dialled(await where.resolve()) if where.hosts else []
        if not where.hosts and relay is None:
            raise TransportError("only a relay reaches it, and this node's option relay is off")
        connection = None
        try:
            target = iroh.EndpointAddr(iroh.EndpointId.from_bytes(key), relay, addresses)
            connection = await self._endpoint.connect(target, self._alpn)
            urgent, bulk = await connection.open_bi(), await connection.open_bi()
            for stream in (urgent, bulk):  # the peer sees a stream only when bytes arrive on it
                await stream.send().write_all(frame(Kind.WELCOME))
            pipe = await self._pipe(connection, urgent, bulk, meter)
            await read_frame(pipe.lanes[0][0], {Kind.WELCOME})
        except GoodbyeError as error:
            raise RefusedError(f"it refused: {error}") from None
        except iroh.IrohError as error:
            said = _close_reason(connection)
            raise (RefusedError(f"it refused: {said}") if said else TransportError(_text(error))) from None
        except BaseException:
            if connection is not None:
                connection.close(0, b"")
            raise
        return pipe

    def _hosts(self, address: str) -> Collection[str]:
        try:
            return [host for host, _ in Address.parse(address).hosts]
        except TransportError:
            return []

    def _dialled(self, addresses: list[str]) -> list[str]:
        """Those of a peer's ``IP:PORT`` that this node may dial; raises TransportError if there are none."""
        allowed, failure = [], TransportError("its names have no address")
        for address in addresses:
            try:
                self._reach.check(split(address)[0])
                allowed.append(address)
            except TransportError as error:
                failure = error
        if not allowed:
            raise failure
        return allowed

    async def _accept(self) -> None:
        while True:
            try:
                incoming = await self._endpoint.accept_next()
            except iroh.IrohError as error:
                self._complain("this node", f"accepting a connection failed: {_text(error)}")
                await asyncio.sleep(0.2)
                continue
            if incoming is None:
                return
            with contextlib.suppress(iroh.IrohError):  # it has gone already
                await self._answer(incoming)

    async def _answer(self, incoming: Any) -> None:
        """Begin a handshake, which costs, unless its address asks for too many."""
        origin = await _origin(incoming)
        host = origin.rpartition(":")[0]
        if self._crowded(host) and not await incoming.remote_addr_validated():
            await incoming.retry()  # only who receives at an address may use up its connections
        elif self._welcome(host):
            self._arrive(self._admit(incoming), origin)
        else:
            await incoming.refuse()

    async def _admit(self, incoming: Any) -> tuple[bytes, Pipe]:
        connection = None
        try:
            connection = await (await incoming.accept()).connect()
            key = bytes(connection.remote_id().to_bytes())
            objection = self._objection(key)
            if objection is not None:
                connection.close(1, objection.encode())
                raise UnwelcomeError(f"{short(key)} is refused: {objection}")
            urgent, bulk = await connection.accept_bi(), await connection.accept_bi()
            pipe = await self._pipe(connection, urgent, bulk, ByteMeter(self._meter))
            for source, _ in pipe.lanes[:2]:
                await read_frame(source, {Kind.WELCOME})
            await pipe.write(frame(Kind.WELCOME), bulk=False)
        except iroh.IrohError as error:
            raise TransportError(_text(error)) from None
        except BaseException:
            if connection is not None:
                connection.close(0, b"")
            raise
        return key, pipe

    async def _pipe(self, connection: Any, urgent: Any, bulk: Any, meter: ByteMeter) -> QuicPipe:
        await urgent.send().set_priority(1)
        pipe = QuicPipe(connection, urgent, bulk, meter)
        self._pipes = {one for one in self._pipes if not one.over} | {pipe}
        return pipe


class QuicPipe:
    """The two streams of a connection.

    Args:
        connection: iroh's connection.
        urgent: the stream for urgent frames.
        bulk: the stream for blobs.
        meter: counts its bytes.

    Attributes:
        over: whether it is closed and all of its bytes are counted.
    """

    def __init__(self, connection: Any, urgent: Any, bulk: Any, meter: ByteMeter) -> None:
        self.over = False
        self._connection = connection
        self._streams = urgent.send(), bulk.send()
        self._sources = _StreamSource(connection, urgent.recv()), _StreamSource(connection, bulk.recv())
        self._meter = meter

    @property
    def meter(self) -> ByteMeter:
        """See :class:`~psyche_lightning.transports.pipe.Pipe`."""
        self.count()
        return self._meter

    @property
    def batch(self) -> int:
        """Several blocks: each call of the library costs time, and urgent frames have their own stream."""
        return WRITE_SIZE

    @property
    def lanes(self) -> Sequence[tuple[Source, Collection[int]]]:
        """See :class:`~psyche_lightning.transports.pipe.Pipe`."""
        more = _NoMoreStreams(self._connection, both_ways=True), _NoMoreStreams(self._connection, both_ways=False)
        return (self._sources[0], URGENT), (self._sources[1], BULK), (more[0], ()), (more[1], ())

    def count(self) -> None:
        """Update the meter from iroh's counters."""
        stats = self._connection.stats()
        up, down = stats.udp_tx_bytes - self._meter.up, stats.udp_rx_bytes - self._meter.down
        self._meter.count(max(0, up), max(0, down))

    async def write(self, data: bytes, *, bulk: bool) -> None:
        """See :class:`~psyche_lightning.transports.pipe.Pipe`."""
        try:
            await self._streams[bulk].write_all(data)
        except iroh.IrohError as error:
            raise _broken(self._connection, error) from None

    def close(self, reason: str) -> None:
        """See :class:`~psyche_lightning.transports.pipe.Pipe`."""
        self._connection.close(0, reason.encode()[:200])

    async def closed(self) -> None:
        """See :class:`~psyche_lightning.transports.pipe.Pipe`."""
        await self._connection.closed()
        self.count()
        self.over = True

    def path(self) -> str:
        """See :class:`~psyche_lightning.transports.pipe.Pipe`."""
        for path in self._connection.paths():
            if path.is_selected:
                return f"relay {path.remote_addr}" if path.is_relay else "direct"
        return ""


class _StreamSource:
    """Reads from one of iroh's streams."""

    def __init__(self, connection: Any, stream: Any) -> None:
        self._connection = connection
        self._stream = stream
        self._data = b""
        self._at = 0  # bytes before this one have been read

    async def readexactly(self, n: int) -> bytes:
        """The next ``n`` bytes; see :class:`~psyche_lightning.transports.framing.Source`."""
        missing = n - (len(self._data) - self._at)
        if missing > 0:
            parts = [self._data[self._at :]]
            while missing > 0:
                parts.append(await self._read())
                missing -= len(parts[-1])
            self._data, self._at = b"".join(parts), 0
        self._at += n
        return self._data[self._at - n : self._at]

    async def _read(self) -> bytes:
        try:
            data: bytes = await self._stream.read(READ_SIZE)
        except iroh.IrohError as error:
            raise _broken(self._connection, error) from None
        if not data:
            raise EOFError
        return data


class _NoMoreStreams:
    """Ends the connection when the peer opens further streams, whose unread bytes would fill this process' memory.

    iroh allows a new connection a hundred streams, and cannot lower that.
    """

    def __init__(self, connection: Any, *, both_ways: bool) -> None:
        self._connection = connection
        self._accept = connection.accept_bi if both_ways else connection.accept_uni

    async def readexactly(self, n: int) -> bytes:
        """Wait for a stream that must not come; see :class:`~psyche_lightning.transports.framing.Source`."""
        try:
            await self._accept()
        except iroh.IrohError as error:
            raise _broken(self._connection, error) from None
        raise WireError("it opened more than the two streams of a link")


class _Preset(iroh.Preset):
    """Contacts no service, and listens only on the given addresses."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses

    def apply(self, builder: Any) -> None:
        builder.apply_minimal()
        for address in self._addresses:
            builder.bind_addr(address)


def _relays(option: str | bool | Sequence[str]) -> list[str] | None:
    """The relays' URLs; empty for no relay, None for the public ones."""
    if option is True or option == "on":
        return None
    if option is False or option == "off":
        return []
    urls = [option] if isinstance(option, str) else option
    if isinstance(urls, Sequence) and urls and all(isinstance(url, str) and "://" in url for url in urls):
        return list(urls)
    raise ConfigError(
        f"the option relay is {option!r}; expected off, on (the public relays of iroh's makers), or the URL of a "
        "relay of your own, such as https://relay.example"
    )


def _relay_mode(relays: list[str] | None) -> Any:
    if relays is None:
        return iroh.RelayMode.default_mode()
    try:
        return iroh.RelayMode.custom_from_urls(relays) if relays else iroh.RelayMode.disabled()
    except iroh.IrohError as error:
        raise TransportError(f"the option relay has a URL that iroh does not accept: {_text(error)}") from None


async def _lookup(host: str) -> str:
    """The IP address of an interface that is given by name or address."""
    if not host or is_ip(host):
        return host or "0.0.0.0"
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise TransportError(f"cannot listen on {host}: {error.strerror}") from error
    return str(found[0][4][0])


def _text(error: Any) -> str:
    """The last cause of an iroh error, without locations in its source code."""
    lines = [line.strip() for line in error.message().splitlines() if line.strip() not in ("", "Caused by:")]
    return _RUST_LOCATION.sub("", lines[-1]) if lines else "unknown error"


async def _origin(incoming: Any) -> str:
    """``HOST:PORT`` from which a connection comes; for one by a relay, that relay in place of the host."""
    address = await incoming.remote_addr()
    if address.is_ip():
        return str(address.addr)
    return f"the relay {address.url}:0" if address.is_relay() else f"{address}:0"


def _close_reason(connection: Any) -> str:
    """Why the peer closed the connection, or empty."""
    reason = (connection.close_reason() or "") if connection is not None else ""
    if not reason.startswith(_CLOSED_BY_PEER):
        return ""
    said = reason[len(_CLOSED_BY_PEER) :].rpartition(" (code ")[0]
    return goodbye_text(said.encode()[:200])


def _broken(connection: Any, error: Any) -> OSError:
    said = _close_reason(connection)
    return GoodbyeError(said) if said else OSError(_text(error))
