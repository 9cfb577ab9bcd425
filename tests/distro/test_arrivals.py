"""Streamed gradients: the payloads of kept ones, with one gradient at a time, and a refusal where that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from psyche_lightning.distro import DisTrO, DistroConfig, LocalSteps, NonFiniteGradientError
from psyche_lightning.distro.holding import Holding
from psyche_lightning.errors import ConfigError

STREAMED = Holding(gradients="streamed")


class Model(torch.nn.Module):
    """Layers of odd sizes; one weight is used twice, and one parameter not at all."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(30, 20)
        self.middle = torch.nn.Linear(20, 20)
        self.conv = torch.nn.Conv1d(3, 5, 3)
        self.idle = torch.nn.Parameter(torch.ones(7))
        self.to(dtype)

    def loss(self, seed: int) -> torch.Tensor:
        drawn = torch.Generator().manual_seed(seed)
        hidden = self.middle(self.embed(torch.randint(30, (4, 3), generator=drawn)))
        return (torch.tanh(self.conv(hidden)).float().mean() + (hidden @ self.embed.weight.T).float().pow(2).mean()) / 2


def make(holding: Holding | None = None, dtype: torch.dtype = torch.float32, **config: Any) -> tuple[DisTrO, Model]:
    model = Model(dtype)
    settings = DistroConfig(**{"chunk": 8, "k": 4, "decay": 0.9, **config})
    groups = [
        {"params": [(name, one) for name, one in model.named_parameters() if ("conv" in name) == conv], "lr": lr}
        for conv, lr in ((False, 0.01), (True, 0.02))
    ]
    return DisTrO(groups, 0.01, 0.1, settings, holding=holding), model


def train(optimizer: DisTrO, model: Model, seeds: list[int]) -> bytes:
    for seed in seeds:
        (model.loss(seed) / len(seeds)).backward()
    payload = optimizer.encode()
    optimizer.apply([payload], optimizer.lr_bits())
    optimizer.zero_grad()
    return payload


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_payloads_are_those_of_kept_gradients(dtype):
    one, plain = make(dtype=dtype)
    two, model = make(STREAMED, dtype)
    for seed in range(5):
        assert train(one, plain, [seed]) == train(two, model, [seed])
        assert all(parameter.grad is None for parameter in model.parameters())
        assert one.figures()[0]["gradient_norm"] == pytest.approx(two.figures()[0]["gradient_norm"])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(plain.parameters(), model.parameters(), strict=True))


def test_micro_batches_add_up_in_delta():
    one, plain = make()
    two, model = make(STREAMED)
    train(one, plain, [1, 2, 3])
    train(two, model, [1, 2, 3])
    kept, streamed = dict(one.delta()), dict(two.delta())
    assert all(torch.allclose(kept[name], streamed[name], atol=1e-7) for name in kept)
    assert not torch.isfinite(torch.tensor(two.figures()[0]["gradient_norm"]))  # that of the sum is unknown


def test_one_gradient_is_held_at_a_time():
    _, model = make(STREAMED)
    held = []

    def look(parameter: torch.Tensor) -> None:
        held.append(sum(one.grad is not None for one in model.parameters()))

    for parameter in model.parameters():  # called after the optimizer's own hook, which came first
        parameter.register_post_accumulate_grad_hook(look)
    model.loss(0).backward()
    assert len(held) == 5
    assert not any(held)


def test_delta_decays_where_no_gradient_came():
    optimizer, model = make(STREAMED, removal=0.0)
    optimizer.load_delta("idle", torch.ones(7))
    train(optimizer, model, [0])
    assert torch.equal(dict(optimizer.delta())["idle"], torch.full((7,), 0.9))


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_delta_in_fewer_bits_takes_them_too(form):
    optimizer, model = make(Holding(delta=form, gradients="streamed", masters="split"), torch.bfloat16)
    losses = []
    for seed in range(60):
        losses.append(float(model.loss(seed).detach()))
        train(optimizer, model, [seed])
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_a_gradient_that_is_not_finite_adds_nothing_and_costs_the_round():
    optimizer, model = make(STREAMED, removal=0.0)
    train(optimizer, model, [0])
    before, nonce = dict(optimizer.delta()), optimizer.nonce
    weight = model.middle.weight
    handle = weight.register_hook(lambda gradient: gradient * float("nan"))
    model.loss(1).backward()
    with pytest.raises(NonFiniteGradientError, match=r"'middle\.weight' has the norm inf"):
        optimizer.encode()
    handle.remove()
    assert optimizer.nonce == nonce
    after = dict(optimizer.delta())
    assert torch.equal(after["middle.weight"], 0.9 * before["middle.weight"])
    assert all(torch.isfinite(value).all() for value in after.values())
    train(optimizer, model, [2])  # and goes on
    assert optimizer.nonce == nonce + 1


def test_a_round_that_is_given_up_is_followed_by_a_whole_one():
    optimizer, model = make(STREAMED, removal=0.0)
    begun = []
    optimizer.begin_gradients(lambda: begun.append(optimizer.arrived))
    model.loss(0).backward()
    assert optimizer.arrived
    optimizer.begin_gradients()
    assert not optimizer.arrived
    first = dict(optimizer.delta())["middle.weight"]
    model.middle.weight.register_hook(torch.zeros_like)
    model.loss(1).backward()
    assert torch.equal(dict(optimizer.delta())["middle.weight"], 0.9 * first)  # decayed once more
    assert begun == [False, False]


def test_what_needs_all_gradients_is_refused():
    matrix = [("w", torch.nn.Parameter(torch.zeros(8, 8)))]
    with pytest.raises(ConfigError, match="Muon makes a direction of a whole gradient"):
        DisTrO([{"params": matrix, "muon": True}], 0.01, holding=STREAMED)
    with pytest.raises(ConfigError, match="local steps are made by an optimizer"):
        LocalSteps(matrix, 0.01, DistroConfig(local_steps=2), holding=STREAMED)
    with pytest.raises(ConfigError, match=r"trainer\.gradients is 'gone'; choose kept or streamed"):
        Holding(gradients="gone")  # type: ignore[arg-type]


def test_a_sparse_gradient_is_refused():
    table = torch.nn.Embedding(8, 8, sparse=True)
    DisTrO(table.named_parameters(), 0.01, config=DistroConfig(chunk=8), holding=STREAMED)
    with pytest.raises(ConfigError, match="'weight' is sparse"):
        table(torch.tensor([1])).sum().backward()
