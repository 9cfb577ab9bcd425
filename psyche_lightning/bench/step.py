"""The cost of a training step of ``Trainer(strategy="psyche")`` alone, next to that of Trainer's default strategy."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

WARM_UP = 20
"""Steps before the clock starts."""
STRATEGIES = {"default": "auto", "psyche": "psyche"}


class SmallModule(LightningModule):
    """``Linear(32, 2)``, trained by SGD: next to nothing to compute, so what remains is the cost of a step itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(32, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The mean square of the layer's output."""
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@dataclass
class StepCost:
    """The cost of a step.

    Attributes:
        cpu: seconds of all of the process's threads for a step, of each run.
        wall: seconds of a step, of each run.
    """

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @property
    def least_cpu(self) -> float:
        """Those of the run that took the fewest."""
        return min(self.cpu)

    @property
    def least_wall(self) -> float:
        """Those of the quickest run."""
        return min(self.wall)


class _Clock(Callback):
    """Times the steps of one fit after the first :data:`WARM_UP`."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._began = 0.0, 0.0
        self.cpu = self.wall = 0.0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == WARM_UP:
            self._began = time.process_time(), time.perf_counter()
        elif trainer.global_step == WARM_UP + self.steps:
            cpu, wall = self._began
            self.cpu, self.wall = (time.process_time() - cpu) / self.steps, (time.perf_counter() - wall) / self.steps


def measure(steps: int, repeats: int) -> dict[str, StepCost]:
    """Train with each strategy in turn, several times.

    Args:
        steps: timed steps of each run.
        repeats: runs of each strategy.
    """
    costs = {name: StepCost() for name in STRATEGIES}
    with _quiet():
        for _ in range(repeats):
            for name, strategy in STRATEGIES.items():
                clock = _Clock(steps)
                _fit(strategy, clock)
                costs[name].cpu.append(clock.cpu)
                costs[name].wall.append(clock.wall)
    return costs


def _fit(strategy: str, clock: _Clock) -> None:
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_steps=WARM_UP + clock.steps,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(torch.randn(1024, 32, generator=torch.Generator().manual_seed(0)))
    trainer.fit(SmallModule(), DataLoader(data, batch_size=1))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's lines about devices and workers, and ours about the run."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "psyche_lightning")]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
