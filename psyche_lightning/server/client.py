"""A node's client for a coordinator server: one websocket, which it restores after restarts and lost links."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, stop_never
from tenacity.wait import wait_exponential, wait_random

from psyche_lightning.errors import ConfigError, CoordinatorError, WireError, cause
from psyche_lightning.logs import Outage
from psyche_lightning.protocol.codec import patch, state_from_json
from psyche_lightning.protocol.link import JoinLink
from psyche_lightning.protocol.requests import Answer, Request, encode
from psyche_lightning.protocol.state import RunState
from psyche_lightning.server.admin import check_url
from psyche_lightning.server.answers import PROBLEM, misfit
from psyche_lightning.server.channel import (
    CLOSE_REPLACED,
    MAX_FRAME_SIZE,
    NONCE_SIZE,
    SYNC,
    VERSION,
    Greeting,
    coordinator_error,
    open_greeting,
    seal_frame,
    seal_hello,
)
from psyche_lightning.server.tls import is_near, untrusted
from psyche_lightning.server.token import own_token
from psyche_lightning.wire.certificate import client_context, is_of
from psyche_lightning.wire.identity import Identity, short

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT = 120.0
"""Seconds after which a coordinator that is there has failed to answer a request."""
HEARTBEAT = 10.0
"""Seconds between pings; half of the server's, so that a node notices a silent link before it counts as gone."""
MAX_PROBLEM_SIZE = 64 * 1024
FIRST_WAIT, LONGEST_WAIT = 0.5, 3.0
IMPOSTOR = {"WrongCoordinator", "Untrusted"}
"""Codes of what a node says when somebody else has its coordinator's address."""
REPEATED = {"DuplicateWitness", "InvalidWithdraw"}
"""The machine's answers to a request that it has already accepted; after a lost answer they mean success."""


@dataclass(eq=False)
class _Call:
    """A request that waits for its answer.

    Attributes:
        name: name of the request.
        values: its fields, encoded.
        answer: resolved by the server's answer.
        sent: how often it was sent.
        timer: for an answer that does not come.
    """

    name: str
    values: list[Any]
    answer: asyncio.Future[Any]
    sent: int = 0
    timer: asyncio.TimerHandle | None = None


class _Lost(Exception):
    """The connection failed, but another attempt may succeed."""


class _Pin(aiohttp.Fingerprint):
    """Accepts the certificates of one key; the handshake before it proved that the other end has the key."""

    def __init__(self, key: bytes) -> None:
        super().__init__(key)
        self._key = key

    def check(self, transport: asyncio.Transport) -> None:
        """Called before anything is sent.

        Raises:
            aiohttp.ServerFingerprintMismatch: the certificate is of another key.
        """
        encrypted: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        certificate = encrypted.getpeercert(binary_form=True) if encrypted is not None else None
        if not is_of(self._key, certificate):
            host, port, *_ = transport.get_extra_info("peername")
            raise aiohttp.ServerFingerprintMismatch(self._key, b"", host, port)


def _trusts(url: str, key: bytes) -> list[bool | ssl.SSLContext | aiohttp.Fingerprint]:
    """Whose certificates a client accepts, in the order in which it tries."""
    if urlsplit(url).scheme != "https":
        return [True]
    if key:
        return [_Pin(key), ssl.create_default_context()]
    return [client_context() if is_near(url) else ssl.create_default_context()]


class HttpCoordinator:
    """A client of one run on a server (a :class:`~psyche_lightning.protocol.requests.Coordinator`).

    It connects at the first call. If the link breaks, unanswered requests are sent again on the next one, for which it
    tries as long as it takes.

    Args:
        url: the run's join link, or the URL of the server, such as ``http://127.0.0.1:8080``. A plain URL suffices for
            open runs, and on the same machine for the user who runs the server.
        run_id: the run.
        identity: the node's key, which signs everything.
        socket_factory: makes the sockets, to count bytes (see ``aiohttp.TCPConnector``).
        attempts: how often to try to reach the server at the start.
        connect_timeout: seconds for one attempt.
        heartbeat: seconds between pings; a server that is silent for one and a half of them is lost.
        clock: monotonic seconds, for log lines about a lost connection.
        entropy: returns a number of random bytes.

    Raises:
        ConfigError: the URL is malformed, or the link is of another run.
    """

    def __init__(
        self,
        url: str,
        run_id: str,
        identity: Identity,
        *,
        socket_factory: Callable[[Any], socket.socket] | None = None,
        attempts: int = 5,
        connect_timeout: float = 5.0,
        heartbeat: float = HEARTBEAT,
        clock: Callable[[], float] = time.monotonic,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        link = JoinLink.parse(url)
        if link.run not in ("", run_id):
            raise ConfigError(f"the join link is of the run {link.run!r}, not of {run_id!r}; leave out the run's name")
        self.url = check_url(link.url)
        self.run_id = run_id
        self._secret = link.secret
        self._trusts = _trusts(self.url, link.key)
        self._trust = self._trusts[0]
        self.signer = identity.public
        self.away: str | None = None
        self._identity = identity
        self._socket_factory = socket_factory
        self._attempts = attempts
        self._heartbeat = heartbeat
        self._connect_timeout = connect_timeout
        self._outage = Outage(logger, f"the coordinator at {self.url}", clock=clock)
        self._store = Outage(logger, f"the store of the coordinator at {self.url}", clock=clock)
        self._task: asyncio.Task[None] | None = None
        self._socket: aiohttp.ClientWebSocketResponse[bool] | None = None
        self._entropy = entropy
        self._coordinator = link.key
        self._linked = bool(link.key)
        self._greeting: Greeting | None = None
        self._number = 0
        self._waiting: list[_Call] = []
        self._in_flight: dict[int, _Call] = {}
        self._state: RunState | None = None
        self._state_json: dict[str, Any] = {}
        self._watchers: set[asyncio.Event] = set()
        self._failure: CoordinatorError | None = None
        self._sending = asyncio.Lock()
        self._stale = False
        self._tasks: set[asyncio.Future[None]] = set()

    # The protocol.

    async def request(self, request: Request[Answer]) -> Answer:
        """Send a request and return its answer; a manifest's text travels only if the server does not hold it."""
        try:
            value = await self._call(request.name, encode(request, held=True))
        except CoordinatorError as error:
            if error.code != "ManifestNeeded":
                raise
            value = await self._call(request.name, encode(request))
        answer: Answer = request.answer_from_json(value)
        return answer

    async def watch(self) -> AsyncIterator[RunState]:
        """Yields the state now and after each change, newest only."""
        self._start()
        news = asyncio.Event()
        self._watchers.add(news)
        seen: RunState | None = None
        try:
            while True:
                self._raise_failure()
                if self._state is not None and self._state is not seen:
                    seen = self._state
                    yield seen
                else:
                    await news.wait()
                news.clear()
        finally:
            self._watchers.discard(news)

    async def close(self) -> None:
        """End the connection; open calls fail."""
        self._fail(CoordinatorError(f"the connection to {self.url} was closed by this node", code="Closed"))
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    # The connection, one background task.

    def _start(self) -> None:
        self._raise_failure()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="coordinator connection")

    async def _call(self, name: str, values: list[Any]) -> Any:
        self._start()
        call = _Call(name, values, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        try:
            await self._flush()
            return await call.answer
        finally:
            if call.timer is not None:
                call.timer.cancel()
            self._waiting = [other for other in self._waiting if other is not call]
            self._in_flight = {number: other for number, other in self._in_flight.items() if other is not call}

    def _overdue(self, number: int) -> None:
        call = self._in_flight.get(number)
        if call is not None and not call.answer.done():
            text = f"{self.url} is there but did not answer {call.name} within {ANSWER_TIMEOUT:.0f} s"
            call.answer.set_exception(CoordinatorError(text, code="Unreachable", retryable=True))

    async def _flush(self) -> None:
        """Send waiting calls in order if there is a connection; the others wait for the next one."""
        async with self._sending:
            while self._socket is not None and self._waiting:
                call = self._waiting.pop(0)
                self._number += 1
                self._in_flight[self._number] = call
                call.sent += 1
                if call.timer is not None:
                    call.timer.cancel()
                call.timer = call.answer.get_loop().call_later(ANSWER_TIMEOUT, self._overdue, self._number)
                assert self._greeting is not None  # it came with the connection
                challenge = self._greeting.challenge
                frame = seal_frame(self._identity, self.run_id, challenge, self._number, call.name, call.values)
                try:
                    await self._socket.send_bytes(frame)
                except (OSError, aiohttp.ClientError):
                    return  # the connection's task sees it, too, and puts the call back

    async def _run(self) -> None:
        try:
            connector = aiohttp.TCPConnector(socket_factory=self._socket_factory)
            timeout = aiohttp.ClientTimeout(total=self._connect_timeout)
            async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
                while self._failure is None:
                    connection = await self._connect(session)
                    try:
                        await self._receive(connection)
                    except _Lost as error:
                        self._away(error)
                    finally:
                        self._socket = None
                        with contextlib.suppress(Exception):
                            await asyncio.wait_for(connection.close(), 1.0)
                    self._waiting = [*self._in_flight.values(), *self._waiting]
                    self._in_flight = {}
                    await asyncio.sleep(FIRST_WAIT)
        except CoordinatorError as error:
            self._fail(error)
        except Exception as error:  # nobody may wait for this task forever
            self._fail(CoordinatorError(f"the coordinator client failed: {error!r}", code="Client"))
            raise

    async def _connect(self, session: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse[bool]:
        reached = self._state is not None
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Lost),
            wait=wait_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT) + wait_random(0.0, FIRST_WAIT),
            stop=stop_never if reached else stop_after_attempt(self._attempts),
            before_sleep=lambda attempt: self._away(attempt.outcome.exception() if attempt.outcome else None),
            reraise=True,
        )
        started = time.monotonic()
        try:
            async for attempt in retrying:
                with attempt:
                    return await self._handshake(session)
        except _Lost as error:
            tries = retrying.statistics.get("attempt_number", self._attempts)
            raise CoordinatorError(
                f"cannot reach the coordinator at {self.url} for run {self.run_id!r}: {error}. "
                f"Tried {tries} times in {time.monotonic() - started:.0f} s. Check the URL (--coordinator or "
                "PSYCHE_COORDINATOR; https:// if it encrypts), that `psyche coordinator` runs there, and that "
                "no firewall blocks it.",
                code="Unreachable",
                retryable=True,
            ) from error
        raise AssertionError("tenacity returns or raises")

    async def _handshake(self, session: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse[bool]:
        """Connect; a node that was connected and has the link waits until an impostor is gone."""
        try:
            return await self._join_up(session)
        except CoordinatorError as error:
            if self._linked and self._state is not None and error.code in IMPOSTOR:
                raise _Lost(str(error)) from error
            raise

    async def _join_up(self, session: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse[bool]:
        """Open the websocket, and let coordinator and node prove their keys; the first state completes it."""
        path = f"{self.url}/v1/runs/{quote(self.run_id, safe='')}"
        nonce = self._entropy(NONCE_SIZE)
        try:
            connection = await self._open(session, f"{path}/watch?nonce={nonce.hex()}")
        except aiohttp.WSServerHandshakeError as error:
            if error.status >= 500 or error.status == 429:
                raise _Lost(f"it answered {error.status}") from error
            raise await self._refusal(session, path, error.status) from error
        except asyncio.TimeoutError as error:
            raise _Lost(f"no answer within {self._connect_timeout:.0f} s") from error
        except aiohttp.ClientConnectorCertificateError as error:
            raise untrusted(self.url) from error
        except aiohttp.ClientConnectorError as error:
            raise _Lost(f"no connection ({cause(error.os_error)})") from error
        except (OSError, aiohttp.ClientError) as error:
            raise _Lost(str(error) or type(error).__name__) from error
        try:
            kind, *values = self._frame(await connection.receive(self._connect_timeout))
            if kind != "hello" or not values or values[0] != VERSION:
                raise CoordinatorError(
                    f"{self.url} uses another protocol than version {VERSION}: {[kind, *values]!r:.80}. "
                    "Use the same version of psyche-lightning on the nodes and the coordinator.",
                    code="WrongVersion",
                )
            challenge = self._met(values[1:], nonce)
            self._number = 0
            secret = self._secret or own_token(self.url)
            await connection.send_bytes(seal_hello(self._identity, self.run_id, challenge, secret))
            self._handle(self._frame(await connection.receive(self._connect_timeout)))
        except asyncio.TimeoutError as error:
            await connection.close()
            raise _Lost(f"it opened a websocket but sent nothing for {self._connect_timeout:.0f} s") from error
        except (OSError, aiohttp.ClientError, ValueError, TypeError) as error:
            await connection.close()
            raise _Lost(str(error)) from error
        except BaseException:
            await connection.close()
            raise
        self.away = None
        self._outage.works()
        self._socket = connection
        return connection

    async def _open(self, session: aiohttp.ClientSession, path: str) -> aiohttp.ClientWebSocketResponse[bool]:
        """Open the websocket at who shows the coordinator's key, or at a proxy that an authority vouches for."""
        for trust in self._trusts:
            self._trust = trust
            try:
                return await session.ws_connect(
                    path, compress=15, max_msg_size=MAX_FRAME_SIZE, heartbeat=self._heartbeat, ssl=trust
                )
            except aiohttp.ServerFingerprintMismatch:
                continue
        raise untrusted(self.url)

    def _met(self, values: list[Any], nonce: bytes) -> bytes:
        """Compare who answers with who answered before; returns the challenge.

        Raises:
            CoordinatorError: it does not prove its key, or it is another coordinator (``WrongCoordinator``); or it is
                another run of that name (``AnotherRun``).
        """
        try:
            greeting = open_greeting(values, self.run_id, nonce)
        except WireError as error:
            raise CoordinatorError(
                f"{self.url} is not the coordinator that it claims to be: {error}. Check the URL, and ask the run's "
                "owner.",
                code="WrongCoordinator",
            ) from error
        if self._coordinator not in (b"", greeting.coordinator):
            before = "that of the join link is" if self._greeting is None else "before it was"
            raise CoordinatorError(
                f"another coordinator answers at {self.url}: its key is {greeting.coordinator.hex()}, {before} "
                f"{self._coordinator.hex()}. Either somebody else has this address, or the coordinator lost its key. "
                "Ask the run's owner for the join link, and start this node again.",
                code="WrongCoordinator",
            )
        if self._greeting is not None and self._greeting.incarnation != greeting.incarnation:
            raise CoordinatorError(
                f"run {self.run_id!r} was closed at {self.url}, and another one was made under its name. Start this "
                "node again to join that.",
                code="AnotherRun",
            )
        self._coordinator, self._greeting = greeting.coordinator, greeting
        return greeting.challenge

    async def _refusal(self, session: aiohttp.ClientSession, path: str, status: int) -> CoordinatorError:
        """Why the server did not open the websocket, in the server's words."""
        try:
            async with session.get(path, ssl=self._trust) as answer:
                problem = json.loads(await answer.content.read(MAX_PROBLEM_SIZE))
            if answer.status >= 400 and not misfit(problem, PROBLEM):
                return coordinator_error(problem)
        except (OSError, aiohttp.ClientError, asyncio.TimeoutError, ValueError):
            pass
        return CoordinatorError(
            f"{self.url} answered {status}: it is not a psyche coordinator, or a proxy in front refuses websockets",
            code="Unreachable",
        )

    async def _receive(self, connection: aiohttp.ClientWebSocketResponse[bool]) -> None:
        """Handle frames until the connection is lost."""
        await self._flush()
        while True:
            try:
                self._handle(self._frame(await connection.receive()))
            except (OSError, aiohttp.ClientError, ValueError, TypeError, LookupError) as error:
                raise _Lost(str(error) or type(error).__name__) from error
            if self._stale:  # the change does not fit our state: request the full state
                self._stale = False
                self._waiting.append(_Call(SYNC, [], asyncio.get_running_loop().create_future()))
                await self._flush()

    def _frame(self, message: Any) -> list[Any]:
        if message.type is aiohttp.WSMsgType.TEXT:
            value = json.loads(message.data)
            if isinstance(value, list) and value and isinstance(value[0], str):
                return value
            raise ValueError("it sent something that is not a frame")
        if message.type is aiohttp.WSMsgType.CLOSE and message.data == CLOSE_REPLACED:
            raise CoordinatorError(
                f"another process joined run {self.run_id!r} with this node's key {short(self._identity.public)}. "
                "Give each process its own node directory.",
                code="Replaced",
            )
        if message.type is aiohttp.WSMsgType.ERROR:
            raise ValueError(str(message.data))
        if message.type is aiohttp.WSMsgType.CLOSE:
            raise ValueError(f"it closed the connection ({message.data})")
        raise ValueError("the connection broke")

    def _handle(self, frame: list[Any]) -> None:
        kind, *values = frame
        if kind == "state":
            self._take(values[0])
        elif kind == "change":
            if self._state is None or values[0] != self._state.nonce:
                self._stale = True
            else:
                self._take(patch(self._state_json, values[1]))
        elif kind == "ok":
            call = self._in_flight.pop(values[0], None)
            self._store.works()
            self.away = None
            if call is not None and not call.answer.done():
                call.answer.set_result(values[1])
        elif kind == "error":
            error = coordinator_error(values[1])
            if values[0] == 0:
                raise error
            self._refused(self._in_flight.pop(values[0], None), error)
        else:
            raise ValueError(f"it sent an unknown frame {kind[:20]!r}")

    def _take(self, value: dict[str, Any]) -> None:
        # It may be an older one: of a coordinator that was restored from a backup. Whoever watches decides about that.
        self._state, self._state_json = state_from_json(value), value
        for news in self._watchers:
            news.set()

    def _refused(self, call: _Call | None, error: CoordinatorError) -> None:
        if call is None or call.answer.done():
            return
        if call.sent > 1 and error.code in REPEATED:
            call.answer.set_result(None)
        elif error.code == "StoreFailed":
            self._store.fails(str(error).removesuffix("."))
            self.away = f"the store of the coordinator at {self.url}: {error}"
            asyncio.get_running_loop().call_later(LONGEST_WAIT, self._again, call)
        else:
            call.answer.set_exception(error)

    def _again(self, call: _Call) -> None:
        if not call.answer.done():
            self._waiting.append(call)
            task = asyncio.ensure_future(self._flush())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    # Log lines, and the end.

    def _away(self, why: object) -> None:
        self.away = f"the coordinator at {self.url}: {why}"
        self._outage.fails(why)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _fail(self, error: CoordinatorError) -> None:
        if self._failure is None:
            self._failure = error
        for call in [*self._in_flight.values(), *self._waiting]:
            if not call.answer.done():
                call.answer.set_exception(error)
        for news in self._watchers:
            news.set()
