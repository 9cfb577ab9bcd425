"""The cost of a step of ``Trainer(strategy="psyche")`` alone, next to that of Trainer's default strategy."""

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

from psyche_lightning.bench.quality.training import CONTEXT, build_model
from psyche_lightning.lightning import PsycheStrategy

WARM_UP = 60
"""Steps before the clock starts, in whole rounds: until Trainer has logged for the first time, which imports."""
STRATEGIES = ("default", "psyche")
SAMPLES = 4
"""Windows of :data:`~psyche_lightning.bench.quality.training.CONTEXT` tokens in a batch of the language model."""


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

    def loader(self) -> DataLoader[Any]:
        """Single samples."""
        data = TensorDataset(torch.randn(1024, 32, generator=torch.Generator().manual_seed(0)))
        return DataLoader(data, batch_size=1)


class LanguageModule(LightningModule):
    """The small language model of ``psyche bench quality``, trained by AdamW: a step costs some milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build_model("small", 0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss of the next token."""
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def loader(self) -> DataLoader[Any]:
        """Batches of :data:`SAMPLES` windows of random bytes."""
        data = torch.randint(0, 256, (1024, CONTEXT), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(data), batch_size=SAMPLES)


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
    """Times the steps of one fit, from one of them to another."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self._began = 0.0, 0.0
        self.cpu = self.wall = 0.0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.first:
            self._began = time.process_time(), time.perf_counter()
        elif trainer.global_step == self.last:
            cpu, wall = self._began
            self.cpu, self.wall = time.process_time() - cpu, time.perf_counter() - wall


def measure(steps: int, repeats: int, local_steps: int = 0) -> dict[str, StepCost]:
    """Train with each strategy in turn, several times.

    Args:
        steps: timed steps of each run; with local steps, the whole rounds that have at most as many, but one at least.
        repeats: runs of each strategy.
        local_steps: of a round with the strategy ``psyche``, each of which is compared with a step of the default
            strategy; 0 for DisTrO's form. With local steps, a language model is trained in place of the small layer.
    """
    length = max(1, local_steps)
    before, rounds = -(-WARM_UP // length), max(1, steps // length)
    costs = {name: StepCost() for name in STRATEGIES}
    with _quiet():
        for _ in range(repeats):
            for name in STRATEGIES:
                unit = length if name == "default" else 1  # steps of Trainer in a round
                clock = _Clock(before * unit, (before + rounds) * unit)
                _fit(name, local_steps, clock)
                costs[name].cpu.append(clock.cpu / (rounds * length))
                costs[name].wall.append(clock.wall / (rounds * length))
    return costs


def _fit(name: str, local_steps: int, clock: _Clock) -> None:
    ours = PsycheStrategy(local_steps=local_steps, chunk=32, k=50) if local_steps else PsycheStrategy()
    trainer = Trainer(
        strategy="auto" if name == "default" else ours,
        accelerator="cpu",
        devices=1,
        max_steps=clock.last,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = LanguageModule() if local_steps else SmallModule()
    trainer.fit(module, module.loader())


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
