"""A short session of each of the coordinator's fuzzers; long ones are run by hand (``program/README.md``)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from solana_support.native import NATIVE

EXECUTIONS = 20_000


@pytest.mark.slow
@pytest.mark.clang(native=True)
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["fuzz", "fuzz-small"])
def test_the_fuzzer_finds_nothing(name: str, tmp_path: Path) -> None:
    subprocess.run(["make", "-s", "-C", str(NATIVE), f"OUT={tmp_path}", name], check=True)
    options = ["-max_len=24", f"-runs={EXECUTIONS}", "-seed=1", "-print_final_stats=1"]
    done = subprocess.run([tmp_path / name, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-8000:]
    assert f"number_of_executed_units: {EXECUTIONS}" in done.stderr
