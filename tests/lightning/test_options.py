"""One list of options: both strategies have it, documented alike, and LightningCLI fills it in from YAML."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from lightning.fabric import Fabric
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningCLI

from psyche_lightning import PsycheStrategy
from psyche_lightning.lightning import PsycheFabricStrategy
from psyche_lightning.protocol.state import CoordinatorConfig
from psyche_lightning.recipe.options import SHARED, RunOptions

Make = Callable[..., Any]
STRATEGIES = [PsycheStrategy, PsycheFabricStrategy]
LIGHTNINGS = {"self", "accelerator", "checkpoint_io", "precision", "precision_plugin"}


def parameters(strategy: type) -> dict[str, inspect.Parameter]:
    found = inspect.signature(strategy.__init__).parameters  # type: ignore[misc]
    return {name: parameter for name, parameter in found.items() if name not in LIGHTNINGS}


def described(strategy: type) -> dict[str, str]:
    """The text of each parameter in the docstring."""
    text = inspect.cleandoc(strategy.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    return dict(re.findall(r"^    (\w+): ((?:.|\n {8})*)", text, re.MULTILINE))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_takes_what_a_run_needs(strategy: type) -> None:
    taken, hints, wanted = parameters(strategy), get_type_hints(strategy.__init__), get_type_hints(RunOptions)  # type: ignore[misc]
    devices = {"inner", "save_distributed_checkpoint"}
    assert set(taken) == {*(item.name for item in fields(RunOptions)), *devices}
    for item in fields(RunOptions):
        if item.default_factory is MISSING:
            assert taken[item.name].default == item.default, item.name
            assert hints[item.name] == wanted[item.name], item.name
        else:
            assert taken[item.name].default is None
            assert hints[item.name] == wanted[item.name] | None
    values = RunOptions(coordinator="http://x:1", run="r", k=4, transport_options={"port": 1}, total_steps=3)
    assert strategy(**vars(values)).options == values


def test_both_have_the_same_list_with_the_same_texts() -> None:
    first, second = map(parameters, STRATEGIES)
    assert list(first.values()) == list(second.values())
    first_texts, second_texts = ({n: t for n, t in described(s).items() if n in first} for s in STRATEGIES)
    assert first_texts == second_texts
    assert list(first_texts) == list(first)


def test_every_shared_value_is_an_option() -> None:
    for kind in SHARED.values():
        assert {item.name for item in fields(kind)} <= {item.name for item in fields(RunOptions)}


def test_lightning_s_command_line_fills_a_strategy_in(classifier: Make, loader: Make, tmp_path: Path) -> None:
    module = classifier()

    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
        trainer:
          max_steps: 2
          accelerator: cpu
          logger: false
          enable_checkpointing: false
          enable_progress_bar: false
          strategy:
            class_path: psyche_lightning.PsycheStrategy
            init_args:
              k: 4
              k_for: {{"*bias": 1}}
              schedule: [{{from_step: 2, k: 3}}]
              decay: 0.5
              overlap: true
              directory: {tmp_path / "node"}
              transport_options: {{port: 4000}}
              config: {{total_steps: 2, global_batch_size_start: 4, global_batch_size_end: 4}}
        """
    )
    cli = LightningCLI(
        type(module),
        Data,
        args=["fit", "--config", str(path), "--trainer.strategy.init_args.seed=7"],
        save_config_callback=None,
    )
    strategy: Any = cli.trainer.strategy
    assert isinstance(strategy, PsycheStrategy)
    assert strategy.options == RunOptions(
        k=4,
        k_for={"*bias": 1},
        schedule=[{"from_step": 2, "k": 3}],
        decay=0.5,
        overlap=True,
        seed=7,
        directory=str(tmp_path / "node"),
        transport_options={"port": 4000},
        config=CoordinatorConfig(total_steps=2, global_batch_size_start=4, global_batch_size_end=4),
    )
    assert cli.trainer.global_step == 2


def test_lightning_s_command_line_refuses_an_unknown_option(
    classifier: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--trainer.strategy=psyche_lightning.PsycheStrategy", "--trainer.strategy.init_args.overlp=true"]
    with pytest.raises(SystemExit):
        LightningCLI(type(classifier()), run=False, args=arguments)
    assert "overlp" in capsys.readouterr().err


def test_the_name_stands_for_the_strategy_without_options() -> None:
    assert isinstance(Trainer(strategy="psyche", accelerator="cpu", logger=False).strategy, PsycheStrategy)
    assert isinstance(Fabric(strategy="psyche", accelerator="cpu").strategy, PsycheFabricStrategy)
