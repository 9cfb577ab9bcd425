"""A small model, data, and a Trainer that is quiet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

import psyche_lightning  # noqa: F401 - registers the strategy

FEATURES, SAMPLES = 6, 48


class Classifier(LightningModule):
    """What a user writes: nothing in it knows of this package."""

    def __init__(self, lr: float = 0.01, norm: bool = False) -> None:
        super().__init__()
        layers = [torch.nn.Linear(FEATURES, 8), torch.nn.BatchNorm1d(8)] if norm else [torch.nn.Linear(FEATURES, 8)]
        self.net = torch.nn.Sequential(*layers, torch.nn.Tanh(), torch.nn.Linear(8, 2))
        self.lr = lr

    def loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, FEATURES, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long())


def bytes_of(module: torch.nn.Module) -> bytes:
    """All parameters, to the bit."""
    return b"".join(parameter.detach().numpy().tobytes() for parameter in module.parameters())


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PSYCHE_COORDINATOR", "PSYCHE_RUN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def classifier() -> type[Classifier]:
    return Classifier


@pytest.fixture
def loader() -> Callable[..., DataLoader[Any]]:
    """Makes a DataLoader over the samples."""
    return lambda **options: DataLoader(samples(), **{"batch_size": 8, **options})


@pytest.fixture
def trainer() -> Callable[..., Trainer]:
    """Makes a Trainer without output."""

    def make(**options: Any) -> Trainer:
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        return Trainer(**{"strategy": "psyche", "accelerator": "cpu", "devices": 1, **quiet, **options})

    return make


@pytest.fixture
def parameter_bytes() -> Callable[[torch.nn.Module], bytes]:
    return bytes_of
