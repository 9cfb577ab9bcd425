"""One coordinator for all tests that need a real one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from psyche_lightning.server.admin import CoordinatorAdmin

# A shell's background jobs ignore Ctrl-C, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real ``psyche coordinator``."""
    folder = tmp_path_factory.mktemp("coordinator")
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "psyche_lightning", "coordinator", "--port", "0", "--dir", str(folder / "runs")],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    try:
        while not (found := re.search(r"http://[\d.:]+", log.read_text())):  # on a busy machine, after a minute too
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield found.group()
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def create_run(coordinator: str, request: pytest.FixtureRequest) -> Callable[..., tuple[str, str]]:
    """Creates a run named after the test; returns the URL and its name."""

    def create(manifest: dict[str, Any] | None = None, **config: Any) -> tuple[str, str]:
        run = re.sub(r"\W+", "-", request.node.name)[-30:]
        CoordinatorAdmin(coordinator).create(run, config, manifest=manifest, seed=1)
        return coordinator, run

    return create


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Four processes for the whole set, as many tests wait rather than compute; none for a part of it."""
    return 4 if config.args == config.getini("testpaths") else 0
