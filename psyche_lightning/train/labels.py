"""Looks, before anything is trained, at whether samples have labels that are."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from psyche_lightning.errors import ConfigError, DataError, counted
from psyche_lightning.hookspecs import DataProvider
from psyche_lightning.lightning.weights import IGNORED, trained

logger = logging.getLogger(__name__)

LOOKED_AT = 256
"""Training samples whose labels are looked at before training."""


def check_labels(provider: DataProvider, validation: Iterable[dict[str, torch.Tensor]]) -> None:
    """Say how many of the first training samples have no trained label. Reads one, if all its labels are trained.

    Args:
        provider: the data.
        validation: the samples for validation; may be empty.

    Raises:
        ConfigError: no training sample has one, or none for validation.
        DataError: the first training sample is unavailable.
    """
    kept = list(validation)
    if kept and not any(map(_is_trained, kept)):
        raise ConfigError(
            f"none of the {counted(len(kept), 'validation sample')} has a trained label (all are {IGNORED}), so there "
            "is no validation loss; give others, or set trainer.validate_every=0"
        )
    if bool((provider.samples(0, 1)[0]["labels"] != IGNORED).all()):
        return  # probably text, of which everything is trained
    count = min(len(provider), LOOKED_AT)
    try:
        untrained = sum(not _is_trained(sample) for sample in provider.samples(0, count))
    except DataError:
        return  # the rounds that need these samples say more
    if untrained == len(provider):
        raise ConfigError(
            f"none of the {counted(count, 'training sample')} has a trained label: all are {IGNORED}, but for the "
            "first of a sample, which no token precedes. Look at the labels of the data."
        )
    if untrained:
        text = "%d of the first %d training samples have no trained label (all are %d): they add nothing"
        logger.warning(text, untrained, count, IGNORED)


def _is_trained(sample: dict[str, torch.Tensor]) -> bool:
    return trained(sample["labels"][None], True) > 0
