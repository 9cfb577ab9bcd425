"""What became of every transaction: one JSON line each, for the user's file and for tables."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from psyche_lightning.errors import ConfigError


@dataclass(frozen=True)
class Record:
    """One transaction of this client, or one that the chain refused before taking it.

    Attributes:
        time: Unix seconds at which it was known what became of it.
        run: the run.
        instruction: what it did; several names with ``+`` between them.
        signature: its first signature in base58.
        result: ``ok``, or the name of the error.
        landed: whether it is on the chain, and paid for.
        slot: the slot in which it landed; None when it did not, or nobody says.
        units: compute units that it used; None when nobody says.
        fee: lamports that it cost; None likewise.
        tries: blockhashes that it took: more than one when earlier ones expired.
        size: bytes.
    """

    time: float
    run: str
    instruction: str
    signature: str
    result: str
    landed: bool
    slot: int | None
    units: int | None
    fee: int | None
    tries: int
    size: int


class Log:
    """Keeps the newest records, and appends each to a file if there is one.

    Args:
        path: the file; None for none.
        keep: how many records stay in memory.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, keep: int = 1000) -> None:
        self.records: list[Record] = []
        self._keep = keep
        self._path = None if path is None else Path(path)
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a"):
                    pass
            except OSError as error:
                raise ConfigError(f"cannot write the log of transactions {path}: {error.strerror}") from error

    def write(self, record: Record) -> None:
        """Keep a record. A full disk costs the line, not the training."""
        self.records.append(record)
        del self.records[: -self._keep]
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(record), separators=(",", ":")) + "\n")
        except OSError:
            self._path = None
