"""Serves a chain: JSON-RPC over HTTP, and subscriptions over websockets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from aiohttp import WSCloseCode, WSMsgType, web

from psyche_lightning_localnet.blocks import cluster_nodes
from psyche_lightning_localnet.chain import LocalChain
from psyche_lightning_localnet.errors import LedgerError, LocalnetError
from psyche_lightning_localnet.ledger import Ledger
from psyche_lightning_localnet.methods import METHODS
from psyche_lightning_localnet.rpc import Method, Methods, Params
from psyche_lightning_localnet.sites import Sites
from psyche_lightning_localnet.subscriptions import Hub, Listener

MAX_BODY_SIZE = 50 * 1024
"""The most bytes of a request, as in a validator."""
MAX_CONNECTIONS = 256
MAX_WAITING = 32 * 1024 * 1024
"""The most characters that wait for a slow subscriber; it is disconnected when there are more."""
HEARTBEAT = 30.0
_PORT_ATTEMPTS = 20

_log = logging.getLogger(__name__)


class LocalServer:
    """Serves a chain, and lets its slots pass.

    ``async with LocalServer(LocalChain()) as server:`` serves until the block ends. Meanwhile, code on the same thread
    can use the chain directly, for example to advance a frozen clock.

    Args:
        chain: the chain.
        host: address to listen on.
        port: port to listen on; 0 for any. It serves websockets there and, as clients expect, on the next port.
        ledger: keeps the chain; None to lose it at the end.
        hosts: names under which it is reached besides those of this machine; see :class:`Sites`.

    Attributes:
        chain: as given.
        url: URL for requests, once started.
        ws_url: URL for subscriptions, once started.
    """

    def __init__(
        self,
        chain: LocalChain,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        ledger: Ledger | None = None,
        hosts: Collection[str] = (),
    ) -> None:
        self.chain = chain
        self.url = self.ws_url = ""
        self._host = host
        self._port = port
        self._ledger = ledger
        self._sites = Sites(host, hosts)
        self._hub = Hub(chain)
        self._sockets: set[web.WebSocketResponse] = set()
        self._runner: web.AppRunner | None = None
        self._tasks: list[asyncio.Task[None]] = []
        own: dict[str, Method] = {"getClusterNodes": self._nodes}
        if ledger is not None:
            own["psyche_snapshot"] = self._snapshot
        self._methods = Methods(chain, {**METHODS, **own})

    async def __aenter__(self) -> LocalServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, and start the clock.

        Raises:
            LocalnetError: one of the two ports is not available.
        """
        app = web.Application(client_max_size=MAX_BODY_SIZE, middlewares=[self._sites.check])
        app.router.add_post("/", self._post)
        app.router.add_get("/", self._websocket)
        app.router.add_get("/health", self._health)
        # Some clients say that a plain body is compressed.
        self._runner = web.AppRunner(app, access_log=None, auto_decompress=False, shutdown_timeout=2.0)
        await self._runner.setup()
        try:
            sockets = _listen(self._host, self._port)
        except OSError as error:
            await self._runner.cleanup()
            raise LocalnetError(
                f"cannot listen on {self._host}, ports {self._port} and {self._port + 1}: {error.strerror or error}. "
                "Choose another --port; 0 takes any."
            ) from error
        for listening in sockets:
            await web.SockSite(self._runner, listening).start()
        # Clients expect websockets on the port after that for requests.
        self._port = sockets[0].getsockname()[1]
        host = f"[{self._host}]" if ":" in self._host else self._host
        host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
        self.url = f"http://{host}:{self._port}"
        self.ws_url = f"ws://{host}:{self._port + 1}"
        self.chain.observer = self._hub
        loop = asyncio.get_running_loop()
        self._tasks.append(loop.create_task(self._keep_time()))
        if self._ledger is not None:
            self._tasks.append(loop.create_task(self._keep_ledger(self._ledger)))

    async def stop(self) -> None:
        """Close all connections, stop listening, and save the chain if there is a ledger."""
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                _log.error("a task of the local chain failed: %s", result)
        self._tasks.clear()
        closing = [socket.close(code=WSCloseCode.GOING_AWAY, message=b"going down") for socket in self._sockets]
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(*closing, return_exceptions=True), 2.0)
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        self.chain.observer = None
        if self._ledger is not None:
            self._ledger.save(self.chain)

    async def _keep_time(self) -> None:
        while True:
            if self.chain.clock.running:
                self.chain.keep_time()
                await asyncio.sleep(max(0.001, self.chain.clock.until_next()))
            else:
                await asyncio.sleep(0.02)

    async def _keep_ledger(self, ledger: Ledger) -> None:
        while True:
            await asyncio.sleep(ledger.interval)
            if ledger.behind(self.chain):
                try:
                    await ledger.save_aside(self.chain)
                except LedgerError as error:  # the previous file stays, and the next attempt may succeed
                    _log.error("%s", error)

    def _nodes(self, chain: LocalChain, params: Params) -> Any:
        return cluster_nodes(urlsplit(self.url).netloc, urlsplit(self.ws_url).netloc)

    def _snapshot(self, chain: LocalChain, params: Params) -> bool:
        if self._ledger is not None:
            self._ledger.save(chain)
        return True

    # -----------------------------------------------------------------------------------------------------------------
    # Requests
    # -----------------------------------------------------------------------------------------------------------------

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(text="ok" if self.chain.healthy else "unknown")

    async def _post(self, request: web.Request) -> web.Response:
        if request.content_type != "application/json":  # a page in a browser cannot send JSON without a preflight
            return web.Response(status=415, text="Supplied content type is not allowed. Content-Type: application/json")
        response = self._methods.respond(await request.read())
        # Many requests of one client must delay neither other clients nor the clock.
        await asyncio.sleep(0)
        return web.Response(text=response or "", content_type="application/json", status=200 if response else 204)

    async def _websocket(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() != "websocket":
            return web.Response(status=405, text="Used HTTP Method is not allowed. POST or OPTIONS is required")
        if len(self._sockets) >= MAX_CONNECTIONS:
            return web.Response(status=503, text="Too many connections.")
        connection = web.WebSocketResponse(max_msg_size=MAX_BODY_SIZE, heartbeat=HEARTBEAT)
        await connection.prepare(request)
        transport = request.transport
        outbox = _Outbox(transport.abort if transport is not None else lambda: None)
        listener = Listener(self._hub, outbox.put)
        self._hub.listeners.add(listener)
        self._sockets.add(connection)
        writer = asyncio.get_running_loop().create_task(outbox.write(connection))
        try:
            async for message in connection:
                if message.type == WSMsgType.TEXT:
                    listener.request(message.data)
                    await asyncio.sleep(0)
                elif message.type == WSMsgType.ERROR:
                    break
        finally:
            self._hub.listeners.discard(listener)
            self._sockets.discard(connection)
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
        return connection


class _Outbox:
    """The bounded queue of texts for one subscriber.

    Args:
        overflow: called when the queue is full.
    """

    def __init__(self, overflow: Callable[[], None]) -> None:
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._waiting = 0
        self._overflow = overflow

    def put(self, text: str) -> None:
        """Add a text, or report an overflow."""
        self._waiting += len(text)
        if self._waiting > MAX_WAITING:
            self._overflow()
        else:
            self._queue.put_nowait(text)

    async def write(self, connection: web.WebSocketResponse) -> None:
        """Send texts until the connection ends."""
        with contextlib.suppress(ConnectionError):
            while True:
                text = await self._queue.get()
                await connection.send_str(text)
                self._waiting -= len(text)


def _listen(host: str, port: int) -> list[socket.socket]:
    """Listen on a port and the next one; for port 0, on any two adjacent ports."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for attempt in range(_PORT_ATTEMPTS):
        opened: list[socket.socket] = []
        try:
            opened.append(socket.create_server((host, port), family=family, backlog=256))
            following = opened[0].getsockname()[1] + 1
            opened.append(socket.create_server((host, following), family=family, backlog=256))
        except (OSError, OverflowError) as error:  # the port after the last one overflows
            for one in opened:
                one.close()
            if port or attempt == _PORT_ATTEMPTS - 1:
                raise OSError(str(error)) from error
        else:
            return opened
    raise AssertionError("unreachable")
