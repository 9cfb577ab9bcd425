"""``psyche join``: a node that knows nothing but the link."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest


def psyche(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "psyche_lightning", *arguments]


@pytest.mark.slow
def test_two_nodes_train_from_empty_folders(tmp_path: Path) -> None:
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    coordinator = subprocess.Popen(
        psyche("coordinator", "--port", "0", "--dir", str(tmp_path / "runs")),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=quiet, cwd=tmp_path,
    )  # fmt: skip
    try:
        assert coordinator.stdout is not None
        found = re.search(r"http://[0-9.:]+", coordinator.stdout.readline())
        assert found
        made = subprocess.run(
            psyche("run", "create", "lan", "demo", "--twin", "init_min_clients=2", "--coordinator", found[0]),
            capture_output=True, text=True, env=quiet, cwd=tmp_path, timeout=100, check=True,
        )  # fmt: skip
        link = re.search(r"on each node: psyche join '(.+)'", made.stdout)
        assert link
        nodes = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            region = ("--region", "eu-west") if name == "a" else ()
            command = psyche("join", link[1], "trainer.accelerator=cpu", *region)
            nodes.append(subprocess.Popen(command, env=quiet, cwd=tmp_path / name, stdout=subprocess.DEVNULL))
        assert [node.wait(200) for node in nodes] == [0, 0]
        with urllib.request.urlopen(f"{found[0]}/v1/runs/lan", timeout=30) as answer:
            status = json.load(answer)
    finally:
        coordinator.kill()
        coordinator.wait()
        coordinator.stdout.close()
    results = [json.loads((tmp_path / name / "psyche-lan" / "result.json").read_text()) for name in ("a", "b")]
    regions = {node["signer"]: node["region"] for node in (*status["clients"], *status["exited"])}
    assert [regions[result["id"]] for result in results] == ["eu-west", None]
    assert results[0]["digest"] == results[1]["digest"]
    assert results[0]["id"] != results[1]["id"]
    assert [result["steps"] for result in results] == [4, 4]
