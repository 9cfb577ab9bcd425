"""``psyche clean``: frees what nodes of finished runs left on disk."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from psyche_lightning.cli.console import say, stdout
from psyche_lightning.errors import ConfigError, StoreError, counted

DEPTH = 3
"""How many folders below a named one a node's may lie: a demo's lie one below."""


@dataclass(frozen=True)
class Node:
    """A node's folder.

    Attributes:
        folder: the folder.
        run: the run's name; empty if the folder does not say.
        over: whether its run is over, as the node saw it.
        left: why the node left, or what it does.
        needless: what it needs no more once its run is over.
    """

    folder: Path
    run: str
    over: bool
    left: str
    needless: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Size of what is needless."""
        return sum(_size(path) for path in self.needless)


def clean(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER]...", help="Folders of nodes, or folders that hold them; by default this one."),
    ] = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Also remove all checkpoints but the newest of each node.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove what nodes need only while their run goes on, for runs that are finished.

    That is blobs/ and delta.safetensors. The newest checkpoint, the key, the journal, the ledger and the metrics stay.
    Nodes whose run is not finished, or that run now, are listed and left alone.

    Examples:
        psyche clean
        psyche clean psyche-demo --checkpoints --yes
    """
    named = folders or [Path()]
    missing = [str(folder) for folder in named if not folder.is_dir()]
    if missing:
        raise ConfigError(
            f"There is no folder {', '.join(missing)}; name folders of nodes, or none for the current one."
        )
    nodes = [_node(folder, checkpoints) for folder in dict.fromkeys(found for one in named for found in _folders(one))]
    if not nodes:
        say(f"no node's folder in {', '.join(map(str, named))}: none has a node.key")
        return
    stdout().print(_table(nodes))
    wanted = [node for node in nodes if node.over and node.needless]
    if not wanted:
        say("nothing to remove")
        return
    if not yes and not (sys.stdin.isatty() and typer.confirm("Remove this?")):
        say("nothing is removed; --yes removes it")
        return
    freed, kept = 0, []
    for node in wanted:
        before = node.bytes
        try:
            _remove(node)
        except (StoreError, OSError) as error:
            kept.append(f"{node.folder}: {error}")
        freed += before - node.bytes
    from psyche_lightning.doctor.finding import size

    say(f"freed {size(freed)} of {counted(len(wanted) - len(kept), 'node')}")
    if kept:
        raise StoreError("Not removed: " + "; ".join(kept))


def _folders(top: Path) -> Iterator[Path]:
    """The folders of nodes in one, and itself."""
    for depth in range(DEPTH + 1):
        yield from sorted(key.parent for key in top.glob("*/" * depth + "node.key"))


def _node(folder: Path, checkpoints: bool) -> Node:
    from psyche_lightning.node.notices import Finished, Outcome
    from psyche_lightning.node.status import FILE as STATUS

    status = {}
    with contextlib.suppress(OSError, ValueError):
        status = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    left = str(status.get("left") or "")
    over = left.startswith(str(Finished(Outcome.LAST_PARAMETERS)))
    state = left or ("it has not left its run" if status else f"it has no {STATUS}")
    needless = [folder / "blobs", folder / "delta.safetensors"]
    if checkpoints:
        needless += _older(folder)
    return Node(folder, str(status.get("run", "")), over, state, tuple(path for path in needless if _size(path)))


def _older(folder: Path) -> list[Path]:
    """All complete checkpoints but the newest, and those that their writer gave up."""
    from psyche_lightning.checkpoints.address import open_storage
    from psyche_lightning.checkpoints.folder import removable, scan
    from psyche_lightning.checkpoints.manifest import folder_name

    saved = folder / "checkpoints"
    return (
        [saved / folder_name(step) for step in removable(scan(open_storage(str(saved))), 1)] if saved.is_dir() else []
    )


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else 0


def _remove(node: Node) -> None:
    """Remove what is needless, while the journal is claimed: a node that starts meanwhile says that it is in use."""
    from psyche_lightning.node.journal import Journal

    with contextlib.ExitStack() as claimed:
        if (node.folder / "journal").exists():
            claimed.enter_context(contextlib.closing(Journal(node.folder / "journal")))
        for path in node.needless:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _table(nodes: list[Node]) -> Table:
    from psyche_lightning.doctor.finding import size

    table = Table("Folder", "Run", "What")
    table.add_column("Frees", justify="right")
    for node in nodes:
        frees = size(node.bytes) if node.over else "stays"
        parts = ", ".join(path.name for path in node.needless) if node.over else node.left
        table.add_row(str(node.folder), node.run, parts or "nothing", Text(frees, style="bold" if node.over else "dim"))
    return table
