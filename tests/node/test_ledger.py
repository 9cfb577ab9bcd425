"""The ledger file: its newest rounds as lines, the older ones compressed."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from psyche_lightning.errors import StoreError
from psyche_lightning.node import ledger as module
from psyche_lightning.node.agreement import DecidedRound
from psyche_lightning.node.ledger import Ledger, find_ledgers, read_ledger
from psyche_lightning.protocol.state import Round


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT", 6 * 200)  # six lines


def write(ledger: Ledger, *heights: int) -> None:
    for height in heights:
        ledger.append("run", [DecidedRound(0, Round(height, height + 1), (bytes(32),), (), (), b"")])


def heights(path: Path) -> list[int]:
    return [row["height"] for row in read_ledger(path)]


def test_old_lines_are_compressed_and_all_are_read(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    write(ledger, *range(20))
    ledger.close()
    segments = sorted((tmp_path / "ledger").iterdir())
    assert [one.name for one in segments] == ["00000001.jsonl.gz", "00000002.jsonl.gz", "00000003.jsonl.gz"]
    assert path.stat().st_size < 1000
    assert sum(one.stat().st_size for one in segments) < 700
    assert gzip.decompress(segments[0].read_bytes()).count(b"\n") == 6
    assert heights(path) == list(range(20))
    assert find_ledgers([tmp_path]) == [path]
    # Another life of the node goes on.
    ledger = Ledger(path)
    write(ledger, *range(20, 40))
    assert heights(path) == list(range(40))
    ledger.close()


def test_a_crash_between_compressing_and_emptying_shows_no_line_twice(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    write(ledger, *range(6))
    ledger.close()
    (segment,) = (tmp_path / "ledger").iterdir()
    path.write_bytes(gzip.decompress(segment.read_bytes()))
    assert heights(path) == list(range(6))
    ledger = Ledger(path)
    assert path.stat().st_size == 0
    write(ledger, *range(6, 15))
    ledger.close()
    assert heights(path) == list(range(15))


def test_a_reader_misses_nothing_that_is_compressed_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    write(ledger, *range(4))
    rows = read_ledger(path)
    seen = [next(rows)["height"]]
    write(ledger, *range(4, 10))
    assert (tmp_path / "ledger" / "00000001.jsonl.gz").exists()
    seen += [row["height"] for row in rows]
    assert seen[:4] == [0, 1, 2, 3]
    assert seen == sorted(set(seen))
    ledger.close()


def test_where_compressing_fails_lines_stay_and_it_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    (tmp_path / "ledger").write_text("no folder")
    ledger = Ledger(path)
    write(ledger, *range(8))
    assert heights(path) == list(range(8))
    (tmp_path / "ledger").unlink()
    write(ledger, *range(8, 20))
    assert (tmp_path / "ledger" / "00000001.jsonl.gz").exists()
    assert heights(path) == list(range(20))
    ledger.close()


@pytest.mark.parametrize("damage", ["short", "other", "line"])
def test_a_damaged_segment_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    write(ledger, *range(7))
    ledger.close()
    segment = tmp_path / "ledger" / "00000001.jsonl.gz"
    data = segment.read_bytes()
    segment.write_bytes({"short": data[:-20], "other": b"no gzip", "line": gzip.compress(b"no json\n")}[damage])
    with pytest.raises(StoreError, match="00000001.jsonl.gz" if damage == "line" else "cannot read the ledger"):
        heights(path)
