"""The commands of docs/solana.md's walk-through, as its reader types them, on a chain of the test's own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from psyche_lightning_localnet import LocalnetProcess

PAGE = Path(__file__).parents[4] / "docs" / "solana.md"
PSYCHE = ("-m", "psyche_lightning", "solana", "localnet")


def blocks(heading):
    """The shell commands of a section."""
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", section, re.DOTALL)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_walk_through_ends_with_points(tmp_path):
    _, wallets, create, nodes, watch, close, _ = blocks("From nothing to a run on the local chain")
    nodes = "".join(f"{line} > {place}.log 2>&1 &\n" for place, line in enumerate(nodes.splitlines()))
    (tmp_path / "psyche").write_text(f'#!/bin/sh\nexec {sys.executable} -m psyche_lightning "$@"\n')
    (tmp_path / "psyche").chmod(0o755)
    with LocalnetProcess("--slot-ms", "100", command=PSYCHE) as local:
        script = wallets.replace("airdrop 2", f"airdrop 2 --url {local.url}")
        script += create.replace("solana:localnet", f"solana:{local.url}")
        script += f"{nodes}{watch}psyche run points first --json > points\nwait\n{close}psyche run list\n"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PSYCHE")}
        environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-e"], input=script, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=550
        )
    logs = "".join((tmp_path / f"{place}.log").read_text() for place in range(2))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert [row["earned"] for row in json.loads((tmp_path / "points").read_text())] == [50, 50]
    assert "waiting for members" in done.stdout
    assert "SOL came back" in done.stdout
    assert "no runs yet" in done.stdout
