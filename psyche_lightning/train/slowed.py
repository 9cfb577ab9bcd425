"""A node that computes several times slower than it could, to show on one machine what a slow one does to a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer


class Slowed(Callback):
    """After each forward and backward pass of a step, sleeps for as long as they took, times ``factor`` less one.

    Args:
        factor: how many times slower, from 1.
        clock: monotonic seconds.
        sleep: waits for some seconds.
    """

    def __init__(
        self,
        factor: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._factor = factor
        self._clock = clock
        self._sleep = sleep
        self._began = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to measure."""
        self._began = self._clock()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Sleep, and begin to measure the next step, of which a share may have several."""
        self._sleep((self._factor - 1) * (self._clock() - self._began))
        self._began = self._clock()
