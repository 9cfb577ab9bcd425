"""A node's status file: what it does now and for whom it waits, for people and their programs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from psyche_lightning.node.files import explained
from psyche_lightning.protocol.state import RunState

FILE = "status.json"


def _now() -> datetime:
    return datetime.now().astimezone()


def progress(state: RunState | None) -> dict[str, int | None]:
    """How far a run is, as values of the file: ``epoch``, ``round`` (None between epochs) and ``step``."""
    current = state.current if state is not None and state.phase.active else None
    return {
        "epoch": None if state is None else state.epoch,
        "round": None if current is None else current.height,
        "step": None if state is None else state.step,
    }


class StatusFile:
    """One JSON object in a file, which is replaced as a whole whenever a value changes.

    Args:
        path: the file.
        now: the date.
    """

    def __init__(self, path: str | os.PathLike[str], now: Callable[[], datetime] = _now) -> None:
        self._path = Path(path)
        self._now = now
        self._values: dict[str, Any] = {}

    def write(self, **values: Any) -> None:
        """Write JSON values, with ``since``: when they became so.

        Raises:
            StoreError: the file cannot be written.
        """
        if values == self._values:
            return
        text = json.dumps({**values, "since": self._now().isoformat(timespec="seconds")}, indent=1) + "\n"
        fresh = self._path.with_name(f"{self._path.name}.new")
        with explained("write", self._path):
            fresh.write_text(text, encoding="utf-8")
            os.replace(fresh, self._path)
        self._values = values
