"""The private names of Lightning, and of torch beside them, that this room uses: nothing else in it does.

Each has no public counterpart, for the reason that stands with it. All were checked with Lightning 2.6.6 and torch
2.13; the tests of this room use every one. (What DisTrO uses of torch is in ``psyche_lightning/distro/internals.py``.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.data import _auto_add_worker_init_fn
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from psyche_lightning.distro.internals import note_step


def seed_workers(loader: DataLoader[Any]) -> None:
    """Seed the worker processes as ``seed_everything(workers=True)`` asks.

    Trainer and Fabric do this for loaders that they make or replace, and have no function for a loader made elsewhere.
    """
    _auto_add_worker_init_fn(loader, 0)


def before_transfer(module: LightningModule, batch: Any) -> Any:
    """What the module's ``on_before_batch_transfer`` makes of a batch.

    Trainer's data fetcher calls the hooks around a transfer; a strategy can only ask for those after it. A batch that
    Trainer did not fetch has to go through this one as well.
    """
    return module._on_before_batch_transfer(batch, dataloader_idx=0)


def weigh(trainer: Trainer, batch: Any) -> None:
    """Let ``self.log`` weigh what it gets by the size of this batch.

    Trainer notes the batch that it fetched; further micro-batches of the same step are not Trainer's.
    """
    results = trainer._results
    if results is not None:
        results.batch, results.batch_size = batch, None


def set_steps(trainer: Trainer, done: int) -> None:
    """Set the number of steps that loggers use for their x-axis; Trainer only ever counts it up."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = done


def set_fetched(trainer: Trainer, batches: int) -> None:
    """Set how many batches of the epoch were fetched, by which Trainer knows its last one; it only ever counts up."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        fetcher.fetched = batches


def replace_step(optimizer: torch.optim.Optimizer, step: Callable[..., Any]) -> None:
    """Put ``step`` in place of the optimizer's.

    torch's schedulers warn of a step that was replaced after they were made, and of an optimizer that made none; they
    look for two marks, which nothing public sets.
    """
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    note_step(optimizer)
    optimizer.step = step  # type: ignore[method-assign]
