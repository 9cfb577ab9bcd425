"""What Windows lacks is taken away (tests/system/windows), and psyche trains all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import psyche_lightning

ROOT = Path(psyche_lightning.__file__).parent
WITHOUT = str(Path(__file__).parent / "windows")


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([WITHOUT, *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def test_every_module_can_be_imported_without_what_windows_lacks(tmp_path: Path) -> None:
    modules = [
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted(ROOT.rglob("*.py"))
        if path.name != "__main__.py"
    ]
    assert len(modules) > 100
    script = (
        f"import importlib\nfor module in {modules!r}:\n    importlib.import_module(module)\n"
        "from psyche_lightning import system\nassert not hasattr(system.os, 'killpg')\n"
        "print('all', system.open_files())"
    )
    done = python(tmp_path, "-c", script)
    assert done.stdout.endswith("all (None, None)\n"), done.stderr


def test_a_recipe_is_trained(tmp_path: Path) -> None:
    done = python(tmp_path, "-m", "psyche_lightning", "train", "hf-llama", "--twin")
    assert done.returncode == 0, done.stderr
    node = tmp_path / "psyche-hf-llama"
    assert json.loads((node / "result.json").read_text())["steps"] == 4
    newest = node / "checkpoint"
    assert not newest.is_symlink()
    assert (newest / "config.json").is_file()


@pytest.mark.slow
def test_the_demo_s_processes_start_train_together_and_stop(tmp_path: Path) -> None:
    command = ["demo", "--twin", "--nodes", "2", "--rounds", "6", "--json", "demo.json"]
    done = python(tmp_path, "-m", "psyche_lightning", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert figures["equal_digests"] is True
    assert len(figures["nodes"]) == 2
