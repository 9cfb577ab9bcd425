"""Pictures of every view of the live page in every state of a run, at three sizes and in both themes, to look at.

python tests/page/gallery.py FOLDER [NAME ...]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.browser import DESK, PHONE, TABLET, Visit, browsing
from support.stages import StagedStore, every_state, key, stage, still

from psyche_lightning.server.store import MemoryStore

SIZES = {"390": PHONE, "1024": TABLET, "1440": DESK}
THEMES = ("light", "dark")
SHEET = 3000
"""Height up to which a contact sheet shows a page, in pixels of a picture."""


@dataclass(frozen=True)
class View:
    """A view of the page.

    Attributes:
        name: of its pictures.
        place: where it is.
        shows: a selector of what is there once it is drawn.
        hover: a chart's name, whose middle the pointer is on.
    """

    name: str
    place: str
    shows: str
    hover: str = ""


NODE = key(2).hex()
VIEWS = (
    View("runs", "/runs", "table.runs"),
    View("before-start", "/runs/before-start", ".run-head"),
    View("gathering", "/runs/gathering", ".run-head"),
    View("warming-up", "/runs/warming-up", ".run-head"),
    View("first-rounds", "/runs/first-rounds", "#loss canvas"),
    View("training", "/runs/training", "#loss canvas"),
    View("training-hover", "/runs/training?smooth=0.9", "#loss canvas", "#loss"),
    View("training-zoom-log", "/runs/training?log=1&from=80&to=220", "#loss canvas"),
    View("training-time", "/runs/training?by=time", "#loss canvas"),
    View("ending", "/runs/ending", "#loss canvas"),
    View("paused", "/runs/paused", "#loss canvas"),
    View("stalled", "/runs/stalled", ".problem"),
    View("finished", "/runs/finished", "#loss canvas"),
    View("nodes", "/runs/training/nodes", "table.nodes"),
    View("nodes-finished", "/runs/finished/nodes", "table.nodes"),
    View("node", f"/runs/training/nodes/{NODE}", ".node"),
    View("node-killed", f"/runs/training/nodes/{key(1).hex()}", ".node"),
    View("no-node", "/runs/training/nodes/00", ".nothing"),
    View("events", "/runs/training/events", ".event"),
    View("events-filtered", "/runs/training/events?kind=late,dropped&search=result", ".toolbar"),
    View("about", "/runs/training/about", ".about"),
    View("no-run", "/runs/nothing", ".nothing"),
    View("closed", "", "#loss canvas"),
)


def many() -> MemoryStore:
    """26 runs that have not begun."""
    return StagedStore(stage(f"run-{number}", 60.0 + number) for number in range(26))


AWAY = "coordinator-away"
OTHERS = {"26-runs": many, "no-runs": MemoryStore}


async def show(visited: Visit, view: View) -> None:
    """Wait until a view is drawn."""
    await visited.until(f"document.querySelector({view.shows!r})")
    await visited.page.evaluate("scrollTo(0, 0)")
    if view.hover:
        await visited.page.locator(f"{view.hover} .plot .u-over").hover()
    await visited.page.wait_for_timeout(450)  # bars have reached their places


async def take(folder: Path, wanted: list[str]) -> list[str]:
    """Write the pictures, and return what is wrong in them."""
    wrong = []

    async def picture(visited: Visit, name: str, hovers: bool = False) -> None:
        await visited.page.screenshot(path=folder / f"{name}.png", full_page=not hovers)
        if not name.startswith(AWAY):  # a browser complains of a server that is gone
            wrong.extend(f"{name}: {text}" for text in visited.wrong)
        if not await visited.fits():
            wrong.append(f"{name}: wider than the window")
        wrong.extend(f"{name}: lies over another: {pair}" for pair in await visited.overlaps())

    stores = {"": every_state, **OTHERS}
    async with browsing() as visit:
        for only, store in stores.items():
            async with still(store()) as (server, url):
                open_: dict[str, Visit] = {}
                closed = next((line["id"] for line in server.archived), "")
                views = [View(only, "/runs", "h1")] if only else VIEWS
                for size, window in SIZES.items():
                    for theme in THEMES:
                        chosen = [one for one in views if not wanted or one.name in wanted]
                        if not chosen:
                            continue
                        visited = await visit(f"{url}/#/runs", window, color_scheme=theme)
                        for view in chosen:
                            await visited.go(view.place or f"/runs/{closed}")
                            await show(visited, view)
                            await picture(visited, f"{view.name}-{size}-{theme}", bool(view.hover))
                        open_[f"{size}-{theme}"] = visited
                if not only and (not wanted or AWAY in wanted):
                    await server.stop()
                    for name, visited in open_.items():
                        await visited.until("document.querySelector('#link.away')")
                        await picture(visited, f"{AWAY}-{name}")
                for visited in open_.values():
                    await visited.page.context.close()
    return wrong


def sheet(folder: Path, name: str, theme: str) -> None:
    """Put the pictures of a view beside each other."""
    pictures = [Image.open(folder / f"{name}-{size}-{theme}.png") for size in SIZES]
    pictures = [one.crop((0, 0, one.width, min(one.height, SHEET))) for one in pictures]
    pictures = [one.resize((one.width * 2 // 3, one.height * 2 // 3), Image.Resampling.LANCZOS) for one in pictures]
    made = Image.new("RGB", (sum(one.width + 12 for one in pictures), max(one.height for one in pictures)), "#888")
    left = 0
    for one in pictures:
        made.paste(one, (left, 0))
        left += one.width + 12
    made.save(folder / f"sheet-{name}-{theme}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="views; all by default")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    found = asyncio.run(take(given.folder, given.names))
    for name in given.names or [*(view.name for view in VIEWS), AWAY, *OTHERS]:
        for theme in THEMES:
            sheet(given.folder, name, theme)
    print("\n".join(found) or "nothing is wrong")
