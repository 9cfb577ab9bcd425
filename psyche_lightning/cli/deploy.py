"""``psyche deploy``: writes the files with which a run is deployed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from psyche_lightning.cli.console import say
from psyche_lightning.cli.link import read_link
from psyche_lightning.deploy import Kind, write
from psyche_lightning.protocol.link import JoinLink


def deploy(
    kind: Annotated[Kind, typer.Argument(help="What to write files for.", show_default=False)],
    link: Annotated[
        str | None,
        typer.Argument(metavar="[LINK]", help="The run's join link, or @FILE with it.", callback=read_link),
    ] = None,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="The run's name, where the link has none.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to write to; by default psyche-deploy/KIND.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
) -> None:
    """Write the files that deploy a run: images, a chart, job files or units, filled in with its link.

    Examples:
        psyche deploy compose --out lab
    """
    folder = out or Path("psyche-deploy") / kind.value
    written = write(kind, folder, run=run or JoinLink.parse(link or "").run, link=link or "", force=force)
    for path in written.paths:
        say(str(path))
    say(f"\n{written.guide.rstrip()}")
