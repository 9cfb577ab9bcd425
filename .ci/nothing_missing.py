"""A pytest plugin for CI, where everything is installed: a test that skips because something is not, fails.

Such a test says in its reason how to install what it lacks. Skips for other reasons, such as an old kernel, stay skips.
"""

from collections.abc import Generator
from typing import TypeVar

import pytest

_Report = TypeVar("_Report", pytest.TestReport, pytest.CollectReport)


def _refuse(report: _Report) -> _Report:
    if report.skipped and isinstance(report.longrepr, tuple) and "install" in report.longrepr[2]:
        path, line, reason = report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{path}:{line}: {reason}. CI must install it: see .ci/run"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tests that skip when they run."""
    return _refuse((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Files that skip as a whole."""
    return _refuse((yield))
