"""What several tests of this folder train on."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder with one text."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "all.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    return tmp_path / "text"
