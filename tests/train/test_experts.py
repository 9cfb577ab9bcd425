"""The model ``mla`` with experts, from a run of two nodes to a checkpoint in plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.training import train_all
from transformers import AutoModelForCausalLM

from psyche_lightning.cli import main
from psyche_lightning.recipe import load_recipe
from psyche_lightning.recipe.config import Recipe
from psyche_lightning.train.runner import train_recipe

EXPERTS = "n_routed_experts: 8, num_experts_per_tok: 2, moe_intermediate_size: 16, first_k_dense_replace: 0"


def recipe(text: Path, *overrides: str) -> Recipe:
    common = [f"data.config.path={text}", "micro_batch_size=2", "validate_every=0"]
    return load_recipe("demo", [*common, *overrides], twin=True)


def test_two_nodes_agree_on_the_balance(
    text: Path, tmp_path: Path, create_run: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    base = recipe(text)
    fields = ", ".join(f"{name}: {value}" for name, value in base.model.config.items())
    faster = ["optimizer.lr_for={'*e_score_correction_bias': 10}", "k_for={'*e_score_correction_bias': 128}"]
    chosen = recipe(text, f"model.config={{{fields}, {EXPERTS}}}", "optimizer.lr=0.001", *faster)
    url, run = create_run(init_min_clients=2, total_steps=4, global_batch_size_start=8)
    results = train_all([chosen] * 2, url, run, [tmp_path / "0", tmp_path / "1"])
    assert "need other values" not in caplog.text
    assert results[0]["digest"] == results[1]["digest"]
    saved = [load_file(tmp_path / str(number) / "checkpoint" / "model.safetensors") for number in (0, 1)]
    biases = [name for name in saved[0] if name.endswith("e_score_correction_bias")]
    assert len(biases) == base.model.config["num_hidden_layers"] > 0
    for name in biases:
        assert torch.equal(saved[0][name], saved[1][name])
        assert 0.001 < saved[0][name].abs().max() <= 0.0401  # at most four steps of ten times the rate


def test_a_checkpoint_is_exported_generated_from_and_trained_again(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    base = recipe(text)
    fields = ", ".join(f"{name}: {value}" for name, value in base.model.config.items())
    train_recipe(recipe(text, f"model.config={{{fields}, {EXPERTS}}}", "total_steps=2"), directory=tmp_path / "node")
    lines = "optimizer.lr_for={'*e_score_correction_bias': 10} and distro.k_for={'*e_score_correction_bias': 128}"
    assert f"the recipe does not set them: add {lines}, or" in caplog.text
    saved = tmp_path / "node" / "checkpoint"
    assert main(["generate", str(saved), "--prompt", "the", "--max-new-tokens", "3"]) == 0
    exported = tmp_path / "exported"
    assert main(["export", str(saved), "--to", "deepseek_v3", "--output", str(exported)]) == 0
    assert main(["generate", str(exported), "--prompt", "the", "--max-new-tokens", "3"]) == 0
    assert any(".experts.7." in name for name in load_file(exported / "model.safetensors"))
    assert not (exported / "manifest.json").exists()
    auto: Any = AutoModelForCausalLM  # it has no annotations
    ids = torch.arange(30).unsqueeze(0)
    with torch.no_grad():
        ours, theirs = (auto.from_pretrained(folder, local_files_only=True)(ids).logits for folder in (saved, exported))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    again = recipe(text, f"model.path={exported}", "model.config={}", "total_steps=2")
    assert train_recipe(again, directory=tmp_path / "again")["steps"] == 2
