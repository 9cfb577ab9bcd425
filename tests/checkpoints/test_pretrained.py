"""A checkpoint that does not give all of a model is refused."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from psyche_lightning.builtin.models import hf
from psyche_lightning.errors import CheckpointError

NORM, PROJECTION = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
Change = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture
def changed(saved: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """Gives a copy of the saved model with other tensors."""

    def make(change: Change) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(saved, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def test_a_missing_tensor_is_named(changed: Callable[[Change], Path]) -> None:
    folder = changed(lambda tensors: [tensors.pop(name) for name in (NORM, PROJECTION)][:0])
    text = f"it lacks 2 tensors: {PROJECTION}, {NORM}. These would begin as random numbers"
    with pytest.raises(CheckpointError, match=re.escape(text)):
        hf({"path": str(folder)})
    assert hf({"path": str(folder), "fresh": True}).training


def test_a_tensor_of_another_shape_is_named(changed: Callable[[Change], Path]) -> None:
    folder = changed(lambda tensors: tensors.update({NORM: torch.ones(9)}))
    with pytest.raises(CheckpointError, match=re.escape(f"1 tensor of another shape: {NORM} [9], not [16]")):
        hf({"path": str(folder)})


def test_fields_that_change_the_shape_are_named_too(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it lacks 9 tensors: model\.layers\.1\..*, and 4 more"):
        hf({"path": str(saved), "num_hidden_layers": 2})


def test_a_tensor_that_is_not_used_is_said(changed: Callable[[Change], Path], caplog: pytest.LogCaptureFixture) -> None:
    folder = changed(lambda tensors: tensors.update(extra=torch.ones(3)))
    with caplog.at_level(logging.WARNING):
        hf({"path": str(folder)})
    said = [record for record in caplog.records if "extra" in record.getMessage()]
    assert [record.name for record in said] == ["psyche_lightning.checkpoints.pretrained"]
    assert "has 1 tensor that LlamaForCausalLM does not use" in said[0].getMessage()
