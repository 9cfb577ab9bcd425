"""The model against transformers' DeepseekV3, its cache, its loss, and what transformers expects of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from psyche_lightning_mla import MLAConfig, MLAForCausalLM
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "max_position_embeddings": 128,
    # Wide enough that attention is far from uniform and a wrong rotation shows in the logits.
    "initializer_range": 0.3,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 2.5,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "direct queries": {},
    "low-rank queries": {"q_lora_rank": 28},
    "narrow values": {"v_head_dim": 10, "q_lora_rank": 28},
    "wide values": {"v_head_dim": 40},
    "half rotation": {"rope_interleave": False},
    "yarn": {"rope_parameters": YARN, "q_lora_rank": 28},
    "llama3": {"rope_parameters": LLAMA3},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "biases": {"attention_bias": True, "q_lora_rank": 28},
    "tied": {"tie_word_embeddings": True},
    "experts": EXPERTS,
    "groups of experts": {**EXPERTS, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 2},
    "plain weights of experts": {**EXPERTS, "norm_topk_prob": False, "first_k_dense_replace": 0},
}


def build(**changes: Any) -> MLAForCausalLM:
    torch.manual_seed(0)
    model = MLAForCausalLM(MLAConfig(**{**SMALL, **changes}))
    with torch.no_grad():  # biases and norms start at 0 and 1, where forgetting them would not show
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
                assert "norm" in name or "bias" in name
    return model.eval()


def tokens(batch: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(1))


def reference(model: MLAForCausalLM) -> DeepseekV3ForCausalLM:
    """`transformers`' DeepseekV3 with the same weights."""
    names = DeepseekV3Config.__dataclass_fields__.keys() & MLAConfig.__annotations__.keys()
    shared = {name: getattr(model.config, name) for name in names - {"bos_token_id", "eos_token_id"}}
    if not model.config.n_routed_experts:
        shared |= {"n_routed_experts": 1, "first_k_dense_replace": model.config.num_hidden_layers}
    config = DeepseekV3Config(
        **shared, num_key_value_heads=model.config.num_attention_heads, bos_token_id=None, eos_token_id=None
    )
    other = DeepseekV3ForCausalLM(config)
    other.load_state_dict(model.state_dict(), strict=True)
    return other.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_deepseek_v3(variant: str) -> None:
    model = build(**VARIANTS[variant])
    ids = tokens()
    with torch.no_grad():
        ours, theirs = model(ids).logits, reference(model)(ids).logits
    assert ours.std() > 0.3
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", ["direct queries", "yarn", "groups of experts"])
def test_gradients_equal_deepseek_v3(variant: str) -> None:
    model = build(**VARIANTS[variant]).train()
    other = reference(model).train()
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    other(ids, labels=ids).loss.backward()
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if name.endswith("e_score_correction_bias"):
            continue  # transformers does not train it
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-4, rtol=1e-3)


def test_logits_with_left_padding_equal_deepseek_v3() -> None:
    model, ids = build(), tokens()
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        ours, theirs = model(ids, attention_mask=mask).logits, reference(model)(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_token_by_token_gives_the_same_logits(variant: str) -> None:
    model, ids = build(**VARIANTS[variant]), tokens()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        pieces = [model(piece, cache=cache).logits for piece in (ids[:, :9], ids[:, 9:12], ids[:, 12:39])]
        pieces.append(model(ids[:, 39:], cache=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=0)


def test_decoding_attends_to_latents_and_prefill_expands(monkeypatch: pytest.MonkeyPatch) -> None:
    from psyche_lightning_mla.modeling import MLAAttention

    calls: list[str] = []
    for name in ("_attend_absorbed", "_attend_expanded"):
        original = getattr(MLAAttention, name)

        def record(self: Any, *args: Any, name: str = name, original: Any = original) -> torch.Tensor:
            calls.append(name)
            result: torch.Tensor = original(self, *args)
            return result

        monkeypatch.setattr(MLAAttention, name, record)
    model = build(num_hidden_layers=1, kv_lora_rank=32)
    model.generate(tokens(1, 50), max_new_tokens=3, do_sample=False)
    assert calls == ["_attend_expanded", "_attend_absorbed", "_attend_absorbed"]


@pytest.mark.parametrize("variant", ["direct queries", "yarn", "narrow values", "experts"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_and_without_cache_agree(variant: str, beams: int) -> None:
    model, ids = build(**VARIANTS[variant]), tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # left padding
    options = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "num_beams": beams}
    options["pad_token_id"] = 0
    with_cache = model.generate(ids, **options, use_cache=True)
    assert with_cache.shape == (2, 64)
    assert torch.equal(with_cache, model.generate(ids, **options, use_cache=False))


def test_generate_with_a_preallocated_cache_agrees() -> None:
    model, ids = build(), tokens()
    plain = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False)
    cache = StaticCache(config=model.config, max_cache_len=64)
    assert torch.equal(plain, model.generate(ids, max_new_tokens=12, do_sample=False, cache=cache))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_keeps_only_latent_and_rope_key(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    batch, length = 2, 40
    with torch.no_grad():
        cache = model(tokens(batch, length), use_cache=True).cache
    kept = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))
    per_token = (SMALL["kv_lora_rank"] + SMALL["qk_rope_head_dim"]) * SMALL["num_hidden_layers"] * dtype.itemsize
    assert kept == per_token * batch * length
    assert model.config.cache_bytes_per_token(dtype.itemsize) == per_token


def test_the_cached_latent_is_the_normalized_one() -> None:
    model = build(num_hidden_layers=1)
    seen: list[torch.Tensor] = []
    model.model.layers[0].self_attn.kv_a_layernorm.register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        cache = model(tokens(), use_cache=True).cache
    assert torch.equal(cache.layers[0].keys, seen[0])


def test_loss_is_shifted_ignores_and_is_float32() -> None:
    model, ids = build().to(torch.bfloat16), tokens()
    labels = ids.clone()
    labels[:, :10] = -100
    with torch.no_grad():
        out = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, 9:-1].float().flatten(0, 1), ids[:, 10:].flatten())
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, expected)
    assert out.logits.dtype == torch.bfloat16


def test_no_cache_in_training_by_default() -> None:
    model = build()
    assert model(tokens()).cache is not None
    assert model.train()(tokens()).cache is None


def test_bf16_autocast_is_close_to_float32() -> None:
    model, ids = build(initializer_range=0.05), tokens()
    exact = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, labels=ids)
    assert abs(out.loss.item() - exact.item()) < 0.02
    out.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, ids = build().train(), tokens()
    model(ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    runs: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    model(ids, labels=ids).loss.backward()
    assert len(runs) == 2
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])


@pytest.mark.parametrize("variant", VARIANTS)
def test_counted_and_built_parameters_agree(variant: str) -> None:
    config = MLAConfig(**{**SMALL, **VARIANTS[variant]})
    with torch.device("meta"):
        model = MLAForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == config.parameter_count()
    assert all(p.is_meta for p in model.parameters())
    assert not list(model.buffers())


def test_a_forward_on_the_meta_device_gives_shapes() -> None:
    with torch.device("meta"):
        model = MLAForCausalLM(MLAConfig(**SMALL)).train()
        out = model(torch.zeros(2, 16, dtype=torch.int64), labels=torch.zeros(2, 16, dtype=torch.int64))
    assert out.logits.shape == (2, 16, SMALL["vocab_size"])
    assert out.loss.is_meta


@pytest.mark.parametrize("variant", ["direct queries", "yarn", "tied", "groups of experts"])
def test_save_and_load(variant: str, tmp_path: Any) -> None:
    model, ids = build(**VARIANTS[variant]), tokens()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True, dtype=torch.float32)
    assert type(loaded) is MLAForCausalLM
    assert loaded.config.model_type == "psyche_mla"
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_initialization() -> None:
    torch.manual_seed(0)
    model = MLAForCausalLM(MLAConfig(num_hidden_layers=8))
    parameters = dict(model.named_parameters())
    assert torch.all(parameters["model.norm.weight"] == 1)
    assert parameters["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert parameters[f"model.layers.3.{name}.weight"].std().item() == pytest.approx(0.02 / 4, rel=0.05)
    ids = torch.randint(0, 256, (2, 64))
    assert model(ids, labels=ids).loss.item() == pytest.approx(5.545, abs=0.15)  # ln 256: nothing is known yet


def test_a_few_steps_learn() -> None:
    torch.manual_seed(0)
    model = MLAForCausalLM(MLAConfig(**{**SMALL, "initializer_range": 0.02}))
    ids = torch.arange(64).repeat(4, 1) % 13
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert model(ids, labels=ids).loss.item() < 0.5
