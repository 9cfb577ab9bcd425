"""A node's durable ledger: one JSON line for each round whose agreed set is certain; append-only, old lines compressed.

It suffices to audit the run without the coordinator (:mod:`psyche_lightning.node.audit`): it holds the coordinator's
record of the round, and the agreed announcements as their trainers signed them.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import threading
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from psyche_lightning.errors import StoreError
from psyche_lightning.node.agreement import DecidedRound
from psyche_lightning.node.files import explained, write_all
from psyche_lightning.protocol.open_ids import closed
from psyche_lightning.wire.canonical import sha256

FILE = "ledger.jsonl"
SEGMENTS = "ledger"
"""The folder of compressed lines beside it: ``00000001.jsonl.gz`` and so on, which ``zcat`` reads."""
SUFFIX = ".jsonl.gz"
SEGMENT = 1 << 20
"""Bytes of lines that become a segment."""

Row = dict[str, Any]
"""``run`` (its scope), ``epoch``, ``height``, ``step``, ``seed``, ``data_index``, ``batch_size``, ``nodes`` (hex),
``weights`` (one for each node, left out where shares are equal), ``parameters`` (hex digest at the epoch's start),
``again`` (``[first, last]`` pairs), ``results`` (signed envelopes, base64)."""


def row_of(scope: str, record: DecidedRound) -> Row:
    """A record as a JSON-able row."""
    round_ = record.round
    return {
        "run": scope,
        "epoch": record.epoch,
        "height": round_.height,
        "step": round_.step,
        "seed": round_.seed,
        "data_index": round_.data_index,
        "batch_size": round_.batch_size,
        "nodes": [node.hex() for node in record.nodes],
        **({"weights": list(round_.weights)} if round_.weights else {}),
        "parameters": record.parameters.hex(),
        "again": [list(interval) for interval in closed(record.again)],
        "results": [base64.b64encode(envelope.raw).decode() for envelope in record.results],
    }


class Ledger:
    """The ledger of a node; any thread may append.

    The newest rounds are lines of the file. When it has :data:`SEGMENT` bytes, its lines become a compressed file of
    the folder :data:`SEGMENTS` beside it, of about a third of the bytes: most of what is left are signatures.

    The operating system has the line when :meth:`append` returns, so it survives ``kill -9``. A power cut may lose the
    last lines, which the ledgers of other nodes replace.

    Args:
        path: the file; created, with its folder, when missing. A torn last line is cut off.

    Raises:
        StoreError: it cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        with explained("open the ledger", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115 - it stays open
            self._file.truncate(_whole(self._file))
            self._full = SEGMENT
            if self._file.seek(0, os.SEEK_END):
                self._resume()

    def append(self, scope: str, records: Iterable[DecidedRound]) -> None:
        """Write rounds down.

        Raises:
            StoreError: the disk is full or the file cannot be written; none of the rounds is written down.
        """
        lines = "".join(json.dumps(row_of(scope, record), separators=(",", ":")) + "\n" for record in records)
        with self._lock, explained("write to the ledger", self.path):
            end = self._file.seek(0, os.SEEK_END)
            try:
                write_all(self._file, lines.encode())
            except OSError:
                with contextlib.suppress(OSError):  # a torn line is cut off at the next start
                    self._file.truncate(end)
                raise
            if end + len(lines) >= self._full:
                self._compress()

    def _compress(self) -> None:
        """Make the file's lines a compressed segment. A failure loses nothing: it is tried again after more lines."""
        folder = self.path.parent / SEGMENTS
        part = folder / "new.part"
        try:
            folder.mkdir(exist_ok=True)
            self._file.seek(0)
            lines = self._file.read()
            with part.open("wb") as file:
                write_all(file, gzip.compress(lines, mtime=0))
                file.flush()
                os.fsync(file.fileno())
            part.replace(folder / f"{_next(folder):08d}{SUFFIX}")
            self._begin_anew(b"")
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            self._full = self._file.seek(0, os.SEEK_END) + SEGMENT

    def _begin_anew(self, lines: bytes) -> None:
        """Go on with a file of these lines. A reader may have the old file open, so it is replaced, not emptied.

        After a crash before that, the newest segment's lines are in both places, which readers know.
        """
        fresh = self.path.with_name(self.path.name + ".part")
        file = open(fresh, "wb+", buffering=0)  # noqa: SIM115 - it stays open
        write_all(file, lines)
        fresh.replace(self.path)
        self._file.close()
        self._file, self._full = file, SEGMENT

    def _resume(self) -> None:
        """Drop the lines that the newest segment has, after a crash at the wrong moment."""
        segments = _segments(self.path)
        if segments:
            with contextlib.suppress(EOFError, zlib.error, gzip.BadGzipFile):  # who reads it is told that it is damaged
                held = gzip.decompress(segments[-1].read_bytes())
                self._file.seek(0)
                lines = self._file.read()
                if held and lines.startswith(held):
                    self._begin_anew(lines[len(held) :])

    def close(self) -> None:
        """Release the file; idempotent."""
        with self._lock:
            self._file.close()


def _segments(path: Path) -> list[Path]:
    """The compressed files of a ledger, oldest first."""
    return sorted((path.parent / SEGMENTS).glob(f"*{SUFFIX}"))


def _next(folder: Path) -> int:
    numbers = [int(found.name.removesuffix(SUFFIX)) for found in folder.glob(f"*{SUFFIX}")]
    return max(numbers, default=0) + 1


def _whole(file: BinaryIO) -> int:
    """Bytes up to the end of the last complete line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def read_ledger(path: Path) -> Iterator[Row]:
    """The rows of a ledger, given by its file, one at a time; its node may be running.

    Raises:
        StoreError: it cannot be read, or a line before the last is damaged.
    """
    try:
        with path.open("rb") as newest:  # before the segments are listed: its lines may become one meanwhile
            known: set[bytes] = set()
            for segment in _segments(path):
                known = set()
                with gzip.open(segment) as file:
                    for number, line in enumerate(file, 1):
                        known.add(sha256(line))
                        yield _row(line, number, segment)
            for number, line in enumerate(newest, 1):
                if not line.endswith(b"\n"):
                    return  # unfinished or torn
                if sha256(line) not in known:  # those of the last segment may still be here
                    yield _row(line, number, path)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StoreError(f"cannot read the ledger {path}: {reason}") from error


def _row(line: bytes, number: int, path: Path) -> Row:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise StoreError(f"line {number} of {path} is damaged: {error}; leave this file out") from error
    return row


def find_ledgers(folders: Iterable[Path]) -> list[Path]:
    """The ledger files in the folders, at any depth.

    Raises:
        StoreError: a folder does not exist, or there is no ledger at all.
    """
    found: list[Path] = []
    for folder in folders:
        if not folder.exists():
            raise StoreError(f"there is no folder {folder}; give node folders, or a folder that holds them")
        found += [folder] if folder.is_file() else sorted(folder.rglob(FILE))
    if not found:
        raise StoreError(f"no {FILE} in {', '.join(map(str, folders))}; nodes with a folder write one as they train")
    return list(dict.fromkeys(found))
