"""What installing this plugin does to whoever installs it."""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest

TEST = """
import sys

def test_something(tmp_path):
    assert "anchorpy.pytest_plugin" in sys.modules  # it was loaded, and does no harm
"""


@pytest.fixture
def project(tmp_path):
    """Somebody's project: one test, no configuration."""
    (tmp_path / "test_theirs.py").write_text(TEST)
    return tmp_path


def test_a_plain_pytest_works_although_anchorpy_brings_a_plugin(project):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


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


def test_every_command_is_listed_and_can_be_loaded(capsys):
    from psyche_lightning_solana.commands import COMMANDS

    from psyche_lightning.cli import main

    assert main(["solana", "--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in COMMANDS)
    for name in COMMANDS:
        assert main(["solana", name, "--help"]) == 0
        assert f"psyche solana {name}" in capsys.readouterr().out
    assert main(["solana", "bild"]) == 2
