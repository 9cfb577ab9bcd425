"""A loop of one's own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric

from psyche_lightning.data.order import DataOrder
from psyche_lightning.distro import DisTrO, DistroConfig
from psyche_lightning.errors import ConfigError
from psyche_lightning.lightning import PsycheFabricStrategy
from psyche_lightning.node.notices import Outcome

Make = Callable[..., Any]


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


def fabric(strategy: Any = "psyche", **options: Any) -> Fabric:
    return Fabric(strategy=strategy, accelerator="cpu", devices=1, **options)


def train(fabric: Fabric, model: Any, optimizer: Any, loader: Any, passes: int = 1) -> list[int]:
    """A loop as anybody writes it; returns the batches of each pass."""
    counts = []
    for _ in range(passes):
        counts.append(0)
        for x, y in loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            fabric.backward(loss)
            optimizer.step()
            counts[-1] += 1
    return counts


@pytest.mark.parametrize("lookahead", [False, True])
def test_an_ordinary_loop_is_a_run_of_one(loader: Make, parameter_bytes: Make, lookahead: bool) -> None:
    module, twin = network(), network()
    twin.load_state_dict(module.state_dict())
    strategy = PsycheFabricStrategy(k=4, lookahead=lookahead)
    f = fabric(strategy)
    model, optimizer = f.setup(module, torch.optim.SGD(module.parameters(), lr=0.01))
    try:
        assert train(f, model, optimizer, f.setup_dataloaders(loader(shuffle=True)), passes=2) == [6, 6]
    finally:
        strategy.close()
    reference = DisTrO(twin.named_parameters(), lr=0.01, config=DistroConfig(k=4, lookahead=lookahead))
    order, data = DataOrder(48, True, 0), loader().dataset
    for step in range(12):
        indices = order.indices(8 * step, 8 * step + 8)

        def closure(indices: list[int] = indices) -> None:
            reference.zero_grad()
            x, y = data[indices]
            torch.nn.functional.cross_entropy(twin(x), y).backward()

        reference.step(closure)
    assert parameter_bytes(module) == parameter_bytes(twin)


def test_only_the_first_loader_is_the_run_s(loader: Make) -> None:
    strategy = PsycheFabricStrategy()
    f = fabric(strategy)
    _, validation = f.setup_dataloaders(loader(), loader())
    assert len(list(validation)) == 6
    assert strategy.session is None, "it joins when it is iterated over"


def test_the_loop_ends_when_the_run_does(loader: Make) -> None:
    before = set(threading.enumerate())
    strategy = PsycheFabricStrategy(total_steps=8)
    f = fabric(strategy)
    module = network()
    model, optimizer = f.setup(module, torch.optim.SGD(module.parameters(), lr=0.01))
    batches = f.setup_dataloaders(loader())
    assert train(f, model, optimizer, batches, passes=3) == [6, 2, 0]
    assert strategy.finished is not None
    assert strategy.finished.outcome is Outcome.LAST_PARAMETERS
    assert {thread.name for thread in set(threading.enumerate()) - before} == set()


def test_bf16_mixed(loader: Make) -> None:
    strategy = PsycheFabricStrategy(total_steps=2)
    f = fabric(strategy, precision="bf16-mixed")
    module = network()
    model, optimizer = f.setup(module, torch.optim.SGD(module.parameters(), lr=0.01))
    assert train(f, model, optimizer, f.setup_dataloaders(loader())) == [2]
    assert next(module.parameters()).dtype == torch.float32


def test_the_registered_name(loader: Make) -> None:
    assert isinstance(fabric().strategy, PsycheFabricStrategy)


def test_a_batch_without_a_step_gives_nothing(loader: Make, caplog: pytest.LogCaptureFixture) -> None:
    strategy = PsycheFabricStrategy(total_steps=2)
    f = fabric(strategy)
    module = network()
    f.setup(module, torch.optim.SGD(module.parameters(), lr=0.01))
    start = [parameter.clone() for parameter in module.parameters()]
    assert len(list(f.setup_dataloaders(loader()))) == 2
    assert all(torch.equal(a, b) for a, b in zip(start, module.parameters(), strict=True))
    assert "the optimizer made no step in round 0" in caplog.text


def test_a_checkpoint_holds_what_is_not_sent_yet(loader: Make, tmp_path: Path) -> None:
    def set_up() -> tuple[Fabric, Any, dict[str, Any]]:
        f, module = fabric(PsycheFabricStrategy(k=4)), network()
        model, optimizer = f.setup(module, torch.optim.AdamW(module.parameters(), lr=0.01))
        return f, f.strategy._step.distro, {"model": model, "optimizer": optimizer}

    f, distro, state = set_up()
    try:
        train(f, state["model"], state["optimizer"], f.setup_dataloaders(loader()))
        f.save(tmp_path / "saved.ckpt", state)
        expected = {name: delta.clone() for name, delta in distro.delta()}
    finally:
        f.strategy.close()
    f, other, state = set_up()
    assert dict(other.delta()) == {}
    f.load(tmp_path / "saved.ckpt", state)
    found = dict(other.delta())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], delta) and delta.abs().max() > 0 for name, delta in expected.items())
    assert other.nonce == distro.nonce
    f.load(tmp_path / "saved.ckpt", {"optimizer": state["optimizer"]}, strict=False)
    plain = torch.optim.AdamW(network().parameters(), lr=0.01)
    state["optimizer"].load_state_dict(plain.state_dict())  # of a program without the strategy


def test_what_is_missing_is_said(loader: Make) -> None:
    f = fabric()
    batches = f.setup_dataloaders(loader())
    with pytest.raises(ConfigError, match="set up module and optimizer before training"):
        next(iter(batches))
    module = network()
    with pytest.raises(ConfigError, match="module and optimizer together"):
        f.setup_optimizers(torch.optim.SGD(module.parameters(), lr=0.01))
    _, optimizer = f.setup(module, torch.optim.SGD(module.parameters(), lr=0.01))
    with pytest.raises(ConfigError, match="needs a batch of the run"):
        optimizer.step()
    module = network()
    several = Fabric(strategy="psyche", accelerator="cpu", devices=2)
    with pytest.raises(ConfigError, match=r"devices=2, but its ranks are not started: call fabric\.launch\(\) first"):
        several.setup(module, torch.optim.SGD(module.parameters(), lr=0.01))
