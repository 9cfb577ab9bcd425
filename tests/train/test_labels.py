"""Fine-tuning data: only trained tokens count, whichever rows and micro-batches they are in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from pyarrow import parquet

from psyche_lightning.errors import ConfigError
from psyche_lightning.lightning.callback import CoordinatorCallback
from psyche_lightning.lightning.weights import IGNORED
from psyche_lightning.recipe import load_recipe
from psyche_lightning.recipe.config import Recipe
from psyche_lightning.train import runner
from psyche_lightning.train.runner import train_recipe

LENGTH = 16
MODEL = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
ROUTED = {"model_type": "mixtral", "num_local_experts": 2, "num_key_value_heads": 2, "output_router_logits": True}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(labelled: list[int], *overrides: str, batch: int = 4, held_out: int = 0, **model: Any) -> Recipe:
    """A recipe on rows whose last tokens are labels: as many as ``labelled`` says for each row."""
    tokens = torch.randint(5, 60, (len(labelled), LENGTH), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    for row, count in zip(labels, labelled, strict=True):
        row[: LENGTH - count] = IGNORED
    parquet.write_table(pyarrow.table({"inputs": tokens.tolist(), "labels": labels.tolist()}), "rows.parquet")
    data = {"path": "rows.parquet", "vocab_size": 64, "validation_samples": held_out}
    plain = {
        "run": {"total_steps": 1, "global_batch_size_start": batch, "global_batch_size_end": batch},
        "model": {"name": "hf", "config": {**MODEL, **model}},
        "data": {"name": "parquet", "seq_len": LENGTH, "config": data},
        "trainer": {"accelerator": "cpu", "validate_every": 1 if held_out else 0},
        "optimizer": {"clip_grad_norm": 1e9},
    }
    Path("recipe.yaml").write_text(json.dumps(plain))
    return load_recipe("recipe.yaml", list(overrides))


def gradients(recipe: Recipe, size: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The gradients of the first round, and the result."""
    found: list[torch.Tensor] = []

    class Noting(CoordinatorCallback):
        def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
            found.extend(p.grad.clone() for p in module.parameters() if p.grad is not None)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "CoordinatorCallback", Noting)
        result = train_recipe(recipe, directory=f"node-{size}")
    return found, result


@pytest.mark.parametrize("labelled", [[16, 1, 16, 1], [0, 16, 2, 0], [3, 0, 0, 0]])
def test_gradient_and_losses_do_not_depend_on_the_micro_batch(
    labelled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, losses = {}, {}
    for size in (1, 2, 3, 4):
        recipe = make([*labelled, 5, 1, 0, 16, 1], f"micro_batch_size={size}", held_out=5)
        found[size], result = gradients(recipe, size, monkeypatch)
        losses[size] = result["loss"]["train"] + result["loss"]["validation"]
    assert len(found[1]) > 5
    for size in (1, 2, 3):
        torch.testing.assert_close(found[size], found[4], rtol=1e-4, atol=1e-6)
        assert losses[size] == pytest.approx(losses[4], abs=1e-5)


def test_a_router_s_loss_is_trained_at_its_scale_and_not_validated() -> None:
    losses = []
    for coefficient in (0.0, 1.0):
        # The gradient differs, so only what comes before the first step can be compared.
        recipe = make(
            [16, 1, 0, 16, 5, 1], "micro_batch_size=1", held_out=2, **ROUTED, router_aux_loss_coef=coefficient
        )
        losses.append(train_recipe(recipe, directory=f"node-{coefficient}")["loss"])
    assert losses[0]["validation"][0] == losses[1]["validation"][0]
    added = losses[1]["train"][0] - losses[0]["train"][0]
    assert 1.9 < added < 2.2, "two experts give 2 if they are used alike, however many micro-batches there are"


def test_rows_without_labels_cost_nothing_and_are_said(caplog: pytest.LogCaptureFixture) -> None:
    recipe = make([8, 8, 8, 0] * 4, "micro_batch_size=1", "total_steps=3")
    result = train_recipe(recipe, directory="node")
    assert (result["rounds"], result["empty_rounds"]) == (3, 0)
    assert "4 of the first 16 training samples have no trained label" in caplog.text
    rows = [
        json.loads(line, parse_constant=pytest.fail) for line in Path("node/metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_a_share_without_labels_is_said_and_the_others_are_trained(caplog: pytest.LogCaptureFixture) -> None:
    recipe = make([8, 0, 8, 8, 8], "micro_batch_size=1", "total_steps=4", batch=1)
    result = train_recipe(recipe, directory="node")
    assert (result["rounds"], result["empty_rounds"]) == (4, 1)
    assert "this node contributes nothing to it, and its data ids 1 stay open: none of its 1 sample" in caplog.text
    assert "this node contributed nothing to 1 of its 4 rounds" in caplog.text
    assert [json.loads(line)["step"] for line in Path("node/metrics.jsonl").read_text().splitlines()] == [1, 3, 4]


def test_data_without_any_label_is_refused() -> None:
    with pytest.raises(ConfigError, match="none of the 4 training samples has a trained label"):
        train_recipe(make([0] * 4), directory="node")
    with pytest.raises(ConfigError, match="none of the 2 validation samples has a trained label"):
        train_recipe(make([16, 16, 0, 0], held_out=2, batch=2), directory="node")
