"""Other people's clients, from Node.js, against the local chain with our programs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

localnet = pytest.importorskip(
    "psyche_lightning_localnet", reason="the local chain is not installed: pip install psyche-lightning-localnet"
)

FOLDER = Path(__file__).parent
NODE = shutil.which("node")


def _ready() -> bool:
    """Whether there is Node.js 20 or later, and the packages."""
    if NODE is None or not (FOLDER / "node_modules").is_dir():
        return False
    version = subprocess.run([NODE, "--version"], capture_output=True, text=True, check=False).stdout
    return int(version.strip().lstrip("v").partition(".")[0] or 0) >= 20


@pytest.mark.slow
@pytest.mark.skipif(
    not _ready(),
    reason="install Node.js 20 or later, and the packages of these tests: cd tests/clients && npm ci",
)
def test_clients_from_node() -> None:
    command = [str(NODE), "--test", "--test-force-exit", "--test-timeout", "120000", "--test-reporter", "spec"]
    # A blockhash lasts for 150 slots: 15 seconds, for a machine with much else to do.
    with localnet.LocalnetProcess(
        "--slot-ms", "100", command=("-m", "psyche_lightning", "solana", "localnet")
    ) as chain:
        found = {**os.environ, "LOCALNET_URL": chain.url, "LOCALNET_WS_URL": chain.ws_url}
        done = subprocess.run(command, cwd=FOLDER, env=found, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"▶ {client}" in done.stdout for client in ("anchor", "kit", "spl-token", "web3.js")), done.stdout
