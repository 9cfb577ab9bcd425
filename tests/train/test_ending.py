"""A training that did not end with its run leaves no result and no exit code 0."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from psyche_lightning.errors import UnfinishedError
from psyche_lightning.recipe import load_recipe
from psyche_lightning.train.module import CausalModule
from psyche_lightning.train.runner import train_recipe

SCRIPT = Path(__file__).with_name("stopped_script.py")
TRAIN = [sys.executable, "-m", "psyche_lightning", "train", "demo", "--twin"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
PATIENCE = 240.0


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Start a node that trains alone for a long time; its folder has the result of an earlier training."""
    folder.mkdir()
    (folder / "result.json").write_text('{"steps": 7}')
    with (folder / "log").open("wb") as output:
        return subprocess.Popen(
            [*TRAIN, "total_steps=100000", "log_every=1", f"node.directory={folder}"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
        )


def test_an_interrupted_training_is_saved_has_no_result_and_goes_on(tmp_path: Path) -> None:
    codes = {signal.SIGTERM: 143, signal.SIGINT: 130}
    nodes = {number: (tmp_path / number.name, start(tmp_path / number.name)) for number in codes}
    try:
        for number, (folder, process) in nodes.items():
            deadline = time.monotonic() + PATIENCE
            while "step 2/" not in (folder / "log").read_text():
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(number)
        for number, (folder, process) in nodes.items():
            assert process.wait(PATIENCE) == codes[number], (folder / "log").read_text()
            assert not (folder / "result.json").exists()
            (saved,) = (folder / "checkpoints").glob("step-*")
            step = int(saved.name.removeprefix("step-"))
            assert step >= 2
            log = (folder / "log").read_text()
            assert f"stopped after step {step} of 100000" in log
            assert f"checkpoint.resume={folder / 'checkpoints'}" in log
            again = [*TRAIN, f"total_steps={step + 1}", f"node.directory={folder}", f"checkpoint.resume={saved.parent}"]
            ended = subprocess.run(again, capture_output=True, text=True, timeout=PATIENCE, env=ENVIRONMENT)
            assert ended.returncode == 0, ended.stdout + ended.stderr
            assert json.loads((folder / "result.json").read_text())["steps"] == step + 1
    finally:
        for _, process in nodes.values():
            process.kill()


@pytest.mark.slow
def test_ranks_that_divide_a_model_stop_at_a_signal_and_go_on_exactly(tmp_path: Path) -> None:
    """Whole updates are sent and nothing is kept of them, so that a checkpoint is all that a run has."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    given = ["demo", "--twin", "trainer.devices=2", "trainer.inner=fsdp", f"data.config.path={tmp_path / 'text.txt'}"]
    given += ["micro_batch_size=2", "validate_every=0", "decay=0", "optimizer.name=adamw"]
    given += ["schedule.kind=constant", "schedule.warmup_steps=0", "schedule.final_lr=null", "total_steps=5"]

    def train(name: str, *more: str, number: int = 0, at: int = 0) -> subprocess.Popen[str]:
        command = [sys.executable, str(SCRIPT), str(number), str(at), *given, f"node.directory={tmp_path / name}"]
        return subprocess.Popen(
            [*command, *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
        )

    def end(process: subprocess.Popen[str], code: int) -> str:
        log, _ = process.communicate(timeout=2 * PATIENCE)
        assert process.returncode == code, log
        return log

    whole, first = train("whole"), train("node", number=signal.SIGTERM, at=2)
    assert "stopped after step 2 of 5" in end(first, 143)
    end(whole, 0)
    resume = f"checkpoint.resume={tmp_path / 'node' / 'checkpoints'}"
    # A Ctrl-C in its first round would end it at once, as there is nothing to save yet.
    assert "stopped after step 4 of 5" in end(train("node", resume, number=signal.SIGINT, at=2), 130)
    assert not (tmp_path / "node" / "result.json").exists()
    end(train("node", resume), 0)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "node")]
    assert [found["rounds"] for found in results] == [5, 1]
    assert results[0]["digest"] == results[1]["digest"]


@pytest.mark.parametrize("good", [0, 2])
def test_a_loss_that_is_not_a_number_is_null_and_a_training_without_any_other_fails(
    good: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = CausalModule.training_step
    seen = iter(range(100))

    def training_step(module: CausalModule, batch: Any, batch_idx: int) -> torch.Tensor:
        return step(module, batch, batch_idx) * (1.0 if next(seen) < good else math.nan)

    monkeypatch.setattr(CausalModule, "training_step", training_step)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    given = [f"data.config.path={tmp_path / 'text.txt'}", "total_steps=4", "validate_every=0", "micro_batch_size=64"]
    recipe = load_recipe("demo", given, twin=True)
    if good:
        train_recipe(recipe, directory=tmp_path / "node")
    else:
        with pytest.raises(UnfinishedError, match="nothing was trained"):
            train_recipe(recipe, directory=tmp_path / "node")
    lines = (tmp_path / "node" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert len(rows) == good
    assert (tmp_path / "node" / "result.json").exists() == bool(good)
    assert (tmp_path / "node" / "checkpoint").exists() == bool(good)
