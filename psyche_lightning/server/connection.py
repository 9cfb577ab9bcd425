"""One websocket of the coordinator's server: a node's, or that of someone who only watches."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

from psyche_lightning.errors import CoordinatorError, PsycheError, WireError
from psyche_lightning.protocol.codec import diff, round_to_json, state_to_json, to_json
from psyche_lightning.protocol.requests import Report
from psyche_lightning.protocol.state import WitnessProof
from psyche_lightning.server.channel import (
    CLOSE_REFUSED,
    CLOSE_REPLACED,
    VERSION,
    Request,
    manifest_text,
    open_hello,
    open_request,
    problem,
)
from psyche_lightning.server.live import LiveRun
from psyche_lightning.wire.canonical import sha256


class Session:
    """Serves one websocket until it closes.

    Args:
        run: the run that it is about.
        socket: the prepared websocket.
        challenge: fresh random bytes that this connection's signatures cover.
        arrived: called with the session once its node proved who it is.

    Attributes:
        run: the run.
        signer: the node's public key; empty for who only watches.
        reason: why the connection ended, in words.
    """

    def __init__(
        self, run: LiveRun, socket: web.WebSocketResponse, challenge: bytes, arrived: Callable[[Session], None]
    ) -> None:
        self.run = run
        self.signer = b""
        self.reason = "its connection was closed"
        self._socket = socket
        self._challenge = challenge
        self._arrived = arrived
        self._last = 0
        self._full = True
        self._sending = asyncio.Lock()
        self._news = run.news()
        self._closing: asyncio.Future[bool] | None = None

    async def serve(self) -> None:
        """Push the state and answer requests; returns when the connection is gone."""
        sender = asyncio.ensure_future(self._push())
        try:
            async for message in self._socket:
                if message.type is not WSMsgType.BINARY:
                    raise WireError("a node sends binary frames only")
                await self._frame(message.data)
            if self._socket.close_code in (None, WSCloseCode.ABNORMAL_CLOSURE):
                self.reason = "its connection was lost"
        except WireError as error:
            self.reason = f"it was disconnected: {error}"
            with contextlib.suppress(OSError, RuntimeError):
                await self._send(["error", 0, problem(CoordinatorError(str(error), code="BadRequest"))])
                await self._socket.close(code=CLOSE_REFUSED)
        except (OSError, RuntimeError):  # the socket went away while we wrote to it
            self.reason = "its connection was lost"
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    def replace(self) -> None:
        """End the connection because its node has a newer one."""
        self._closing = asyncio.ensure_future(self._socket.close(code=CLOSE_REPLACED))

    def end(self) -> None:
        """End the connection because the run is gone."""
        self._closing = asyncio.ensure_future(self._socket.close(message=b"the run is closed"))

    async def _send(self, frame: list[Any]) -> None:
        async with self._sending:
            await self._socket.send_str(json.dumps(frame, separators=(",", ":")))

    async def _push(self) -> None:
        """The state, then what changed; a slow reader skips to the newest."""
        known: dict[str, Any] = {}
        with self._news as news:
            await self._send(["hello", VERSION, self._challenge.hex()])
            while True:
                current = state_to_json(self.run.state)
                if self._full:
                    self._full = False
                    await self._send(["state", current])
                elif current != known:
                    await self._send(["change", known["nonce"], diff(known, current)])
                known = current
                await news.wait(None)

    async def _frame(self, frame: bytes) -> None:
        if not self.signer:
            self.signer = open_hello(frame, self.run.state.run_id, self._challenge)
            self._arrived(self)
            return
        request = open_request(frame, self.signer, self.run.state.run_id, self._challenge, self._last)
        self._last = request.number
        try:
            answer = ["ok", request.number, self._answer(request)]
        except PsycheError as error:
            answer = ["error", request.number, problem(error)]
        await self._send(answer)

    def _answer(self, request: Request) -> Any:
        arguments, signer, act = request.arguments, self.signer, self.run.act
        if request.method == "join":
            return self._join(*arguments)
        if request.method == "withdraw":
            return act(lambda host, now: host.withdraw(signer, now))
        if request.method == "warmup_witness":
            epoch, index, digest = arguments
            return act(lambda host, now: host.warmup_witness(signer, epoch, index, digest, now))
        if request.method == "witness":
            epoch, height, position, index, flag, merkle, participants, broadcasts, figures = arguments
            proof, report = WitnessProof(position, index, flag), _report(figures)
            return act(
                lambda host, now: host.witness(
                    signer, epoch, height, proof, merkle, participants, broadcasts, report, now
                )
            )
        if request.method == "health_check":
            epoch, height, signers = arguments
            if any(type(key) is not bytes for key in signers):
                raise WireError("health_check takes the keys of clients")
            return act(lambda host, now: host.health_check(signer, epoch, height, signers, now))
        if request.method == "checkpoint":
            epoch, step, digest = arguments
            return act(lambda host, now: host.checkpoint(signer, epoch, step, digest, now))
        if request.method == "accuse":
            first, second = arguments
            return act(lambda host, now: host.accuse(signer, first, second, now))
        if request.method == "rounds":
            return [round_to_json(value) for value in self.run.rounds(*arguments)]
        if request.method == "terms":
            host = self.run.host
            return [to_json(host.state.config), host.unset, host.manifest]
        self._full = True  # sync, the one that is left
        self._news.wake()
        return None

    def _join(self, address: str, digest: bytes, text: str) -> None:
        """A manifest that some node sent before need not travel again."""
        if not text and digest not in self.run.manifests:
            raise CoordinatorError("the coordinator does not hold this manifest yet", code="ManifestNeeded")
        if text:
            try:
                manifest = json.loads(text)
                if not isinstance(manifest, dict) or manifest_text(manifest) != text or sha256(text.encode()) != digest:
                    raise ValueError("not its canonical form, or not what its digest says")
            except (ValueError, RecursionError) as error:
                raise CoordinatorError(f"the manifest cannot be read: {error}", code="InvalidManifest") from error
        else:
            manifest = self.run.manifests[digest]
        self.run.act(lambda host, now: host.join(self.signer, self.signer, address, manifest, now))
        self.run.keep_manifest(digest, manifest)


def _report(values: list[Any]) -> Report:
    """Check the figures of a witness: they decide nothing, but they are stored and shown."""
    kinds = (int, float, float, int, int)
    if len(values) != 5 or any(type(value) is not kind for value, kind in zip(values, kinds, strict=True)):
        raise WireError("a report is [step, loss, tokens per second, bytes up, bytes down]")
    if any(not 0 <= values[i] < 1 << 64 for i in (0, 3, 4)):
        raise WireError("step and bytes of a report are unsigned 64-bit integers")
    return Report(*values)
