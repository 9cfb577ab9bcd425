"""The recipe's optimizer: which one, and other learning rates for some parameters (``optimizer.lr_for``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from psyche_lightning import MuonAdamW
from psyche_lightning.errors import ConfigError
from psyche_lightning.recipe import load_recipe
from psyche_lightning.recipe.config import OptimizerSection, ScheduleSection
from psyche_lightning.train.module import CausalModule
from psyche_lightning.train.runner import train_recipe


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


def groups_of(**section: Any) -> list[tuple[float, bool, set[str]]]:
    """Rate, whether Muon trains it, and names of each group."""
    chosen = OptimizerSection(lr=0.1, **section)
    module = CausalModule(Model(), chosen, chosen.schedule.build(0.1, 10))
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    optimizer = module.configure_optimizers()["optimizer"]
    assert isinstance(optimizer, MuonAdamW) == (chosen.name == "muon")
    return [(group["lr"], group["muon"], {names[id(p)] for p in group["params"]}) for group in optimizer.param_groups]


def test_hidden_matrices_have_groups_of_their_own_with_muon() -> None:
    body, head = "model.body.weight", "model.head.weight"
    assert groups_of() == [(0.1, False, {body, head})]
    assert groups_of(name="muon") == [(0.1, True, {body}), (0.1, False, {head})]
    assert groups_of(name="muon", muon_for={"*head*": True}, lr_for={"*body*": 0.5}) == [
        (0.05, True, {body}),
        (0.1, True, {head}),
    ]
    for section, problem in (
        ({"name": "muon", "muon_for": {"*tail*": True}}, r"muon_for has '\*tail\*', which matches no parameter"),
        ({"name": "muon", "muon_for": {"*": 1}}, r"muon_for of '\*' is 1; choose true or false"),
        ({"muon_for": {"*": True}}, r"optimizer\.muon_for needs optimizer\.name=muon; it is 'adamw'"),
    ):
        with pytest.raises(ConfigError, match=problem):
            groups_of(**section)


def test_muon_changes_what_a_recipe_trains(text: Path, tmp_path: Path) -> None:
    small = ["total_steps=3", f"data.config.path={text}", "schedule.warmup_steps=0", "seq_len=32"]
    digests = {
        name: train_recipe(
            load_recipe("demo", [*small, f"optimizer.name={name}"], twin=True), directory=tmp_path / name
        )["digest"]
        for name in ("adamw", "muon")
    }
    assert digests["adamw"] != digests["muon"]


def test_what_is_wrong_is_refused() -> None:
    with pytest.raises(ConfigError, match="lr_for has 'frozen', which matches no trainable parameter"):
        rates(frozen=2)
    with pytest.raises(ConfigError, match="lr_for of 'head' is -1; choose a number from 0 on"):
        rates(head=-1)
