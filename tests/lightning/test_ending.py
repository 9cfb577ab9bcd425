"""How a Trainer's part in a run ends: with the run's last parameters, or with an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from support.fit import Fit, StopAt, until

from psyche_lightning import PsycheStrategy
from psyche_lightning.errors import ConfigError, CoordinatorError, PsycheError, UnfinishedError
from psyche_lightning.lightning.fabric import PsycheFabricStrategy
from psyche_lightning.server.admin import CoordinatorAdmin, ServerRun

Make = Callable[..., Any]


class Loop:
    """What a user of Fabric writes."""

    def __init__(self, strategy: PsycheFabricStrategy) -> None:
        self.fabric = Fabric(strategy=strategy, accelerator="cpu", devices=1)

    def fit(self, module: Any, loader: Any) -> None:
        self.fabric.setup(module, module.configure_optimizers())
        self.batches = self.fabric.setup_dataloaders(loader)
        next(iter(self.batches))


def test_a_run_that_ends_without_parameters_fails_on_every_node(
    classifier: Make, loader: Make, trainer: Make, create_run: Make
) -> None:
    """Its owner says that it is over, while nodes wait for members."""
    start = {"start": {"step": 5, "data_index": 0}}
    url, run = create_run(start, init_min_clients=3, total_steps=9, global_batch_size_start=8)
    fits = [Fit(trainer(strategy=PsycheStrategy(url, run, manifest=start)), classifier(), loader())]
    loop, other = Loop(PsycheFabricStrategy(url, run, manifest=start)), classifier()
    admin = CoordinatorAdmin(url)
    until(lambda: len(admin.status(run)["pending"]) == 1)
    fits.append(Fit(loop, other, loader()))
    until(lambda: len(admin.status(run)["pending"]) == 2)
    admin.pause(run)
    admin.command(run, "update", config={"total_steps": 5})
    admin.resume(run)
    for fit in fits:
        assert isinstance(fit.wait(), UnfinishedError)
        assert "the run is finished; no parameters were agreed" in str(fit.error)
    assert fits[0].untouched
    with pytest.raises(UnfinishedError):
        next(iter(loop.batches))
    loop.fabric.strategy.close()


def test_a_run_that_its_owner_removes_fails_on_every_node(
    classifier: Make, loader: Make, trainer: Make, create_run: Make
) -> None:
    url, run = create_run(init_min_clients=2)
    fit = Fit(trainer(strategy=PsycheStrategy(url, run), max_steps=4), classifier(), loader())
    admin = CoordinatorAdmin(url)
    until(lambda: len(admin.status(run)["pending"]) == 1)
    admin.pause(run)
    admin.command(run, "close")
    assert isinstance(fit.wait(), PsycheError)
    assert run in str(fit.error)
    assert fit.untouched


def test_a_finished_run_is_refused_at_once(classifier: Make, loader: Make, trainer: Make, create_run: Make) -> None:
    url, run = create_run()
    trainer(strategy=PsycheStrategy(url, run), max_steps=3).fit(classifier(), loader())
    late = Fit(trainer(strategy=PsycheStrategy(url, run), max_steps=30), classifier(), loader())
    assert isinstance(late.wait(), CoordinatorError)
    assert "finished after 3 steps" in str(late.error)
    assert "checkpoint.resume" in str(late.error)
    assert late.untouched


def test_a_second_fit_joins_again_while_the_run_goes_on_and_is_refused_after_its_end(
    classifier: Make, loader: Make, trainer: Make, create_run: Make
) -> None:
    url, run = create_run(total_steps=6)
    stop = StopAt(2)
    fit, module = trainer(strategy=PsycheStrategy(url, run), callbacks=[stop], min_epochs=0), classifier()
    fit.fit(module, loader())
    assert fit.global_step == 2
    before = [parameter.detach().clone() for parameter in module.parameters()]
    stop.step = 0
    fit.fit(module, loader())
    assert fit.global_step == 6
    assert stop.seen[:2] == [1, 2]
    assert stop.seen[2:] == list(range(stop.seen[2], 7)), "from where the run is"
    assert not any(torch.equal(*pair) for pair in zip(before, module.parameters(), strict=True))
    with pytest.raises(CoordinatorError, match="finished after 6 steps"):
        fit.fit(module, loader())
    assert fit.global_step == 6


@pytest.mark.parametrize("limit", [{"max_steps": 3}, {"max_epochs": 1}, {"max_time": {"seconds": 0}}])
def test_a_fit_that_has_nothing_to_do_says_so(
    limit: dict[str, Any], classifier: Make, loader: Make, trainer: Make
) -> None:
    fit, module = trainer(**{"max_epochs": -1, **limit}), classifier()
    if "max_time" not in limit:
        fit.fit(module, loader())
    with pytest.raises(ConfigError, match="this fit trained nothing"):
        fit.fit(module, loader())


@pytest.mark.parametrize("limit", [{"max_steps": 2}, {"max_epochs": 1}])
def test_a_run_that_is_beyond_the_limits_of_a_trainer_is_no_training(
    limit: dict[str, int], classifier: Make, loader: Make, trainer: Make, create_run: Make
) -> None:
    """Six batches make an epoch of Trainer, and the run is at step eight."""
    start = {"start": {"step": 7, "data_index": 56}}
    url, run = create_run(start, total_steps=9, global_batch_size_start=8)
    late = Fit(trainer(strategy=PsycheStrategy(url, run, manifest=start), **limit), classifier(), loader())
    assert isinstance(late.wait(), ConfigError)
    assert "was at step 8 when this node became a member" in str(late.error)
    assert late.untouched


def test_a_fabric_that_left_its_run_trains_nothing_silently(
    loader: Make, create_run: Make, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    url, run = create_run(total_steps=4)

    def batches(steps: int, folder: Path | None = tmp_path) -> Any:
        fabric = Fabric(strategy=PsycheFabricStrategy(url, run, directory=folder), accelerator="cpu", devices=1)
        module = torch.nn.Linear(6, 2)
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.01))
        data = fabric.setup_dataloaders(loader())
        for (x, y), _ in zip(data, range(steps), strict=False):
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return fabric, data

    fabric, data = batches(2)
    fabric.strategy.close()
    with pytest.raises(PsycheError, match="has left run"):
        next(iter(data))
    fabric, data = batches(9)  # another life on the same run
    assert fabric.strategy.finished is not None
    assert not caplog.messages
    assert list(data) == list(data) == []
    assert [text for text in caplog.messages if "is over: the loader has no more batches" in text] == caplog.messages
    assert len(caplog.messages) == 1
    with pytest.raises(CoordinatorError, match="finished after 4 steps"):
        batches(1, folder=None)  # a newcomer


@pytest.mark.parametrize("members", [1, 2])
def test_who_is_removed_fails_at_once(
    members: int, classifier: Make, loader: Make, trainer: Make, create_run: Make
) -> None:
    """While it trains, and while it waits for another member."""
    url, run = create_run(init_min_clients=members, total_steps=100_000, global_batch_size_start=8)
    fit = Fit(trainer(strategy=PsycheStrategy(url, run)), classifier(), loader())
    owner = ServerRun(url, run)
    until(lambda: owner.status()["step"] > 2 if members == 1 else len(owner.status()["pending"]) == 1)
    owner.kick(fit.trainer.strategy.session.identity.hex())
    assert isinstance(fit.wait(), CoordinatorError)
    assert fit.trainer.state.status == "interrupted"
    assert fit.trainer.global_step < 100_000
