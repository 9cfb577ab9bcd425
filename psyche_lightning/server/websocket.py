"""One websocket of the coordinator's server, of a node or of a watcher."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

from psyche_lightning.errors import CoordinatorError, PsycheError, WireError
from psyche_lightning.protocol.link import join_proof
from psyche_lightning.protocol.requests import Join, decode
from psyche_lightning.server.channel import (
    CLOSE_REFUSED,
    CLOSE_REPLACED,
    SYNC,
    Frame,
    open_frame,
    open_hello,
    problem,
)
from psyche_lightning.server.limits import MAX_FRAME_OF_OTHERS, cost, frame_cost
from psyche_lightning.server.live import LiveRun
from psyche_lightning.transports.limits import Bucket


class Websocket:
    """Serves one websocket until it closes.

    Args:
        run: the run.
        socket: the prepared websocket.
        greeting: the challenge that this connection's signatures cover, and the first frame (see ``greet``).
        secrets: returns those of which each proves that a node is invited; None if it is in any case.
        arrived: called with the connection once its node has proved its key; returns what the node may ask for.
        usual: seconds without a frame that are usual.

    Attributes:
        run: the run.
        member: whether the node is a member, or was one when it came.
        signer: the node's public key; empty for a watcher.
        reason: why the connection ended, in words.
        silent: whether it ended because nothing was heard from the node.
    """

    def __init__(
        self,
        run: LiveRun,
        socket: web.WebSocketResponse,
        greeting: tuple[bytes, list[Any]],
        secrets: Callable[[], Sequence[bytes]] | None,
        arrived: Callable[[Websocket], Bucket],
        usual: float,
    ) -> None:
        self.run = run
        self.signer = b""
        self.reason = "its connection was closed"
        self.silent = False
        self._usual = usual
        self._heard = asyncio.get_running_loop().time()
        self._woke = -math.inf
        self._socket = socket
        self._challenge, self._greeting = greeting
        self._secrets = secrets
        self._proof = b""
        self._arrived = arrived
        self._last = 0
        self._full = True
        self.member = False
        self._bucket: Bucket | None = None
        self._sending = asyncio.Lock()
        self._news = run.news()
        self._closing: asyncio.Future[bool] | None = None

    async def serve(self) -> None:
        """Push the state and answer requests; returns when the connection has ended."""
        sender = asyncio.ensure_future(self._push())
        try:
            async for message in self._socket:
                if message.type is WSMsgType.ERROR:
                    break
                before, self._heard = self._heard, asyncio.get_running_loop().time()
                if self._heard - before > self._usual:
                    self._woke = self._heard
                if message.type is WSMsgType.PING:
                    await self._socket.pong(message.data)
                elif message.type is not WSMsgType.PONG:
                    if message.type is not WSMsgType.BINARY:
                        raise WireError("a node sends binary frames only")
                    await self._frame(message.data)
                if self.member:
                    self.run.heard()
            if isinstance(self._socket.exception(), (TimeoutError, asyncio.TimeoutError)):
                self.silent, self.reason = True, "nothing was heard from it"
            elif self._socket.close_code in (None, WSCloseCode.ABNORMAL_CLOSURE):
                self.reason = "its connection was lost"
        except WireError as error:
            self.reason = f"it was disconnected: {error}"
            with contextlib.suppress(OSError, RuntimeError):
                await self._send(["error", 0, problem(CoordinatorError(str(error), code="BadRequest"))])
                await self._socket.close(code=CLOSE_REFUSED)
        except (OSError, RuntimeError):  # the socket was closed during a write
            self.reason = "its connection was lost"
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    @property
    def was_quiet(self) -> bool:
        """Whether nothing came for an unusual time, or only just came again."""
        now = asyncio.get_running_loop().time()
        return now - self._heard > self._usual or now - self._woke < self._usual

    def replace(self) -> None:
        """End the connection, because its node has a newer one."""
        self._closing = asyncio.ensure_future(self._socket.close(code=CLOSE_REPLACED))

    def turn_away(self) -> None:
        """End the connection, because there are too many of those who are no members."""
        self._closing = asyncio.ensure_future(self._socket.close(code=WSCloseCode.TRY_AGAIN_LATER))

    def end(self) -> None:
        """End the connection, because the run was removed."""
        self._closing = asyncio.ensure_future(self._socket.close(message=b"the run is closed"))

    async def _send(self, frame: list[Any]) -> None:
        async with self._sending:
            await self._socket.send_str(json.dumps(frame, separators=(",", ":")))

    async def _push(self) -> None:
        """Send the state, then changes; a slow reader skips to the newest."""
        known: dict[str, Any] = {}
        with self._news as news:
            await self._send(self._greeting)
            while True:
                current = self.run.state_json
                if self._full:
                    self._full = False
                    await self._send(["state", current])
                elif change := self.run.change(known, current):
                    await self._send(["change", known["nonce"], change])
                known = current
                if self._dismissed():
                    await self._dismiss()
                    return
                await news.wait(None)

    def _dismissed(self) -> bool:
        """Whether the node was a member and may no longer be one."""
        host = self.run.host
        return self.member and not (host.membership.admits(self.signer) or host.trains(self.signer))

    async def _dismiss(self) -> None:
        try:
            self.run.host.membership.check(self.signer, "")
        except CoordinatorError as error:
            await self._send(["error", 0, problem(error)])
        self.reason = "it may no longer be a member"
        self._closing = asyncio.ensure_future(self._socket.close(code=CLOSE_REFUSED))

    async def _frame(self, frame: bytes) -> None:
        if not self.signer:
            self.signer, self._proof = open_hello(frame, self.run.state.run_id, self._challenge)
            self.member = self.signer in self.run.host.membership.members
            self._bucket = self._arrived(self)
            return
        await self._pay(frame_cost(len(frame)))  # before the signature, which costs
        asked = open_frame(frame, self.signer, self.run.state.run_id, self._challenge, self._last)
        self._last = asked.number
        if asked.name != Join.name and len(frame) > MAX_FRAME_OF_OTHERS:
            raise WireError(f"a request {asked.name[:40]!r} of {len(frame)} bytes; at most {MAX_FRAME_OF_OTHERS}")
        await self._pay(cost(asked.name))
        try:
            answer = ["ok", asked.number, await self._answer(asked)]
        except WireError:
            raise
        except PsycheError as error:
            answer = ["error", asked.number, problem(error)]
        await self._send(answer)

    async def _pay(self, units: float) -> None:
        """Wait until the node may ask for more; meanwhile nothing is read from it."""
        assert self._bucket is not None
        pause = self._bucket.wait(units, asyncio.get_running_loop().time())
        if pause:
            await asyncio.sleep(pause)

    def _invited(self) -> bool:
        return self._secrets is None or any(
            hmac.compare_digest(self._proof, join_proof(secret, self._challenge, self.signer))
            for secret in self._secrets()
        )

    async def _answer(self, asked: Frame) -> Any:
        if asked.name == SYNC:
            self._full = True
            self._news.wake()
            return None
        request = decode(asked.name, asked.values, self.run.manifests)
        if isinstance(request, Join):
            self.run.host.membership.check_link(self.signer, shown=self._invited(), tried=bool(self._proof))
        answer = request.answer_to_json(await self.run.answer(self.signer, request))
        if isinstance(request, Join):
            self.member = True
            self.run.keep_manifest(request.manifest)
        return answer
