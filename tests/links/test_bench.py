"""The benchmark over shaped links, on a small model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        os.geteuid() != 0 or not os.path.exists("/dev/net/tun") or shutil.which("ip") is None,
        reason="network namespaces and TUN devices need root and iproute2",
    ),
]


def test_all_methods_are_measured_over_the_same_links(tmp_path: Path) -> None:
    """Two nodes train in each way, and under DDP; namespaces and relay are gone afterwards."""
    figures, image = tmp_path / "links.json", tmp_path / "links.png"
    options = ["--nodes", "2", "--recipe", "demo", "--blocks", "1", "--steps", "4", "--ddp-limit", "60"]
    options += ["--local-steps", "2"]
    command = [sys.executable, str(HERE / "bench.py"), *options, "--json", str(figures), "--png", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    overlap, without, local, ddp = json.loads(figures.read_text())["outcomes"]
    assert all(one["tokens_per_second"] > 0 for one in (overlap, without, local, ddp))
    # 7.1 MB of fp32 gradients a step in the one case, a payload of 3.4 kB and messages in the others; with local steps
    # one of 87 kB for two steps.
    assert ddp["bytes_up"] > 7e6 > 500 * max(overlap["bytes_up"], without["bytes_up"]) > 500 * 3.4e3
    # A window of two rounds has at least one payload whole: of 43 kB a step, half.
    assert 2 * max(overlap["bytes_up"], without["bytes_up"]) < local["bytes_up"] < 7e6 / 20
    assert overlap["unshaped"] > 0
    assert len(overlap["shares"]) == 1
    assert image.read_bytes()[:4] == b"\x89PNG"
    assert "links-" not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout


def test_what_a_killed_measurement_left_goes_when_the_next_one_begins() -> None:
    program = (
        "import subprocess, sys, time\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "from relay import Link, network\n"
        "with network([Link()] * 2) as net:\n"
        "    inside = subprocess.Popen([*net.machines[0].inside, 'sleep', '300'], start_new_session=True)\n"
        "    print(net.machines[0].name, inside.pid, flush=True)\n"
        "    sys.stdin.read()\n"
    )

    def measure() -> tuple[subprocess.Popen[str], str, int]:
        process = subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True)
        assert process.stdout is not None
        name, number = process.stdout.readline().split()
        return process, name, int(number)

    def runs(process: int) -> bool:
        stat = Path(f"/proc/{process}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    def namespaces() -> str:
        return subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout

    killed, left, alive = measure()
    killed.kill()
    killed.wait()
    assert left in namespaces()
    assert runs(alive)
    following, name, number = measure()
    assert left not in namespaces()
    assert name in namespaces()
    assert not runs(alive)
    os.kill(number, 9)
    following.communicate("")
    assert name not in namespaces()
