"""The memory of activations, counted without values."""

from __future__ import annotations

import pytest
import torch

from psyche_lightning.bench.engine import peak
from psyche_lightning.plugins import load_plugins
from psyche_lightning.recipe import load_recipe
from psyche_lightning.train.activations import activations

MEGA = 1 << 20


def bytes_of(*overrides: str, name: str = "demo") -> int:
    found = activations(load_recipe(name, overrides))
    assert found is not None
    return found


def test_more_samples_take_more_and_recomputing_takes_less() -> None:
    once = bytes_of("micro_batch_size=8")
    assert bytes_of("micro_batch_size=16") == pytest.approx(2 * once, rel=0.01)
    assert bytes_of("trainer.gradient_checkpointing=true") < 0.4 * once
    assert bytes_of("precision=bf16-mixed") < 0.8 * once


@pytest.mark.parametrize(("recompute", "least"), [("false", 0.6), ("true", 0.4)])
def test_it_is_about_what_a_real_pass_takes(recompute: str, least: float) -> None:
    """Of a small model that recomputes, little is kept, so what the allocator holds besides counts for more."""
    chosen = [f"trainer.gradient_checkpointing={recompute}", "micro_batch_size=32"]
    recipe = load_recipe("demo", chosen)
    told = bytes_of(*chosen)
    model = load_plugins().models()[recipe.model.name](recipe.model.options)
    if recompute == "true":
        model.gradient_checkpointing_enable()
    model.train()
    ids = torch.zeros(32, recipe.data.seq_len, dtype=torch.int64)

    def once() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    once()
    real = peak(once)
    if real:  # only Linux tells
        assert least * real - 10 * MEGA < told < 1.2 * real


def test_models_of_transformers_also_with_tied_parameters() -> None:
    small = ["model.config.num_hidden_layers=2", "model.config.hidden_size=128", "model.config.vocab_size=512"]
    small += ["model.config.num_attention_heads=4", "model.config.num_key_value_heads=2", "seq_len=64"]
    for tied in ("true", "false"):
        assert bytes_of(*small, f"model.config.tie_word_embeddings={tied}", name="hf-llama") > 0


def test_a_model_that_looks_at_values_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    class Looking(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) if float(input.detach().mean()) > 0 else input

    from psyche_lightning.train import activations as module

    def model(recipe: object) -> torch.nn.Module:
        with torch.device("meta"):
            found: torch.nn.Module = Looking(4, 4)
        return found

    monkeypatch.setattr(module, "meta_model", model)
    assert activations(load_recipe("demo")) is None
