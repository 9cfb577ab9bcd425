"""The plugin against the host's conformance kit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from psyche_lightning_text.plugin import build

from psyche_lightning.testing.data import DataContract


class TestText(DataContract):
    def make_factory(self) -> Callable[..., Any]:
        return build

    def make_config(self, folder: Path) -> dict[str, Any]:
        (folder / "text.txt").write_text("".join(f"line {number}: {number**3}\n" for number in range(60)))
        return {"seq_len": 16, "path": str(folder / "text.txt"), "validation_samples": 3}
