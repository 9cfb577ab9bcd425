"""Muon before the vote: gradients of matrices become its directions."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from psyche_lightning.distro import DisTrO, DistroConfig, NonFiniteGradientError
from psyche_lightning.errors import ConfigError
from psyche_lightning.muon import products_on

CONFIG = DistroConfig(chunk=16, k=4, decay=0.5)


def make(config: DistroConfig = CONFIG, **muon: Any) -> DisTrO:
    torch.manual_seed(0)
    named = dict(torch.nn.Linear(20, 24).named_parameters())
    groups = [{"params": [("weight", named["weight"])], **muon}, {"params": [("bias", named["bias"])]}]
    return DisTrO(groups, 0.25, config=config)


def fill(optimizer: DisTrO, seed: int) -> list[torch.Tensor]:
    """Gives each parameter a gradient; returns copies."""
    generator = torch.Generator().manual_seed(seed)
    (weight,), (bias,) = (group["params"] for group in optimizer.param_groups)
    for parameter in (weight, bias):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return [weight.grad.clone(), bias.grad.clone()]


def test_delta_gets_the_directions_of_torch_s_muon() -> None:
    optimizer = make(DistroConfig(chunk=16, k=4, decay=0.5, removal=0.0), muon=True, momentum=0.8)
    theirs = torch.nn.Parameter(torch.zeros(24, 20))
    muon = torch.optim.Muon([theirs], 1.0, 0.0, 0.8, adjust_lr_fn="match_rms_adamw")
    expected = {"weight": torch.zeros(24, 20), "bias": torch.zeros(24)}
    for seed in range(3):
        theirs.grad, bias = fill(optimizer, seed)
        before = theirs.detach().clone()
        with products_on(theirs.device):
            muon.step()
        expected["weight"] = 0.5 * expected["weight"] + 0.25 * (before - theirs.detach())
        expected["bias"] = 0.5 * expected["bias"] + 0.25 * bias
        optimizer.encode()
        for name, delta in optimizer.delta():
            assert torch.allclose(delta, expected[name], atol=1e-6)


def test_without_it_gradients_stay_as_they_are() -> None:
    optimizer = make()
    gradients = fill(optimizer, 0)
    payload = optimizer.encode()
    now = [group["params"][0].grad for group in optimizer.param_groups]
    assert all(gradient.equal(before) for gradient, before in zip(now, gradients, strict=True))
    other = make(muon=True)
    fill(other, 0)
    assert other.encode() != payload


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_with_the_same_payloads(dtype: torch.dtype) -> None:
    def new() -> DisTrO:
        optimizer = make(muon=True)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data = parameter.data.to(dtype)
        return optimizer

    def encode(optimizer: DisTrO, seed: int) -> bytes:
        generator = torch.Generator().manual_seed(seed)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        return optimizer.encode()

    one, other, fresh = new(), new(), new()
    encode(one, 0)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other.load_state_dict({**state, "param_groups": [{**group, "muon": False} for group in state["param_groups"]]})
    payload = encode(one, 1)
    assert encode(other, 1) == payload
    assert encode(fresh, 1) != payload
    one.reset()
    assert encode(one, 1) == encode(new(), 1)


def test_a_gradient_that_is_not_finite_leaves_no_trace() -> None:
    optimizer = make(muon=True)
    fill(optimizer, 0)
    optimizer.encode()
    ((_, before),) = [(name, tensor.clone()) for name, tensor in optimizer.momentum()]
    fill(optimizer, 1)
    optimizer.param_groups[1]["params"][0].grad[3] = torch.nan
    with pytest.raises(NonFiniteGradientError):
        optimizer.encode()
    ((name, after),) = optimizer.momentum()
    assert (name, after.equal(before)) == ("weight", True)


def test_vectors_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\"muon\": True has 'bias' of shape \[3\], but Muon trains matrices"):
        DisTrO([{"params": torch.nn.Linear(2, 3).named_parameters(), "muon": True}], 0.1)
