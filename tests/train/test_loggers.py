"""The loggers that a recipe may name: real ones, whose files are read back."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from psyche_lightning.errors import ConfigError
from psyche_lightning.recipe import load_recipe
from psyche_lightning.train.runner import train_recipe


def trained(folder: Path, logger: str) -> list[dict[str, Any]]:
    """Trains the demo's twin with that logger; the rows of its ``metrics.jsonl``."""
    recipe = load_recipe("demo", [f"logger={logger}", "validate_every=2"], twin=True)
    train_recipe(recipe, directory=folder)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_csv_has_the_figures_of_metrics_jsonl(tmp_path: Path) -> None:
    rows = trained(tmp_path, "csv")
    with (tmp_path / "logs" / "version_0" / "metrics.csv").open() as file:
        # Lightning joins rows of one step as long as they are not written.
        logged = [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(file)]
    assert {(row["step"], name, value) for row in rows for name, value in row.items()} == {
        (row["step"], name, value) for row in logged for name, value in row.items()
    }
    assert "chunk: 64" in (tmp_path / "logs" / "version_0" / "hparams.yaml").read_text()


def test_tensorboard_has_the_figures_of_metrics_jsonl(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = trained(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "logs" / "version_0"))
    events.Reload()
    for name in ("loss", "lr", "validation_loss", "bytes_up"):
        wanted = [(row["step"], pytest.approx(row[name])) for row in rows if name in row]
        assert [(event.step, event.value) for event in events.Scalars(name)] == wanted


def test_wandb_gets_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    import wandb

    rows = trained(tmp_path, "wandb")
    run = wandb.run
    assert run is not None
    try:
        assert run.project == "demo"
        last = {name: value for row in rows for name, value in row.items()}
        shown = dict(run.summary)
        assert {name: shown[name] for name in ("loss", "lr", "validation_loss")} == {
            name: last[name] for name in ("loss", "lr", "validation_loss")
        }
        assert run.config["distro"]["chunk"] == 64
    finally:
        wandb.finish()
    assert list((tmp_path / "logs" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_logger_whose_package_is_missing_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning.fabric.loggers.tensorboard.{name}", False)
    with pytest.raises(ConfigError, match=r"trainer\.logger=tensorboard needs the package tensorboard: .*\[loggers\]"):
        trained(tmp_path, "tensorboard")


def test_an_unknown_logger_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"csv.*tensorboard.*wandb"):
        load_recipe("demo", ["logger=excel"], twin=True)
