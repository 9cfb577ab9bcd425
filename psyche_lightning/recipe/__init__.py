"""Recipes describe a run: the YAML file, its typed form, and the part that is equal on all nodes."""

from psyche_lightning.recipe.config import Recipe
from psyche_lightning.recipe.loading import find_recipe, load_recipe, resolve

__all__ = ["Recipe", "find_recipe", "load_recipe", "resolve"]
