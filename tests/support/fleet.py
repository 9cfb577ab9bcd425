"""A run of real processes on this machine: a coordinator and nodes that come, are killed and are looked into."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from psyche_lightning.cli.demo.processes import PSYCHE, Child, Processes
from psyche_lightning.errors import CoordinatorError, PsycheError
from psyche_lightning.node.audit import Audit, audit
from psyche_lightning.node.ledger import find_ledgers, read_ledger
from psyche_lightning.server.admin import CoordinatorAdmin
from psyche_lightning.wire.identity import Identity

POLL = 0.2
PATIENCE = 180.0
"""Seconds for what takes a few on an idle machine."""


class FleetError(PsycheError):
    """Processes did not do what they should; the text has the end of their logs."""


class Fleet:
    """A coordinator and its nodes; leaving the context stops all of them.

    Args:
        folder: gets the coordinator's and the nodes' folders.
        settings: of the run, ``KEY=VALUE`` as for ``psyche run create``.
        recipe: what is trained, its twin.
        run: the run's name.

    Attributes:
        nodes: every node that was ever started, by its number.
        admin: the owner's side.
    """

    def __init__(self, folder: Path, settings: Sequence[str] = (), *, recipe: str = "demo", run: str = "fleet") -> None:
        self.folder = folder
        self.run = run
        self.nodes: dict[int, Child] = {}
        self._settings = list(settings)
        self._recipe = recipe
        self._processes = Processes()

    def __enter__(self) -> Fleet:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.coordinator = self._processes.add(
                Child("coordinator", self._serve("0"), self.folder / "coordinator.log")
            )
            self.url = self.coordinator.url()
            self.admin = CoordinatorAdmin(self.url)
            create = ["run", "create", self.run, self._recipe, *self._settings, "--twin", "--coordinator", self.url]
            created = self._processes.add(Child("create", create, self.folder / "create.log"))
            if created.process.wait(PATIENCE):
                raise FleetError(f"the run could not be created:\n{created.tail()}")
        except BaseException:
            self._processes.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._processes.stop()

    def _serve(self, port: str) -> list[str]:
        return ["coordinator", "--port", port, "--dir", str(self.folder / "coordinator")]

    # --- what can be done to it -------------------------------------------------------------------------------------

    def start(self, *settings: str, number: int | None = None, program: Sequence[str] = PSYCHE) -> int:
        """Start a node, or one that was killed again; returns its number.

        Args:
            settings: its own, besides the run's.
            number: of a node that was here before, whose folder it takes; a new one unless given.
            program: what Python runs with the arguments of ``psyche``, if it is to be an odd node.
        """
        number = len(self.nodes) if number is None else number
        folder = self.place(number)
        folder.mkdir(exist_ok=True)
        own = [f"node.directory={folder}", "trainer.validate_every=0", *settings]
        arguments = ["train", self._recipe, *self._settings, *own, "--twin", "--coordinator", self.url]
        arguments += ["--run", self.run]
        log = folder / "log.txt"
        self.nodes[number] = self._processes.add(Child(f"node {number}", arguments, log, program=program))
        return number

    def kill(self, number: int) -> None:
        """``kill -9`` a node."""
        self.nodes[number].signal(signal.SIGKILL)
        self.nodes[number].process.wait()

    def restart_coordinator(self) -> None:
        """``kill -9`` the coordinator, and start it again where it was."""
        self.coordinator.signal(signal.SIGKILL)
        self.coordinator.process.wait()
        self.coordinator.restart(self._serve(self.url.rpartition(":")[2]))

    def conclude(self, patience: float = PATIENCE) -> dict[int, str]:
        """End the run where it is: pause it at the end of its epoch, and say that this was its last step.

        Returns:
            As of :meth:`finish`.
        """
        self.admin.pause(self.run)
        status = self.until(lambda found: found["phase"] == "paused", "the pause", patience)
        self.admin.command(self.run, "update", config={"total_steps": status["step"] - 1})
        self.admin.resume(self.run)
        return self.finish(patience)

    # --- what can be seen of it -------------------------------------------------------------------------------------

    def place(self, number: int) -> Path:
        """The folder of a node."""
        return self.folder / f"node-{number}"

    def log(self, number: int) -> str:
        """What a node has printed."""
        return (self.place(number) / "log.txt").read_text(errors="replace")

    def key(self, number: int) -> bytes:
        """The public key of a node."""
        return Identity.load_or_create(self.place(number) / "node.key").public

    def status(self) -> dict[str, Any]:
        """The run's status.

        Raises:
            CoordinatorError: the coordinator does not answer.
        """
        return self.admin.status(self.run)

    def until(self, holds: Callable[[dict[str, Any]], bool], what: str, patience: float = PATIENCE) -> dict[str, Any]:
        """Wait for a status in which something holds, and return it.

        Raises:
            FleetError: it took too long, or a node that was not killed failed.
        """
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            try:
                found = self.status()
                if holds(found):
                    return found
            except CoordinatorError as error:
                if not error.retryable:
                    raise
            self._check()
            time.sleep(POLL)
        raise self._in_vain(what)

    def finish(self, patience: float = PATIENCE) -> dict[int, str]:
        """Wait for the end of the run; returns the digests with which nodes ended, by their numbers.

        Raises:
            FleetError: it did not end in time, or a node that was not killed failed.
        """
        self.until(lambda found: found["phase"] == "finished", "the end of the run", patience)
        deadline = time.monotonic() + PATIENCE
        while any(node.code is None for node in self.nodes.values()):
            if time.monotonic() > deadline:
                raise self._in_vain("nodes to leave the finished run")
            time.sleep(POLL)
        self._check()
        results = {number: self.place(number) / "result.json" for number in self.nodes}
        return {number: json.loads(file.read_text())["digest"] for number, file in results.items() if file.exists()}

    def ended(self, number: int) -> int:
        """Wait until a node has ended by itself; returns its exit code.

        Raises:
            FleetError: it did not in time.
        """
        try:
            return self.nodes[number].process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise self._in_vain(f"node {number} to end") from None

    def _in_vain(self, what: str) -> FleetError:
        tails = "\n".join(f"--- {node.name}\n{node.tail()}" for node in self.nodes.values() if node.code is None)
        return FleetError(f"waited in vain for {what}:\n{tails or 'no node is left'}")

    def _check(self) -> None:
        failed = [node for node in self.nodes.values() if node.code not in (None, 0, -signal.SIGKILL)]
        if failed:
            raise FleetError("\n".join(f"{node.name} failed:\n{node.tail()}" for node in failed))

    def ledger(self) -> Audit:
        """The run's ledger, from the folders of all nodes, the killed ones included."""
        return audit(row for ledger in find_ledgers([self.folder]) for row in read_ledger(ledger))


def usage(pid: int) -> tuple[int, int]:
    """Memory in bytes and open file descriptors of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))
