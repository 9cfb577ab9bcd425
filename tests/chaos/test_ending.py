"""What a node reports that does not end with its run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support.fleet import PATIENCE, Fleet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SETTINGS = [
    "total_steps=20",
    "init_min_clients=2",
    "min_clients=2",
    "global_batch_size_start=4",
    "global_batch_size_end=4",
]


def wait(fleet: Fleet, number: int) -> int:
    """Wait for a node's exit code."""
    deadline = time.monotonic() + PATIENCE
    while (code := fleet.nodes[number].code) is None:
        assert time.monotonic() < deadline, fleet.log(number)
        time.sleep(0.2)
    return code


def test_who_comes_to_a_finished_run_fails_and_leaves_no_result(tmp_path: Path) -> None:
    with Fleet(tmp_path, SETTINGS) as fleet:
        fleet.start()
        fleet.start()
        assert len(set(fleet.finish().values())) == 1
        late = fleet.start()
        assert wait(fleet, late) == 1
        assert "error: run 'fleet' finished after 20 steps" in fleet.log(late)
        assert not (fleet.place(late) / "result.json").exists()
        assert not list(fleet.place(late).glob("checkpoints/step-*"))
