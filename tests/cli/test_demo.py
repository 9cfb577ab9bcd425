"""``psyche demo`` without its processes: what it asks for and what it prints."""

from __future__ import annotations

import pytest

from psyche_lightning.cli.demo.command import _stretched
from psyche_lightning.recipe import load_recipe


@pytest.mark.parametrize("recipe", ["demo", "hf-llama", "consilience-40b", "mla-200m"])
@pytest.mark.parametrize("rounds", [1, 2, 6, 10, 11, 1000])
def test_a_schedule_fits_any_number_of_rounds(recipe: str, rounds: int) -> None:
    whole = load_recipe(recipe)
    steps = whole.run.coordinator.total_steps
    fitted = load_recipe(recipe, [*_stretched(whole, rounds), f"total_steps={rounds}"])
    assert fitted.optimizer.schedule.warmup_steps == whole.optimizer.schedule.warmup_steps * rounds // steps
    assert all(0 <= fitted.schedule(step) <= whole.optimizer.lr for step in range(1, rounds + 1))
    assert _stretched(whole, steps) == [
        f"optimizer.schedule.{name}={length}" for name, length in whole.optimizer.schedule.lengths(1).items()
    ]
