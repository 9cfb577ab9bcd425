"""``psyche top``: a live view of any run."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from psyche_lightning.cli import main
from psyche_lightning.cli.demo.view import View
from psyche_lightning.server.admin import CoordinatorAdmin
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.server.server import CoordinatorServer
from psyche_lightning.server.store import MemoryStore
from psyche_lightning.testing.walking import walk
from psyche_lightning.wire.identity import Identity

SETTINGS = {
    "waiting_for_members_extra_time": 0.05,
    "total_steps": 12,
    "global_batch_size_start": 3,
    "global_batch_size_end": 3,
    "init_min_clients": 1,
}


class Served:
    """A coordinator in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.server = CoordinatorServer(MemoryStore())
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.url = self.do(self.server.start("127.0.0.1", 0)).result(30)

    def do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def create(self, run: str) -> None:
        CoordinatorAdmin(self.url).create(run, SETTINGS)

    def walk(self, run: str) -> Any:
        """Begins a node that goes through the run's motions."""

        async def node() -> None:
            client = HttpCoordinator(self.url, run, Identity.generate())
            try:
                await walk(client)
            finally:
                await client.close()

        return self.do(node())

    def close(self) -> None:
        self.do(self.server.stop()).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.close()


def test_in_a_pipe_it_prints_lines_until_the_run_is_over(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    served.create("r")
    node = served.walk("r")
    assert main(["top", served.url]) == 0
    node.result(30)
    lines = capsys.readouterr().out.splitlines()
    assert [text for text in lines if re.match(r"round 12/12  loss ", text)]
    assert lines[-2].startswith("run r, epoch 1: finished")
    assert all("…" not in text for text in lines)


def test_once_prints_the_run_and_its_nodes(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    served.create("r")
    served.walk("r").result(60)
    assert main(["top", served.url.removeprefix("http://"), "r", "--once"]) == 0
    title, facts, node = capsys.readouterr().out.splitlines()
    assert title == "run r, epoch 1: finished"
    assert facts.startswith("round 12/12  loss ")
    assert re.match(r"[0-9a-f]{8}  healthy  ", node)


def test_several_runs_are_named_where_nobody_can_choose(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", served.url]) == 1
    assert "has no run yet" in capsys.readouterr().err
    served.create("a")
    served.create("b")
    assert main(["top", served.url]) == 1
    assert "has 2 runs: name one of a, b" in capsys.readouterr().err
    assert main(["top", served.url, "c", "--once"]) == 1
    assert "no run 'c'" in capsys.readouterr().err


def test_ctrl_c_ends_it_with_130_and_no_traceback(served: Served) -> None:
    served.create("r")
    code = "import sys; from psyche_lightning.cli import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-u", "-c", code, "top", served.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("run r, epoch 0: waiting for members")
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == ""


def test_the_picture_folds_to_80_columns_and_to_the_lines_of_the_terminal() -> None:
    node = {"status": "healthy", "loss": 2.5, "tokens_per_second": 12_345.6, "bytes_up": 123_456_789, "bytes_down": 9}
    status = {
        "run_id": "r",
        "phase": "round_train",
        "epoch": 0,
        "step": 5,
        "total_steps": None,
        "metrics": [],
        "clients": [{**node, "key": f"{number:08x}"} for number in range(100)],
        "pending": [],
        "exited": [],
        "events": [{"text": "word " * 40}],
        "waits_for": "waits for " + "00000001, " * 16,
    }
    text = io.StringIO()
    console = Console(file=text, width=80, height=40, force_terminal=True, color_system=None)
    View(console, all_reduce=None, rounds=None, live=False).once(status)
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in text.getvalue()
    assert "round" in text.getvalue()
    assert "4/?" in text.getvalue()
    assert "74 more" in text.getvalue()
    assert text.getvalue().count("00000001") > 2
    assert len(lines) <= 44
