"""``psyche observe``: shows what nodes did and saw, from their event files."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from psyche_lightning.errors import ConfigError, PluginError, nearest

if TYPE_CHECKING:
    from psyche_lightning.chronicle.entry import Entry, Kind
    from psyche_lightning.observe.app import Observer
    from psyche_lightning.observe.timeline import Timeline

SIZE = (100, 28)
"""Columns and lines of a picture."""


def observe(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...",
            help="Folders of nodes and coordinators, a folder that holds them, or a trace of `psyche sim --json`.",
        ),
    ],
    run: Annotated[
        str | None, typer.Option(metavar="RUN", help="The run; by default the one with the newest event.")
    ] = None,
    round_: Annotated[
        str | None, typer.Option("--round", metavar="[EPOCH/]ROUND", help="Only events of this round; prints them.")
    ] = None,
    node: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Only events by or about the node whose key begins so; prints them."),
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--kind", metavar="KIND", help="Only events of this kind, such as wait or fault; may be repeated."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print events as lines of JSON.")] = False,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a picture of what it shows at first, and end.")
    ] = None,
) -> None:
    """Look at what nodes and their coordinator did, live or afterwards: rounds, waits, and what was around a fault.

    In a terminal, `?` shows the keys. Elsewhere, or with a filter, it prints what is not the same in every round, and
    with a filter everything that matches.

    Examples:
        psyche observe psyche-demo
        psyche observe psyche-demo --kind fault --kind drop
        psyche observe psyche-demo/node-1 --round 6 --json
    """
    from psyche_lightning.chronicle.reader import find_books
    from psyche_lightning.observe.timeline import RECENT, Timeline

    wanted = _kinds(kinds or [])
    prints = as_json or round_ is not None or node is not None or bool(wanted)
    lines = svg is None and (prints or not sys.stdout.isatty())
    began = time.perf_counter()
    with _without_collector():
        line = Timeline(find_books(folders), run, recent=sys.maxsize if lines else RECENT)
    if lines:
        _print(line, round_, node, wanted, as_json=as_json, everything=prints)
        return
    took = time.perf_counter() - began
    observer = _observer()(line, took, live=svg is None)
    if svg is not None:
        _write(svg, asyncio.run(observer.picture(SIZE)))
        return
    observer.run()


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Reading makes many objects and no cycles, through which the collector would go again and again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _observer() -> type[Observer]:
    try:
        from psyche_lightning.observe.app import Observer
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("textual", "psyche_lightning"):
            raise
        raise PluginError(
            "psyche observe needs textual to show a time line: pip install 'psyche-lightning[observe]'. Without it, "
            "`psyche observe FOLDER --kind fault` and --json print events."
        ) from error
    return Observer


def _kinds(names: list[str]) -> list[Kind]:
    from psyche_lightning.chronicle.entry import Kind

    known = {kind.value: kind for kind in Kind}
    given = [name for text in names for name in text.split(",")]
    for name in given:
        if name not in known:
            raise ConfigError(f"--kind {name}: there is no such kind.{nearest(name, known)} Choose {', '.join(known)}.")
    return [known[name] for name in given]


def _print(
    line: Timeline, round_: str | None, node: str | None, kinds: list[Kind], *, as_json: bool, everything: bool
) -> None:
    from psyche_lightning.chronicle.entry import COORDINATOR, Kind, line_of
    from psyche_lightning.cli.console import say
    from psyche_lightning.observe.timeline import chosen

    entries = sorted([*line.entries, *line.ends], key=lambda entry: entry.time)
    found = chosen(entries, round_=round_, node=node, kinds=kinds)
    for entry in found:
        if as_json:
            print(line_of(entry.values()).decode(), end="")
        elif everything or not (entry.kind.usual or (entry.kind is Kind.PHASE and entry.node != COORDINATOR)):
            say(_line(line, entry))
    sys.stdout.flush()


def _line(line: Timeline, entry: Entry) -> str:
    """An entry in one line."""
    from psyche_lightning.observe.timeline import clock, what

    place = line.place_of(entry)
    where = "" if place is None else f"{place[0]}/{place[1]}"
    took = "" if entry.seconds is None else f" ({entry.seconds:.2f} s)"
    return f"{clock(entry.time):>12}  {entry.node:<11}  {where:>6}  {entry.kind.value:<8}  {what(entry)}{took}"


def _write(path: Path, picture: str) -> None:
    try:
        path.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
