"""A node's durable ledger: one JSON line for each round whose agreed set is certain; append-only.

It suffices to audit the run without the coordinator (:mod:`psyche_lightning.node.audit`): it holds the coordinator's
record of the round, and the agreed announcements as their trainers signed them.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from psyche_lightning.errors import StoreError
from psyche_lightning.node.agreement import DecidedRound
from psyche_lightning.node.store import explained, write_all
from psyche_lightning.protocol.open_ids import closed

FILE = "ledger.jsonl"

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
    """The ledger file of a node; any thread may append.

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

    def close(self) -> None:
        """Release the file; idempotent."""
        with self._lock:
            self._file.close()


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
    """The rows of a ledger file; its node may be running.

    Raises:
        StoreError: it cannot be read, or a line before the last is damaged.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return  # unfinished or torn
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("no object")
                except ValueError as error:
                    raise StoreError(f"line {number} of {path} is damaged: {error}; leave this file out") from error
                yield row
    except OSError as error:
        raise StoreError(f"cannot read the ledger {path}: {error.strerror}") from error


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
