"""Reads event files, also while they are written, and those of a writer that was killed."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from psyche_lightning.chronicle.entry import Entry, entry_of
from psyche_lightning.chronicle.writer import FILE, NAME, VERSION, number_of, past
from psyche_lightning.errors import ConfigError, WireError

MAX_LINE = 1 << 16
"""Longest line in bytes; a longer one is damaged."""


@dataclass
class Book:
    """The event files of one writer, or one file of entries by several.

    Attributes:
        current: the file that may still grow.
        older: the full ones, the newest first, that :meth:`back` has not read yet.
        damaged: lines so far that are no entries, such as one that a kill tore.
    """

    current: Path
    older: list[Path] = field(default_factory=list)
    damaged: int = 0
    _turned: int = 0
    _offset: int = 0
    _rest: bytes = b""
    _node: str = ""
    _run: str = ""

    def news(self) -> list[Entry]:
        """The entries of the newest file that came since the last call.

        Raises:
            ConfigError: the file cannot be read, or is of a later release.
        """
        if self.current.suffix == ".gz":
            return []
        missed: list[Entry] = []
        for path in self._full():  # what was the newest file is full
            missed += self._read(path, skip=self._offset)
            self._offset, self._rest = 0, b""
        try:
            with self.current.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return missed
        except OSError as error:
            raise ConfigError(f"cannot read {self.current}: {error.strerror}") from error
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [*missed, *self._entries(lines)]

    def _full(self) -> list[Path]:
        """The files that became full since the last call."""
        if self.current.name != FILE:
            return []
        full = [path for path in past(self.current.parent) if number_of(path) > self._turned]
        self._turned = number_of(full[-1]) if full else self._turned
        return full

    def back(self) -> list[Entry]:
        """The entries of the next older file; empty when there is none left.

        Raises:
            ConfigError: it cannot be read, or is of a later release.
        """
        while self.older:
            found = list(self._read(self.older.pop(0)))
            if found:
                return found
        return []

    def _read(self, path: Path, skip: int = 0) -> Iterator[Entry]:
        try:
            with _opened(path) as file:
                file.seek(skip)
                yield from self._entries(file)
        except FileNotFoundError:
            return  # the writer has dropped its oldest file meanwhile
        except (EOFError, zlib.error, gzip.BadGzipFile):
            self.damaged += 1
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error

    def _entries(self, lines: Iterable[bytes]) -> Iterator[Entry]:
        for line in lines:
            if not line.strip():
                continue
            try:
                if len(line) > MAX_LINE:
                    raise ValueError("too long")
                values = json.loads(line.decode())  # of bytes it would guess the encoding
                if "events" in values:
                    if values["events"] != VERSION:
                        raise ConfigError(
                            f"{self.current} has events of version {values['events']!r}, and this release reads "
                            f"version {VERSION}; read it with the release of psyche_lightning that wrote it"
                        )
                    self._node, self._run = str(values["node"]), str(values["run"])
                    continue
                yield entry_of(values, self._node, self._run)
            except (ValueError, TypeError, KeyError, RecursionError, WireError):
                self.damaged += 1


def _opened(path: Path) -> IO[bytes]:
    # Annotated with a class that is not an IO[bytes], though it is one.
    return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def find_books(paths: Iterable[Path]) -> list[Book]:
    """The event files at paths: folders, searched at any depth, or files.

    Raises:
        ConfigError: a path does not exist, or there are no event files.
    """
    given = list(paths)
    found: dict[Path, Book] = {}
    for path in given:
        if not path.exists():
            raise ConfigError(f"there is no {path}; give folders of nodes, a folder that holds them, or a trace")
        if path.is_file():
            found.setdefault(path, Book(path, [path] if path.suffix == ".gz" else []))
            continue
        for folder in sorted({file.parent for file in path.rglob(f"{NAME}*.jsonl*")}):
            full = past(folder)
            turned = number_of(full[-1]) if full else 0
            found.setdefault(folder / FILE, Book(folder / FILE, full[::-1], _turned=turned))
    if not found:
        raise ConfigError(
            f"no {FILE} in {', '.join(map(str, given))}; nodes and coordinators with a folder write one, and "
            "`psyche sim --trace --json` prints one"
        )
    return list(found.values())
