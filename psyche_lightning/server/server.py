"""The coordinator as a server: several runs, JSON for people, a websocket for each node, a page at ``/``.

Permissions: nodes sign everything (see :mod:`~psyche_lightning.server.channel`); creating and changing runs needs the
owner's token (see :mod:`~psyche_lightning.server.token`); reading is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import hdrs, web

from psyche_lightning.aio import within
from psyche_lightning.chronicle.entry import COORDINATOR
from psyche_lightning.chronicle.writer import Chronicle
from psyche_lightning.coordinator.creation import check_settings, create_host
from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.crowd import network, surplus
from psyche_lightning.entrance import Entrance
from psyche_lightning.errors import CoordinatorError, PsycheError, counted
from psyche_lightning.protocol.link import join_secret
from psyche_lightning.protocol.manifest import manifest_text
from psyche_lightning.server.archive import find, record_of
from psyche_lightning.server.channel import MAX_FRAME_SIZE, NONCE_SIZE, SALT_SIZE, greet, problem
from psyche_lightning.server.clock import SEEN, steady
from psyche_lightning.server.feed import Board, Feed, Watcher
from psyche_lightning.server.guard import Guard, Handler, caller
from psyche_lightning.server.limits import (
    BODY_SECONDS,
    MAX_ARCHIVED,
    MAX_FRAME_OF_PAGES,
    MAX_RUNS,
    MAX_STRANGERS,
    MAX_STRANGERS_OF_HOST,
    REQUEST_RATE,
    REQUEST_STORE,
    Buckets,
    Callers,
)
from psyche_lightning.server.live import LOOK_AGAIN, SILENCE, LiveRun
from psyche_lightning.server.status import run_line, run_status
from psyche_lightning.server.store import Store
from psyche_lightning.server.tls import coordinator_context
from psyche_lightning.server.websocket import Websocket
from psyche_lightning.transports.limits import Bucket
from psyche_lightning.wire.canonical import HASH_SIZE
from psyche_lightning.wire.identity import KEY_SIZE

if TYPE_CHECKING:
    from psyche_lightning.server.metrics import Exposition

logger = logging.getLogger(__name__)

MAX_BODY_SIZE = MAX_FRAME_SIZE
HEARTBEAT = 20.0
PAGE_HEADERS = {
    hdrs.CACHE_CONTROL: "no-cache",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Beside the page's own policy, which names the hashes of its script and its style."""
RECONNECT_TIME = 10.0
"""Seconds in addition to the grace in which nodes find a coordinator again that was away for all of them."""
STATUS = {
    "UnknownRun": 404,
    "SeveralRuns": 409,
    "UnknownManifest": 404,
    "Unauthorized": 401,
    "ForeignOrigin": 403,
    "ForeignHost": 421,
    "RunExists": 409,
    "UpdateConfigNotHalted": 409,
    "CloseCoordinatorNotHalted": 409,
    "StoreFailed": 503,
    "TooLarge": 413,
    "TooManyRequests": 429,
    "TooManyRuns": 409,
}


class CoordinatorServer:
    """Serves the runs of a store.

    Args:
        store: where the runs are kept, and the coordinator's key; stored runs continue.
        clock: seconds of a clock that never steps; None for :func:`~psyche_lightning.server.clock.steady`.
        wall: seconds since 1970, for dates that people see.
        entropy: returns a number of random bytes.
        token: the owner's token, which creating and changing runs needs. ``psyche coordinator`` always has one. With
            None, which is for servers within a program, every caller on the same machine may.
        hosts: names under which the server is reached; see :class:`~psyche_lightning.sites.Sites`.
        grace: seconds in which a node may come back after its connection broke, before it counts as gone. A node that
            fell silent is gone only if another member was heard from meanwhile: else it may be the server that hears
            nothing.
        tls: whether to encrypt, with a certificate of the coordinator's key.
        heartbeat: seconds between pings; a node that is silent for one and a half of them is disconnected.
        events: folder for the event files, which has one for each run; None for none.
        max_runs: runs that it takes at once; None for 256.
    """

    def __init__(
        self,
        store: Store,
        *,
        clock: Callable[[], float] | None = None,
        wall: Callable[[], float] = time.time,
        entropy: Callable[[int], bytes] = os.urandom,
        token: str | None = None,
        hosts: Collection[str] = (),
        grace: float = 5.0,
        tls: bool = False,
        heartbeat: float = HEARTBEAT,
        events: Path | None = None,
        max_runs: int | None = None,
    ) -> None:
        self.runs: dict[str, LiveRun] = {}
        self.archived = store.archived()
        self._store = store
        self._identity = store.identity()
        self._clock = steady(wall) if clock is None else clock
        self._wall = wall
        self._entropy = entropy
        self._guard = Guard(token, hosts)
        self._grace = grace
        self._tls = coordinator_context(self._identity) if tls else None
        self._heartbeat = heartbeat
        self._events = events
        self._max_runs = max_runs or MAX_RUNS
        self._sessions: dict[tuple[str, bytes], Websocket] = {}
        self._sockets: set[web.WebSocketResponse] = set()
        self._open: dict[Websocket | Watcher, str] = {}  # in order of arrival, with their hosts
        self._asking = Buckets(REQUEST_RATE, REQUEST_STORE)
        self._board = Board(self.runs, self._clock, lambda: self.archived, store.archived_status)
        self._leaving: dict[tuple[str, bytes], asyncio.TimerHandle] = {}
        self._timekeepers: dict[str, asyncio.Task[None]] = {}
        self._runner: Entrance | None = None
        self._stopping = False

    @property
    def key(self) -> bytes:
        """The coordinator's public key, which nodes pin."""
        return self._identity.public

    async def start(self, host: str = "127.0.0.1", port: int = 8080) -> str:
        """Load the runs, start to listen, and return the URL.

        Raises:
            PsycheError: the store cannot be read, or the server cannot listen on the address.
        """
        for run_host in self._store.load():
            run = self._add(self._live(run_host))
            with contextlib.suppress(PsycheError):  # the disk is still full: the run goes on when it is not
                run.act(lambda host, now: host.restarted(now))
            for member in list(run_host.membership.members):
                reason = "not back after the coordinator's restart"
                self._expect(run, member, self._grace + RECONNECT_TIME, reason, since=run.last_heard)
        application = self._application()
        self._runner = Entrance(application, self._tls)
        application.middlewares.insert(0, self._runner.check)
        await self._runner.setup()
        try:
            site = web.TCPSite(self._runner, host, port)
            await site.start()
        except OSError as error:
            await self.stop()
            raise CoordinatorError(
                f"cannot listen on {host}:{port}: {error.strerror or error}. Choose another --port; 0 takes any."
            ) from error
        self._guard.sites.listening(address[0] for address in self._runner.addresses)
        # A server that listens has at least one address.
        listening, bound = self._runner.addresses[0][:2]
        return f"http{'s' * bool(self._tls)}://{f'[{listening}]' if ':' in listening else listening}:{bound}"

    async def stop(self) -> None:
        """Close all connections and stop listening; the runs stay in the store."""
        self._stopping = True
        for handle in self._leaving.values():
            handle.cancel()
        for task in self._timekeepers.values():
            task.cancel()
        await asyncio.gather(*self._timekeepers.values(), return_exceptions=True)
        closing = [asyncio.wait_for(socket.close(code=1001, message=b"going down"), 1.0) for socket in self._sockets]
        await asyncio.gather(*closing, return_exceptions=True)
        if self._runner is not None:
            await self._runner.cleanup()
        for run in self.runs.values():
            run.close()

    def _live(self, host: RunHost) -> LiveRun:
        run, silence = host.state.run_id, SILENCE / HEARTBEAT * self._heartbeat
        chronicle = None
        if self._events is not None:
            chronicle = Chronicle(self._events / run, node=COORDINATOR, run=run, key=self.key.hex())
        return LiveRun(host, self._clock, self._store, self._wall, silence=silence, chronicle=chronicle)

    def _add(self, run: LiveRun) -> LiveRun:
        self.runs[run.state.run_id] = run
        self._timekeepers[run.state.run_id] = asyncio.get_running_loop().create_task(run.keep_time())
        return run

    # Nodes that come and go.

    def _arrived(self, session: Websocket) -> Bucket:
        key = (session.run.state.run_id, session.signer)
        timer = self._leaving.pop(key, None)
        if timer is not None:
            timer.cancel()
        old, self._sessions[key] = self._sessions.get(key), session
        if old is not None:
            old.replace()
        return self._asking.of(key)

    def _gone(self, session: Websocket) -> None:
        key = (session.run.state.run_id, session.signer)
        if self._sessions.get(key) is session and not self._stopping:
            del self._sessions[key]
            # Whoever is still there has answered a ping since this one was due.
            since = self._clock() - self._heartbeat / 2 if session.silent else None
            # A node closes a silent connection, which the server sees when the way is open again: the node is on it.
            looking = session.was_quiet and not session.silent
            wait = self._grace + RECONNECT_TIME if looking else self._grace
            self._expect(session.run, session.signer, wait, session.reason, since=since)

    def _expect(self, run: LiveRun, signer: bytes, wait: float, reason: str, *, since: float | None = None) -> None:
        """Drop the node unless it comes back within ``wait`` seconds.

        Args:
            run: the run.
            signer: the node.
            wait: seconds.
            reason: why it seems to be gone, in words.
            since: the clock's reading after which another member must have been heard from; None to drop it anyway.
        """
        key = (run.state.run_id, signer)
        self._leaving[key] = asyncio.get_running_loop().call_later(wait, self._drop, run, signer, reason, since)

    def _drop(self, run: LiveRun, signer: bytes, reason: str, since: float | None, waited: bool = False) -> None:
        key = (run.state.run_id, signer)
        self._leaving.pop(key, None)
        if since is not None and run.last_heard <= since:  # nobody is heard: perhaps no way leads here
            again = asyncio.get_running_loop().call_later(LOOK_AGAIN, self._drop, run, signer, reason, since, True)
            self._leaving[key] = again
            return
        if waited:  # the way is open again
            self._expect(run, signer, self._grace + RECONNECT_TIME, reason)
            return
        try:
            run.act(lambda host, now: host.disconnected(signer, now, reason))
        except PsycheError:  # the store fails: the node stays a member until it works again
            self._expect(run, signer, self._grace, reason)

    # Requests.

    def _application(self) -> web.Application:
        checks = [_errors, Callers().check, self._guard.check]
        application = web.Application(middlewares=checks, client_max_size=MAX_BODY_SIZE)
        run = "/v1/runs/{run}"
        application.add_routes(
            [
                web.get("/", self._page),
                web.get("/metrics", self._metrics),
                web.get("/healthz", self._health),
                web.get("/v1/feed", self._feed),
                web.get("/v1/runs", self._list),
                web.post("/v1/runs", self._create),
                web.post("/v1/backup", self._backup),
                web.get(run, self._status),
                web.get(run + "/watch", self._watch),
                web.post(run + "/pause", self._pause),
                web.post(run + "/resume", self._resume),
                web.post(run + "/start", self._start),
                web.post(run + "/update", self._update),
                web.post(run + "/authorize", self._allow),
                web.post(run + "/revoke", self._forbid),
                web.post(run + "/kick", self._kick),
                web.post(run + "/restart-from", self._restart_from),
                web.post(run + "/close", self._close),
                web.post(run + "/delete", self._delete),
                web.post(run + "/link", self._link),
                web.get("/v1/manifests/{digest}", self._manifest),
            ]
        )
        return application

    def _run(self, request: web.Request) -> LiveRun:
        run_id = request.match_info["run"]
        if run_id not in self.runs:
            known = ", ".join(sorted(self.runs)) or "none yet"
            raise CoordinatorError(
                f"no run {run_id[:40]!r} on this coordinator; its runs are: {known}. "
                "Create it with `psyche run create`, or check PSYCHE_RUN.",
                code="UnknownRun",
            )
        return self.runs[run_id]

    async def _body(self, request: web.Request) -> dict[str, Any]:
        # A page of another site can make a browser post plain text here, but not JSON.
        if request.content_type != "application/json":
            raise CoordinatorError("send application/json", code="BadRequest")
        try:
            value = await within(BODY_SECONDS, request.json())
        except asyncio.TimeoutError:
            raise CoordinatorError(f"the body did not come within {BODY_SECONDS:g} s", code="BadRequest") from None
        except (ValueError, RecursionError) as error:
            raise CoordinatorError(f"the body is not JSON: {error}", code="BadRequest") from error
        if not isinstance(value, dict):
            raise CoordinatorError("the body is not a JSON object", code="BadRequest")
        return value

    async def _page(self, request: web.Request) -> web.Response:
        page = resources.files("psyche_lightning.server").joinpath("page.html").read_text("utf-8")
        response = web.Response(text=page, content_type="text/html", headers=PAGE_HEADERS)
        response.enable_compression()
        return response

    async def _metrics(self, request: web.Request) -> web.Response:
        text, content_type = self._exposition.render(request.headers.get(hdrs.ACCEPT, ""))
        return web.Response(body=text, headers={hdrs.CONTENT_TYPE: content_type})

    async def _health(self, request: web.Request) -> web.Response:
        """200, or 503 while changes of a run cannot be stored."""
        problems = {name: run.unstorable for name, run in self.runs.items() if run.unstorable is not None}
        return web.json_response({"healthy": not problems, "problems": problems}, status=503 if problems else 200)

    @cached_property
    def _exposition(self) -> Exposition:
        from psyche_lightning.server.metrics import Exposition

        return Exposition(self.runs.values, lambda: len(self._sockets))

    async def _list(self, request: web.Request) -> web.Response:
        lines = [run_line(run) for run in self.runs.values()]
        return web.json_response({"runs": lines, "archived": self.archived}, headers={SEEN: caller(request)})

    async def _create(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        host = create_host(body, self._entropy)
        run_id = host.state.run_id
        if run_id not in self.runs and len(self.runs) >= self._max_runs:
            raise CoordinatorError(
                f"this coordinator has {counted(len(self.runs), 'run')}, which is its limit (--max-runs); close one: "
                "`psyche run close RUN`",
                code="TooManyRuns",
            )
        if run_id not in self.runs:
            now = self._clock()
            host.history.ahead = self._wall() - now
            host.begin(now)
            self._store.create(host, body)
            self._add(self._live(host))
        elif self._store.created(run_id) != body:  # an identical request may repeat one whose answer was lost
            raise CoordinatorError(
                f"run {run_id!r} already exists with other values. Choose another name, or look at it with "
                f"`psyche run status {run_id}`.",
                code="RunExists",
            )
        return web.json_response(run_status(self.runs[run_id]), status=201)

    async def _status(self, request: web.Request) -> web.Response:
        name = request.match_info["run"]
        if name not in self.runs and any(line["id"] == name for line in self.archived):
            return web.json_response(self._store.archived_status(name))
        run = self._run(request)
        places = (_number(request, name) for name in ("events", "metrics", "past", "rounds"))
        return web.json_response(run_status(run, *places))

    async def _pause(self, request: web.Request) -> web.Response:
        return await self._command(request, lambda host, now: host.pause(now))

    async def _resume(self, request: web.Request) -> web.Response:
        return await self._command(request, lambda host, now: host.resume(now))

    async def _start(self, request: web.Request) -> web.Response:
        return await self._command(request, lambda host, now: host.start(now))

    async def _update(self, request: web.Request) -> web.Response:
        config = (await self._body(request)).get("config")
        if not isinstance(config, dict):
            raise CoordinatorError("config is not a JSON object of settings such as total_steps", code="BadRequest")
        values = check_settings(config)
        return await self._command(request, lambda host, now: host.update(values, now))

    async def _allow(self, request: web.Request) -> web.Response:
        node = await self._node(request)
        return await self._command(request, lambda host, _: host.allow(node))

    async def _forbid(self, request: web.Request) -> web.Response:
        node = await self._node(request)
        return await self._command(request, lambda host, now: host.revoke(node, now))

    async def _kick(self, request: web.Request) -> web.Response:
        node = await self._node(request)
        if node is None:
            raise CoordinatorError("name the node to remove, by its key", code="BadRequest")
        return await self._command(request, lambda host, now: host.kick(node, now))

    async def _restart_from(self, request: web.Request) -> web.Response:
        body = await self._body(request)
        text, step = body.get("digest"), body.get("step")
        try:
            digest = bytes.fromhex(text)  # type: ignore[arg-type] # any JSON value, which is what is checked here
        except (TypeError, ValueError):
            digest = b""
        if len(digest) != HASH_SIZE:
            raise CoordinatorError(
                f"{str(text)[:80]!r} is not a digest of parameters: expected {2 * HASH_SIZE} hexadecimal digits, as "
                "`psyche run status --json` and a checkpoint's description show them",
                code="BadRequest",
            )
        if type(step) is not int:
            raise CoordinatorError(f"{str(step)[:80]!r} is not a number of steps", code="BadRequest")
        return await self._command(request, lambda host, now: host.restart_from(digest, step, now))

    async def _node(self, request: web.Request) -> bytes | None:
        """The node key in a request's body; None for everybody."""
        node = (await self._body(request)).get("node")
        if node is None:
            return None
        try:
            key = bytes.fromhex(node)
        except (TypeError, ValueError):
            key = b""
        if len(key) != KEY_SIZE:
            raise CoordinatorError(
                f"{str(node)[:80]!r} is not a node key: expected {2 * KEY_SIZE} hexadecimal digits, as `psyche run "
                "status --json` shows them",
                code="BadRequest",
            )
        return key

    async def _close(self, request: web.Request) -> web.Response:
        """Close a halted run; its history is archived if it ever trained."""
        run = self._halted(request)
        await self._body(request)
        run_id = run.state.run_id
        kept = run.host.history.dates.started is not None
        forgotten: list[str] = []
        if kept:
            known = [line["id"] for line in self.archived]
            self._store.archive(run_id, record_of(run, self._wall()))
            self.archived = self._store.archived()
            still = {line["id"] for line in self.archived}
            forgotten = [one for one in known if one not in still]
        else:
            self._store.remove(run_id)
        self._end(run_id)
        for one in forgotten:
            text = "the history of the closed run %s is deleted: those of the newest %d are kept"
            logger.warning(text, one, MAX_ARCHIVED)
        archived = run.state.scope if kept else None
        return web.json_response({"closed": run_id, "archived": archived, "forgotten": forgotten})

    async def _delete(self, request: web.Request) -> web.Response:
        """Delete a halted run with its history, or a closed one."""
        name = request.match_info["run"]
        await self._body(request)
        if name in self.runs:
            self._halted(request)
            self._store.remove(name)
            self._end(name)
        else:
            name = find(self.archived, name)
            self._store.forget(name)
            self.archived = self._store.archived()
        run_id = name.partition("#")[0]
        others = {*self.runs, *(line["run_id"] for line in self.archived)}
        if self._events is not None and run_id not in others:  # runs of one name have one folder
            shutil.rmtree(self._events / run_id, ignore_errors=True)
        return web.json_response({"deleted": name})

    def _halted(self, request: web.Request) -> LiveRun:
        run = self._run(request)
        run_id = run.state.run_id
        if not run.state.phase.halted:
            raise CoordinatorError(
                f"run {run_id!r} is open, in phase {run.state.phase.name}; pause it first: `psyche run pause {run_id}`",
                code="CloseCoordinatorNotHalted",
            )
        return run

    def _end(self, run_id: str) -> None:
        """Serve a run no more."""
        self.runs.pop(run_id).close()
        self._timekeepers.pop(run_id).cancel()
        for key, session in list(self._sessions.items()):
            if key[0] == run_id:
                session.end()

    async def _backup(self, request: web.Request) -> web.Response:
        """A backup for the owner, with all that a coordinator in this one's place needs."""
        await self._body(request)
        data = self._store.backup(self._guard.token, self._wall())
        return web.Response(body=data, content_type="application/octet-stream", headers={"Cache-Control": "no-store"})

    async def _link(self, request: web.Request) -> web.Response:
        """What a join link has besides the URL, which only the owner knows."""
        run = self._run(request)
        new = (await self._body(request)).get("new", False)
        if new is True:
            run.act(lambda host, _: host.membership.renew_link())
        elif new is not False:
            raise CoordinatorError(f"new is {str(new)[:40]!r}; expected true or false", code="BadRequest")
        secret = self._secret(run) if run.host.membership.by_link else b""
        return web.json_response({"key": self.key.hex(), "secret": secret.hex()})

    def _secret(self, run: LiveRun) -> bytes:
        return join_secret(self._identity, run.state.scope, run.host.membership.links)

    async def _command(self, request: web.Request, action: Callable[[Any, float], None]) -> web.Response:
        run = self._run(request)
        await self._body(request)
        run.act(action)
        return web.json_response(run_status(run))

    async def _manifest(self, request: web.Request) -> web.Response:
        wanted = request.match_info["digest"]
        for run in self.runs.values():
            manifest = run.host.manifest
            if manifest is not None and run.manifest_digest.hex() == wanted:
                return web.Response(text=manifest_text(manifest), content_type="application/json")
        scope = next((line["id"] for line in self.archived if line.get("manifest_digest") == wanted), None)
        if scope is not None:
            manifest = self._store.archived_status(scope)["manifest"]
            return web.Response(text=manifest_text(manifest), content_type="application/json")
        raise CoordinatorError(f"no run has a manifest with the digest {wanted[:64]!r}", code="UnknownManifest")

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        run, nonce = self._run(request), _nonce(request)
        socket = web.WebSocketResponse(
            heartbeat=self._heartbeat, max_msg_size=MAX_FRAME_SIZE, compress=True, autoping=False
        )
        await socket.prepare(request)
        state = run.state
        greeting = greet(self._identity, state.run_id, state.incarnation, self._entropy(SALT_SIZE), nonce)
        # Called at each join: the run may have another link by then.
        secrets = None if self._guard.obeys(request) else lambda: [self._secret(run), *self._guard.secrets]
        session = Websocket(run, socket, greeting, secrets, self._arrived, self._heartbeat / 2)
        try:
            await self._serve(request, socket, session)
        finally:
            self._gone(session)
        return socket

    async def _feed(self, request: web.Request) -> web.StreamResponse:
        """What the live page shows."""
        socket = web.WebSocketResponse(heartbeat=self._heartbeat, max_msg_size=MAX_FRAME_OF_PAGES, compress=True)
        await socket.prepare(request)
        feed = Feed(self._board, request.query.get("run"))
        await self._serve(request, socket, Watcher(socket, feed, self._wall))
        return socket

    async def _serve(self, request: web.Request, socket: web.WebSocketResponse, session: Websocket | Watcher) -> None:
        """Serve a websocket, in place of the oldest one of a stranger if there are too many."""
        host = network(request.remote or "")
        strangers = {one: other for one, other in self._open.items() if not one.member}
        oldest = surplus(strangers, host, MAX_STRANGERS, MAX_STRANGERS_OF_HOST)
        if oldest is not None:
            del self._open[oldest]
            oldest.turn_away()
        self._sockets.add(socket)
        self._open[session] = host
        try:
            await session.serve()
        finally:
            self._sockets.discard(socket)
            self._open.pop(session, None)


def _nonce(request: web.Request) -> bytes:
    text = request.query.get("nonce", "")
    try:
        nonce = bytes.fromhex(text)
    except ValueError:
        nonce = b"?"
    if len(nonce) not in (0, NONCE_SIZE):
        raise CoordinatorError(f"nonce={text[:20]!r} is not {NONCE_SIZE} bytes in hex", code="BadRequest")
    return nonce


def _number(request: web.Request, name: str) -> int:
    text = request.query.get(name, "0")
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise CoordinatorError(f"{name}={text[:20]!r} is not a number", code="BadRequest")
    return int(text)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every refusal with JSON that says what to do."""
    try:
        return await handler(request)
    except PsycheError as error:
        value = problem(error)
        status = STATUS.get(value["code"], 400)
    except web.HTTPRequestEntityTooLarge:
        text = f"the body is larger than {MAX_BODY_SIZE} bytes"
        value, status = problem(CoordinatorError(text, code="TooLarge")), 413
    except web.HTTPException as error:
        text = f"{request.method} {request.path[:80]}: {error.reason}. GET / shows a page, GET /v1/runs the runs."
        value, status = problem(CoordinatorError(text, code="BadRequest")), error.status
    return web.json_response(value, status=status)
