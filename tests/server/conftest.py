"""A real server on loopback, and clients that go through a run's motions without training anything."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from psyche_lightning.server.admin import CoordinatorAdmin
from psyche_lightning.server.server import CoordinatorServer
from psyche_lightning.server.store import MemoryStore, Store
from psyche_lightning.testing.walking import walk

QUICK = {"waiting_for_members_extra_time": 0.05, "warmup_time": 20, "cooldown_time": 5, "max_round_train_time": 20}


class ServerProcess:
    """``psyche coordinator`` as a process of its own, on one port however often it is started."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self._options = options
        self._process: subprocess.Popen[str] | None = None
        self.url = ""
        self.port = 0

    def start(self) -> str:
        code = "import sys; from psyche_lightning.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", code, "coordinator", "--port", str(self.port), "--dir", str(self.directory)]
        self._process = subprocess.Popen(
            [*command, *self._options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self._process.stdout is not None
        said = ""  # nodes that come back at once may be spoken of before the address
        while not (found := re.search(r"https?://[0-9.]+:(\d+)", said)):
            line = self._process.stdout.readline()
            assert line, f"it ended without an address: {said}"
            said += line
        self.url, self.port = found[0], int(found[1])
        return self.url

    def line(self) -> str:
        """The next line of its output."""
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def end(self, number: int = signal.SIGKILL) -> int:
        """Send a signal and return the exit code."""
        assert self._process is not None
        self._process.send_signal(number)
        code = self._process.wait(60)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process = None
        return code

    @property
    def admin(self) -> CoordinatorAdmin:
        return CoordinatorAdmin(self.url)

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self.end()


@pytest.fixture(name="walk")
def walk_fixture() -> Callable[..., object]:
    return walk


@pytest.fixture
def quick() -> dict[str, float]:
    """Settings with which a run of willing nodes never waits long."""
    return dict(QUICK)


@pytest.fixture
def server_process(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    made: list[ServerProcess] = []

    def make(*options: str) -> ServerProcess:
        made.append(ServerProcess(tmp_path / "coordinator", *options))
        made[-1].start()
        return made[-1]

    yield make
    for process in made:
        process.__exit__()


@pytest.fixture
def served() -> Callable[..., object]:
    """A server of this process on a free port: ``async with served(...) as (server, url)``."""

    @asynccontextmanager
    async def serve(store: Store | None = None, **options: object) -> AsyncIterator[tuple[CoordinatorServer, str]]:
        server = CoordinatorServer(store or MemoryStore(), **options)  # type: ignore[arg-type]
        url = await server.start("127.0.0.1", 0)
        try:
            yield server, url
        finally:
            await server.stop()

    return serve


@pytest.fixture
def run() -> Callable[..., object]:
    """Run a coroutine with a bound that turns a hang into a failure."""

    def bounded(coroutine: object, timeout: float = 60.0) -> object:
        async def inner() -> object:
            return await asyncio.wait_for(coroutine, timeout)  # type: ignore[arg-type]

        return asyncio.run(inner())

    return bounded
