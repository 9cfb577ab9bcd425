"""The coordinator's wall clock is set, as NTP does: real processes, a faked wall clock."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support.fleet import Fleet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LIBRARY = next(Path("/usr/lib").rglob("libfaketime.so.1"), None)
SETTINGS = [
    "total_steps=1000000",
    "init_min_clients=2",
    "min_clients=2",
    "epoch_time=15",
    "warmup_time=12",
    "cooldown_time=10",
    "max_round_train_time=10",
    "waiting_for_members_extra_time=1",
    "global_batch_size_start=4",
    "global_batch_size_end=4",
]


@pytest.mark.skipif(LIBRARY is None, reason="there is no faketime: apt-get install faketime")
@pytest.mark.parametrize("step", ["-3600", "+3600"])
def test_the_coordinators_clock_is_set_by_an_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    stamp = tmp_path / "clock"
    stamp.write_text("+0")
    with monkeypatch.context() as only:  # for the coordinator alone
        only.setenv("LD_PRELOAD", str(LIBRARY))
        only.setenv("FAKETIME_TIMESTAMP_FILE", str(stamp))
        only.setenv("FAKETIME_NO_CACHE", "1")
        only.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        only.setenv("DONT_FAKE_MONOTONIC", "1")
        fleet = Fleet(tmp_path / "fleet", SETTINGS)
        fleet.__enter__()
    try:
        for _ in range(2):
            fleet.start()
        before = fleet.until(lambda found: found["step"] > 5, "steps")
        stamp.write_text(step)
        began = time.monotonic()
        after = fleet.until(lambda found: found["epoch"] > before["epoch"], "the next epoch", 60)
        assert time.monotonic() - began > 2  # it did not end because of the hour
        assert f"{before['epoch']} ends: its time is over" in " ".join(event["text"] for event in after["events"])
        fleet.admin.pause(fleet.run)
        fleet.until(lambda found: found["phase"] == "paused", "the pause", 60)
        fleet.admin.resume(fleet.run)
        resumed = fleet.until(lambda found: found["phase"] == "round_train", "rounds after the pause", 60)
        fleet.restart_coordinator()
        fleet.until(lambda found: found["step"] > resumed["step"] + 3, "rounds after the restart", 60)
        assert fleet.status()["events"][-1]["time"] - time.time() == pytest.approx(float(step), abs=60)
    finally:
        fleet.__exit__(None, None, None)
