"""A demo's coordinator of any kind: starts it, creates a run on it, and reads the run's status."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from psyche_lightning.cli.demo.processes import Child, Processes
from psyche_lightning.errors import ConfigError, CoordinatorError, nearest
from psyche_lightning.plugins import load_plugins

SERVER = "server"


class Stage(Protocol):
    """One kind of coordinator in the demo. A kind of a plugin builds its stage with ``demo``.

    Attributes:
        what: the coordinator's name in messages.
    """

    what: str

    def open(self, processes: Processes, folder: Path, nodes: int, console: Console) -> str:
        """Start the coordinator with its files in ``folder``; returns its URL for the nodes."""
        ...

    def create(self, run_id: str, recipe: str, overrides: list[str], twin: bool) -> None:
        """Create the run."""

    def environment(self, node: int) -> Mapping[str, str]:
        """Variables that a node needs."""
        ...

    def look(self, nodes: list[Child]) -> dict[str, Any] | None:
        """The run's status, as ``psyche run status --json`` prints it, or None while it is not available.

        A demo that changes the run or its nodes meanwhile, does so here.
        """
        ...

    def finish(self, folders: list[Path]) -> dict[str, Any]:
        """Called when all nodes have ended; returns further values for the demo's JSON."""
        ...

    def show(self, console: Console) -> None:
        """Print the facts that only this kind of coordinator has."""


def find_stage(name: str) -> Stage:
    """The stage with this name.

    Raises:
        ConfigError: the coordinator does not exist, or has no demo.
    """
    if name == SERVER:
        return ServerStage()
    found = load_plugins().coordinators()
    demos = {other: kind.demo for other, kind in found.items() if kind.demo is not None}
    have = [SERVER, *demos]
    if name not in have:
        raise ConfigError(
            f"There is no demo with the coordinator {name!r}.{nearest(name, have)} Choose {', '.join(have)}."
        )
    stage: Stage = demos[name]()
    return stage


class ServerStage:
    """``psyche coordinator`` in its own process."""

    what = "the coordinator"

    def __init__(self) -> None:
        self._folder = Path()
        self._url = ""
        self._run = ""

    def open(self, processes: Processes, folder: Path, nodes: int, console: Console) -> str:
        """Start the server on a free port."""
        self._folder = folder
        self._server = processes.add(Child("coordinator", self._serve("0"), folder / "coordinator.log"))
        self._url = self._server.url()
        console.print(f"watch it in a browser: {self._url}", highlight=False)
        return self._url

    def _serve(self, port: str) -> list[str]:
        return ["coordinator", "--port", port, "--dir", str(self._folder / "coordinator")]

    def create(self, run_id: str, recipe: str, overrides: list[str], twin: bool) -> None:
        """Create the run."""
        from psyche_lightning.cli.owner import administer
        from psyche_lightning.cli.run_creation import wanted
        from psyche_lightning.server.token import FILE

        self._run = run_id
        token = self._folder / "coordinator" / FILE  # commands do not find it by themselves where a user has no home
        owner = administer(self._url, run_id, token if token.exists() else None)
        owner.create(wanted(run_id, [recipe, *overrides], twin))

    def environment(self, node: int) -> Mapping[str, str]:
        """The nodes need no variables."""
        return {}

    def look(self, nodes: list[Child]) -> dict[str, Any] | None:
        """Ask the server; restarts a server that has died."""
        from psyche_lightning.server.admin import CoordinatorAdmin

        if self._server.code is not None:
            self._server.restart(self._serve(self._url.rpartition(":")[2]))  # its store has the run, which continues
        try:
            return CoordinatorAdmin(self._url).status(self._run)
        except CoordinatorError as error:
            if not error.retryable:
                raise
            return None

    def finish(self, folders: list[Path]) -> dict[str, Any]:
        """Do nothing."""
        return {}

    def show(self, console: Console) -> None:
        """Do nothing."""
