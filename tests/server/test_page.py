"""The live page in a real browser, at its own address and behind a reverse proxy."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web

from psyche_lightning.protocol.evals import Measure
from psyche_lightning.protocol.requests import Evaluated, WarmupWitness
from psyche_lightning.protocol.state import Phase
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.wire.identity import Identity

playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed: pip install -e '.[dev]'")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed: apt-get install chromium")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update"]  # what Chromium would fetch for itself
GREEN = "rgb(22, 128, 60)"
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


OVERLAPS = """() => {
  const boxes = [...document.querySelectorAll("#figures b, #figures span")].map(element => {
    const text = document.createRange();
    text.selectNodeContents(element);
    return [element.textContent, text.getBoundingClientRect()];
  });
  const card = document.querySelector("#figures").getBoundingClientRect();
  const across = (a, b) => a.left < b.right && b.left < a.right;
  const over = (a, b) => across(a, b) && a.top + 1 < b.bottom && b.top + 1 < a.bottom;
  const found = boxes.filter(([, a]) => a.left < card.left || a.right > card.right).map(([name]) => name);
  boxes.forEach(([one, a], i) => boxes.slice(i + 1).forEach(([other, b]) => over(a, b) && found.push([one, other])));
  return found;
}"""


@asynccontextmanager
async def proxied(upstream: str, prefix: str) -> AsyncIterator[tuple[str, list[str]]]:
    """A reverse proxy that serves ``upstream`` below ``prefix`` alone; its URL, and the paths that led nowhere."""
    strays: list[str] = []

    async def forward(request: web.Request) -> web.StreamResponse:
        if not request.path.startswith(prefix):
            strays.append(request.path)
            return web.Response(status=404)
        target = upstream + (request.raw_path.removeprefix(prefix) or "/")
        headers = {"X-Forwarded-Host": request.host}  # the upstream sees its own name as Host, as behind nginx
        headers |= {name: request.headers[name] for name in ("Origin",) if name in request.headers}
        if request.headers.get("Upgrade") != "websocket":
            async with session.request(request.method, target, headers=headers) as answer:
                return web.Response(status=answer.status, body=await answer.read(), content_type=answer.content_type)
        async with session.ws_connect(target, headers=headers) as there:
            here = web.WebSocketResponse()
            await here.prepare(request)

            async def hand_on(source: Any, target: Any) -> None:
                async for message in source:
                    is_text = message.type is aiohttp.WSMsgType.TEXT
                    await (target.send_str if is_text else target.send_bytes)(message.data)
                await target.close()

            await asyncio.gather(hand_on(here, there), hand_on(there, here))
            return here

    application = web.Application()
    application.add_routes([web.get("/{path:.*}", forward)])
    runner = web.AppRunner(application, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with aiohttp.ClientSession() as session:
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}{prefix}", strays
        finally:
            await runner.cleanup()


class Visit:
    """A page in a browser; what it may not do is kept in ``wrong``."""

    def __init__(self, page: Any, address: str) -> None:
        self.page = page
        self.wrong: list[str] = []
        self.sockets: list[str] = []
        self._home = urlsplit(address)
        page.on("console", lambda message: self._complain(message.type in ("error", "warning"), message.text))
        page.on("pageerror", lambda error: self._complain(True, str(error)))
        page.on("requestfailed", lambda request: self._complain(True, f"{request.url}: {request.failure}"))
        page.on("response", lambda answer: self._complain(answer.status >= 400, f"{answer.status} {answer.url}"))
        page.on("request", lambda request: self._asked(request.url))
        page.on("websocket", lambda socket: (self._asked(socket.url), self.sockets.append(socket.url)))

    def _complain(self, wrong: bool, text: str) -> None:
        if wrong:
            self.wrong.append(text)

    def _asked(self, url: str) -> None:
        there = urlsplit(url)
        if there.scheme != "data":
            inside = there.netloc == self._home.netloc and there.path.startswith(self._home.path.rstrip("/"))
            self._complain(not inside, f"asked {url}")

    async def until(self, expression: str) -> None:
        """Wait until the JavaScript expression holds on the page."""
        await self.page.wait_for_function(expression)

    async def line(self) -> list[float]:
        """The chart's line: the x coordinate of each of its points. It has one beginning."""
        path = await self.page.locator("#chart path[fill=none]").get_attribute("d")
        assert re.fullmatch(r"M[\d. ]+(L[\d. ]+)+", path), path
        return [float(point.split()[0]) for point in re.split("[ML]", path)[1:]]

    async def text(self, selector: str) -> list[str]:
        return await self.page.locator(selector).all_inner_texts()

    async def overlaps(self) -> list[str]:
        """Figures whose text lies over another's, or out of their card."""
        return await self.page.evaluate(OVERLAPS)


@asynccontextmanager
async def browsing() -> AsyncIterator[Any]:
    """``await visit(address, size)`` opens a page in a browser that keeps nothing."""
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)

        async def visit(address: str, size: dict[str, int] = DESK, **options: Any) -> Visit:
            context = await browser.new_context(viewport=size, **options)
            context.set_default_timeout(20_000)
            made = Visit(await context.new_page(), address)
            await made.page.goto(address)
            await made.until("document.querySelector('#link').textContent === 'live'")
            return made

        try:
            yield visit
        finally:
            await browser.close()


async def create(url: str, run_id: str, manifest: dict[str, Any] | None = None, **config: Any) -> None:
    async with aiohttp.ClientSession() as session:
        body = {
            "run_id": run_id,
            "config": {"global_batch_size_start": 1, **config},
            **({"manifest": manifest} if manifest else {}),
        }
        async with session.post(f"{url}/v1/runs", json=body) as answer:
            assert answer.status == 201, await answer.text()


async def ask(url: str, path: str, body: dict[str, Any] | None = None) -> None:
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/runs/{path}", json=body or {}) as answer:
        assert answer.status == 200, await answer.text()


def test_the_newest_evaluation_of_each_task_is_shown(served, walk, run, quick):
    async def main():
        async with served(grace=0.2) as (_, url), browsing() as visit:
            await create(url, "r", {"evals": {"tasks": ["<b>sums</b>"], "every": 10}}, **quick, total_steps=60)
            visited = await visit(url)
            client = HttpCoordinator(url, "r", Identity.generate())
            await walk(client, until=lambda state: state.step > 20)
            assert await visited.text("#tasks td") == []
            for step, share in ((10, 0), (20, 0), (20, 2)):
                await client.request(Evaluated("<b>sums</b>", step, 3, share, (Measure("acc", 0.5 * share, 1.0),)))
            await visited.until("document.querySelector('#tasks').textContent.includes('2 of 3')")  # all that was sent
            assert await visited.text("#tasks td") == ["<b>sums</b>", "acc 0.5000", "20", "2 of 3"]
            await client.close()
            assert visited.wrong == []

    run(main())


@pytest.mark.parametrize("prefix", ["", "/house/psyche"], ids=["at the root", "below a proxy's path"])
def test_two_epochs_from_before_the_start_to_the_end(served, walk, run, quick, prefix):
    async def main():
        async with served(grace=0.2) as (_, url), proxied(url, prefix) as (address, strays), browsing() as visit:
            await create(url, "r", **quick, total_steps=60)
            visited = await visit(address if prefix else url)  # without the slash at its end
            assert "waiting for nodes" in await visited.text("#figures b")
            assert "0 / 60" in await visited.text("#figures b")
            client = HttpCoordinator(address, "r", Identity.generate())  # nodes take the same way

            await walk(client, until=lambda state: state.step > 20)
            await ask(url, "r/pause")
            paused = await walk(client, until=lambda state: state.phase is Phase.PAUSED)
            steps = paused.step - 1
            await visited.until("document.querySelector('#figures b').textContent === 'paused'")
            line = await visited.line()
            assert len(line) == steps
            assert line == sorted(set(line))
            assert await visited.text("#nodes .tag") == ["pending"]

            await ask(url, "r/resume")
            await walk(client)
            await client.close()
            await visited.until("document.querySelector('#nodes .tag').textContent === 'finished'")
            line = await visited.line()
            assert len(line) == 60
            assert line == sorted(set(line))
            assert await visited.text("#chart text") != []
            assert (await visited.text("#figures b"))[:4] == ["finished", "60 / 60", "2 · –", "2.4000"]
            assert await visited.text("figcaption") == ["norm01"]
            paths = await visited.page.locator("#curves path[fill=none]").all()
            assert [(await path.get_attribute("d")).count("L") for path in paths] == [59, 59]
            assert (await visited.text("#nodes th"))[-1] == "norm"
            assert (await visited.text("#nodes td"))[-1] == "1 · 2"
            colour = "getComputedStyle(document.querySelector('#nodes .tag')).color"
            assert await visited.page.evaluate(colour) == GREEN
            again = await visit(address + "/")  # who comes when all is over sees the same
            assert await again.line() == line
            assert strays == visited.wrong == again.wrong == []
            assert len(visited.sockets) == 1  # one connection held all the time

    run(main(), 120.0)


@pytest.mark.parametrize("width", [1280, 900, 390, 320])
def test_figures_do_not_lie_over_each_other(served, run, width):
    async def main():
        async with served() as (_, url), browsing() as visit:
            await create(url, "a-run-with-a-name-of-32-letters-", init_min_clients=3, total_steps=200_000)
            visited = await visit(url, {"width": width, "height": 800})
            assert (await visited.text("#figures b"))[:2] == ["waiting for nodes", "0 / 200.0 k"]
            assert await visited.overlaps() == []
            assert await visited.page.evaluate("document.documentElement.scrollWidth") <= width
            assert visited.wrong == []

    run(main(), 60.0)


def test_a_disk_that_is_full_is_seen(served, run):
    async def main():
        async with served() as (server, url), browsing() as visit:
            await create(url, "r")
            visited = await visit(url)
            assert not await visited.page.locator("#problem").is_visible()
            server.runs["r"]._unstorable = "cannot write <b>runs</b>: disk is full"
            await visited.until("!document.querySelector('#problem').hidden")
            assert await visited.text("#problem") == ["cannot write <b>runs</b>: disk is full"]
            server.runs["r"]._unstorable = None
            await visited.until("document.querySelector('#problem').hidden")
            assert visited.wrong == []

    run(main(), 60.0)


def test_many_runs_leave_room_on_a_phone(served, run):
    async def main():
        async with served() as (_, url), browsing() as visit:
            for number in range(26):
                await create(url, f"run-{number}")
            visited = await visit(url, PHONE, has_touch=True, is_mobile=True)
            box = "(e => { const b = document.querySelector(e).getBoundingClientRect(); return [b.left, b.height] })"
            assert (await visited.page.evaluate(box + "('nav')"))[1] < 60
            for name in ("run-25", "run-0", "run-12"):  # the one that is shown is in sight
                await visited.page.evaluate(f"location.hash = '{name}'")
                await visited.until(f"document.querySelector('nav a.here')?.textContent.startsWith('{name} ')")
                left, _ = await visited.page.evaluate(box + "('nav a.here')")
                assert 0 <= left < PHONE["width"] - 100
            assert visited.wrong == []

    run(main(), 60.0)


def test_figures_of_steps_that_the_owner_undid_are_not_drawn(served, walk, run, quick):
    """After `psyche run restart-from` steps are trained again; the newest figures count."""

    async def main():
        async with served() as (server, url), browsing() as visit:
            await create(url, "r", **quick, total_steps=30)
            client = HttpCoordinator(url, "r", Identity.generate())
            await walk(client, until=lambda state: state.step > 20)
            await ask(url, "r/pause")
            state = await walk(client, until=lambda state: state.phase is Phase.PAUSED)
            await ask(url, "r/restart-from", {"digest": "ab" * 32, "step": 5})
            await ask(url, "r/resume")
            visited = await visit(url)
            await visited.until("!document.querySelector('#waiting').hidden")
            waits = "waiting for a holder of abababab, step 5; 1 newcomer is here"
            assert await visited.text("#waiting") == [waits]
            await client.request(WarmupWitness(state.epoch, 0, bytes.fromhex("ab" * 32)))
            await walk(client)
            await client.close()
            await visited.until("document.querySelector('#waiting').hidden")
            assert server.runs["r"].host.history.metrics.count > 40
            visited = await visit(url)
            line = await visited.line()
            assert len(line) == 30
            assert line == sorted(set(line))
            assert visited.wrong == []

    run(main(), 60.0)
