"""Samples longer than a model's positions are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from psyche_lightning.builtin.models import hf
from psyche_lightning.errors import ConfigError
from psyche_lightning.recipe import load_recipe
from psyche_lightning.recipe.estimate import meta_model
from psyche_lightning.recipe.positions import check_positions, positions

COUNT = 24
SMALL: dict[str, Any] = {"vocab_size": 64}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("max_position_embeddings", {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                                          "num_attention_heads": 2}),
    "gpt2": ("n_positions", {"n_embd": 16, "n_layer": 1, "n_head": 2}),
    "mpt": ("max_seq_len", {"d_model": 16, "n_layers": 1, "n_heads": 2}),
    "roberta": ("max_position_embeddings", {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                                            "num_attention_heads": 2, "is_decoder": True, "pad_token_id": 1}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_accepted_can_be_computed_and_the_next_is_refused(kind: str) -> None:
    field, fields = KINDS[kind]
    model = hf({"model_type": kind, **SMALL, **fields, field: COUNT})
    most = COUNT - 2 if kind == "roberta" else COUNT  # RoBERTa counts from behind its padding's position
    assert positions(model) == most
    check_positions(model, most)
    model(input_ids=torch.full((1, most), 5))
    with pytest.raises(ConfigError, match=rf"has {most} positions\. .* model\.config\.{field}={COUNT + 1}"):
        check_positions(model, most + 1)


def test_a_model_without_a_limit_takes_everything() -> None:
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    xlnet = {"model_type": "xlnet", "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}  # says -1
    for model in (hf({"model_type": "mamba", **SMALL, **fields}), hf({**xlnet, **SMALL}), torch.nn.Linear(2, 2)):
        assert positions(model) is None
        check_positions(model, 1 << 20)


def test_a_dry_run_refuses_as_well() -> None:
    recipe = load_recipe("hf-llama", ["data.seq_len=512", "model.config.max_position_embeddings=511"])
    with pytest.raises(ConfigError, match=r"data\.seq_len is 512, and LlamaForCausalLM has 511 positions"):
        meta_model(recipe)
