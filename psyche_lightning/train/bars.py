"""The progress bars of ``psyche train``: one for rounds, and one for parameters that come from peers."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from psyche_lightning.logs import redirections
from psyche_lightning.node.download import Transfer


class Bars:
    """Draws the progress of a training a few times a second; draws nothing without a terminal.

    Args:
        console: the console to draw on.
        name: the run's name.
        total: number of its rounds; None if unknown.
        transfer: returns the download of parameters in progress, or None.
    """

    def __init__(self, console: Console, name: str, total: int | None, transfer: Callable[[], Transfer | None]) -> None:
        self._rounds = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._bytes = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._round = self._rounds.add_task(name, total=total, figures="")
        self._parameters = self._bytes.add_task("")
        self._transfer = transfer
        self._shown: Transfer | None = None
        self._live = (
            Live(console=console, get_renderable=self.render, **redirections()) if console.is_terminal else None
        )

    def start(self) -> None:
        """Start drawing."""
        if self._live is not None:
            self._live.start()

    def stop(self) -> None:
        """Draw once more, then stop."""
        if self._live is not None:
            self._live.stop()

    def advance(self, done: int, figures: str) -> None:
        """Show the rounds done, with ``figures`` beside them."""
        self._rounds.update(self._round, completed=done, figures=figures)

    def render(self) -> Group | Progress:
        """The current bars."""
        transfer = self._transfer()
        if transfer is None:
            return self._rounds
        if transfer is not self._shown:
            self._shown = transfer
            self._bytes.reset(self._parameters, total=transfer.total, completed=transfer.here)
        count = len(transfer.sources)
        peers = f" from {count} peer{'s' * (count != 1)}" if count else ""
        text = f"parameters {transfer.digest.hex()[:12]}{peers}"
        self._bytes.update(self._parameters, completed=transfer.here, description=text)
        return Group(self._rounds, self._bytes)
