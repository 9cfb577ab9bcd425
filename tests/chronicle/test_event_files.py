"""Event files: what is written is read, also after a kill, within a bounded size."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest

from psyche_lightning.chronicle.entry import Entry, Kind, entry_of, line_of
from psyche_lightning.chronicle.reader import Book, find_books
from psyche_lightning.chronicle.writer import FILE, Chronicle, past
from psyche_lightning.errors import ConfigError, WireError


def entry(number: int, text: str = "", kind: Kind = Kind.WAIT) -> Entry:
    return Entry(float(number), kind, text, 1, number, number + 1, ("aa", "bb"), 0.5)


def chronicle(folder: Path, **limits: int) -> Chronicle:
    return Chronicle(folder, node="n1", run="run", key="ab", **limits)


def everything(book: Book) -> list[Entry]:
    found = book.news()
    while older := book.back():
        found = [*older, *found]
    return found


def times(book: Book) -> list[int]:
    return [int(one.time) for one in everything(book)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    files = chronicle(tmp_path)
    files.add(entry(3, "waits for aa\n\u2028 and \ud800"))
    files.add(Entry(4.0, Kind.FAULT))
    [book] = find_books([tmp_path])
    first, second = book.news()
    assert first == Entry(3.0, Kind.WAIT, "waits for aa\n\u2028 and ?", 1, 3, 4, ("aa", "bb"), 0.5, "n1", "run")
    assert second == Entry(4.0, Kind.FAULT, node="n1", run="run")
    assert book.news() == []
    files.add(entry(5))
    assert [one.time for one in book.news()] == [5.0]


def test_an_entry_is_what_its_values_say() -> None:
    whole = Entry(3.0, Kind.WAIT, "text", 1, 3, 4, ("aa",), 0.5, "n1", "run")
    assert entry_of(json.loads(line_of(whole.values()))) == whole
    later = {"time": 1, "kind": "moved", "text": "to another host", "node": "n2", "more": [1]}
    assert entry_of(later) == Entry(1.0, Kind.NOTICE, "moved: to another host", node="n2")


@pytest.mark.parametrize(
    "values", [None, [], {}, {"time": 1}, {"time": "x", "kind": "wait"}, {"kind": "wait", "time": None}]
)
def test_anything_else_is_no_entry(values: object) -> None:
    with pytest.raises(WireError):
        entry_of(values)


def test_a_line_that_a_kill_tore_costs_that_line_alone(tmp_path: Path) -> None:
    files = chronicle(tmp_path)
    files.add(entry(1))
    files.add(entry(2))
    files.close()
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-9])
    [book] = find_books([tmp_path])
    assert times(book) == [1]
    files = chronicle(tmp_path)
    files.add(entry(3))
    [book] = find_books([tmp_path])
    assert times(book) == [1, 3]
    assert book.damaged == 1


def test_damaged_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    chronicle(tmp_path).add(entry(1))
    with (tmp_path / FILE).open("ab") as file:
        file.write(b"\x00\xff\n" + b"[" * 100_000 + b"\n" + b'"text"\n[]\n' + line_of(entry(2).values()))
    [book] = find_books([tmp_path])
    assert times(book) == [1, 2]
    assert book.damaged == 4


def test_full_files_are_compressed_and_the_oldest_go(tmp_path: Path) -> None:
    files = chronicle(tmp_path, segment=4_000, total=8_000)
    for number in range(2000):
        files.add(entry(number))
    older = past(tmp_path)
    assert all(path.suffix == ".gz" for path in older)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 8_000
    assert 1 < len(older) < 2000 * 100 // 4_000  # some were dropped
    [book] = find_books([tmp_path])
    found = times(book)
    assert found == list(range(found[0], 2000))


def test_a_reader_follows_over_a_full_file(tmp_path: Path) -> None:
    files = chronicle(tmp_path, segment=2_000)
    [book] = find_books([tmp_path])
    seen: list[Entry] = []
    for number in range(200):
        files.add(entry(number))
        if number % 70 == 0:  # several files become full in between
            seen += book.news()
    seen += book.news()
    assert [int(one.time) for one in seen] == list(range(200))
    assert len(past(tmp_path)) > 3


def test_a_kill_while_a_file_is_compressed_loses_nothing(tmp_path: Path) -> None:
    files = chronicle(tmp_path, segment=1_000)
    for number in range(12):
        files.add(entry(number))
    files.close()
    [full] = past(tmp_path)[-1:]
    plain = full.with_suffix("")
    plain.write_bytes(gzip.decompress(full.read_bytes()))  # both are there
    [book] = find_books([tmp_path])
    assert times(book) == list(range(12))
    full.unlink()  # only the uncompressed one is
    (tmp_path / f"{full.name}.new").write_bytes(b"half")
    chronicle(tmp_path).close()
    assert full.exists()
    assert not plain.exists()
    [book] = find_books([tmp_path])
    assert times(book) == list(range(12))


def test_a_disk_that_fails_ends_the_events_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        files = chronicle(tmp_path / "file" / "node")
        files.add(entry(1))
        files.add(entry(2))
        files.close()
    assert len(caplog.records) == 1
    assert "no more events" in caplog.text


def test_a_folder_without_events_and_a_later_version_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no"):
        find_books([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match=r"no events.jsonl in .*psyche sim --trace --json"):
        find_books([tmp_path])
    (tmp_path / FILE).write_text('{"events": 2, "node": "n", "run": "r"}\n')
    [book] = find_books([tmp_path])
    with pytest.raises(ConfigError, match="version 2, and this release reads version 1"):
        book.news()


def test_the_page_explains_each_kind() -> None:
    page = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
    assert not [kind for kind in Kind if f"| `{kind.value}` | {kind.meaning} |" not in page]
