"""``optimizer.lr_for``: other learning rates for some parameters."""

from __future__ import annotations

import pytest
import torch

from psyche_lightning.errors import ConfigError
from psyche_lightning.recipe.config import OptimizerSection, ScheduleSection
from psyche_lightning.train.module import CausalModule


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.frozen = (torch.nn.Linear(2, 2, bias=False) for _ in range(3))
        self.frozen.requires_grad_(False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids


def rates(**factors: float) -> tuple[list[float], list[float]]:
    """The rates of body and head in the first and the second step."""
    section = OptimizerSection(lr=0.1, lr_for=factors, schedule=ScheduleSection(warmup_steps=2))
    module = CausalModule(Model(), section, section.schedule.build(0.1, 10))
    found = module.configure_optimizers()
    owners = {id(p): group for group in found["optimizer"].param_groups for p in group["params"]}
    both = [owners[id(layer.weight)] for layer in (module.model.body, module.model.head)]
    first = [group["lr"] for group in both]
    found["optimizer"].step()
    found["lr_scheduler"]["scheduler"].step()
    return first, [group["lr"] for group in both]


def test_the_first_pattern_counts_and_the_schedule_is_that_of_all() -> None:
    assert rates() == ([0.05, 0.05], [0.1, 0.1])
    first, second = rates(**{"model.head*": 10, "model.*": 0.5})
    assert first == pytest.approx([0.025, 0.5])
    assert second == pytest.approx([0.05, 1.0])


def test_what_is_wrong_is_refused() -> None:
    with pytest.raises(ConfigError, match="lr_for has 'frozen', which matches no trainable parameter"):
        rates(frozen=2)
    with pytest.raises(ConfigError, match="lr_for of 'head' is -1; choose a number from 0 on"):
        rates(head=-1)
