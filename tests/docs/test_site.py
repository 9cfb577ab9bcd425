"""The documentation as a site: it builds without a complaint, asks nobody for anything, and its reference is whole."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import psyche_lightning
from psyche_lightning import distro, errors, hookspecs, lightning, recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs-material is not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = ["-m", "mkdocs", "build", "--quiet", "--strict", "-f", "docs/site/mkdocs.yml", "-d", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_it_builds_and_has_a_page_for_each_that_is_written(site: Path, pages: list[Any]) -> None:
    for page in pages[1:]:
        path = page.path.relative_to(ROOT / "docs").with_suffix("")
        assert (site / (path.parent if path.name == "index" else path) / "index.html").is_file(), page.name
    home = (site / "index.html").read_text()
    assert "psyche demo" in home
    assert 'href="tutorial/"' in home
    for plugin in ROOT.glob("plugins/*/README.md"):
        assert (site / "plugins" / plugin.parent.name / "index.html").is_file()
        assert f'href="plugins/{plugin.parent.name}/"' in home, f"{plugin.parent.name} is not in nav"


def test_it_takes_nothing_from_other_machines(site: Path) -> None:
    for path in [*site.rglob("*.html"), *site.rglob("*.css"), *site.rglob("*.svg")]:
        text = path.read_text()
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*?\ssrc=\"?([^\"\s>]+)", text)
        loaded += re.findall(
            r"<link\b(?=[^>]*rel=\"?(?:stylesheet|icon|preconnect|preload))[^>]*href=\"?([^\"\s>]+)", text
        )
        loaded += re.findall(r"(?:@import|url\()\s*[\"']?([^\"')\s]+)", text)
        assert [url for url in loaded if re.match(r"(https?:)?//", url)] == [], path


def test_names_of_blocks_are_titles(site: Path) -> None:
    assert '<span class="filename">train.py</span>' in (site / "tutorial" / "index.html").read_text()


@pytest.mark.parametrize("module", [psyche_lightning, lightning, recipe, distro, errors, hookspecs])
def test_the_reference_has_all_public_names(site: Path, module: ModuleType) -> None:
    reference = "\n".join(path.read_text() for path in site.glob("reference/**/*.html"))
    anchors = set(re.findall(r'id="(psyche_lightning[\w.]+)"', reference))
    own = (name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__)
    for name in getattr(module, "__all__", own):
        value = getattr(module, name)
        if name.startswith("_") or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        assert f"{value.__module__}.{value.__qualname__}" in anchors, (
            f"{module.__name__}.{name} is not in docs/reference"
        )
