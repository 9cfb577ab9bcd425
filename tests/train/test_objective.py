"""A model that would learn to copy its input is refused before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from psyche_lightning.builtin.models import hf
from psyche_lightning.errors import ConfigError
from psyche_lightning.train.objective import check_objective

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
SEQ2SEQ = {
    "vocab_size": 64,
    "d_model": 32,
    "decoder_layers": 1,
    "encoder_layers": 1,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "decoder_attention_heads": 2,
    "encoder_attention_heads": 2,
    "max_position_embeddings": 64,
}
PROPHET = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_decoder_layers": 1,
    "num_encoder_layers": 1,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "num_decoder_attention_heads": 2,
    "num_encoder_attention_heads": 2,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}
"""Its loss is made of more logits than it returns."""
MARIAN = {**SEQ2SEQ, "pad_token_id": 63, "decoder_start_token_id": 63}


def build(model_type: str, **config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return hf({"model_type": model_type, **config})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_type", "config", "words"),
    [
        ("bart", SEQ2SEQ, "BartForCausalLM compares the label of a token with the output at the same place"),
        ("marian", MARIAN, "MarianForCausalLM compares the label of a token with the output at the same place"),
        ("prophetnet", PROPHET, "ProphetNetForCausalLM compares the label of a token with the output at the same"),
        ("bigbird_pegasus", SEQ2SEQ, "BigBirdPegasusForCausalLM compares the label of a token with the output at"),
        ("pegasus", SEQ2SEQ, "PegasusForCausalLM compares the label of a token with the output at the same place"),
        ("bert", SMALL, "outputs of BertLMHeadModel for a token depend on the tokens after it"),
    ],
)
def test_a_model_that_learns_to_copy_is_refused(
    model_type: str, config: dict[str, Any], words: str, dtype: torch.dtype
) -> None:
    with pytest.raises(ConfigError, match=f"{words}.*would learn to copy its input"):
        check_objective(build(model_type, **config).to(dtype), 64, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", SMALL),
        ("bert", {**SMALL, "is_decoder": True}),
        ("mixtral", {**SMALL, "num_key_value_heads": 2, "output_router_logits": True, "router_aux_loss_coef": 1.0}),
        ("gpt2", {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}),
    ],
)
def test_others_pass_and_stay_as_they_are(model_type: str, config: dict[str, Any], dtype: torch.dtype) -> None:
    model = build(model_type, **config).to(dtype).train()
    before, chance = [p.clone() for p in model.parameters()], torch.get_rng_state()
    check_objective(model, 64, 16)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert torch.equal(chance, torch.get_rng_state())


def test_a_model_that_fails_on_the_probe_is_left_to_training() -> None:
    class Picky(torch.nn.Module):
        def forward(self, input_ids: Any, labels: Any = None) -> Any:
            raise ValueError("only rows of 4096 tokens")

    check_objective(Picky(), 64, 4096)
