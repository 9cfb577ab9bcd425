"""What `.ci/run` does beside running tests."""

import os
import subprocess
import sys
from pathlib import Path

CI = Path(__file__).parents[2] / ".ci"
TESTS = """
import pytest

@pytest.mark.skipif(True, reason="no compiler is installed: apt-get install it")
def test_marked(): ...

@pytest.fixture
def tool(): pytest.skip("the tool is not installed")

def test_needs_it(tool): ...

def test_kernel(): pytest.skip("this kernel is too old")

@pytest.mark.xfail(reason="the fix is not installed", strict=True)
def test_known(): assert False

def test_well(): ...
"""


def test_what_is_not_installed_fails_in_ci(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_some.py").write_text(TESTS)
    whole = 'import pytest\npytest.importorskip("no_such_module", reason="it is not installed: pip install it")\n'
    (tmp_path / "test_whole.py").write_text(whole)
    environment = {**os.environ, "PYTHONPATH": str(CI), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    def told(*options: str) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors", *options]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout

    assert "1 passed, 4 skipped, 1 xfailed" in told()
    strict = told("-p", "nothing_missing")
    assert "1 passed, 1 skipped, 1 xfailed, 3 errors" in strict
    assert "no compiler is installed: apt-get install it. CI must install it" in strict
