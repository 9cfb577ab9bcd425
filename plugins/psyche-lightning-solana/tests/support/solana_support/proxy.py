"""A real RPC service that misbehaves: it stands before another one and fails as told, over real sockets."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import aiohttp
from aiohttp import WSMsgType, web

Failure = str
"""How a request fails:

- ``drop``: the connection breaks before the request was carried out; ``lost``: after it was.
- ``hang``: no answer ever.
- ``garbage``, ``empty``, ``wrong``: an answer that is not JSON, nothing, JSON of another request.
- ``status N``: an HTTP status; ``error N TEXT``: an error of JSON-RPC.
"""


class Proxy:
    """Forwards requests and subscriptions, except where :meth:`fail` said otherwise.

    Args:
        upstream: URL of the service behind it.
        upstream_ws: its websocket URL.

    Attributes:
        url: for requests.
        ws_url: for subscriptions.
        counts: requests so far, by method.
        down: whether everything is refused, subscriptions included.
        deaf: whether subscriptions are accepted and nothing comes on them.
    """

    def __init__(self, upstream: str, upstream_ws: str) -> None:
        self.url = self.ws_url = ""
        self.counts: Counter[str] = Counter()
        self.down = False
        self.deaf = False
        self._upstream, self._upstream_ws = upstream, upstream_ws
        self._failures: dict[str, deque[Failure]] = defaultdict(deque)
        self._always: dict[str, Failure] = {}
        self._chance: Callable[[], Failure | None] = lambda: None
        self._edit: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None
        self._sockets: set[web.WebSocketResponse] = set()
        self._release = asyncio.Event()

    async def __aenter__(self) -> Proxy:
        app = web.Application(client_max_size=1 << 20)
        app.router.add_post("/", self._post)
        app.router.add_get("/", self._websocket)
        self._session = aiohttp.ClientSession()
        self._runner = web.AppRunner(app, access_log=None, auto_decompress=False, shutdown_timeout=0.2)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        self.url, self.ws_url = f"http://127.0.0.1:{port}", f"ws://127.0.0.1:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release.set()
        await self.cut()
        await self._session.close()
        await self._runner.cleanup()

    def fail(self, method: str, *failures: Failure) -> None:
        """Let the next requests of that method fail, one after the other; ``*`` for any method."""
        self._failures[method].extend(failures)

    def heal(self) -> None:
        """Forget all failures that are still to come."""
        self._failures.clear()
        self._always.clear()
        self._chance = lambda: None

    def always(self, method: str, failure: Failure | None) -> None:
        """Let every request of that method fail, until None."""
        if failure is None:
            self._always.pop(method, None)
        else:
            self._always[method] = failure

    def stumble(self, share: float, failures: Sequence[Failure], randomness: random.Random) -> None:
        """Let this share of all requests fail, in one of these ways each."""
        self._chance = lambda: randomness.choice(failures) if randomness.random() < share else None

    def edit(self, change: Callable[[str, dict[str, Any]], dict[str, Any]] | None) -> None:
        """Let ``change(method, answer)`` replace answers."""
        self._edit = change

    async def cut(self) -> None:
        """Break every subscription."""
        for socket in list(self._sockets):
            transport = socket._req.transport if socket._req is not None else None
            if transport is not None:
                transport.abort()
        self._sockets.clear()
        await asyncio.sleep(0)

    def _failure(self, method: str) -> Failure | None:
        for name in (method, "*"):
            if self._failures[name]:
                return self._failures[name].popleft()
            if name in self._always:
                return self._always[name]
        return self._chance()

    async def _post(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        method = str(json.loads(body).get("method"))
        self.counts[method] += 1
        kind, _, detail = ("drop" if self.down else self._failure(method) or "").partition(" ")
        if kind == "drop":
            return _broken(request)
        if kind == "hang":
            await self._release.wait()
            return _broken(request)
        if kind == "status":
            return web.Response(status=int(detail), text="no", headers={"Retry-After": "0"})
        if kind == "error":
            code, _, text = detail.partition(" ")
            error = {"code": int(code), "message": text or "an error", "data": None}
            return web.json_response({"jsonrpc": "2.0", "id": 0, "error": error})
        wrong = {"garbage": "<html>gateway</html>", "empty": "", "wrong": '{"jsonrpc":"2.0","id":0,"result":{"x":[]}}'}
        if kind in wrong:
            return web.Response(text=wrong[kind], content_type="application/json")
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self._upstream, data=body, headers=headers) as answer:
            text = await answer.text()
        if kind == "lost":
            return _broken(request)
        if self._edit is not None:
            text = json.dumps(self._edit(method, json.loads(text)))
        return web.Response(text=text, content_type="application/json")

    async def _websocket(self, request: web.Request) -> web.StreamResponse:
        self.counts["websocket"] += 1
        if self.down:
            return _broken(request)
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        self._sockets.add(socket)
        try:
            async with self._session.ws_connect(self._upstream_ws, max_msg_size=0) as upstream:
                forward = asyncio.ensure_future(self._forward(upstream, socket))
                try:
                    async for message in socket:
                        if message.type is WSMsgType.TEXT:
                            await upstream.send_str(message.data)
                finally:
                    forward.cancel()
                    await asyncio.gather(forward, return_exceptions=True)
        finally:
            self._sockets.discard(socket)
        return socket

    async def _forward(self, upstream: Any, socket: web.WebSocketResponse) -> None:
        async for message in upstream:
            if message.type is WSMsgType.TEXT and not (self.deaf and "method" in json.loads(message.data)):
                failure = self._failures["notification"].popleft() if self._failures["notification"] else ""
                await socket.send_str("{}" if failure else message.data)


def _broken(request: web.Request) -> web.StreamResponse:
    """Break the connection that a request came on."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
