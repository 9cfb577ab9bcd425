"""The samples on which a node validates."""

from __future__ import annotations

import torch

from psyche_lightning.errors import ConfigError
from psyche_lightning.hookspecs import DataProvider
from psyche_lightning.plugins import load_plugins
from psyche_lightning.recipe.config import Recipe


def validation_samples(recipe: Recipe, provider: DataProvider) -> list[dict[str, torch.Tensor]]:
    """The samples of each validation: from the set that ``data.validation`` describes, or else held out by the data.

    A set of its own gives the first ``trainer.validation_samples`` of its order.

    Args:
        recipe: the node's recipe.
        provider: its training data.

    Returns:
        The samples; none if ``trainer.validate_every`` is 0.

    Raises:
        ConfigError: there is nothing to validate on, or the set does not fit the training data.
        DataError: some of the samples are not available.
    """
    if not recipe.trainer.validate_every:
        return []
    most = recipe.trainer.validation_samples
    separate = separate_set(recipe, provider)
    found = provider.validation()[:most] if separate is None else separate.samples(0, min(most, len(separate)))
    if not found:
        raise ConfigError(
            f"trainer.validate_every is {recipe.trainer.validate_every}, but there is nothing to validate on. Hold out "
            "samples of the data (data.config.validation_samples=64), name a set of its own with the options in which "
            "it differs (data.validation={split: validation} or {path: ...}), or set trainer.validate_every=0."
        )
    return found


def separate_set(recipe: Recipe, provider: DataProvider) -> DataProvider | None:
    """Opens the set that ``data.validation`` describes; None if the recipe has none.

    Raises:
        ConfigError: it cannot be opened, or does not fit the training data.
    """
    if not recipe.data.validation:
        return None
    if recipe.data.config.get("validation_samples") or recipe.data.config.get("validation_fraction"):
        raise ConfigError(
            "The recipe has a set for validation (data.validation) and holds out training samples "
            "(data.config.validation_samples or validation_fraction); expected one of them. Set the latter to 0."
        )
    try:
        factory = load_plugins().data_providers()[recipe.data.name]
        found: DataProvider = factory(recipe.data.validation_options, seed=recipe.run.seed)
    except ConfigError as error:
        raise ConfigError(f"data.validation: {error}") from error
    if (found.vocab_size, found.seq_len) != (provider.vocab_size, provider.seq_len):
        raise ConfigError(
            f"data.validation has {found.vocab_size} token ids in samples of {found.seq_len}, but the training data "
            f"{provider.vocab_size} in samples of {provider.seq_len}; expected the same tokenizer and seq_len."
        )
    return found
