"""What all ranks of a node do with rank 0 between rounds, where each of them has a part of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from psyche_lightning.lightning.session import Session
from psyche_lightning.lightning.strategy import PsycheStrategy

VALIDATE, CONTINUE, COPY, DIGEST = "validate", "continue a text", "copy", "name the parameters"


class Together(Callback):
    """Keeps the ranks of a node in one place while rank 0's callbacks use the model; put it after them.

    Args:
        strategy: knows the session.
        works: what rank 0 may have all ranks do, by name (:meth:`Session.on_shards`).
    """

    def __init__(self, strategy: PsycheStrategy, works: Mapping[str, Callable[..., Any]]) -> None:
        self._strategy = strategy
        self._works = works

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the ranks can do together."""
        self._session.works.update({DIGEST: self._session.digest, **self._works})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Wait for rank 0."""
        self._session.meet()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Wait for rank 0."""
        self._session.meet()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for rank 0."""
        self._session.meet()

    @property
    def _session(self) -> Session:
        """The node's membership, while it trains."""
        assert self._strategy.session is not None
        return self._strategy.session
