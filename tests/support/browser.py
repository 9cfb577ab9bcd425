"""The page in a real browser."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web

playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed: pip install -e '.[dev]'")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
AXE = Path(__file__).parents[2] / "psyche_lightning" / "page" / "node_modules" / "axe-core" / "axe.min.js"
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update"]  # what Chromium would fetch for itself
PATIENCE = 30.0
"""Seconds until something that does not appear is a failure."""
PHONE, TABLET, DESK = (
    {"width": 390, "height": 844},
    {"width": 1024, "height": 800},
    {"width": 1440, "height": 900},
)

# Columns of the plot between its first and its last coloured one in which no line is drawn.
GAPS = """name => {
  const { root, bbox } = document.querySelector(`${name} .plot`).uplot;
  const canvas = root.querySelector("canvas");
  const pen = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  pen.drawImage(canvas, 0, 0);
  const { data, width, height } = pen.getImageData(bbox.left, bbox.top, bbox.width, bbox.height);
  const coloured = x => {
    for (let y = 0; y < height; y++) {
      const i = 4 * (y * width + x);
      if (Math.max(data[i], data[i + 1], data[i + 2]) - Math.min(data[i], data[i + 1], data[i + 2]) > 40) return true;
    }
    return false;
  };
  const drawn = [...Array(width).keys()].filter(coloured);
  return { width, drawn: drawn.length, gaps: drawn.length ? drawn.at(-1) - drawn[0] + 1 - drawn.length : null };
}"""

# Figures whose text lies over another's, or out of its card.
OVERLAPS = """() => {
  const figures = "h1, .progress b, .progress span, .phase > *, .figure dt, .figure b";
  const boxes = [...document.querySelectorAll(figures)].map(element => {
    const text = document.createRange();
    text.selectNodeContents(element);
    return [element, text.getBoundingClientRect()];
  });
  const over = (a, b) => a.left + 1 < b.right && b.left + 1 < a.right && a.top + 1 < b.bottom && b.top + 1 < a.bottom;
  const found = [];
  boxes.forEach(([one, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
    if (!one.contains(other) && !other.contains(one) && over(a, b)) found.push([one.textContent, other.textContent]);
  }));
  return found;
}"""


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

    async def go(self, place: str) -> None:
        """Go to a place of the page, such as ``/runs/NAME/nodes``."""
        await self.page.evaluate("place => { location.hash = place; }", place)

    async def until(self, expression: str) -> None:
        """Wait until the JavaScript expression holds on the page."""

        async def look() -> None:  # wait_for_function() would have the page evaluate text, which its policy forbids
            while not await self.page.evaluate(expression):
                await asyncio.sleep(0.05)

        try:
            await asyncio.wait_for(look(), PATIENCE)
        except asyncio.TimeoutError:
            raise AssertionError(f"it never held: {expression}") from None

    async def shows(self, selector: str, text: str) -> None:
        """Wait until an element of the selector has the text."""
        await self.page.locator(selector, has_text=text).first.wait_for()

    async def text(self, selector: str) -> list[str]:
        return await self.page.locator(selector).all_inner_texts()

    async def steps(self, chart: str = "#loss") -> list[float]:
        """The steps on a chart's axis."""
        return await self.page.evaluate("name => [...document.querySelector(`${name} .plot`).uplot.data[0]]", chart)

    async def one_curve(self, chart: str = "#loss") -> bool:
        """Whether the chart's line has no gap, as it is painted."""
        painted = await self.page.evaluate(GAPS, chart)
        return painted["gaps"] == 0 and painted["drawn"] > painted["width"] / 2

    async def overlaps(self) -> list[str]:
        """Figures whose text lies over another's."""
        return await self.page.evaluate(OVERLAPS)

    async def barriers(self) -> list[str]:
        """What axe-core finds serious."""
        if not await self.page.evaluate("'axe' in window"):
            await self.page.evaluate(AXE.read_text("utf-8") + "; undefined")
        found = await self.page.evaluate("axe.run({ resultTypes: ['violations'] })")
        return [
            f"{one['id']}: {[node['target'] for node in one['nodes']]}"
            for one in found["violations"]
            if one["impact"] in ("serious", "critical")
        ]

    async def fits(self) -> bool:
        """Whether nothing is wider than the window."""
        return await self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@asynccontextmanager
async def browsing() -> AsyncIterator[Any]:
    """``await visit(address, size)`` opens a page in a browser that keeps nothing."""
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)

        async def visit(address: str, size: dict[str, int] = DESK, **options: Any) -> Visit:
            context = await browser.new_context(viewport=size, timezone_id="UTC", **options)
            context.set_default_timeout(1000 * PATIENCE)
            made = Visit(await context.new_page(), address)
            await made.page.goto(address)
            await made.until("document.querySelector('#link')?.textContent === 'live'")
            return made

        try:
            yield visit
        finally:
            await browser.close()


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
