"""Names, addresses and reasons that others chose do nothing to a terminal: they are shown, or refused."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest
from aiohttp import web

from psyche_lightning.cli import main
from psyche_lightning.cli.console import PlainConsole, say
from psyche_lightning.coordinator.membership import Membership
from psyche_lightning.errors import CoordinatorError
from psyche_lightning.logs import LineFormatter
from psyche_lightning.protocol.manifest import mismatch
from psyche_lightning.protocol.requests import Join
from psyche_lightning.server.channel import coordinator_error
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.server.server import CoordinatorServer
from psyche_lightning.server.store import MemoryStore
from psyche_lightning.text import plain
from psyche_lightning.transports.framing import goodbye, goodbye_text
from psyche_lightning.wire.identity import Identity

MANIFEST = {"run": {"global_batch_size": 8, "total_steps": 9}}
CLEAR = "\x1b[2J"
HOSTILE = [CLEAR, "\x9b2J", "\x1b]0;owned\x07", "\r", "\x08", "\u202egpj", "\u2066", "\u2028", "\ud800", "\x7f"]
MARKUP = ["[/red]", "[bold", "[link=http://x]here[/link]", ":skull:"]


def harmless(text: str) -> bool:
    return not any(character in text for hostile in HOSTILE for character in hostile if not character.isprintable())


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_terminal_obeys_is_escaped(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert harmless(plain(text))
    assert harmless(goodbye_text(goodbye("no" + text.encode("utf-8", "replace").decode())[5:]))
    assert harmless(str(coordinator_error({"error": text, "code": text})))
    assert harmless(str(coordinator_error({"error": text, "differences": [[text, text, text]]})))
    assert harmless(str(mismatch([(f"model.{text}", text, 1)])))
    record = logging.LogRecord("psyche_lightning", logging.INFO, "", 1, "%s\n", (text,), None)
    assert harmless(LineFormatter().format(record))
    say(text)
    PlainConsole(width=80).print(text)
    assert harmless(capsys.readouterr().out)


@pytest.mark.parametrize("text", ["größe", "модель", "模型 🙂", "a\\b", "[x]"])
def test_other_text_stays(text: str) -> None:
    assert plain(text) == text


@pytest.mark.parametrize("address", [*HOSTILE, "tcp://1.2.3.4:5\n"])
def test_an_address_with_control_characters_is_refused(address: str) -> None:
    with pytest.raises(CoordinatorError, match="control characters") as refused:
        Membership("r", 4).check(bytes(32), address)
    assert refused.value.code == "InvalidMember"


def test_status_shows_an_address_that_looks_like_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a narrow table breaks addresses

    async def play() -> None:
        server = CoordinatorServer(MemoryStore())
        url = await server.start(port=0)
        await asyncio.to_thread(main, ["run", "create", "r", "--coordinator", url])
        nodes = [HttpCoordinator(url, "r", Identity.generate()) for _ in MARKUP]
        for node, address in zip(nodes, MARKUP, strict=True):
            await node.request(Join(address, MANIFEST))
        codes.append(await asyncio.to_thread(main, ["run", "status", "r", "--coordinator", url]))
        await asyncio.gather(*(node.close() for node in nodes))
        await server.stop()

    codes: list[int] = []
    asyncio.run(play())
    assert codes == [0]
    shown = capsys.readouterr().out
    assert all(address in shown for address in MARKUP)


HEX = ("incarnation", "signer")
"""Texts of an answer in which anything else is refused."""


def spoilt(value: object, text: str) -> object:
    """A JSON value with a hostile text at the end of each of its own, but of those that must be hex."""
    if isinstance(value, dict):
        return {name: item if name in HEX else spoilt(item, text) for name, item in value.items()}
    if isinstance(value, list):
        return [spoilt(item, text) for item in value]
    return value + text if isinstance(value, str) else value


@pytest.mark.parametrize("hostile", [CLEAR + "[/red]\ud800\u202e", "\x9b2J[bold"])
def test_a_server_that_answers_with_control_characters(hostile: str, capsys: pytest.CaptureFixture[str]) -> None:
    node = {
        "key": "0123abcd", "signer": "01", "status": "healthy", "address": "tcp://x", "step": 1, "loss": 0.5,
        "tokens_per_second": 1.0, "bytes_up": 1, "bytes_down": 1,
    }  # fmt: skip
    run = {
        "run_id": "r", "phase": "paused", "epoch": 1, "height": 2, "step": 3, "total_steps": 9, "clients": [node],
        "pending": [node], "exited": [node], "metrics": [], "events": [{"time": 0.0, "text": "joined"}],
        "points": [{"node": "a", "earned": 1, "slashed": 0, "claimed": 0}], "about": {"owner": "me"},
        "config": {"total_steps": 9, "global_batch_size_end": 1, "init_min_clients": 1}, "incarnation": "00",
        "waits_for": "nobody", "problem": "none", "manifest_digest": "00", "by_link": False, "allowed": ["a"],
        "evaluations": [{"task": "t", "step": 1, "documents": 2, "measured": 1, "figures": {"acc": 0.5}}],
        "settings": {"k": 4, "local_steps": None, "next": None},
    }  # fmt: skip

    async def answer(request: web.Request) -> web.Response:
        value = {"runs": [{**run, "clients": 1}]} if request.path == "/v1/runs" and request.method == "GET" else run
        return web.json_response(spoilt(value, hostile), status=200)

    async def refuse(_: web.Request) -> web.Response:
        return web.json_response(spoilt({"error": "no", "code": "Unauthorized"}, hostile), status=401)

    async def play() -> None:
        application = web.Application()
        application.router.add_post("/v1/runs/r/close", refuse)
        application.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        for command in (["status", "r"], ["list"], ["points", "r"], ["pause", "r"], ["resume", "r"], ["start", "r"]):
            codes.append(await asyncio.to_thread(main, ["run", *command, "--coordinator", url]))
        codes.append(await asyncio.to_thread(main, ["run", "close", "r", "--coordinator", url]))
        codes.append(await asyncio.to_thread(main, ["run", "status", "r", "--json", "--coordinator", url]))
        await runner.cleanup()

    codes: list[int] = []
    asyncio.run(play())
    assert codes == [0] * 6 + [1, 0]
    printed = capsys.readouterr()
    assert harmless(printed.out + printed.err)
    assert "error: no" in printed.err
    assert json.dumps(hostile)[1:-1] in printed.out
