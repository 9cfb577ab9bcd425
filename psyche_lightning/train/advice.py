"""Compares a recipe with what its model advises for some of its parameters."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from psyche_lightning.recipe.config import Recipe
from psyche_lightning.train.module import CausalModule

logger = logging.getLogger(__name__)


def missing_lines(module: CausalModule, recipe: Recipe) -> list[str]:
    """What a model advises for some of its parameters, and the recipe neither has nor sets otherwise.

    Args:
        module: its model may have the attribute ``advised``, see :class:`~psyche_lightning.hookspecs.ModelFactory`.
        recipe: is compared.

    Returns:
        Overrides, such as ``optimizer.lr_for={'*bias': 10}``.
    """
    advised: Mapping[str, Mapping[str, Any]] = getattr(module.model, "advised", {})
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]

    def unsaid(pattern: str, own: Collection[str]) -> list[str]:
        return [one for one in names if fnmatchcase(one, pattern) and not any(fnmatchcase(one, of) for of in own)]

    faster = {
        pattern: factor
        for pattern, factor in advised.get("lr_for", {}).items()
        if unsaid(pattern, recipe.optimizer.lr_for)
    }
    finer = {
        pattern: min(k, recipe.distro.k_limit)
        for pattern, k in advised.get("k_for", {}).items()
        if any(recipe.distro.k < min(k, recipe.distro.k_limit) for _ in unsaid(pattern, recipe.distro.k_for))
    }
    found = (("optimizer.lr_for", faster), ("distro.k_for", finer))
    return [f"{key}={values}" for key, values in found if values]


def say_missing_lines(module: CausalModule, recipe: Recipe) -> None:
    """Warn of each line that :func:`missing_lines` finds."""
    lines = missing_lines(module, recipe)
    if lines:
        logger.warning(
            "%s has parameters that need other values than the rest, and the recipe does not set them: add %s, or "
            "values of your own for them (the model's documentation says why)",
            type(module.model).__name__,
            " and ".join(lines),
        )
