"""Metrics that are the run's, and those that stay a node's and say so."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from support.fit import Fit

from psyche_lightning import PsycheStrategy
from psyche_lightning.errors import ConfigError
from psyche_lightning.lightning.callback import CoordinatorCallback
from psyche_lightning.lightning.fabric import PsycheFabricStrategy
from psyche_lightning.server.admin import CoordinatorAdmin

Make = Callable[..., Any]


class Heard(Callback):
    """Notes the run's loss and the node's own, and the learning rate of each step."""

    def __init__(self) -> None:
        self.run: list[float] = []
        self.own: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.run.append(float(trainer.callback_metrics.get("psyche/loss", math.nan)))  # there for who monitors it
        self.own.append(float(outputs["loss"]))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


class Sizes(Callback):
    """Notes the figures of the steps that are logged."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, float]] = {}

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % 4 == 0:
            names = ("gradient_norm", "momentum_norm", "agreement")
            known = {name: trainer.callback_metrics.get(f"psyche/{name}") for name in names}
            self.seen[trainer.global_step] = {name: float(one) for name, one in known.items() if one is not None}


def plateau(module: type[Any], monitor: str, interval: str = "step") -> Any:
    """A module whose learning rate halves when the metric stops to improve by a lot."""

    class Plateau(module):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, threshold=0.9)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": monitor, "interval": interval},
            }

    return Plateau()


def test_the_loss_of_the_run_decides_the_same_on_both_nodes(
    classifier: Make, loader: Make, trainer: Make, create_run: Make
) -> None:
    url, run = create_run(init_min_clients=2, total_steps=12, global_batch_size_start=8, global_batch_size_end=8)
    heard = [Heard(), Heard()]
    fits = [
        Fit(trainer(strategy=PsycheStrategy(url, run), callbacks=[each]), plateau(classifier, "psyche/loss"), loader())
        for each in heard
    ]
    assert [fit.wait() for fit in fits] == [None, None]
    assert len(heard[0].run) == 12
    assert heard[0].run == heard[1].run
    assert heard[0].own != heard[1].own
    means = [(one + two) / 2 for one, two in zip(heard[0].own, heard[1].own, strict=True)]
    assert heard[0].run == pytest.approx(means), "the median of two"
    assert heard[0].rates == heard[1].rates
    assert heard[0].rates[0] > heard[0].rates[-1]


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlap"])
def test_the_coordinator_has_the_means_of_what_the_nodes_log(
    classifier: Make, loader: Make, trainer: Make, create_run: Make, overlap: bool
) -> None:
    url, run = create_run(init_min_clients=2, total_steps=12, global_batch_size_start=8, global_batch_size_end=8)
    # A report has the newest figures alone, so those of a node that lags by all steps between two logs are lost.
    seen = [Sizes(), Sizes()]
    fits = [
        Fit(
            trainer(
                strategy=PsycheStrategy(url, run, overlap=overlap), callbacks=[each, CoordinatorCallback(log_every=4)]
            ),
            classifier(),
            loader(),
        )
        for each in seen
    ]
    assert [fit.wait() for fit in fits] == [None, None]
    status = CoordinatorAdmin(url).status(run)
    rows = {row["step"]: row["figures"] for row in status["metrics"] if row["figures"]}
    assert list(rows) == list(seen[0].seen) == [4, 8, 12]
    for step, row in rows.items():
        one, two = (each.seen[step] for each in seen)
        assert one.keys() == two.keys() == row.keys()
        assert "agreement" in row
        assert row == pytest.approx({name: (one[name] + two[name]) / 2 for name in one})
    for node in status["clients"]:
        (own,) = [
            each
            for each, fit in zip(seen, fits, strict=True)
            if fit.trainer.strategy.session.signer.hex() == node["signer"]
        ]
        assert {name: one["value"] for name, one in node["figures"].items()} == pytest.approx(own.seen[12])
        assert {one["step"] for one in node["figures"].values()} == {12}
    assert len({row["gradient_norm"] for row in rows.values()}) == 3
    # Each report also says how the round's time went, and what is trained.
    timed = [row for row in status["metrics"] if row["parts"]]
    assert len(timed) >= 8
    for row in timed:
        assert row["parts"].keys() == {"compute", "encode", "wait", "apply"}
        assert all(seconds >= 0 for seconds in row["parts"].values())
        assert row["learning_rate"] > 0
    trained = sum(parameter.numel() for parameter in fits[0].trainer.model.parameters())
    assert status["model"]["parameters"] == trained
    assert timed[-1]["ratio"] == pytest.approx(4 * trained / timed[-1]["bytes_up"])


def test_alone_the_loss_of_the_run_is_that_of_the_node(classifier: Make, loader: Make, trainer: Make) -> None:
    heard = Heard()
    stop = EarlyStopping("psyche/loss", patience=1, min_delta=100.0)
    fit = trainer(max_epochs=50, callbacks=[heard, stop])
    fit.fit(classifier(), loader())
    assert heard.run == pytest.approx(heard.own)
    assert (fit.current_epoch, stop.stopped_epoch) == (2, 1)


@pytest.mark.parametrize(("monitor", "interval"), [("val_loss", "epoch"), ("loss", "step")])
def test_alone_a_rate_may_follow_any_metric(
    classifier: Make, loader: Make, trainer: Make, monitor: str, interval: str
) -> None:
    heard = Heard()
    trainer(max_epochs=6, callbacks=[heard]).fit(plateau(classifier, monitor, interval), loader(), loader())
    assert heard.rates[0] > heard.rates[-1]


def test_with_others_a_rate_that_follows_a_metric_of_the_node_is_refused(
    classifier: Make, loader: Make, trainer: Make, create_run: Make
) -> None:
    url, run = create_run()
    with pytest.raises(ConfigError, match=r"monitors 'val_loss', a metric of this node alone.*Monitor 'psyche/loss'"):
        trainer(strategy=PsycheStrategy(url, run), max_steps=1).fit(plateau(classifier, "val_loss"), loader())


def test_sync_dist_says_once_that_values_are_the_nodes_own(
    classifier: Make, loader: Make, trainer: Make, create_run: Make, caplog: pytest.LogCaptureFixture
) -> None:
    class Synced(classifier):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(batch, batch_idx)
            self.log("synced", loss, sync_dist=True)
            return loss

    def said() -> list[str]:
        return [text for text in caplog.messages if "value of this node alone" in text]

    stop = EarlyStopping("loss", check_on_train_epoch_end=True)
    with caplog.at_level(logging.INFO, "psyche_lightning"):
        trainer(max_steps=2).fit(Synced(), loader())
        assert said() == []
        url, run = create_run()
        trainer(strategy=PsycheStrategy(url, run), max_steps=2, callbacks=[stop]).fit(Synced(), loader())
    assert len(said()) == 1
    assert "sync_dist=True" in said()[0]
    assert [text for text in caplog.messages if "EarlyStopping monitors 'loss' of this node" in text]


def test_the_collectives_of_fabric_say_so_too(caplog: pytest.LogCaptureFixture) -> None:
    strategy = PsycheFabricStrategy("http://127.0.0.1:1", "r")
    value = torch.ones(2)
    with caplog.at_level(logging.WARNING, "psyche_lightning"):
        assert strategy.all_reduce(value) is value
        assert strategy.all_gather(value) is value
        assert strategy.broadcast(value) is value
    assert ["all_reduce" in text for text in caplog.messages] == [True]
