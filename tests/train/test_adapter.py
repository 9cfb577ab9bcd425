"""Adapters of ``peft``: trained, exchanged and saved alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from support.training import train_all
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from psyche_lightning.cli import main
from psyche_lightning.errors import ConfigError
from psyche_lightning.recipe import load_recipe
from psyche_lightning.recipe.config import Recipe
from psyche_lightning.recipe.estimate import estimate
from psyche_lightning.train.runner import train_recipe

ADAPTER = "checkpoint/adapter_model.safetensors"
IDS = torch.arange(40)[None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=256, max_position_embeddings=64, num_key_value_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def recipe(tmp_path: Path, base: Path) -> Recipe:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    loaded = load_recipe("demo", [f"data.config.path={tmp_path / 'text.txt'}", "lr=0.05"], twin=True)
    model = replace(
        loaded.model,
        name="hf",
        config={},
        path=str(base),
        adapter={"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0},
    )
    loaded = replace(loaded, model=model, checkpoint=replace(loaded.checkpoint, every=2))
    return loaded


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(IDS).logits
    return found


def test_an_adapter_alone_is_trained_and_saved(base: Path, tmp_path: Path) -> None:
    result = train_recipe(recipe(tmp_path, base), directory=tmp_path / "node")
    assert result["loss"]["train"][-1] < result["loss"]["train"][0]
    folder = tmp_path / "node" / "checkpoint"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sorted({name.rpartition(".lora_")[2] for name in tensors}) == ["A.weight", "B.weight"]
    assert len(tensors) == 2 * 2 * 2
    assert not (folder / "model.safetensors").exists()
    before = logits(AutoModelForCausalLM.from_pretrained(base))
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(logits(loaded), before)
    assert torch.equal(logits(loaded.unload()), before)  # the model's own parameters are as they were


def test_an_adapter_does_not_save_resized_embeddings(base: Path, tmp_path: Path) -> None:
    plain = recipe(tmp_path, base)
    resized = replace(plain, model=replace(plain.model, config={"vocab_size": 300}))
    with pytest.raises(ConfigError, match=r"resizes the embeddings, which an adapter .* does not save"):
        train_recipe(resized, directory=tmp_path / "node")


def test_training_an_adapter_goes_on_from_its_checkpoint(base: Path, tmp_path: Path) -> None:
    first = recipe(tmp_path, base)
    whole = train_recipe(first, directory=tmp_path / "whole")
    half = replace(first, run=replace(first.run, total_steps=2))
    train_recipe(half, directory=tmp_path / "half")
    # Momentum is not part of a checkpoint, so the second half differs; a node that resumes twice does not.
    resumed = replace(first, checkpoint=replace(first.checkpoint, resume=str(tmp_path / "half" / "checkpoints")))
    ends = [train_recipe(resumed, directory=tmp_path / name)["digest"] for name in ("a", "b")]
    assert ends[0] == ends[1] != whole["digest"]
    wrong = replace(resumed, checkpoint=replace(resumed.checkpoint, resume=str(tmp_path / "half" / "checkpoints")))
    with pytest.raises(ConfigError, match="total_steps"):
        train_recipe(replace(wrong, run=replace(wrong.run, total_steps=2)), directory=tmp_path / "c")


def test_nodes_of_a_run_end_with_equal_adapters(
    base: Path, tmp_path: Path, create_run: Callable[..., tuple[str, str]]
) -> None:
    url, run = create_run(init_min_clients=2, total_steps=4, global_batch_size_start=4)
    results = train_all([recipe(tmp_path, base)] * 2, url, run, [tmp_path / "0", tmp_path / "1"])
    assert results[0]["digest"] == results[1]["digest"]
    saved = [(tmp_path / name / ADAPTER).read_bytes() for name in ("0", "1")]
    assert saved[0] == saved[1]
    assert results[0]["payload_bytes_computed"] < 400  # signs of the adapter alone
    size = estimate(recipe(tmp_path, base))  # as --dry-run shows it
    assert size.payload == results[0]["payload_bytes_computed"]
    assert size.trainable == sum(tensor.numel() for tensor in load_file(tmp_path / "0" / ADAPTER).values())
    assert size.memory["gradients"] == 4 * size.trainable
    # Nobody sent the model itself: both have it.
    assert results[0]["socket_bytes_up"] < sum(file.stat().st_size for file in base.glob("*.safetensors"))


def test_psyche_generate_takes_an_adapter(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_recipe(recipe(tmp_path, base), directory=tmp_path / "node")
    capsys.readouterr()
    folder = str(tmp_path / "node" / "checkpoint")
    assert main(["generate", folder, "--prompt", "the quick", "--max-new-tokens", "4", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("the quick")


@pytest.mark.parametrize(
    ("adapter", "text"),
    [
        ({"rank": 4}, r"has no field 'rank'"),
        ({"type": "lorra"}, r"type is 'lorra'\. Did you mean 'lora'\?"),
        ({"target_modules": ["nothing"]}, r"model\.adapter cannot be made: Target modules"),
    ],
)
def test_bad_adapters_are_explained(adapter: dict[str, Any], text: str, base: Path, tmp_path: Path) -> None:
    wanted = recipe(tmp_path, base)
    with pytest.raises(ConfigError, match=text):
        train_recipe(replace(wanted, model=replace(wanted.model, adapter=adapter)), directory=tmp_path / "node")


def test_a_fresh_model_has_nothing_to_adapt(base: Path, tmp_path: Path) -> None:
    wanted = recipe(tmp_path, base)
    fresh = replace(wanted.model, path=None, config={"model_type": "llama", "vocab_size": 256, "hidden_size": 32})
    with pytest.raises(ConfigError, match=r"model\.path"):
        train_recipe(replace(wanted, model=fresh), directory=tmp_path / "node")
