"""``psyche join`` on another machine: a network namespace with an empty folder and nothing but the link."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # the machines are those of the benchmark beside this file

from bench import PORT, wait_for
from relay import Link, network

from psyche_lightning.cli.demo.processes import Child, Processes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        os.geteuid() != 0 or not os.path.exists("/dev/net/tun") or shutil.which("ip") is None,
        reason="network namespaces and TUN devices need root and iproute2",
    ),
]


def rows_of(folder: Path) -> list[dict[str, float]]:
    path = folder / "psyche-far" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_machine_that_has_nothing_but_the_link_trains_and_goes_on(tmp_path: Path) -> None:
    with network([Link(None, 0.02, 0.0)] * 2) as net, Processes() as processes:
        own, other = net.machines
        log, runs, home = tmp_path / "log", tmp_path / "runs", tmp_path / "elsewhere"
        serve = ["coordinator", "--host", own.address, "--port", str(PORT), "--dir", str(runs)]
        coordinator = processes.add(Child("coordinator", serve, log, inside=own.inside))
        coordinator.url()
        keyed = partial(_found, coordinator, r"--coordinator '(\S+)'")
        wait_for("line with the coordinator's key", processes, keyed, 30)
        there = ["--coordinator", keyed(), "--token-file", str(runs / "owner.token")]
        create = ["run", "create", "far", "demo", "--twin", "total_steps=4000", *there]
        made = processes.add(Child("run", create, log, inside=own.inside))
        assert made.process.wait() == 0, made.tail()
        link = _found(made, r"psyche join '(\S+)'")
        home.mkdir()
        (home / "link").write_text(link)
        # Only its options lead anywhere: the link's file, this machine's address, and its folder.
        join = ["join", f"@{home / 'link'}", "trainer.accelerator=cpu"]
        join += [f"node.directory={home / 'psyche-far'}", f"node.transport_options.host={other.address}"]
        steps: list[float] = []
        node = Child("node", join, log, inside=other.inside)
        for again in (False, True):
            begun, started = len(rows_of(home)), time.monotonic()
            if again:
                node.restart(join)
            else:
                processes.add(node)
            wait_for("step", processes, partial(_more, home, begun + 3), 300)
            print(f"three steps after {time.monotonic() - started:.1f} s")
            node.process.terminate()
            assert node.process.wait(60) in (0, 143), node.tail()
            steps.append(max(row["step"] for row in rows_of(home)))
        assert steps[1] > steps[0] > 0


def _found(child: Child, pattern: str) -> str:
    found = re.search(pattern, child.tail(100))
    return found[1] if found else ""


def _more(home: Path, number: int) -> bool:
    return len(rows_of(home)) >= number
