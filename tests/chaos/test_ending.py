"""What a node reports that does not end with its run."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from support.fleet import PATIENCE, Fleet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SETTINGS = [
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
    with Fleet(tmp_path, ["total_steps=20", *SETTINGS]) as fleet:
        fleet.start()
        fleet.start()
        assert len(set(fleet.finish().values())) == 1
        late = fleet.start()
        assert wait(fleet, late) == 1
        assert "error: run 'fleet' finished after 20 steps" in fleet.log(late)
        assert not (fleet.place(late) / "result.json").exists()
        assert not list(fleet.place(late).glob("checkpoints/step-*"))


def test_who_is_stopped_leaves_and_the_others_say_for_whom_they_wait(tmp_path: Path) -> None:
    with Fleet(tmp_path, ["total_steps=300", *SETTINGS]) as fleet:
        stops, stays = fleet.start(), fleet.start()
        fleet.until(lambda found: found["step"] > 5, "the first steps")
        fleet.nodes[stops].signal(signal.SIGTERM)
        assert wait(fleet, stops) == 143
        del fleet.nodes[stops]
        assert not (fleet.place(stops) / "result.json").exists()
        fleet.until(lambda found: "it waits for 1 more member. Start more nodes" in fleet.log(stays), "the words")
        fleet.start(number=2)
        assert len(set(fleet.finish().values())) == 1
