"""The script for devices, on the CPU with its small sizes, and the page that is made from its files."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"device_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


measure, page = load("measure"), load("page")

ALONE = """
import importlib.util, runpy, sys
missing = {"aiohttp", "cryptography", "lightning", "msgpack", "pluggy", "rich", "typer", "yaml"}
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in missing else find(name, package)
sys.modules.update(dict.fromkeys(missing))  # importing one is an ImportError
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script as where only torch and numpy are installed."""


def test_every_part_holds_on_the_cpu_with_torch_and_numpy_alone(tmp_path: Path) -> None:
    out = tmp_path / "device.json"
    command = [sys.executable, "-c", ALONE, str(FOLDER / "measure.py"), "--out", str(out), "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    states = {name: part["state"] for name, part in found["parts"].items()}
    assert states.pop("training") == "lacking"
    assert "pip install -e ." in found["parts"]["training"]["why"]
    assert set(states.values()) == {"held"}, found["parts"]
    assert list(states) == [name for name in measure.PARTS if name != "training"]
    assert found["parts"]["random rounds"]["most votes"] > measure.FLOAT32_VOTES
    assert [row["form"] for row in found["parts"]["speed"]["rows"]] == list(measure.FORMS)
    assert all({"encode", "apply", "bound", "payload"} <= row.keys() for row in found["parts"]["speed"]["rows"])
    # And the page takes it.
    (tmp_path / "results").mkdir()
    out.rename(tmp_path / "results" / "here.json")
    text = page.section(tmp_path / "results")
    assert "| golden rounds | held | 18 comparisons |" in text
    assert "| AdamW's step / step |" in text
    assert "lacking" in text


def run(setting: Any, tmp_path: Path, parts: dict[str, Any], seconds: float = 60) -> bool:
    return bool(measure.run(setting, seconds, parts))


@pytest.fixture(name="setting")
def setting_fixture(tmp_path: Path) -> Any:
    setting = measure.Setting(torch.device("cpu"), True, None, lambda: None)
    setting.save = lambda: (tmp_path / "out.json").write_text(json.dumps(setting.found))
    return setting


def test_a_part_that_fails_or_takes_too_long_is_named_and_the_others_run(
    setting: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(setting: Any, part: dict[str, Any]) -> None:
        part["so far"] = 1
        raise measure.WrongError("two bytes differ")

    def waits(setting: Any, part: dict[str, Any]) -> None:
        while True:
            pass

    def holds(setting: Any, part: dict[str, Any]) -> None:
        part["left"] = setting.left

    assert not run(setting, tmp_path, {"one": (30, fails), "two": (0.2, waits), "three": (30, holds)})
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["one"]["state"] == "failed"
    assert found["one"]["why"] == "WrongError: two bytes differ"
    assert found["one"]["so far"] == 1
    assert found["two"]["state"] == "out of time"
    assert found["three"]["state"] == "held"
    assert 0 < found["three"]["left"] <= 30
    assert "not held: one, two" in capfd.readouterr().out
    assert not run(setting, tmp_path, {"late": (30, waits)}, seconds=0.1), "the whole's time limits each part's"


def test_a_device_that_computes_otherwise_is_found(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both comparisons see a sign that another device would choose otherwise."""
    from psyche_lightning.distro import optimizer

    subtract, calls = optimizer.subtract_from_each, []

    def once_wrong(ours: list[torch.Tensor], theirs: list[torch.Tensor], factor: float) -> None:
        calls.append(1)
        subtract(ours, [-theirs[0], *theirs[1:]] if len(calls) % 50 == 0 else theirs, factor)

    monkeypatch.setattr(optimizer, "subtract_from_each", once_wrong)
    with pytest.raises(measure.WrongError, match="other parameters than recorded: DisTrO, plain"):
        measure.golden_rounds(setting, {})
    with pytest.raises(measure.WrongError, match="the device gave other parameters than the CPU: DisTrO"):
        measure.random_rounds(setting, {})


def test_a_device_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        measure.main(["--out", str(tmp_path / "x.json"), "--device", "cuda:99"])
    assert caught.value.code == 2
    assert "the device 'cuda:99' cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_the_page_has_the_figures_of_the_files() -> None:
    text = page.PAGE.read_text()
    assert page.placed(text, page.section()) == text, "run python tests/device/page.py"
    assert measure.FORMAT == page.FORMAT


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="measure again"):
        page.section(tmp_path)
    assert page.section(tmp_path / "none") == page.NOTHING


@pytest.mark.slow
def test_the_training_part_trains_on_the_cpu(setting: Any) -> None:
    assert measure.run(setting, 240, {"training": (240, measure.training)}), setting.found
    assert setting.found["training"]["equal_digests"] is True
    assert setting.found["training"]["rounds"] == 3
