from __future__ import annotations

import json
from pathlib import Path

import pytest

from psyche_lightning.cli import main
from psyche_lightning.errors import ConfigError
from psyche_lightning.plugins import Plugins, Registration, load_plugins


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "words"}))
    return folder


@pytest.fixture(autouse=True)
def formats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A plugin with two formats, one of which fails in the middle."""

    def upper(source: Path, target: Path) -> None:
        (target / "text").write_text((source / "config.json").read_text().upper())

    def half(source: Path, target: Path) -> None:
        (target / "text").write_text("half")
        raise ConfigError("this checkpoint has no words")

    plugins = Plugins(only=[])
    for name, offer in (("upper", upper), ("half", half)):
        plugins._registrations.append(
            Registration("export format", name, offer, "words", "psyche-lightning-words", "1")
        )
    load_plugins.cache_clear()
    monkeypatch.setattr("psyche_lightning.plugins.load_plugins", lambda: plugins)
    monkeypatch.chdir(tmp_path)


def test_it_writes_a_new_folder(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(checkpoint), "--to", "upper"]) == 0
    assert "exported to model-upper" in capsys.readouterr().out
    assert (tmp_path / "model-upper" / "text").read_text() == '{"MODEL_TYPE": "WORDS"}'
    assert main(["export", str(checkpoint), "--to", "upper"]) == 1
    assert "'model-upper' exists already; name a new folder with --output" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    for name in ("empty", "some/where"):
        assert main(["export", str(checkpoint), "--to", "upper", "--output", name]) == 0
        assert [path.name for path in (tmp_path / name).iterdir()] == ["text"]


def test_what_fails_leaves_nothing(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(checkpoint), "--to", "half"]) == 1
    assert "this checkpoint has no words" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "--to", "uper"], "no export format 'uper'. Did you mean 'upper'? Installed: half, upper"),
        (["nothing", "--to", "upper"], "'nothing' is not a checkpoint"),
    ],
)
def test_what_is_not_there(
    arguments: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", *arguments]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
