"""Disks that are full: real processes, real file systems."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 64 MiB."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> Path:
    """Leave no byte on a disk; returns the file that takes the room."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(os.statvfs(disk).f_frsize))
    return filler


def test_a_node_whose_disk_is_full_leaves_and_the_others_go_on(tmp_path: Path, small_disk: Path) -> None:
    with Fleet(tmp_path / "fleet", SETTINGS) as fleet:
        for number in range(3):
            fleet.start(*([f"node.directory={small_disk / 'node'}"] if number == 0 else []))
        fleet.until(lambda found: found["step"] > 10, "10 steps")
        fill(small_disk)
        code, log = fleet.nodes[0].process.wait(120), fleet.log(0)
        del fleet.nodes[0]
        step = fleet.status()["step"]
        found = fleet.until(lambda found: found["step"] > step + 10, "10 more steps of the others")
    assert code == 1
    assert "error: cannot write" in log.splitlines()[-1]
    assert f"{small_disk}/node/" in log.splitlines()[-1]
    assert "No space left on device" in log.splitlines()[-1]
    assert "Traceback" not in log
    assert any(event["kind"] == "left" for event in found["events"])
    assert not any(event["kind"] == "dropped" for event in found["events"])
