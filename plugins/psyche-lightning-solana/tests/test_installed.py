"""What installing this plugin does to whoever installs it."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
TEST = """
import sys

def test_something():
    assert "anchorpy.pytest_plugin" in sys.modules  # it was loaded, and does no harm
"""
PROCESS = "def test_something(xprocess): pass"


@pytest.fixture
def theirs(tmp_path):
    """Run pytest in somebody's project, which has one test; what it says."""

    def theirs(*arguments, test=TEST, settings=""):
        (tmp_path / "test_theirs.py").write_text(test)
        (tmp_path / "pytest.ini").write_text(f"[pytest]\n{settings}")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        command = [sys.executable, "-m", "pytest", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return theirs


def test_a_plain_pytest_works_and_is_quiet_although_anchorpy_brings_a_plugin(theirs):
    for said in (theirs(), theirs("-v"), theirs(settings="filterwarnings = error")):
        assert "1 passed in" in said  # "1 passed, 1 warning in" otherwise
        assert "reminder" not in said
        assert "Warning" not in said


def test_who_starts_processes_is_still_reminded_to_end_them(theirs):
    assert "pytest-xprocess reminder" in theirs("-v", test=PROCESS)


def test_what_makes_it_load_is_required():
    needed = {re.split(r"[^\w-]", text)[0] for text in importlib.metadata.requires("psyche-lightning-solana") or []}
    assert {"pytest-asyncio", "pytest-xprocess"} <= needed


def test_the_wheel_has_what_is_needed_to_run_and_no_more(tmp_path):
    shutil.copytree(HERE, tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    command = [sys.executable, "-c", f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"]
    subprocess.run(command, cwd=tmp_path / "source", capture_output=True, check=True)
    [wheel] = tmp_path.glob("*.whl")
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = HERE / "psyche_lightning_solana"
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert found == {"pytest_xprocess.py", *(path.relative_to(HERE).as_posix() for path in files)}
    assert {"coordinator.so", "authorizer.so", "treasurer.so"} <= {name.rpartition("/")[2] for name in found}


def test_the_plugin_imports_nothing_heavy():
    code = (
        "import sys; from psyche_lightning_solana import plugin; plugin.commands();"
        "print([name for name in ('solders', 'solana', 'anchorpy', 'aiohttp', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_a_node_and_whoever_looks_at_a_run_need_no_anchorpy():
    code = (
        "import sys; from psyche_lightning_solana import owner_side;"
        "from psyche_lightning_solana.client import coordinator;"
        "from psyche_lightning_solana.instructions import RunKeys; from solders.pubkey import Pubkey as P;"
        "keys = coordinator.SolanaRun.at('solana:localnet', 'r').keys_of(P.default()); keys.tick(P.default());"
        "print(type(keys) is RunKeys, 'anchorpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True False\n", done.stderr


@pytest.mark.parametrize("command", [["localnet"], ["cost", "demo"]])
def test_where_the_local_chain_is_missing_it_is_said_how_to_get_it(command):
    code = (
        "import sys; sys.modules['psyche_lightning_localnet'] = None; from psyche_lightning.cli import main;"
        f"sys.exit(main(['solana', *{command}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip install psyche-lightning-localnet" in done.stderr
    assert "Traceback" not in done.stderr


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
