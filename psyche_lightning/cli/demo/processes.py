"""The demo's processes: each runs in its own session, and all stop within seconds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from psyche_lightning import system
from psyche_lightning.chronicle.entry import DEMO, Entry, Kind
from psyche_lightning.chronicle.writer import Chronicle
from psyche_lightning.errors import PsycheError
from psyche_lightning.node.status import FILE as STATUS

PSYCHE = ("-m", "psyche_lightning")
START_TIMEOUT = 60.0
ASK_SECONDS = 2.0
"""Seconds in which a process may end by itself before it is killed."""
_URL = re.compile(r"https?://[\w.:\[\]-]+")
_THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM")}


class Child:
    """A ``psyche`` command in its own process, with its output in a log file.

    Args:
        name: its name in messages.
        arguments: the command's arguments.
        log: file for its output, which is appended.
        environment: variables in addition to those of this process.
        program: what Python runs; by default ``psyche``.
        inside: the command that runs Python elsewhere, such as in a network namespace.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = PSYCHE,
        inside: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.log = log
        self._program = [*inside, sys.executable, *program]
        self._arguments = list(arguments)
        self._environment = {**os.environ, **_THREADS, "PYTHONUNBUFFERED": "1", **(environment or {})}
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as output:
            return subprocess.Popen(
                [*self._program, *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )

    def restart(self, arguments: Sequence[str]) -> None:
        """Start the command again, with these arguments."""
        self._arguments = list(arguments)
        self.process = self._start()

    @property
    def code(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self.process.poll()

    def tail(self, lines: int = 12) -> str:
        """The end of its output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def url(self) -> str:
        """Wait for the first URL in its output; returns it.

        Raises:
            PsycheError: the process ended, or printed no URL in time.
        """
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            found = _URL.search(self.log.read_text(errors="replace"))
            if found:
                return found.group()
            if self.code is not None:
                break
            time.sleep(0.05)
        raise PsycheError(f"the {self.name} did not start; its output ends with:\n{self.tail()}")

    def signal(self, number: int) -> None:
        """Send a signal to its whole session, if it still runs."""
        system.send_signal(self.process, number)


class Ends:
    """Writes down how processes end, into event files: of a kill, the process itself has nothing to say.

    Args:
        folder: for the files.
        run: the run's name.
        now: seconds since 1970.
    """

    def __init__(self, folder: Path, run: str, now: Callable[[], float] = time.time) -> None:
        self._chronicle = Chronicle(folder, node=DEMO, run=run)
        self._now = now
        self._over: dict[int, int] = {}

    def look(self, children: Sequence[Child]) -> None:
        """Write down who has ended since the last look."""
        for child in children:
            code, number = child.code, child.process.pid
            if code is None or number in self._over:
                continue
            self._over[number] = code
            node = _node_of(child.log.with_name(STATUS))
            kind = Kind.LEAVE if code == 0 else Kind.FAULT
            about = (node,) if node else ()
            self._chronicle.add(Entry(self._now(), kind, f"{child.name} {_ended(code)}", about=about))


def _ended(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _node_of(status: Path) -> str:
    """The short key of the node with that status file; empty if it has none, as it ended before it joined."""
    try:
        return str(json.loads(status.read_text())["node"])[:8]
    except (OSError, ValueError, KeyError, TypeError):
        return ""


class Processes:
    """All children. At the end of the context, each is asked to stop, and killed after two seconds."""

    def __init__(self) -> None:
        self.children: list[Child] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def add(self, child: Child) -> Child:
        """Add a child, which stops with the others; returns it."""
        self.children.append(child)
        return child

    def stop(self) -> None:
        """Stop all within five seconds: first the nodes, so that they can leave the run, then the coordinator."""
        for group in (self.children[1:], self.children[:1]):
            for child in group:
                child.signal(signal.SIGINT)
            deadline = time.monotonic() + ASK_SECONDS
            while time.monotonic() < deadline and any(child.code is None for child in group):
                time.sleep(0.02)
            for child in group:
                child.signal(system.KILL)
                child.process.wait()
