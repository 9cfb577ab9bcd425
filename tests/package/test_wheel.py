"""What the host's wheel holds: every package and every file that the code reads."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from psyche_lightning import __version__
from psyche_lightning.plugins import EXTRAS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "psyche_lightning" / "page"
"""Sources of the coordinator\'s page; the wheel has what is built from them."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built from a copy: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("psyche_lightning", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-c", f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    [path] = folder.glob("*.whl")
    return path


def test_it_has_every_file_of_the_package_and_every_recipe(wheel: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "psyche_lightning").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and PAGE not in path.parents
    }
    expected |= {f"psyche_lightning/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.*")}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == expected


def test_its_version_is_the_package_s(wheel: Path) -> None:
    assert wheel.name == f"psyche_lightning-{__version__}-py3-none-any.whl"


def test_the_extras_that_messages_name_exist(wheel: Path) -> None:
    [metadata] = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA")]
    lines = zipfile.ZipFile(wheel).read(metadata).decode().splitlines()
    assert {f"Provides-Extra: {extra}" for extra in EXTRAS.values()} <= set(lines)


def test_recipes_are_found_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere.mkdir()
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r}); from psyche_lightning.recipe import find_recipe;"
        "print(find_recipe('demo'))"
    )
    found = subprocess.run([sys.executable, "-c", script], cwd=elsewhere, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == site / "psyche_lightning" / "recipes" / "demo.yaml"
