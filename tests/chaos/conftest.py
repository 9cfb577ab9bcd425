"""The demo as a user starts it, and its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from psyche_lightning.errors import CoordinatorError
from psyche_lightning.server.admin import CoordinatorAdmin

LIMIT = 240.0


@dataclass
class Demo:
    """A running ``psyche demo`` of the CPU twin."""

    folder: Path
    process: subprocess.Popen[str]

    def children(self, command: str) -> list[int]:
        """Process ids of its children that run that psyche command."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if int(fields[1]) == self.process.pid and fields[0] != "Z" and command.encode() in arguments:
                found.append(int(entry.name))
        return sorted(found)

    def wait_for_step(self, step: int) -> None:
        """Until the run has trained that many steps."""
        deadline = time.monotonic() + LIMIT
        log = self.folder / "coordinator.log"
        while time.monotonic() < deadline and self.process.poll() is None:
            text = log.read_text() if log.exists() else ""
            if "http://" in text:
                url = text[text.index("http://") :].split()[0]
                try:
                    if CoordinatorAdmin(url, attempts=1).status("demo")["step"] > step:
                        return
                except CoordinatorError:
                    pass
            time.sleep(0.05)
        raise AssertionError(f"the demo did not reach step {step}:\n{self.output()}")

    def output(self) -> str:
        """What it printed; ends it if it still runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.communicate(timeout=60)[0]

    def finish(self) -> dict[str, Any]:
        """Its figures, once it has ended well."""
        output = self.process.communicate(timeout=LIMIT)[0]
        assert self.process.returncode == 0, output
        figures: dict[str, Any] = json.loads((self.folder.parent / "out.json").read_text())
        return figures


@pytest.fixture
def start_demo(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    started: list[Demo] = []

    def start(*arguments: str) -> Demo:
        folder = tmp_path / f"demo-{len(started)}"
        command = [sys.executable, "-m", "psyche_lightning", "demo", "--twin", "--keep", str(folder)]
        process = subprocess.Popen(
            [*command, "--json", str(tmp_path / "out.json"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        started.append(Demo(folder, process))
        return started[-1]

    yield start
    for demo in started:
        if demo.process.poll() is None:
            demo.process.send_signal(signal.SIGINT)
            demo.process.wait(60)
