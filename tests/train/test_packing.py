"""Models that do not keep packed texts apart are refused before training, and models that do are not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from psyche_lightning.errors import ConfigError
from psyche_lightning.plugins import load_plugins
from psyche_lightning.train.packing import check_packing

DATA: Any = SimpleNamespace(vocab_size=256, seq_len=32)
SIZES: dict[str, Any] = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")} | {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "moe_intermediate_size": 16, "num_experts": 4,
    "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16,
}  # fmt: skip
APART: dict[str, Any] = {
    "llama": HEADS,
    "gpt2": {"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "mixtral": {**HEADS, **EXPERTS},
    "gemma3_text": {**HEADS, "head_dim": 8},
}
TOGETHER: dict[str, Any] = {
    "opt": {"num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 256, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gpt_oss": {**HEADS, **EXPERTS, "head_dim": 8},
    "granitemoe": {**HEADS, **EXPERTS},
    "lfm2": {**HEADS, "layer_types": ["conv", "full_attention"]},
    "qwen3_next": {**HEADS, **LINEAR, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 32},
    "rwkv": {"attention_hidden_size": 32, "intermediate_size": 48},
    "xlnet": {"vocab_size": 256, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
}


def transformers_model(kind: str, fields: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    sizes = {} if "vocab_size" in fields else SIZES
    return load_plugins().models()["hf"]({"model_type": kind, **sizes, **fields})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", APART)
def test_models_that_keep_texts_apart(kind: str, dtype: torch.dtype) -> None:
    check_packing(transformers_model(kind, APART[kind]).to(dtype), DATA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TOGETHER)
def test_models_that_do_not(kind: str, dtype: torch.dtype) -> None:
    model = transformers_model(kind, TOGETHER[kind]).to(dtype)
    after = " and what comes after it" if kind == "xlnet" else ""
    with pytest.raises(
        ConfigError, match=rf"{type(model).__name__} they see.*sees what comes before it{after}, .*packed=false"
    ):
        check_packing(model, DATA)


class Texts(nn.Module):
    """A model of the mean of each text, with a fault to choose."""

    def __init__(self, fault: str = "", longer: int = 0) -> None:
        super().__init__()
        self.words = nn.Embedding(256, 8)
        self.out = nn.Linear(8, 256)
        self.dropout = nn.Dropout(0.5)
        self.fault = fault
        self.longer = longer

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor) -> Any:
        if input_ids.shape[1] < self.longer:
            raise ValueError("too short")
        if self.fault == "fails":
            raise ValueError("no such kernel")
        text = torch.cat([torch.zeros_like(position_ids[:, :1]), (position_ids.diff() != 1).long()], 1).cumsum(1)
        if self.fault == "the first row's texts":
            text = text[:1].expand_as(text)
        same = text[:, :, None] == text[:, None, :]
        seen = same & torch.ones_like(same).tril()
        if self.fault == "before":
            seen = torch.ones_like(same).tril()
        if self.fault == "after":
            seen = seen | torch.ones_like(same).triu()
        attended = seen.to(self.words.weight.dtype)
        hidden = self.dropout(attended @ self.words(input_ids) / attended.sum(-1, keepdim=True))
        if self.fault == "choice":  # without a gradient: the largest of all tokens is left out
            hidden = hidden * (input_ids < input_ids.max(1, keepdim=True).values)[..., None]
        return SimpleNamespace(logits=self.out(hidden), loss=None)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("before", "see each other: a text sees what comes before it, although"),
        ("after", "see each other: a text sees what comes after it, although"),
        ("the first row's texts", "when a batch has two samples: .* set trainer.micro_batch_size=1, choose data"),
        ("choice", "see each other"),
        ("fails", "Texts fails on samples that hold two texts .ValueError: no such kernel"),
    ],
)
def test_what_is_said_about_models_of_ones_own(fault: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_packing(Texts(fault), DATA)


def test_a_model_may_need_longer_rows() -> None:
    check_packing(Texts(longer=32), DATA)
    with pytest.raises(ConfigError, match="before it"):
        check_packing(Texts("before", longer=32), DATA)


def test_a_fault_with_two_samples_does_not_matter_to_one() -> None:
    check_packing(Texts("the first row's texts"), DATA, micro_batch_size=1)


def test_the_model_stays_as_it_is() -> None:
    model = Texts()
    model.dropout.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chance = torch.random.get_rng_state()
    check_packing(model, DATA)
    assert model.training
    assert model.words.training
    assert not model.dropout.training
    assert torch.equal(torch.random.get_rng_state(), chance)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())
    assert not model.words._forward_hooks
