"""A model in bfloat16 computes as its checkpoint does in plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from psyche_lightning.builtin.models import hf
from psyche_lightning.checkpoints.dtypes import cast, tensors
from psyche_lightning.checkpoints.model import ModelCopy

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 2048,
}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},  # tied, with a buffer that scales the embedding
    "apertus": {},  # an activation whose parameters have the dtype of the configuration
    "glm4_moe": {**EXPERTS, "first_k_dense_replace": 1, "num_key_value_heads": 2},  # a router in float32
    "deepseek_v3": {**EXPERTS, **LATENT, "first_k_dense_replace": 1, "head_dim": 8, "num_key_value_heads": 2},
    "mamba": {"state_size": 8},  # decay rates in float32
}


def build(kind: str) -> Any:
    torch.manual_seed(0)
    fields = {**SMALL, **KINDS[kind]}
    if kind == "mamba":
        fields = {name: fields[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "state_size")}
    return hf({"model_type": kind, **fields})


def plain(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM  # it has no annotations
    return auto.from_pretrained(folder, local_files_only=True, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_what_plain_transformers_loads(kind: str, tmp_path: Path) -> None:
    model = cast(build(kind), torch.bfloat16)
    ModelCopy(model).save(tmp_path / "saved")
    loaded = plain(tmp_path / "saved")  # dtype: as the checkpoint says
    ours, theirs = dict(tensors(model)), dict(tensors(loaded))
    assert {name: value.dtype for name, value in ours.items()} == {name: v.dtype for name, v in theirs.items()}
    assert any(value.dtype == torch.bfloat16 for value in ours.values())
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    ids = torch.randint(64, (2, 300), generator=torch.Generator().manual_seed(1))
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_rotary_frequencies_and_routers_are_not_rounded() -> None:
    model = build("deepseek_v3")
    before = {name: value.clone() for name, value in tensors(model)}
    cast(model, torch.bfloat16)
    now = dict(tensors(model))
    for name in ("model.rotary_emb.inv_freq", "model.layers.1.mlp.gate.e_score_correction_bias"):
        assert now[name].dtype == torch.float32
        assert torch.equal(now[name], before[name])
    assert now["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_another_module_keeps_its_buffers() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    cast(module, torch.bfloat16)
    assert {value.dtype for value in module.parameters()} == {torch.bfloat16}
    assert module[1].running_var.dtype == torch.float32


def test_a_model_in_float32_can_be_saved_in_bfloat16(tmp_path: Path) -> None:
    model = build("gemma")
    copy = ModelCopy(model, "model.", torch.bfloat16)
    copy.save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in saved  # tied
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert copy.digest() == ModelCopy(plain(tmp_path / "saved"), "model.").digest()
