"""The twins of recipes for several devices, on two ranks that meet over gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from psyche_lightning.checkpoints.manifest import NAME, Manifest
from psyche_lightning.checkpoints.model import ModelCopy
from psyche_lightning.plugins import load_plugins
from psyche_lightning.train.saving import PREFIX

TRAIN = ("-m", "psyche_lightning", "train")


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *TRAIN, *arguments, "data.config.max_bytes=2000000", "trainer.threads=1"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "inner"), [("consilience-40b", "fsdp"), ("mla-1b", "ddp"), ("mla-8b", "fsdp")])
def test_its_twin_trains_on_two_ranks_and_its_checkpoint_is_one_model(name: str, inner: str, tmp_path: Path) -> None:
    more = ["trainer.devices=2", f"trainer.inner={inner}", "trainer.validate_every=2", "checkpoint.every=3"]
    done = train(tmp_path, name, "--twin", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / f"psyche-{name}"
    found = json.loads((folder / "result.json").read_text())
    assert (found["steps"], found["empty_rounds"]) == (4, 0)
    losses = [*found["loss"]["train"], *found["loss"]["validation"]]
    assert len(losses) == 4
    assert all(5 < loss < 6 for loss in losses), "bytes that it knows nothing of, in nats"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 2, 4]
    manifest = Manifest.parse((folder / "checkpoint" / NAME).read_bytes(), name)
    assert manifest.metadata.step == 4
    saved = load_plugins().models()["mla"]({"path": str(folder / "checkpoint")})
    assert ModelCopy(saved, PREFIX, torch.bfloat16).digest().hex() == manifest.digest, "of whole tensors"
