"""A pytest plugin: gives ``strategy="psyche"`` to every Trainer that would use Lightning's default, and notes outcomes.

``lightning_suite.py`` loads it, in a run of Lightning's tests. It reads ``PEER_STRATEGY`` (``psyche``, or ``auto`` for
Lightning's default) and ``PEER_OUTCOMES``, the file to which it adds one line of JSON for each test.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Generator
from typing import Any

import pytest
from lightning.pytorch import Trainer

import psyche_lightning  # noqa: F401 - registers the strategy

ONE_PROCESS = {"accelerator": ("auto", "cpu"), "devices": ("auto", 1, "1"), "num_nodes": (1,)}
"""The arguments with which a Trainer is one process on the CPU, each with its default first."""


def _forced(make: Callable[..., None], strategy: str) -> Callable[..., None]:
    """``Trainer.__init__`` with another default strategy."""

    @functools.wraps(make)
    def init(self: Trainer, *args: Any, **options: Any) -> None:
        given = options.get("strategy", "auto")
        if (isinstance(given, str) and given.startswith(("ddp", "fsdp", "deepspeed"))) or options.get("devices") in (
            2,
            "2",
        ):
            pytest.skip("several processes")
        if given == "auto" and all(options.get(name, values[0]) in values for name, values in ONE_PROCESS.items()):
            options["strategy"] = strategy
        make(self, *args, **options)

    return init


def pytest_configure(config: pytest.Config) -> None:
    """Before Lightning's tests are imported."""
    Trainer.__init__ = _forced(Trainer.__init__, os.environ["PEER_STRATEGY"])  # type: ignore[method-assign]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note a test that ended: its name, outcome, and the error if there is one."""
    report = yield
    if report.when == "call" or report.outcome != "passed":
        # The newest error first, then those during which it came: pytest.warns hides the error of its block.
        chain = getattr(report.longrepr, "chain", [])
        messages = [crash.message for _, crash, _ in reversed(chain) if crash is not None]
        error = "\n\n".join(messages) or str(report.longrepr or "")
        name = item.nodeid.partition("tests_pytorch/")[2]
        with open(os.environ["PEER_OUTCOMES"], "a", encoding="utf-8") as file:
            file.write(json.dumps({"test": name, "outcome": report.outcome, "error": error}) + "\n")
    return report
