"""Checkpoints in DeepSeek-V3's format, in both directions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from psyche_lightning_mla.deepseek import export
from psyche_lightning_mla.plugin import build
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from psyche_lightning.errors import CheckpointError, ConfigError

DENSE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 24,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
KINDS = {
    "dense": DENSE,
    "dense with yarn": {**DENSE, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "dense, tied": {**DENSE, "tie_word_embeddings": True},
    "experts": {**DENSE, **EXPERTS},
}
IDS = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(1))


def moved(model: Any) -> Any:
    """The model with biases that are not zero, for evaluation."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("bias"):
                value.copy_(torch.randn_like(value) * 0.2)
    return model.eval()


def deepseek(folder: Path, **fields: Any) -> DeepseekV3ForCausalLM:
    """A checkpoint that plain transformers wrote."""
    torch.manual_seed(0)
    model = moved(DeepseekV3ForCausalLM(DeepseekV3Config(**fields, num_key_value_heads=2, num_mtp_layers=0)))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_exported_checkpoints_give_the_same_logits_in_plain_transformers(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = moved(build(KINDS[kind]))
    for name in ("own", "exported"):
        (tmp_path / name).mkdir()
    model.save_pretrained(tmp_path / "own")
    export(tmp_path / "own", tmp_path / "exported")
    other, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", local_files_only=True, output_loading_info=True, dtype=torch.float32
    )
    assert type(other) is DeepseekV3ForCausalLM
    assert not any(info.values()), info
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
    again = build({"path": str(tmp_path / "exported")})  # and back
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert again.config.parameter_count() == model.config.parameter_count()


def test_an_exported_checkpoint_needs_no_plugin(tmp_path: Path) -> None:
    for name in ("own", "exported"):
        (tmp_path / name).mkdir()
    build(DENSE).save_pretrained(tmp_path / "own")
    export(tmp_path / "own", tmp_path / "exported")
    script = (
        "import sys; from transformers import AutoModelForCausalLM as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1], local_files_only=True)\n"
        "print(type(model).__name__, any(name.startswith('psyche') for name in sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "exported")], check=True, capture_output=True, text=True
    )
    assert run.stdout.split()[-2:] == ["DeepseekV3ForCausalLM", "False"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_deepseek_checkpoint_is_where_training_begins(kind: str, tmp_path: Path) -> None:
    fields = KINDS[kind] if kind == "experts" else {**KINDS[kind], "first_k_dense_replace": 3}
    other = deepseek(tmp_path, **fields)
    model = build({"path": str(tmp_path)})
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert model.config.eos_token_id == other.config.eos_token_id
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS).logits, other(IDS).logits, atol=1e-5, rtol=0)
    with torch.device("meta"):
        shapes = build({"path": str(tmp_path)})
    assert [p.shape for p in shapes.parameters()] == [p.shape for p in model.parameters()]


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    deepseek(tmp_path, **DENSE, first_k_dense_replace=3)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "model.layers.3.eh_proj.weight": torch.zeros(2, 2)}, file, {"format": "pt"})
    assert len(build({"path": str(tmp_path)}).model.layers) == 3
    assert "model.layers.3.eh_proj.weight" in caplog.text


def test_an_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    deepseek(tmp_path, **DENSE, first_k_dense_replace=3)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor: model\.layers\.1\.mlp\.up_proj\.weight"):
        build({"path": str(tmp_path)})
    file.unlink()
    with pytest.raises(ConfigError, match=r"no file named model\.safetensors"):
        build({"path": str(tmp_path)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantized; convert"),
        ({"hidden_act": "gelu"}, "has hidden_act='gelu'; the model 'mla' has only 'silu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "expected one of default"),
    ],
)
def test_what_the_model_lacks_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    deepseek(tmp_path, **DENSE, first_k_dense_replace=3)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        build({"path": str(tmp_path)})


def test_another_model_is_not_exported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="has the model type 'llama'; only 'psyche_mla' can become 'deepseek_v3'"):
        export(tmp_path, tmp_path / "exported")
