"""``psyche train``: a recipe's CPU twin from its text to its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import train_all
from transformers import AutoModelForCausalLM

from psyche_lightning.errors import CheckpointError, ConfigError
from psyche_lightning.recipe import load_recipe
from psyche_lightning.recipe.config import ModelSection, Recipe
from psyche_lightning.train.module import ProviderDataset
from psyche_lightning.train.runner import check_parameters, train_recipe

Make = Callable[..., Any]


@pytest.fixture
def recipe(text: Path) -> Recipe:
    loaded = load_recipe("demo", [f"data.config.path={text}", "micro_batch_size=2"], twin=True)
    trainer = replace(loaded.trainer, validate_every=2)
    return replace(loaded, trainer=trainer, checkpoint=replace(loaded.checkpoint, every=3))


def test_alone_it_leaves_metrics_checkpoints_and_a_result(recipe: Recipe, tmp_path: Path) -> None:
    result = train_recipe(recipe, directory=tmp_path / "node")
    assert result == json.loads((tmp_path / "node" / "result.json").read_text())
    assert result["steps"] == 4
    assert len(bytes.fromhex(result["digest"])) == len(bytes.fromhex(result["id"])) == 32
    rows = [json.loads(line) for line in (tmp_path / "node" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 2, 4]
    validation = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert result["loss"]["validation"] == [validation[0], validation[-1]]
    assert validation[-1] < validation[0]
    assert [row["lr"] for row in rows if "lr" in row] == [recipe.schedule(step) for step in (1, 2, 3, 4)]
    for name in ("checkpoints/step-000003", "checkpoint"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "node" / name, local_files_only=True)
        assert sum(parameter.numel() for parameter in model.parameters()) > 1000
    assert not list((tmp_path / "node").glob("*.new"))


def test_the_same_seed_gives_the_same_bytes(recipe: Recipe, tmp_path: Path) -> None:
    digests = [train_recipe(recipe, directory=tmp_path / name)["digest"] for name in ("a", "b")]
    other = replace(recipe, run=replace(recipe.run, seed=1))
    assert digests[0] == digests[1] != train_recipe(other, directory=tmp_path / "c")["digest"]


def test_dropout_is_that_of_the_step(recipe: Recipe, tmp_path: Path) -> None:
    """A node that comes back trains its share as one that was never away."""
    fields = {"model_type": "gpt2", "vocab_size": 256, "n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.5}
    kept = replace(recipe.checkpoint, every=2)
    whole = replace(recipe, model=ModelSection("hf", fields), checkpoint=kept)
    train_recipe(whole, directory=tmp_path / "whole")
    resume = str(tmp_path / "whole" / "checkpoints" / "step-000002")
    train_recipe(replace(whole, checkpoint=replace(kept, resume=resume)), directory=tmp_path / "again")
    losses = []
    for name in ("whole", "again"):
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in rows if row["step"] == 3 and "loss" in row])
    assert losses[0] == losses[1] != []


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_two_nodes_make_local_steps_of_the_recipe_s_optimizer(
    recipe: Recipe, text: Path, tmp_path: Path, create_run: Make, name: str
) -> None:
    given = [f"data.config.path={text}", "micro_batch_size=2", "init_min_clients=2", f"optimizer.name={name}"]
    given += ["local_steps=2", "scale=1.5", "decay=0.95", "chunk=32", "k=32", "total_steps=6"]
    given += ["global_batch_size_start=8", "global_batch_size_end=8"]
    local = load_recipe("demo", [*given, "trainer.validate_every=3"], twin=True)
    url, run = create_run(init_min_clients=2, min_clients=1)
    results = train_all([local, local], url, run, [tmp_path / "0", tmp_path / "1"])
    assert all(isinstance(result, dict) for result in results), results
    assert results[0]["digest"] == results[1]["digest"]
    assert [result["steps"] for result in results] == [6, 6]
    first, last = results[0]["loss"]["validation"]
    assert last < first - 0.1


@pytest.mark.parametrize(("fixed", "steps"), [({"total_steps": 6}, 6), ({}, 4)])
def test_a_run_ends_where_its_coordinator_says(
    fixed: dict[str, int], steps: int, recipe: Recipe, tmp_path: Path, create_run: Make
) -> None:
    """Its owner may change the number of steps, but not the recipes of its nodes; they fix what the run leaves open."""
    url, run = create_run(global_batch_size_start=4, **fixed)
    assert recipe.run.total_steps == 4
    assert train_recipe(recipe, coordinator_url=url, run_id=run, directory=tmp_path / "node")["steps"] == steps


def test_two_nodes_of_a_run(recipe: Recipe, tmp_path: Path, create_run: Make) -> None:
    url, run = create_run(init_min_clients=2, total_steps=4, global_batch_size_start=4)
    first, second = train_all([recipe] * 2, url, run, [tmp_path / "0", tmp_path / "1"])
    assert first["digest"] == second["digest"]
    assert first["id"] != second["id"]
    for result in (first, second):
        assert result["payload_bytes_up"] == 4 * result["payload_bytes_computed"]
        assert 0 < result["payload_bytes_up"] < result["socket_bytes_up"]


def test_a_model_too_small_for_the_data(recipe: Recipe, tmp_path: Path) -> None:
    model = replace(recipe.model, config={**recipe.model.config, "vocab_size": 16})
    with pytest.raises(ConfigError, match="256 token ids and the model has 16"):
        train_recipe(replace(recipe, model=model), directory=tmp_path / "node")


def test_a_folder_that_cannot_be_written(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to the node's folder"):
        train_recipe(recipe, directory=tmp_path / "file" / "node")


def test_a_data_set_asks_its_provider_for_stretches() -> None:
    asked: list[tuple[int, int]] = []

    class Provider:
        vocab_size, seq_len, tokenizer = 2, 1, None

        def __len__(self) -> int:
            return 10

        def samples(self, start: int, stop: int) -> list[dict[str, torch.Tensor]]:
            asked.append((start, stop))
            return [{"input_ids": torch.tensor([i])} for i in range(start, stop)]

        def validation(self) -> list[dict[str, torch.Tensor]]:
            return []

    found = ProviderDataset(Provider()).__getitems__([7, 8, 9, 0, 1, 5])
    assert [int(sample["input_ids"]) for sample in found] == [7, 8, 9, 0, 1, 5]
    assert asked == [(7, 10), (0, 2), (5, 6)]


def test_a_model_whose_parameters_are_not_finite_is_refused() -> None:
    model = torch.nn.Linear(2, 2)
    check_parameters(model)
    with torch.no_grad():
        model.bias[1] = torch.nan
    with pytest.raises(CheckpointError, match="in 1 parameter such as 'bias'"):
        check_parameters(model)
