"""The demo's live view: the run's progress, its nodes, and its events."""

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

from psyche_lightning.logs import redirections
from psyche_lightning.text import plain

LINE_EVERY, LINES = 10, 6
"""For an output that is not a terminal: the most rounds between two lines, and about the fewest lines of a run."""
EVENTS = 4


def megabytes(count: float | None) -> str:
    """A number of bytes as a text."""
    if count is None:
        return "-"
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


class View:
    """Shows a run's status; redraws it on a terminal, prints lines elsewhere.

    Args:
        console: the console to print to.
        all_reduce: bytes of an fp32 all-reduce per node and round, for the ratio; None for a single node.
        rounds: training rounds of the run.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        console: Console,
        *,
        all_reduce: float | None,
        rounds: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._all_reduce = all_reduce
        self._rounds = rounds
        self._clock = clock
        self._live = (
            Live(console=console, auto_refresh=False, transient=True, **redirections()) if console.is_terminal else None
        )
        self._first: tuple[int, float] | None = None
        self._every = max(1, min(LINE_EVERY, rounds // LINES))
        self._printed = 0

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, status: dict[str, Any]) -> None:
        """Show the run as the coordinator's status describes it."""
        done = status["step"] - 1
        if self._first is None and done:
            self._first = (done, self._clock())
        if self._live:
            self._live.update(self._picture(status, done), refresh=True)
        elif done >= self._printed + self._every or done == self._rounds > self._printed:
            self._printed = done
            self._console.print(self._line(status, done), highlight=False)

    def _left(self, done: int) -> str:
        if self._first is None or done <= self._first[0]:
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
            "round": f"{done}/{self._rounds}",
            "loss": "-" if loss is None else f"{loss:.3f}",
            "tokens/s": f"{rate:,.0f}",
            "up": megabytes(up),
            "down": megabytes(down),
            "ratio": f"{self._all_reduce / most:.0f}x" if most and self._all_reduce is not None else "-",
            "left": self._left(done),
        }

    def _line(self, status: dict[str, Any], done: int) -> str:
        return "  ".join(f"{name} {value}" for name, value in self._facts(status, done).items())

    def _picture(self, status: dict[str, Any], done: int) -> RenderableType:
        facts = Table(box=None, pad_edge=False, header_style="dim")
        values = self._facts(status, done)
        for name in values:
            facts.add_column(name, justify="right", no_wrap=True, min_width=7)
        facts.add_row(*values.values(), style="bold")
        nodes = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("node", "status", "loss", "tokens/s", "up", "down"):
            nodes.add_column(name, justify="left" if name in ("node", "status") else "right", min_width=9)
        for node in (*status["clients"], *status["pending"], *status["exited"]):
            well = node["status"] in ("healthy", "pending", "finished")
            nodes.add_row(
                node["key"],
                Text(node["status"], style="green" if well else "red"),
                "-" if node["loss"] is None else f"{node['loss']:.3f}",
                "-" if node["tokens_per_second"] is None else f"{node['tokens_per_second']:,.0f}",
                megabytes(node["bytes_up"]),
                megabytes(node["bytes_down"]),
            )
        events = Text("\n".join(plain(event["text"]) for event in status["events"][-EVENTS:]), style="dim")
        bar = ProgressBar(total=self._rounds, completed=done, width=64)
        body = Group(facts, bar, Text(), nodes, Text(), events)
        phase = status["phase"].replace("_", " ")
        title = f"run {status['run_id']}, epoch {status['epoch']}: {phase}"
        return Panel(body, title=Text(title), border_style="blue", expand=False)
