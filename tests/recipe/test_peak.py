"""The memory that a process takes is what the estimate says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import muon, run

SHARED = (
    "distro.k=4", "optimizer.name=adamw", "optimizer.clip_grad_norm=null", "data.seq_len=8", "micro_batch_size=1",
    "global_batch_size_start=1", "global_batch_size_end=1", "trainer.precision=bf16-true", "trainer.masters=split",
    "trainer.delta=bfloat16", "trainer.gradients=streamed",
)  # fmt: skip
LARGE = (
    "model.config.hidden_size=768", "model.config.intermediate_size=2048", "model.config.num_hidden_layers=20",
    "model.config.num_attention_heads=6", "model.config.kv_lora_rank=192",
)  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, which tells a process's peak"),
]
# What is freed goes back to the system at once, so that only what is held counts.
SURROUNDINGS = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}


def test_a_lean_node_s_peak_is_its_estimate(tmp_path: Path) -> None:
    script, lists = Path(__file__).with_name("peak.py"), [json.dumps(SHARED), json.dumps(SHARED + LARGE)]
    done = subprocess.run(
        [sys.executable, str(script), *lists],
        cwd=tmp_path,
        env={**os.environ, **SURROUNDINGS},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["parameters"] > 100_000_000
    assert found["peak"] == pytest.approx(sum(found["memory"].values()), rel=0.05), found
    assert found["write"] == pytest.approx(found["copied"], rel=0.05), found
    assert found["peak"] < 7 * found["parameters"]


def test_muon_s_work_on_matrices_that_devices_divide_is_in_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SURROUNDINGS.items():
        monkeypatch.setenv(name, value)
    for found in run(muon.peaks):
        for estimated, peak in found:
            assert peak == pytest.approx(estimated, rel=0.05), found
