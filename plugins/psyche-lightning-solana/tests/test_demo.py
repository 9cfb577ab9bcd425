"""``psyche demo --coordinator solana``, as people type it."""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("nodes", [2, 3])
def test_it_pauses_and_of_three_nodes_one_is_killed(nodes, tmp_path):
    command = ["demo", "--coordinator", "solana", "--nodes", str(nodes), "--rounds", "24", "--json", "figures.json"]
    done = subprocess.run(
        [sys.executable, "-m", "psyche_lightning", *command], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    chain = figures["solana"]
    assert chain["killed"] == ("node 2" if nodes == 3 else None)
    assert len(figures["nodes"]) == 2
    assert len({node["digest"] for node in figures["nodes"]}) == 1
    assert {name: chain["paused"][name] for name in ("step", "digest")} == {
        name: chain["resumed"][name] for name in ("step", "digest")
    }
    assert [row["step"] for row in figures["history"]] == list(range(1, 25))
    senders = {
        row["wallet"] for row in chain["transactions"] if (row["instruction"], row["result"]) == ("witness", "ok")
    }
    assert senders == {f"node {number}" for number in range(nodes)}
