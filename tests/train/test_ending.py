"""A training that did not end with its run leaves no result and no exit code 0."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TRAIN = [sys.executable, "-m", "psyche_lightning", "train", "demo", "--twin"]
PATIENCE = 120.0


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Start a node that trains alone for a long time; its folder has the result of an earlier training."""
    folder.mkdir()
    (folder / "result.json").write_text('{"steps": 7}')
    with (folder / "log").open("wb") as output:
        return subprocess.Popen(
            [*TRAIN, "total_steps=100000", "log_every=1", f"node.directory={folder}"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )


def test_an_interrupted_training_has_no_result_and_says_so(tmp_path: Path) -> None:
    codes = {signal.SIGTERM: 143, signal.SIGINT: 130}
    nodes = {number: (tmp_path / number.name, start(tmp_path / number.name)) for number in codes}
    try:
        for number, (folder, process) in nodes.items():
            deadline = time.monotonic() + PATIENCE
            while "step 2/" not in (folder / "log").read_text():
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(number)
        for number, (folder, process) in nodes.items():
            assert process.wait(PATIENCE) == codes[number], (folder / "log").read_text()
            assert not (folder / "result.json").exists()
            assert not list((folder / "checkpoints").glob("step-*"))
    finally:
        for _, process in nodes.values():
            process.kill()
