"""Recipes: a run as a YAML file, its typed form, and what must be equal on all nodes."""

from psyche_lightning.recipe.config import Recipe
from psyche_lightning.recipe.loading import find_recipe, load_recipe, resolve

__all__ = ["Recipe", "find_recipe", "load_recipe", "resolve"]
