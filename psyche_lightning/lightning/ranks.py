"""What the ranks of a node exchange in a round: the gradients of a share that they train together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor

from psyche_lightning.errors import DataError
from psyche_lightning.lightning.optimizers import TakenStep
from psyche_lightning.lightning.supported import check_streamed
from psyche_lightning.lightning.weights import ShareLoss
from psyche_lightning.lightning.world import World


class RankGradients:
    """Makes one gradient of those of a node's ranks.

    Args:
        world: the ranks.
        step: the module with its optimizer, the same on all ranks.

    Attributes:
        declined: whether a rank lacked samples of the current share, so that the node gives no update.

    Raises:
        ConfigError: gradients are streamed.
    """

    def __init__(self, world: World, step: TakenStep) -> None:
        if step.distro.ranks is None:
            why = "several devices with inner='ddp' reduce their gradients after the backward pass"
            check_streamed(why, step.distro.holding)
        self._world = world
        self._step = step
        self.declined = False

    def average(
        self, weight: float, loss: float, samples: int, lost: DataError | None = None
    ) -> tuple[float, float, int] | None:
        """Replace gradients by their mean over all ranks; all ranks call it at once.

        Args:
            weight: what this rank's gradients are the mean over: samples, tokens; at 0 they do not count.
            loss: mean loss of that.
            samples: samples of this rank.
            lost: the error if this rank lacks some of them.

        Returns:
            Weight, mean loss and samples of all ranks; None if a rank lacks samples, and gradients stay.
        """
        parameters = [parameter for parameter in self._step.parameters if parameter.requires_grad]
        counts = bool(weight)
        there = [float(counts and parameter.grad is not None) for parameter in parameters]
        ours = [weight, weight * loss if counts else 0.0, float(samples), float(lost is not None)]
        whole, losses, count, gone, *present = self._world.sum([*ours, *there])
        if gone:
            self.declined = True
            return None
        used = [parameter for parameter, some in zip(parameters, present, strict=True) if some]
        for parameter, some in zip(parameters, present, strict=True):
            if not some:
                parameter.grad = None
        if whole:
            self._world.mix(used, weight / whole)
        return whole, losses / whole if whole else 0.0, int(count)

    def totals(self, mean: ShareLoss) -> tuple[float | None, float]:
        """The sums over all ranks of a mean's value and weight; None for a value of nothing."""
        value, weight, some = self._world.sum(
            [0.0 if mean.value is None else float(mean.value), mean.weight, float(mean.value is not None)]
        )
        return value if some else None, weight

    def total(self, value: float) -> float:
        """The sum of the ranks' values."""
        return self._world.sum([value])[0]

    @property
    def _whole(self) -> list[torch.nn.Parameter]:
        """The trained parameters that are not divided."""
        return [one for one in self._step.parameters if one.requires_grad and not isinstance(one, DTensor)]

    def sum_whole(self) -> None:
        """Make gradients of parameters that are not divided their sums over all ranks; all ranks call it at once."""
        if whole := self._whole:
            self._world.mix(whole, 1.0)

    @contextmanager
    def summing(self) -> Iterator[None]:
        """A block that runs backward: what it adds to gradients is then the sum over all ranks for whole ones, too."""
        whole = self._whole
        earlier = [parameter.grad for parameter in whole]
        for parameter in whole:
            parameter.grad = None
        yield
        self.sum_whole()
        for parameter, gradient in zip(whole, earlier, strict=True):
            if gradient is not None and parameter.grad is not None:
                parameter.grad += gradient

    def agreed(self, error: DataError | None) -> DataError | None:
        """The error for which all ranks decline a round: this rank's, or that another one has one; None without any."""
        (gone,) = self._world.sum([float(error is not None)])
        if error is None and gone:
            return DataError("the samples of another rank of this node were unavailable; its messages say why", ids=())
        return error


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
