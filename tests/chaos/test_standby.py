"""A coordinator's machine is lost, and another one takes over from its newest backup: real processes all the way."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from support.fleet import Fleet

from psyche_lightning.cli import main
from psyche_lightning.cli.demo.processes import Child, Processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = [
    "total_steps=1000000",
    "init_min_clients=3",
    "min_clients=2",
    "global_batch_size_start=6",
    "global_batch_size_end=6",
    "waiting_for_members_extra_time=1",
    "overlap=true",
]


def test_a_standby_takes_over_from_the_newest_backup(tmp_path: Path) -> None:
    backup, standby = tmp_path / "standby.backup", tmp_path / "standby"
    with Fleet(tmp_path / "fleet", SETTINGS) as fleet, Processes() as others:
        for _ in range(3):
            fleet.start()
        fleet.until(lambda found: found["step"] > 10, "10 steps")
        command = ["coordinator", "backup", str(backup), "--coordinator", fleet.url, "--every", "5"]
        copying = others.add(Child("backup", command, tmp_path / "backup.log"))
        first = fleet.until(lambda _: backup.exists(), "a backup")
        before = fleet.until(lambda found: found["step"] > first["step"] + 10, "10 more steps")

        fleet.coordinator.signal(signal.SIGKILL)
        fleet.coordinator.process.wait()
        copying.signal(signal.SIGTERM)
        assert main(["coordinator", "restore", str(backup), "--dir", str(standby)]) == 0
        # It answers where the lost one did: the address moves, by DNS or as a virtual one.
        fleet.coordinator.restart(["coordinator", "--port", fleet.url.rpartition(":")[2], "--dir", str(standby)])

        after = fleet.until(lambda found: found["step"] > before["step"] + 10, "10 further steps", 120)
        assert after["epoch"] == before["epoch"]
        assert not [event for event in after["events"] if event["kind"] in ("dropped", "left")]
        digests = fleet.conclude()
        assert len(digests) == 3
        assert len(set(digests.values())) == 1
        assert fleet.ledger().problems == []
