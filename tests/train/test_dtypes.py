"""The dtypes of a recipe: what is trained in bfloat16, and what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from psyche_lightning.builtin.models import hf
from psyche_lightning.checkpoints.model import ModelCopy
from psyche_lightning.plugins import load_plugins
from psyche_lightning.recipe import load_recipe
from psyche_lightning.recipe.config import Recipe
from psyche_lightning.train.module import CausalModule
from psyche_lightning.train.runner import train_recipe

LLAMA = (
    "{model_type: llama, vocab_size: 257, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, "
    "num_attention_heads: 2}"
)


def recipe(text: Path, *overrides: str) -> Recipe:
    common = ["model.name=hf", f"data.config.path={text}", "data.seq_len=192", "total_steps=2", "validate_every=2"]
    return load_recipe("demo", [*common, "micro_batch_size=4", "validation_samples=2", *overrides], twin=True)


def loaded(folder: Path) -> Any:
    auto: Any = AutoModelForCausalLM  # it has no annotations
    return auto.from_pretrained(folder / "checkpoint", local_files_only=True)


@pytest.mark.parametrize("choice", ["model.dtype=bfloat16", "trainer.precision=bf16-true"])
def test_the_saved_checkpoint_computes_as_the_trained_model_did(text: Path, tmp_path: Path, choice: str) -> None:
    chosen = recipe(text, f"model.config={LLAMA}", choice)
    result = train_recipe(chosen, directory=tmp_path / "node")
    model = loaded(tmp_path / "node")
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    provider = load_plugins().data_providers()[chosen.data.name](chosen.data.options, seed=chosen.run.seed)
    samples = provider.validation()[:2]
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        loss = CausalModule(model, chosen.optimizer, chosen.schedule).training_step(batch, 0)
    assert float(loss) == pytest.approx(result["loss"]["validation"][-1], rel=1e-6)


@pytest.mark.parametrize(
    ("override", "dtype"),
    [
        ("model.config={}", "bfloat16"),
        ("save_dtype=float32", "float32"),
        ("model.config={fresh: true}", "float32"),
    ],
)
def test_a_source_in_bfloat16_stays_one_on_disk(text: Path, tmp_path: Path, override: str, dtype: str) -> None:
    fields = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    source = hf({"model_type": "llama", "num_attention_heads": 2, **fields})
    ModelCopy(source, dtype=torch.bfloat16).save(tmp_path / "source")
    chosen = recipe(text, f"model.path={tmp_path / 'source'}", "model.config={}", override)
    result = train_recipe(chosen, directory=tmp_path / "n")
    assert json.loads((tmp_path / "n" / "checkpoint" / "config.json").read_text())["dtype"] == dtype
    assert {str(value.dtype) for value in loaded(tmp_path / "n").parameters()} == {f"torch.{dtype}"}
    manifest = json.loads((tmp_path / "n" / "checkpoint" / "manifest.json").read_text())
    assert (manifest["digest"] == result["digest"]) == (dtype == "float32")  # it is trained in float32
