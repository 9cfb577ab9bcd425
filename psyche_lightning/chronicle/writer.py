"""Writes event files: a line at a time, without a sync, within a bounded size.

The newest entries are in ``events.jsonl``. When that file is full, it is compressed as ``events-NNNNNN.jsonl.gz``, and
the oldest of these go when all together are too large. Each file's first line says who wrote it.
"""

from __future__ import annotations

import contextlib
import gzip
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from psyche_lightning.chronicle.entry import Entry, line_of
from psyche_lightning.text import plain

logger = logging.getLogger(__name__)

NAME = "events"
FILE = "events.jsonl"
VERSION = 1
SEGMENT = 1 << 20
"""Bytes after which a file is compressed; it shrinks to about a tenth."""
TOTAL = 64 << 20
"""Most bytes of all of a writer's files."""
_PAST = re.compile(rf"{NAME}-(\d{{6,}})\.jsonl(\.gz)?")


class Chronicle:
    """The event files of one writer; any thread may add entries.

    The operating system has an entry when :meth:`add` returns, so it survives ``kill -9``; a power cut may lose the
    newest ones, or tear a line, which readers skip. Events decide nothing: a full disk ends them with a warning, until
    the next start, and nothing else.

    Args:
        folder: where the files lie; created if missing.
        node: who writes, as in :class:`Entry`.
        run: the run's name.
        key: the writer's public key in hex, for readers.
        segment: see :data:`SEGMENT`.
        total: see :data:`TOTAL`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        node: str,
        run: str,
        key: str = "",
        segment: int = SEGMENT,
        total: int = TOTAL,
    ) -> None:
        self.folder = Path(folder)
        self._head = line_of({"events": VERSION, "node": node, "run": run, "key": key})
        self._segment = segment
        self._total = total
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._size = 0
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in past(self.folder):  # a kill came while it was compressed
                if path.suffix != ".gz":
                    _compress(path)
            self._open()

    def add(self, entry: Entry) -> None:
        """Write an entry down."""
        line = line_of(entry.values(whole=False))
        with self._writing():
            if self._file is not None:
                self._file.write(line)
                self._size += len(line)
                if self._size >= self._segment:
                    self._turn()

    def close(self) -> None:
        """Release the file; idempotent."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _open(self) -> None:
        self._file = file = open(self.folder / FILE, "ab+", buffering=0)  # noqa: SIM115 - it stays open
        self._size = file.seek(0, os.SEEK_END)
        if self._size:
            file.seek(self._size - 1)
            if file.read(1) != b"\n":  # a kill, or a power cut, tore the last line: it stays a line of its own
                self._size += file.write(b"\n")
        self._size += file.write(self._head)  # again at each start, as another node may have had the folder

    def _turn(self) -> None:
        """Compress the full file, begin a new one, and drop the oldest beyond the limit."""
        assert self._file is not None
        self._file.close()
        self._file = None
        older = past(self.folder)
        number = 1 + max((number_of(path) for path in older), default=0)
        full = self.folder / f"{NAME}-{number:06d}.jsonl"
        os.replace(self.folder / FILE, full)
        _compress(full)
        self._open()
        sizes = [(path, path.stat().st_size) for path in past(self.folder)]
        excess = sum(size for _, size in sizes) + self._segment - self._total
        for path, size in sizes:
            if excess <= 0:
                break
            path.unlink()
            excess -= size

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Holds the lock. A warning comes when it is free again: who listens to the log may add it as an entry."""
        try:
            with self._lock:
                try:
                    yield
                except OSError:
                    if self._file is not None:
                        with contextlib.suppress(OSError):
                            self._file.close()
                    self._file = None
                    raise
        except OSError as error:
            logger.warning("no more events in %s: %s", self.folder, plain(error.strerror or str(error)))


def past(folder: Path) -> list[Path]:
    """The full files in a folder, the oldest first; one of each number."""
    found: dict[int, Path] = {}
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(folder.iterdir()):  # .jsonl before .jsonl.gz, which is whole if it is there
            if _PAST.fullmatch(path.name):
                found[number_of(path)] = path
    return [found[number] for number in sorted(found)]


def number_of(path: Path) -> int:
    """The number of a full file."""
    match = _PAST.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _compress(path: Path) -> None:
    packed = path.with_name(path.name + ".gz")
    fresh = path.with_name(path.name + ".gz.new")
    with path.open("rb") as source, fresh.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as target:
        shutil.copyfileobj(source, target)
    os.replace(fresh, packed)
    path.unlink()
