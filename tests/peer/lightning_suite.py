"""Runs a selection of Lightning's own tests with ``strategy="psyche"`` forced on them, and compares with its default.

    python tests/peer/lightning_suite.py CHECKOUT

CHECKOUT is a checkout of Lightning at the tag below; nothing is fetched. ``selection.txt`` names the tests: those of
one process on the CPU that make a Trainer. Those that fail with the strategy run once more with Lightning's default.
``differences.toml`` holds every known difference with its reason: what the strategy refuses, and facts that follow from
what it is. Exit code 1 means a difference that is not in the list, one that shows something else than its reason says,
or an entry without a difference, which then leaves the list.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
TAG = "2.6.5"
"""The newest tag when the list was made; the installed Lightning may be a later 2.6."""
NEEDS = ("cloudpickle", "sklearn")
"""Packages that some of the selected tests import (cloudpickle, scikit-learn), beyond what our own tests need."""
TIMEOUT = 120
"""Seconds for one test: a wait without end is a failure."""


@dataclass(frozen=True)
class Reason:
    """Why some tests end otherwise with the strategy.

    Attributes:
        kind: ``refused`` for a setting that the strategy refuses before anything runs, ``fact`` for anything else.
        why: for people.
        shows: a pattern that the errors of these tests contain.
        tests: their names, each without the parameters of its cases.
    """

    kind: str
    why: str
    shows: str
    tests: tuple[str, ...]

    def explains(self, test: str, error: str) -> bool:
        """Whether this is the reason why a test fails with that error."""
        return _name(test) in self.tests and re.search(self.shows, error) is not None


@dataclass(frozen=True)
class Outcome:
    """How a test ended.

    Attributes:
        outcome: ``passed``, ``failed`` or ``skipped``.
        error: what it failed with, or why it was skipped.
    """

    outcome: str
    error: str


def reasons(path: Path = HERE / "differences.toml") -> list[Reason]:
    """The list of known differences."""
    with open(path, "rb") as file:
        return [Reason(**{**entry, "tests": tuple(entry["tests"])}) for entry in tomllib.load(file)["reason"]]


def selection(path: Path = HERE / "selection.txt") -> list[str]:
    """The selected files and folders, from Lightning's folder ``tests/tests_pytorch``."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def differing(ours: Mapping[str, Outcome], theirs: Mapping[str, Outcome]) -> dict[str, str]:
    """The errors of the tests that fail with the strategy alone.

    Args:
        ours: outcomes with the strategy.
        theirs: outcomes with Lightning's default, at least of the tests that failed with the strategy.
    """
    return {
        test: got.error
        for test, got in ours.items()
        if got.outcome == "failed" and test in theirs and theirs[test].outcome != "failed"
    }


def judge(ours: Mapping[str, Outcome], theirs: Mapping[str, Outcome], known: Sequence[Reason]) -> list[str]:
    """What is wrong, a line each.

    Args:
        ours: as of :func:`differing`.
        theirs: likewise.
        known: the list of differences.
    """
    wrong, explained = [], set()
    for test, error in differing(ours, theirs).items():
        name = _name(test)
        shown = [reason for reason in known if reason.explains(test, error)]
        explained.update((name, reason) for reason in shown)
        if not shown:
            why = next((reason.why for reason in known if name in reason.tests), None)
            what = "not in the list" if why is None else f"not for its reason ({why})"
            wrong.append(f"{what}: {test}: {error.strip().partition(chr(10))[0]}")
    ran = {_name(test) for test in ours}
    return wrong + [
        f"no longer differs, remove it from the list ({reason.why}): {name}"
        for reason in known
        for name in reason.tests
        if name in ran and (name, reason) not in explained
    ]


def _name(test: str) -> str:
    return test.partition("[")[0]


def run(checkout: Path, strategy: str, tests: Sequence[str], *, jobs: int = 0) -> dict[str, Outcome]:
    """The outcomes of some of Lightning's tests.

    Args:
        checkout: Lightning's repository.
        strategy: for every Trainer that would use the default.
        tests: files, folders or single tests, from ``tests/tests_pytorch``.
        jobs: processes; 0 for this command's own.
    """
    root = checkout.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = Path(scratch, "outcomes")
        paths = [str(HERE), str(root / "tests"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONDONTWRITEBYTECODE": "1",  # a test fails if files appear in the checkout
            "PEER_STRATEGY": strategy,
            "PEER_OUTCOMES": str(outcomes),
        }
        plugins = ["forced", "no:cacheprovider", "no:pytest_anchorpy", "no:asyncio", "no:xprocess"]
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "--color=no", "-o", "addopts="]
        command += [part for name in plugins for part in ("-p", name)]
        command += ["-c", str(root / "pyproject.toml"), "--rootdir", str(root), f"--timeout={TIMEOUT}", "-W", "ignore"]
        command += ["-n", str(jobs)] if jobs else []
        command += [str(root / "tests" / "tests_pytorch" / test) for test in tests]
        ended = subprocess.run(command, cwd=scratch, env=environment, check=False)
        if ended.returncode not in (0, 1):
            raise SystemExit(f"pytest ended with exit code {ended.returncode}: the tests could not be run")
        lines = outcomes.read_text(encoding="utf-8").splitlines() if outcomes.exists() else []
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    found: dict[str, Outcome] = {}
    for record in records:  # a test that passes and then fails in its teardown has two
        if found.get(record["test"], Outcome("passed", "")).outcome != "failed":
            found[record["test"]] = Outcome(record["outcome"], record["error"])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help=f"Lightning's repository at tag {TAG}")
    parser.add_argument("tests", nargs="*", help="files or tests from tests/tests_pytorch (default: the selection)")
    parser.add_argument("--jobs", type=int, default=0, help="processes (default: one)")
    parser.add_argument("--differences", type=Path, default=HERE / "differences.toml", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    version = (options.checkout / "src" / "version.info").read_text(encoding="utf-8").strip()
    if version != TAG:
        parser.error(f"{options.checkout} is a checkout of Lightning {version}; the list is for the tag {TAG}")
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        parser.error(f"Lightning's tests need {', '.join(missing)}: pip install cloudpickle scikit-learn")
    known = reasons(options.differences)
    ours = run(options.checkout, "psyche", options.tests or selection(), jobs=options.jobs)
    failed = [test for test, got in ours.items() if got.outcome == "failed"]
    theirs = run(options.checkout, "auto", failed, jobs=options.jobs) if failed else {}
    wrong = judge(ours, theirs, known)
    differ = differing(ours, theirs)
    count = {kind: sum(got.outcome == kind for got in ours.values()) for kind in ("passed", "skipped")}
    refusals = [reason for reason in known if reason.kind == "refused"]
    refused = sum(any(reason.explains(*one) for reason in refusals) for one in differ.items())
    print(
        f"\n{len(ours)} tests of Lightning {version} with the strategy 'psyche': {count['passed']} passed, "
        f"{count['skipped']} skipped, {len(failed) - len(differ)} fail with both strategies, {len(differ)} differ: "
        f"{refused} refused, {len(differ) - refused} others"
    )
    for line in wrong:
        print(line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
