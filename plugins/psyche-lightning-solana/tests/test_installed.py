"""What installing this plugin does to whoever installs it."""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest

TEST = """
def test_something(tmp_path):
    (tmp_path / "file").write_text("here")
    assert (tmp_path / "file").exists()
"""


@pytest.fixture
def project(tmp_path):
    """Somebody's project: one test, no configuration."""
    (tmp_path / "test_theirs.py").write_text(TEST)
    return tmp_path


def run(project, *arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=120)


def test_a_plain_pytest_works_although_anchorpy_brings_a_plugin(project):
    done = run(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    traced = run(project, "--trace-config")
    assert re.search(r"anchorpy.*pytest_plugin", traced.stdout)  # it was loaded, and did no harm


def test_what_makes_it_load_is_required():
    needed = {re.split(r"[^\w-]", text)[0] for text in importlib.metadata.requires("psyche-lightning-solana") or []}
    assert {"py", "pytest-asyncio", "pytest-xprocess"} <= needed


def test_the_plugin_imports_nothing_heavy():
    code = (
        "import sys; from psyche_lightning_solana import plugin; plugin.commands();"
        "print([name for name in ('solders', 'solana', 'anchorpy', 'aiohttp', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
