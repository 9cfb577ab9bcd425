from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from psyche_lightning.cli import main


@pytest.mark.slow
def test_a_whole_run_over_iroh(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = ["demo", "--transport", "iroh", "--nodes", "3", "--rounds", "12", "--json", str(figures)]
    done = subprocess.run(
        [sys.executable, "-m", "psyche_lightning", *command, "--keep", str(tmp_path / "demo")],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads(figures.read_text())
    assert told["equal_digests"]
    assert len(told["nodes"]) == 3
    for node in told["nodes"]:
        assert node["socket_bytes_up"] > node["payload_bytes_up"] > 0


def test_its_speed_can_be_measured(tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    command = ["bench", "transport", "--transport", "iroh", "--megabytes", "2", "--repeats", "1", "--json", str(file)]
    assert main(command) == 0
    _, speed = json.loads(file.read_text())["transports"]
    assert speed["name"] == "iroh"
    assert speed["best"] > 0
    assert 1 < speed["overhead"] < 1.1
