"""Disks that are full: real processes, real file systems."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.disk import small_disk
from support.fleet import Fleet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = [
    "total_steps=1000000",
    "init_min_clients=3",
    "min_clients=2",
    "global_batch_size_start=6",
    "global_batch_size_end=6",
    "waiting_for_members_extra_time=1",
]


def test_a_node_whose_disk_is_full_leaves_and_the_others_go_on(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small disk") as disk, Fleet(tmp_path / "fleet", SETTINGS) as fleet:
        for number in range(3):
            fleet.start(*([f"node.directory={disk.path / 'node'}"] if number == 0 else []))
        fleet.until(lambda found: found["step"] > 10, "10 steps")
        disk.fill()
        code, log = fleet.ended(0), fleet.log(0)
        del fleet.nodes[0]
        step = fleet.status()["step"]
        found = fleet.until(lambda found: found["step"] > step + 10, "10 more steps of the others")
    assert code == 1
    assert "error: cannot write" in log.splitlines()[-1]
    assert f"{disk.path}/node/" in log.splitlines()[-1]
    assert "No space left on device" in log.splitlines()[-1]
    assert "Traceback" not in log
    assert any(event["kind"] == "left" for event in found["events"])
    assert not any(event["kind"] == "dropped" for event in found["events"])
