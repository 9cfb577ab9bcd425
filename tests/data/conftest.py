"""Token files, texts and tables small enough to look at."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    torch.set_num_threads(1)


def write_tokens(path: Path, count: int, *, first: int = 0, vocab: int = 1000, size: int = 2) -> np.ndarray[Any, Any]:
    """A raw file of ``count`` tokens that count from ``first``."""
    tokens = (np.arange(first, first + count) % vocab).astype(f"<u{size}")
    path.write_bytes(tokens.tobytes())
    return tokens


def write_texts(path: Path, count: int) -> list[str]:
    """A jsonl file of texts."""
    texts = [f"text {number}: {number * number * 7919} {'ä' * (number % 3)}" for number in range(count)]
    path.write_text("".join(json.dumps({"text": text, "number": 1}) + "\n" for text in texts))
    return texts


@pytest.fixture
def tokens_at() -> Callable[..., Any]:
    return write_tokens


@pytest.fixture
def texts_at() -> Callable[..., Any]:
    return write_texts


def damage_group(path: Path, group: int) -> None:
    """Overwrite the pages of a row group; times and sizes stay."""
    from pyarrow import parquet

    column = parquet.ParquetFile(path).metadata.row_group(group).column(0)
    start = min(place for place in (column.dictionary_page_offset, column.data_page_offset) if place is not None)
    whole, times = bytearray(path.read_bytes()), path.stat()
    whole[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(whole)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def damage() -> Callable[[Path, int], None]:
    return damage_group
