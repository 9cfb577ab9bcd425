"""The connections of an HTTP server: they must ask for something soon, and few of one address may be about to."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from psyche_lightning.crowd import network, surplus

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_SILENT, MAX_SILENT_OF_HOST = 512, 32
"""Connections that have not sent a whole request yet, in all and from one address."""
HEADER_SECONDS, KEEPALIVE_SECONDS = 10.0, 15.0
"""Seconds for the headers of the first request, and from one request of a connection to the next."""


class Entrance(web.AppRunner):
    """A runner whose connections must ask for something soon.

    It encrypts by itself, because a site would tell it of a connection only after the handshake.

    Args:
        application: not set up yet.
        tls: how to encrypt; None for plain HTTP.
        shutdown_timeout: seconds for requests under way at the end.
    """

    def __init__(
        self, application: web.Application, tls: ssl.SSLContext | None = None, *, shutdown_timeout: float = 2.0
    ) -> None:
        super().__init__(
            application,
            access_log=None,
            shutdown_timeout=shutdown_timeout,
            keepalive_timeout=KEEPALIVE_SECONDS,
            lingering_time=2.0,
        )
        self._tls = tls
        self._silent: dict[asyncio.BaseTransport, str] = {}

    @property
    def server(self) -> Any:  # what a site gives its loop to make protocols
        """Makes the protocol of each connection; None before the setup."""
        inside: Any = super().server
        return None if inside is None else lambda: _Visitor(self, inside(), self._tls)

    @web.middleware
    async def check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A middleware that notes which connections have asked for something."""
        if request.transport is not None:
            self.left(request.transport)
        return await handler(request)

    def came(self, transport: asyncio.BaseTransport) -> None:
        """Count a new connection until :meth:`left`, and end one that is too many."""
        host = network(str((transport.get_extra_info("peername") or ("",))[0]))
        oldest = surplus(self._silent, host, MAX_SILENT, MAX_SILENT_OF_HOST)
        if oldest is not None:
            self.end(oldest)
        self._silent[transport] = host
        asyncio.get_running_loop().call_later(HEADER_SECONDS, self.end, transport)

    async def cleanup(self) -> None:
        """End all connections."""
        for transport in list(self._silent):
            self.end(transport)
        await super().cleanup()

    def encrypted(self, before: asyncio.BaseTransport, after: asyncio.BaseTransport) -> None:
        """A connection goes on within another."""
        if before in self._silent:
            self._silent[after] = self._silent.pop(before)
            asyncio.get_running_loop().call_later(HEADER_SECONDS, self.end, after)

    def left(self, transport: asyncio.BaseTransport) -> None:
        """The connection asked for something, or is gone."""
        self._silent.pop(transport, None)

    def end(self, transport: asyncio.BaseTransport) -> None:
        """End a connection that has not asked for anything."""
        if self._silent.pop(transport, None) is not None and isinstance(transport, asyncio.Transport):
            transport.abort()


class _Visitor(asyncio.Protocol):
    """Tells the entrance of a connection, encrypts it, and leaves the rest to the protocol inside."""

    def __init__(self, entrance: Entrance, inside: asyncio.Protocol, tls: ssl.SSLContext | None) -> None:
        self._entrance = entrance
        self._transport: asyncio.BaseTransport | None = None
        self._inside = inside
        self._open, self._over = tls is None, False
        self._early = b""
        self._tls = tls
        self._handshake: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        if self._tls is None:
            self._inside.connection_made(transport)
        else:
            assert isinstance(transport, asyncio.Transport)
            transport.pause_reading()  # what comes now is for the encryption
            self._handshake = asyncio.ensure_future(self._encrypt(transport, self._tls))
        self._entrance.came(transport)

    async def _encrypt(self, plain: asyncio.Transport, context: ssl.SSLContext) -> None:
        loop = asyncio.get_running_loop()
        try:
            inner = await loop.start_tls(plain, self, context, server_side=True, ssl_handshake_timeout=HEADER_SECONDS)
        except (OSError, EOFError):  # ssl.SSLError is an OSError
            inner = None
        if inner is None or self._over:
            self._entrance.left(plain)
            plain.abort()
            return
        self._entrance.encrypted(plain, inner)
        self._transport, self._open = inner, True
        self._inside.connection_made(inner)
        if self._early:
            self._inside.data_received(self._early)

    def connection_lost(self, error: Exception | None) -> None:
        if self._transport is not None:
            self._entrance.left(self._transport)
        self._over = True
        if self._open:
            self._inside.connection_lost(error)

    def data_received(self, data: bytes) -> None:
        if self._open:
            self._inside.data_received(data)
        else:  # it came with the end of the handshake
            self._early += data

    def eof_received(self) -> bool | None:
        return self._inside.eof_received()

    def pause_writing(self) -> None:
        self._inside.pause_writing()

    def resume_writing(self) -> None:
        self._inside.resume_writing()
