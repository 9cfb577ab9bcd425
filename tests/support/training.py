"""Several nodes of one run in threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from psyche_lightning.recipe.config import Recipe
from psyche_lightning.train.runner import train_recipe

PATIENCE = 240.0


def train_all(recipes: Sequence[Recipe], url: str, run: str, folders: Sequence[Path]) -> list[Any]:
    """Train a recipe in each folder, as nodes of one run; returns results, or the errors with which nodes ended."""
    results: list[Any] = [None] * len(recipes)

    def node(place: int) -> None:
        try:
            results[place] = train_recipe(recipes[place], coordinator_url=url, run_id=run, directory=folders[place])
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=node, args=(place,), daemon=True) for place in range(len(recipes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return results
