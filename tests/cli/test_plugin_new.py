"""``psyche plugin new``: every kind of package, installed as pip would, passes its own tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from psyche_lightning.cli import main
from psyche_lightning.cli.plugin import Kind

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def install(folder: Path) -> None:
    """Write what pip would: the metadata with the entry points, beside the package."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"{name} = {module}" for name, module in project["entry-points"]["psyche_lightning"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[psyche_lightning]", *lines, ""]))


@pytest.mark.timeout(600)  # a busy machine takes minutes to import what these processes need
@pytest.mark.parametrize("kind", Kind)
def test_the_tests_of_a_new_package_pass(kind: Kind, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugin", "new", kind.value, "my-first_one", "--directory", str(tmp_path / "new")]) == 0
    folder = tmp_path / "new" / "psyche-lightning-my-first-one"
    printed = capsys.readouterr().out
    for name in ("pyproject.toml", "README.md", "psyche_lightning_my_first_one/plugin.py", "tests/test_contract.py"):
        assert (folder / name).is_file()
        assert str(folder / name) in printed
    for path in folder.rglob("*"):
        assert path.is_dir() or "{{" not in path.read_text(), path
    install(folder)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PSYCHE_", "PYTEST_"))}
    environment |= {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plugin", "new", "data", "mine", "--directory", str(tmp_path)]
    assert main(arguments) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["plugin", "new", "model", *arguments[3:]]) == 1
    assert "already exists and is not overwritten" in " ".join(capsys.readouterr().err.split())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("data", "Mine", "cannot have the name 'Mine'"),
        ("data", "../mine", "cannot have the name '../mine'"),
        ("data", "a--b", "cannot have the name"),
        ("data", "9lives", "cannot have the name"),
        ("data", "class", "is not a Python keyword"),
        ("data", "x" * 41, "at most 40 characters"),
        ("data", "tokens", "already registers the data provider 'tokens'"),
        ("transport", "tcp", "already registers the transport 'tcp'"),
        ("coordinator", "http", "already registers the coordinator 'http'"),
        ("model", "llama", "transformers has the model type 'llama'"),
        ("command", "train", "a command of psyche itself"),
        ("export", "deepseek_v3", "already registers the export format 'deepseek_v3'"),
    ],
)
def test_an_invalid_name_is_explained(
    kind: str, name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugin", "new", kind, name, "--directory", str(tmp_path / "new")]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()


def test_a_place_that_cannot_be_written_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["plugin", "new", "data", "mine", "--directory", str(tmp_path / "file" / "below")]) == 1
    assert "cannot be written to" in " ".join(capsys.readouterr().err.split())


def test_an_unknown_kind_names_the_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugin", "new", "database", "mine"]) == 2
    assert "transport" in capsys.readouterr().err
