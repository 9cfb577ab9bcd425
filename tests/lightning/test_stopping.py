"""A node that stops lets the others go on, and nobody hangs without a word."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import RunningStage
from support.fit import PATIENCE, Fit, StopAt, until

from psyche_lightning import PsycheStrategy
from psyche_lightning.node.notices import TooFewMembers, Waits
from psyche_lightning.server.admin import CoordinatorAdmin

Make = Callable[..., Any]


class Broken(Callback):
    """Fails after a step."""

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 2:
            raise ValueError("broken")


@pytest.mark.parametrize("others", [False, True])
def test_a_fit_leaves_the_handlers_of_signals_as_they_were(
    others: bool, classifier: Make, loader: Make, trainer: Make, create_run: Make
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    strategy = PsycheStrategy(*create_run()) if others else "psyche"
    trainer(strategy=strategy, max_steps=2).fit(classifier(), loader())
    assert {number: signal.getsignal(number) for number in before} == before


def left(url: str, run: str) -> int:
    """How many nodes said goodbye, rather than vanish."""
    return [event["kind"] for event in CoordinatorAdmin(url).status(run)["events"]].count("left")


class Clock(Timer):
    """The Timer that ``max_time`` adds, whose time is over when the test says so."""

    over = False

    def time_remaining(self, stage: str = RunningStage.TRAINING) -> float | None:
        return 0.0 if self.over else super().time_remaining(stage)


@pytest.mark.parametrize("told", ["max_time", "should_stop"])
def test_a_wait_for_members_ends_when_trainer_is_told_to_stop(
    told: str, classifier: Make, loader: Make, trainer: Make, create_run: Make
) -> None:
    url, run = create_run(init_min_clients=2)
    clock = Clock({"hours": 1})
    fit = Fit(trainer(strategy=PsycheStrategy(url, run), max_steps=9, callbacks=[clock]), classifier(), loader())
    until(lambda: len(CoordinatorAdmin(url).status(run)["pending"]) == 1)
    if told == "max_time":
        clock.over = True
    else:
        fit.trainer.should_stop = True
    assert fit.wait() is None
    assert fit.trainer.global_step == 0
    assert left(url, run) == 1


def test_a_step_whose_results_did_not_come_in_time_is_not_counted(
    classifier: Make, loader: Make, trainer: Make, create_run: Make
) -> None:
    """The other node trains for longer than this one has."""
    url, run = create_run(init_min_clients=2, min_clients=2, total_steps=9)
    trains, goes_on = threading.Event(), threading.Event()

    class Slow(classifier):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            trains.set()
            goes_on.wait()
            loss: torch.Tensor = super().training_step(batch, batch_idx)
            return loss

    slow = Fit(trainer(strategy=PsycheStrategy(url, run)), Slow(), loader())
    quick = Fit(trainer(strategy=PsycheStrategy(url, run)), classifier(), loader())
    assert trains.wait(PATIENCE)
    session = quick.trainer.strategy.session
    until(lambda: session.samples > 0)  # it has submitted
    before = [parameter.detach().clone() for parameter in quick.module.parameters()]
    quick.trainer.should_stop = True
    assert quick.wait() is None
    assert quick.trainer.global_step == 0
    assert all(torch.equal(*pair) for pair in zip(before, quick.module.parameters(), strict=True))
    assert left(url, run) == 1
    slow.trainer.should_stop = True
    goes_on.set()
    assert slow.wait() is None


@pytest.mark.parametrize("how", ["EarlyStopping", "exception"])
def test_who_is_left_says_for_how_many_it_waits_and_goes_on_when_they_come(
    how: str, classifier: Make, loader: Make, trainer: Make, create_run: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "psyche_lightning")
    url, run = create_run(init_min_clients=2, min_clients=2, total_steps=6)
    options: dict[str, dict[str, Any]] = {
        "EarlyStopping": {"callbacks": [StopAt(2)], "min_epochs": 0},
        "exception": {"callbacks": [Broken()]},
    }
    stays = Fit(trainer(strategy=PsycheStrategy(url, run)), classifier(), loader())
    stops = Fit(trainer(strategy=PsycheStrategy(url, run), **options[how]), classifier(), loader())
    assert isinstance(stops.wait(), ValueError if how == "exception" else type(None))
    assert left(url, run) == 1

    def said(kind: type[Any]) -> list[str]:
        return [str(record.args[0]) for record in caplog.records if record.args and isinstance(record.args[0], kind)]

    until(lambda: bool(said(TooFewMembers)) and bool(said(Waits)))
    assert "waits for 1 more member. Start more nodes; or its owner" in said(TooFewMembers)[0]
    assert f"psyche run update {run} init_min_clients=1 min_clients=1" in said(TooFewMembers)[0]
    until(lambda: any("waits for 1 more member (has 1 of 2)" in text for text in said(Waits)))
    again = Fit(trainer(strategy=PsycheStrategy(url, run)), classifier(), loader())
    assert again.wait() is None
    assert stays.wait() is None
    assert (stays.trainer.global_step, again.trainer.global_step) == (6, 6)
    assert all(torch.equal(*pair) for pair in zip(stays.module.parameters(), again.module.parameters(), strict=True))
