"""What Lightning exchanges between its processes stays within a node, which says so."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping

from psyche_lightning.lightning.device import NodeDevices
from psyche_lightning.recipe.options import RunOptions

logger = logging.getLogger(__name__)

RUN_LOSS = "psyche/loss"
"""The metric that is the same on every node."""


class LocalCollectives(NodeDevices):
    """The collectives of Trainer and Fabric, with this node's ranks as their processes; a base beside Lightning's.

    Attributes:
        options: the node's.
    """

    options: RunOptions
    _said = False

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Trainer's ``sync_dist=True``: returns this node's value."""
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():  # Trainer itself counts batches with it
            self._say("self.log(sync_dist=True)")
        return self._reduced(tensor, group, reduce_op)

    def all_reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Fabric's ``all_reduce``: returns this node's value."""
        self._say("all_reduce")
        return self._reduced(tensor, group, reduce_op)

    def all_gather(self, tensor: torch.Tensor, group: Any | None = None, sync_grads: bool = False) -> torch.Tensor:
        """Returns this node's value, or one value for each of its ranks."""
        self._say("all_gather")
        return self._gathered(tensor, group, sync_grads)

    def _say(self, what: str) -> None:
        if self._said or self.options.coordinator is None or self.global_rank:
            return
        self._said = True
        logger.warning(
            "%s gives the value of this node alone: the nodes of a run exchange updates, not values of Trainer or "
            "Fabric. The run's training loss, the same on every node, is logged as %r.",
            what,
            RUN_LOSS,
        )


def monitored(trainer: Trainer) -> bool:
    """Whether a callback or a scheduler decides by the run's loss."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined] # set dynamically
    return any(getattr(one, "monitor", None) == RUN_LOSS for one in (*callbacks, *trainer.lr_scheduler_configs))


def tell_of_monitors(trainer: Trainer) -> None:
    """Say which callbacks decide by a metric of this node, in a run with other nodes."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined] # set dynamically
        if isinstance(callback, EarlyStopping) and callback.monitor != RUN_LOSS:
            logger.info(
                "EarlyStopping monitors %r of this node: where it differs between nodes, they leave the run at "
                "different steps. For the same decision on every node, monitor %r.",
                callback.monitor,
                RUN_LOSS,
            )
