"""What Trainer counts, validates and saves, and when: as with Lightning's default strategy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from psyche_lightning import PsycheStrategy

Make = Callable[..., Any]


class Moments(Callback):
    """Notes the step of each validation, and what the module is told of the number of steps."""

    def __init__(self) -> None:
        self.validated: list[int] = []

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.validated.append(trainer.global_step)


def counts(make: Make, module: Any, loader: Make, folder: Path, **options: Any) -> dict[str, Any]:
    """Everything that is counted in a fit of 6 batches a pass."""
    moments, saving = Moments(), ModelCheckpoint(folder, save_top_k=-1, monitor="val_loss")
    fit = make(callbacks=[moments, saving], enable_checkpointing=True, **options)
    fit.fit(module, loader(), loader())
    return {
        "validated": moments.validated,
        "estimated": module.estimated,
        "steps": fit.global_step,
        "epochs": fit.current_epoch,
        "saved": sorted(Path(path).name for path in saving.best_k_models),
        "limits": (fit.max_steps, fit.max_epochs, fit.min_epochs, fit.limit_train_batches, fit.val_check_interval),
    }


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 8},
        {"max_epochs": 2},
        {"max_epochs": 2, "val_check_interval": 4},
        {"max_epochs": 2, "val_check_interval": 0.5},
        {"max_steps": 8, "val_check_interval": 3, "check_val_every_n_epoch": None},
        {"max_epochs": 3, "check_val_every_n_epoch": 2},
        {"max_epochs": 2, "limit_train_batches": 4, "accumulate_grad_batches": 2},
        {"max_epochs": 2, "val_check_interval": 2, "accumulate_grad_batches": 2},
        {"max_steps": 4, "max_epochs": 3, "min_epochs": 3},
        {"fast_dev_run": 4},
    ],
    ids=str,
)
def test_counts_are_those_of_the_default_strategy(
    classifier: Make, loader: Make, trainer: Make, tmp_path: Path, options: dict[str, Any]
) -> None:
    class Asking(classifier):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            self.estimated = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    ours = counts(trainer, Asking(), loader, tmp_path / "ours", **options)
    theirs = counts(trainer, Asking(), loader, tmp_path / "theirs", strategy="auto", **options)
    assert ours == theirs


def test_a_schedule_over_the_estimated_steps_ends_with_the_fit(classifier: Make, loader: Make, trainer: Make) -> None:
    class Cosine(classifier):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            steps = int(self.trainer.estimated_stepping_batches)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module = Cosine()
    fit = trainer(max_epochs=2, accumulate_grad_batches=3)
    fit.fit(module, loader())
    assert fit.global_step == 4
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0)


def test_a_run_that_ends_first_brings_no_validation_of_its_own(classifier: Make, loader: Make, trainer: Make) -> None:
    moments = Moments()
    options = {"max_steps": 20, "min_epochs": 3, "val_check_interval": 4, "num_sanity_val_steps": 0}
    fit = trainer(strategy=PsycheStrategy(total_steps=5), callbacks=[moments], **options)
    fit.fit(classifier(), loader(), loader())
    assert (fit.global_step, moments.validated) == (5, [4])
    assert (fit.max_steps, fit.min_epochs) == (20, 3)
