"""The figures of a step."""

from __future__ import annotations

import math

import torch

from psyche_lightning.distro import DisTrO, DistroConfig

CONFIG = DistroConfig(chunk=8, k=4, decay=0.5)


def two_groups() -> tuple[DisTrO, list[torch.nn.Parameter]]:
    parameters = [torch.nn.Parameter(torch.zeros(16, 16)), torch.nn.Parameter(torch.zeros(8, 8))]
    groups = [{"params": [(f"p{i}", parameter)]} for i, parameter in enumerate(parameters)]
    return DisTrO(groups, lr=0.5, config=CONFIG), parameters


def encoded(optimizer: DisTrO, parameters: list[torch.nn.Parameter], *gradients: torch.Tensor) -> bytes:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return optimizer.encode()


def test_norms_are_those_of_each_group() -> None:
    optimizer, parameters = two_groups()
    torch.manual_seed(0)
    first, second = torch.randn(16, 16), torch.randn(8, 8)
    encoded(optimizer, parameters, first, second)
    found = optimizer.figures()
    deltas = [delta.norm().item() for _, delta in optimizer.delta()]
    for group, gradient, delta in zip(found, (first, second), deltas, strict=True):
        assert math.isclose(group["gradient_norm"], gradient.norm().item(), rel_tol=1e-6)
        assert math.isclose(group["momentum_norm"], delta, rel_tol=1e-6)
        assert math.isnan(group["agreement"])


def test_agreement_is_with_the_sum_of_the_others() -> None:
    """Equal nodes agree everywhere, opposite ones nowhere; a node alone agrees with nobody."""
    torch.manual_seed(0)
    gradients = [torch.randn(16, 16), torch.randn(8, 8)]
    mine, same, opposite = two_groups(), two_groups(), two_groups()
    own = encoded(*mine, *gradients)
    agreed = encoded(*same, *gradients)
    against = encoded(*opposite, gradients[0], -gradients[1])
    optimizer, lrs = mine[0], mine[0].lr_bits()
    optimizer.observing = True
    optimizer.apply([own], lrs)
    assert all(math.isnan(group["agreement"]) for group in optimizer.figures())
    optimizer.apply([own, agreed], lrs)
    assert [group["agreement"] for group in optimizer.figures()] == [1.0, 1.0]
    optimizer.apply([against, own], lrs)
    assert [group["agreement"] for group in optimizer.figures()] == [1.0, 0.0]
    optimizer.apply([own, agreed, against], lrs)  # in the second group, the others cancel
    first, second = (group["agreement"] for group in optimizer.figures())
    assert first == 1.0
    assert math.isnan(second)


def test_independent_nodes_agree_on_half_and_observing_changes_nothing() -> None:
    torch.manual_seed(1)
    parameter = torch.nn.Parameter(torch.zeros(256, 256))
    twin = torch.nn.Parameter(torch.zeros(256, 256))
    one, other = DisTrO([("p", parameter)], 0.1, config=CONFIG), DisTrO([("p", twin)], 0.1, config=CONFIG)
    payloads = [encoded(one, [parameter], torch.randn(256, 256)), encoded(other, [twin], torch.randn(256, 256))]
    one.observing = True
    for optimizer in (one, other):
        optimizer.apply(payloads, optimizer.lr_bits())
    assert abs(one.figures()[0]["agreement"] - 0.5) < 0.1
    assert torch.equal(parameter, twin)
