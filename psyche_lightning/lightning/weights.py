"""Weighs the micro-batches of a share: the share's loss is the mean over all that their losses are means over."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch

from psyche_lightning.errors import ConfigError

WEIGHT = "weight"
"""Key of a ``training_step``'s output: the number of tokens, or of whatever else, that its loss is the mean over."""
LABELS = "labels"
"""Key of a batch: whole numbers, -100 where nothing is trained."""
IGNORED = -100
"""The label without a loss, in torch and in transformers."""


def trained(labels: torch.Tensor, shifted: bool) -> int:
    """The number of labels with a loss.

    Args:
        labels: whole numbers, [batch, ...].
        shifted: whether the model compares them with the outputs one place before, so that the first has no loss.
    """
    return int((_compared(labels, shifted) != IGNORED).sum())


def shifts(module: torch.nn.Module) -> bool:
    """Whether a module trains a model that shifts its labels, as causal language models of transformers do.

    A module can say so itself, by an attribute ``shifts_labels``.
    """
    told = getattr(module, "shifts_labels", None)
    if told is not None:
        return bool(told)
    models = sys.modules.get("transformers.modeling_utils")
    if models is None:  # then the module has no such model
        return False
    found = (one for one in module.modules() if isinstance(one, models.PreTrainedModel) and one.can_generate())
    outermost = next(found, None)  # an encoder-decoder may hold a decoder that would shift on its own
    return outermost is not None and not getattr(outermost.config, "is_encoder_decoder", False)


class ShareLoss:
    """Adds up the losses of a share, and says what to run backward.

    The sum of the weights is known only after the last micro-batch. Until then gradients are those for a guess,
    :attr:`correction` times which they are those of the mean. The guess is right if each label is trained, and if all
    samples weigh the same.

    Args:
        samples: samples of the whole share.
        shifted: see :func:`shifts`.
        common: whether the guess is the number of samples, so that ranks that add up theirs have the same.

    Attributes:
        value: the sum so far, for the guess; None if nothing was added.
        weight: the sum of the weights.
    """

    def __init__(self, samples: int, shifted: bool, common: bool = False) -> None:
        self.value: torch.Tensor | None = None
        self._samples = samples
        self._shifted = shifted
        self.weight = 0.0
        self._guess = float(samples) if common else 0.0

    def part(self, output: Any, batch: Any, samples: int) -> torch.Tensor | None:
        """Add a micro-batch.

        Args:
            output: what its ``training_step`` returned.
            batch: the micro-batch.
            samples: its samples; 0 if it is trained for the sake of other ranks.

        Returns:
            The loss to run backward; None if the micro-batch adds nothing.

        Raises:
            ConfigError: the weight in the output is not a finite number from 0.
        """
        loss = loss_of(output)
        weight, most = self._weigh(output, batch, samples) if samples else (0, 0)
        if loss is None or not weight:
            return None
        self._guess = self._guess or most / samples * self._samples
        self.weight += weight
        part = loss * (weight / self._guess)
        self.value = part.detach() if self.value is None else self.value + part.detach()
        return part

    def add_others(self, value: float | None, weight: float) -> None:
        """Make value and weight those of all ranks of a node.

        Args:
            value: the sum of theirs; None if nothing was added on any.
            weight: the sum of theirs.
        """
        self.value, self.weight = None if value is None else torch.tensor(value), weight

    @property
    def correction(self) -> float:
        """The guess, divided by the sum of the weights; 1 if nothing was added."""
        return self._guess / self.weight if self.weight else 1.0

    def _weigh(self, output: Any, batch: Any, samples: int) -> tuple[float, float]:
        """A micro-batch's weight, and its weight if each of its labels were trained."""
        if isinstance(output, Mapping) and WEIGHT in output:
            weight = float(output[WEIGHT])
            if not 0 <= weight < math.inf:
                raise ConfigError(
                    f"training_step returned the {WEIGHT!r} {weight}; expected how many tokens (or whatever else) its "
                    "loss is the mean over: a finite number from 0"
                )
            return weight, weight
        labels = batch.get(LABELS) if isinstance(batch, Mapping) else None
        if isinstance(labels, torch.Tensor) and labels.ndim and not labels.dtype.is_floating_point:
            compared = _compared(labels, self._shifted)
            return int((compared != IGNORED).sum()), compared.numel()
        return samples, samples


def loss_of(output: Any) -> torch.Tensor | None:
    """The loss in what a ``training_step`` returned."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, torch.Tensor) else None


def _compared(labels: torch.Tensor, shifted: bool) -> torch.Tensor:
    return labels[:, 1:] if shifted and labels.ndim > 1 else labels
