"""Pictures of the live page for docs/monitoring.md, of a run on a coordinator that is running.

python tests/page/pictures.py http://127.0.0.1:8080 RUN
"""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.browser import DESK, PHONE, browsing

PICTURES = (
    ("page-run", "", DESK, "light"),
    ("page-phone", "", PHONE, "light"),
    ("page-nodes", "/nodes", {"width": 1024, "height": 640}, "dark"),
)


async def take(url: str, run: str, folder: Path) -> None:
    """Write the pictures into a folder."""
    async with browsing() as visit:
        for name, view, size, scheme in PICTURES:
            visited = await visit(f"{url}/#/runs/{run}{view}", size, color_scheme=scheme)
            await visited.until("document.querySelector('#loss .plot canvas, table.nodes')")
            await visited.page.wait_for_timeout(500)  # bars have reached their places
            picture = Image.open(io.BytesIO(await visited.page.screenshot()))
            picture.save(folder / f"{name}.webp", quality=82, method=6)
            if visited.wrong:
                raise SystemExit(f"the page complains: {visited.wrong}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs" / "images")
    given = parser.parse_args()
    asyncio.run(take(given.url.rstrip("/"), given.run, given.out))
