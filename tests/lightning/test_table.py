"""docs/trainer-arguments.md has a row for each of Trainer's arguments and callbacks, and each row is true."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as lightning_callbacks
import pytest
from lightning.pytorch import Callback, Trainer, callbacks
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import HalfPrecision
from torch.utils.data import DataLoader

from psyche_lightning import PsycheStrategy
from psyche_lightning.errors import ConfigError

Make = Callable[..., Any]
PAGE = Path(__file__).parents[2] / "docs" / "trainer-arguments.md"
ROW = re.compile(r"^\| `(\w+)` \| (works|differs|refused)\b.* \|.*\|$", re.MULTILINE)


def rows(heading: str) -> dict[str, str]:
    """The first word on each name of a table of the page."""
    text = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return dict(ROW.findall(text))


def test_each_argument_and_each_callback_has_a_row() -> None:
    assert set(rows("Arguments")) == set(inspect.signature(Trainer).parameters)
    assert set(rows("Callbacks")) == set(lightning_callbacks.__all__)


BATCHES = 6
ARGUMENTS: dict[str, tuple[dict[str, Any], int]] = {
    "accelerator": ({"accelerator": "cpu", "max_steps": 2}, 2),
    "strategy": ({"strategy": PsycheStrategy(k=4), "max_steps": 2}, 2),
    "precision": ({"precision": "bf16-true", "max_steps": 2}, 2),
    "callbacks": ({"callbacks": [Callback()], "max_steps": 2}, 2),
    "fast_dev_run": ({"fast_dev_run": 3}, 3),
    "max_epochs": ({"max_epochs": 2}, 2 * BATCHES),
    "min_epochs": ({"strategy": PsycheStrategy(total_steps=3), "max_epochs": 4, "min_epochs": 3}, 3),
    "max_steps": ({"strategy": PsycheStrategy(total_steps=3), "max_steps": 5}, 3),
    "min_steps": ({"strategy": PsycheStrategy(total_steps=3), "max_steps": 9, "min_steps": 5}, 3),
    "max_time": ({"max_time": {"hours": 1}, "max_epochs": 1}, BATCHES),
    "limit_train_batches": ({"limit_train_batches": 3, "accumulate_grad_batches": 2, "max_epochs": 1}, 2),
    "limit_val_batches": ({"limit_val_batches": 1, "max_steps": 2}, 2),
    "limit_test_batches": ({"limit_test_batches": 1, "max_steps": 2}, 2),
    "limit_predict_batches": ({"limit_predict_batches": 1, "max_steps": 2}, 2),
    "val_check_interval": ({"val_check_interval": 3, "accumulate_grad_batches": 2, "max_epochs": 1}, 3),
    "check_val_every_n_epoch": ({"check_val_every_n_epoch": 2, "max_epochs": 2}, 2 * BATCHES),
    "num_sanity_val_steps": ({"num_sanity_val_steps": 1, "max_steps": 2}, 2),
    "log_every_n_steps": ({"log_every_n_steps": 2, "max_steps": 4}, 4),
    "enable_checkpointing": ({"enable_checkpointing": True, "max_steps": 2}, 2),
    "enable_progress_bar": ({"enable_progress_bar": True, "max_steps": 2}, 2),
    "enable_model_summary": ({"enable_model_summary": True, "max_steps": 2}, 2),
    "accumulate_grad_batches": ({"accumulate_grad_batches": 3, "max_epochs": 1}, 2),
    "gradient_clip_val": ({"gradient_clip_val": 0.1, "max_steps": 2}, 2),
    "gradient_clip_algorithm": ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value", "max_steps": 2}, 2),
    "deterministic": ({"deterministic": "warn", "max_steps": 2}, 2),
    "benchmark": ({"benchmark": False, "max_steps": 2}, 2),
    "inference_mode": ({"inference_mode": False, "max_steps": 2}, 2),
    "use_distributed_sampler": ({"use_distributed_sampler": False, "max_epochs": 1}, BATCHES),
    "profiler": ({"profiler": "simple", "max_steps": 2}, 2),
    "detect_anomaly": ({"detect_anomaly": True, "max_steps": 2}, 2),
    "plugins": ({"plugins": [HalfPrecision("bf16-true")], "max_steps": 2}, 2),
    "sync_batchnorm": ({"sync_batchnorm": True, "max_steps": 2}, 2),
    "reload_dataloaders_every_n_epochs": ({"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3}, 3 * BATCHES),
    "default_root_dir": ({"default_root_dir": "elsewhere", "max_steps": 2}, 2),
    "enable_autolog_hparams": ({"enable_autolog_hparams": False, "max_steps": 2}, 2),
    "model_registry": ({"model_registry": None, "max_steps": 2}, 2),
}
"""Options of a fit with a data set of six batches, and the steps that it makes."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "num_nodes": ({"num_nodes": 2}, "num_nodes=2.*start the same program on every machine"),
    "overfit_batches": ({"overfit_batches": 1}, "small data set instead"),
}


def test_each_argument_is_tried() -> None:
    table = rows("Arguments")
    assert {name for name, says in table.items() if says == "refused"} == set(REFUSED)
    assert {name for name, says in table.items() if says != "refused"} == {*ARGUMENTS, "devices", "logger", "barebones"}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_that_works(name: str, classifier: Make, loader: Make, trainer: Make) -> None:
    options, steps = ARGUMENTS[name]
    fit = trainer(**options)
    fit.fit(classifier(), loader(), loader())
    assert fit.state.status == "finished"
    assert fit.global_step == steps


def test_a_logger_gets_the_figures_of_the_run(classifier: Make, loader: Make, trainer: Make, tmp_path: Path) -> None:
    fit = trainer(logger=CSVLogger(tmp_path), log_every_n_steps=1, max_steps=2)
    fit.fit(classifier(), loader())
    header = (Path(fit.log_dir) / "metrics.csv").read_text().partition("\n")[0]
    assert {"loss_step", "psyche/clients"} <= set(header.split(","))


def test_barebones(classifier: Make, loader: Make) -> None:
    fit = Trainer(strategy="psyche", accelerator="cpu", devices=1, barebones=True, max_steps=2)
    fit.fit(classifier(), loader())
    assert fit.global_step == 2


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_that_is_refused(name: str, classifier: Make, loader: Make, trainer: Make) -> None:
    options, advice = REFUSED[name]
    with pytest.raises(ConfigError, match=advice):
        trainer(max_steps=2, **options).fit(classifier(), loader())


class Written(callbacks.BasePredictionWriter):
    def write_on_epoch_end(self, *args: Any) -> None:
        self.done = True


class Saving(callbacks.Checkpoint):
    """A checkpoint of the user's own."""


CALLBACKS: dict[str, Callable[[], Callback]] = {
    "Callback": Callback,
    "BasePredictionWriter": lambda: Written("epoch"),
    "BatchSizeFinder": lambda: callbacks.BatchSizeFinder("power", steps_per_trial=1, max_trials=1, init_val=4),
    "Checkpoint": Saving,
    "DeviceStatsMonitor": lambda: callbacks.DeviceStatsMonitor(cpu_stats=False),
    "EarlyStopping": lambda: callbacks.EarlyStopping("psyche/loss", check_on_train_epoch_end=True),
    "EMAWeightAveraging": callbacks.EMAWeightAveraging,
    "LambdaCallback": lambda: callbacks.LambdaCallback(on_train_start=lambda *_: None),
    "LearningRateFinder": lambda: callbacks.LearningRateFinder(num_training_steps=12),
    "LearningRateMonitor": callbacks.LearningRateMonitor,
    "ModelCheckpoint": lambda: callbacks.ModelCheckpoint("saved", every_n_train_steps=2),
    "ModelSummary": callbacks.ModelSummary,
    "OnExceptionCheckpoint": lambda: callbacks.OnExceptionCheckpoint("saved"),
    "ProgressBar": callbacks.ProgressBar,
    "RichModelSummary": callbacks.RichModelSummary,
    "RichProgressBar": callbacks.RichProgressBar,
    "SpikeDetection": callbacks.SpikeDetection,
    "ThroughputMonitor": lambda: callbacks.ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=2),
    "Timer": lambda: callbacks.Timer("00:01:00:00"),
    "TQDMProgressBar": callbacks.TQDMProgressBar,
    "WeightAveraging": lambda: callbacks.WeightAveraging(use_buffers=True),
}


REFUSED_CALLBACKS = {
    "BackboneFinetuning",
    "BaseFinetuning",
    "GradientAccumulationScheduler",
    "ModelPruning",
    "StochasticWeightAveraging",
}
"""Their errors are those of tests/lightning/test_callbacks.py."""


def test_each_callback_is_tried() -> None:
    table = rows("Callbacks")
    assert {name for name, says in table.items() if says == "refused"} == REFUSED_CALLBACKS
    assert {name for name, says in table.items() if says != "refused"} == set(CALLBACKS)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_that_works(name: str, classifier: Make, loader: Make, trainer: Make) -> None:
    class Sized(classifier):  # type: ignore[misc]
        batch_size = 8

        def train_dataloader(self) -> DataLoader[Any]:
            data: DataLoader[Any] = loader(batch_size=self.batch_size)
            return data

        def val_dataloader(self) -> DataLoader[Any]:
            return self.train_dataloader()

    options: dict[str, Any] = {"logger": True, "enable_model_summary": name == "ModelSummary"}
    options.update(enable_progress_bar=name.endswith("ProgressBar"), enable_checkpointing="Checkpoint" in name)
    fit = trainer(max_steps=4, log_every_n_steps=2, callbacks=[CALLBACKS[name]()], **options)
    fit.fit(Sized())
    assert (fit.state.status, fit.global_step) == ("finished", 4)
