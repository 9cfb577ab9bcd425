"""The balance of experts: what its rule gives, and that it stays out of everything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from psyche_lightning_mla import MLAConfig, MLAForCausalLM

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def build(**changes: Any) -> MLAForCausalLM:
    torch.manual_seed(0)
    return MLAForCausalLM(MLAConfig(**{**SMALL, **changes})).train()


def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(1))


def chosen(model: MLAForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """How often each expert is chosen."""
    found: list[torch.Tensor] = []
    handle = model.model.layers[1].mlp.gate.register_forward_hook(lambda _, __, out: found.append(out[1]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return torch.bincount(found[0].flatten(), minlength=8)


def test_the_gradient_of_the_bias_is_the_load_beyond_the_mean() -> None:
    model, ids = build(), tokens()
    counts = chosen(model, ids)
    assert counts.sum() == ids.numel() * 2
    model(ids, labels=ids).loss.backward()
    bias = dict(model.named_parameters())[BIAS]
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad / 1e-3, counts / counts.sum() - 1 / 8)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_balance_changes_no_other_gradient(checkpointing: bool) -> None:
    ids = tokens()
    gradients = []
    for trained in (True, False):
        model = build()
        dict(model.named_parameters())[BIAS].requires_grad_(trained)
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if name != BIAS})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name])


def test_the_bias_decides_the_choice_and_not_the_weights() -> None:
    model, ids = build(), tokens()
    gate = model.model.layers[1].mlp.gate
    hidden = torch.randn(5, 32)
    before, _ = gate(hidden)
    with torch.no_grad():
        gate.e_score_correction_bias.add_(3.0)  # the same for all: nothing changes
    after, _ = gate(hidden)
    torch.testing.assert_close(before.sort().values, after.sort().values)
    with torch.no_grad():
        gate.e_score_correction_bias[5] += 10.0
    weights, experts = gate(hidden)
    assert (experts == 5).any(dim=-1).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(5))
    assert chosen(model, ids)[5] == ids.numel()


def test_steps_along_the_sign_balance_the_load() -> None:
    model, ids = build(), tokens()
    bias = dict(model.named_parameters())[BIAS]
    with torch.no_grad():
        bias[:2] += 1.0  # two experts have all tokens
    assert chosen(model, ids)[:2].sum() == ids.numel() * 2
    optimizer = torch.optim.SGD([bias], lr=1.0)
    for _ in range(150):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        bias.grad = 0.01 * bias.grad.sign()
        optimizer.step()
    counts = chosen(model, ids).float()
    assert counts.max() < 1.5 * counts.mean()
    assert counts.min() > 0.3 * counts.mean()


def test_half_precision_keeps_the_router_exact() -> None:
    model = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights, _ = model.model.layers[1].mlp.gate(torch.randn(5, 32))
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_every_kernel_of_experts_gives_the_same(implementation: str) -> None:
    model, ids = build(), tokens()
    with torch.no_grad():
        expected = model(ids).logits
        assert model.get_experts_implementation()[""] == "grouped_mm"
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)
