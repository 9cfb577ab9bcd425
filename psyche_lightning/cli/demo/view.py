"""The live view of ``psyche demo`` and ``psyche top``: the run's progress, its nodes, and its events."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from psyche_lightning.doctor.finding import size
from psyche_lightning.logs import redirections
from psyche_lightning.text import plain

LINE_EVERY, LINES = 10, 6
"""For an output that is not a terminal: the most rounds between two lines, and about the fewest lines of a run."""
EVENTS = 4
LEAST_NODES, OTHER_LINES = 4, 14
"""Rows for nodes in the picture in any case, and lines of a terminal that are for the rest."""


def _sent(count: float | None) -> str:
    """A number of bytes, if it is known."""
    return "-" if count is None else size(count)


class View:
    """Shows a run's status; redraws it on a terminal, prints lines elsewhere.

    Args:
        console: the console to print to.
        all_reduce: bytes of an fp32 all-reduce per node and round, for the ratio; None for a single node, or unknown.
        rounds: training rounds of the run; None while that is not known.
        clock: monotonic seconds.
        live: whether a terminal is redrawn.
    """

    def __init__(
        self,
        console: Console,
        *,
        all_reduce: float | None,
        rounds: int | None,
        clock: Callable[[], float] = time.monotonic,
        live: bool = True,
    ) -> None:
        self._console = console
        self.all_reduce = all_reduce
        self._rounds = rounds
        self._clock = clock
        self._live: Live | None = None
        if live and console.is_terminal:
            self._live = Live(console=console, auto_refresh=False, transient=True, **redirections())
        self._seen: dict[str, Any] | None = None
        self._first: tuple[int, float] | None = None
        self._every = LINE_EVERY if rounds is None else max(1, min(LINE_EVERY, rounds // LINES))
        self._printed = 0

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    @property
    def redraws(self) -> bool:
        """Whether it draws a picture again and again, and prints no lines."""
        return self._live is not None

    def show(self, status: dict[str, Any]) -> None:
        """Show the run as the coordinator's status describes it."""
        done = status["step"] - 1
        self._seen = status
        self._rounds = status.get("total_steps") or self._rounds
        if self._first is None and done:
            self._first = (done, self._clock())
        if self._live:
            self._live.update(self._picture(status, done), refresh=True)
            return
        if done >= self._printed + self._every or done == self._rounds != self._printed:
            self._printed = done
            self._console.print(self._line(status, done), highlight=False)

    def once(self, status: dict[str, Any]) -> None:
        """Print the run as it is: a picture on a terminal, lines elsewhere."""
        done = status["step"] - 1
        if self._console.is_terminal:
            self._console.print(self._picture(status, done))
            return
        self._console.print(heading(status), highlight=False)
        self._console.print(self._line(status, done), highlight=False)
        for node in _nodes(status):
            self._console.print("  ".join(_figures(node)), highlight=False)

    def last(self) -> None:
        """Print the newest picture once more, as a terminal forgets what was redrawn."""
        if self._live is not None and self._seen is not None:
            self._live.stop()
            self._console.print(self._picture(self._seen, self._seen["step"] - 1))

    def _left(self, done: int) -> str:
        if self._first is None or done <= self._first[0] or self._rounds is None:
            return "-"
        pace = (self._clock() - self._first[1]) / (done - self._first[0])
        seconds = pace * (self._rounds - done)
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"

    def _facts(self, status: dict[str, Any], done: int) -> dict[str, str]:
        clients = [node for node in status["clients"] if node["bytes_up"] is not None]
        loss = next((row["loss"] for row in reversed(status["metrics"]) if row["loss"] is not None), None)
        rate = sum(node["tokens_per_second"] or 0 for node in clients)
        up = max((node["bytes_up"] for node in clients), default=None)
        down = max((node["bytes_down"] for node in clients), default=None)
        most = max(up or 0, down or 0) / max(done, 1)
        return {
            "round": f"{done}/{self._rounds or '?'}",
            "loss": "-" if loss is None else f"{loss:.3f}",
            "tokens/s": f"{rate:,.0f}",
            "up": _sent(up),
            "down": _sent(down),
            "ratio": f"{self.all_reduce / most:.0f}x" if most and self.all_reduce is not None else "-",
            "left": self._left(done),
        }

    def _line(self, status: dict[str, Any], done: int) -> str:
        """The facts that fit into 80 columns; what comes down is about what goes up."""
        facts = self._facts(status, done).items()
        return "  ".join(f"{name} {value}" for name, value in facts if name != "down")

    def _picture(self, status: dict[str, Any], done: int) -> RenderableType:
        facts = Table(box=None, pad_edge=False, header_style="dim")
        values = self._facts(status, done)
        for name in values:
            facts.add_column(name, justify="right", no_wrap=True, min_width=7)
        facts.add_row(*values.values(), style="bold")
        nodes = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("node", "status", "loss", "tokens/s", "up", "down"):
            nodes.add_column(name, justify="left" if name in ("node", "status") else "right", min_width=9)
        found = _nodes(status)
        room = max(LEAST_NODES, self._console.height - OTHER_LINES)
        for node in found[:room]:
            key, standing, *figures = _figures(node)
            well = standing in ("healthy", "pending", "finished")
            nodes.add_row(key, Text(standing, style="green" if well else "red"), *figures)
        if len(found) > room:
            nodes.add_row("...", f"{len(found) - room} more")
        events = Text("\n".join(plain(event["text"]) for event in status["events"][-EVENTS:]), style="dim")
        bar = ProgressBar(total=self._rounds or max(done, 1), completed=done, width=64)
        waits = [Text(plain(text), style="yellow") for text in (status.get("problem"), status.get("waits_for")) if text]
        body = Group(facts, bar, *waits, Text(), nodes, Text(), events)
        return Panel(body, title=Text(heading(status)), border_style="blue", expand=False)


def heading(status: dict[str, Any]) -> str:
    """The run, its epoch and its phase."""
    phase = status["phase"].replace("_", " ")
    return plain(f"run {status['run_id']}, epoch {status['epoch']}: {phase}")


def _nodes(status: dict[str, Any]) -> list[dict[str, Any]]:
    return [*status["clients"], *status["pending"], *status["exited"]]


def _figures(node: dict[str, Any]) -> list[str]:
    """A node in a row: key, status, loss, speed, bytes up and down."""
    return [
        node["key"],
        node["status"],
        "-" if node["loss"] is None else f"{node['loss']:.3f}",
        "-" if node["tokens_per_second"] is None else f"{node['tokens_per_second']:,.0f}",
        _sent(node["bytes_up"]),
        _sent(node["bytes_down"]),
    ]
