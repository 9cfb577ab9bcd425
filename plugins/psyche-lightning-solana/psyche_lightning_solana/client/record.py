"""The result of every transaction: one JSON line each, for the user's file and for tables."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from psyche_lightning.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One transaction of this client, or one that the chain refused in advance.

    Attributes:
        time: Unix seconds at which its result was known.
        run: the run.
        instruction: its instructions; several names are separated by ``+``.
        signature: its first signature in base58.
        result: ``ok``, or the name of the error.
        landed: whether it is on the chain, and paid for.
        slot: the slot in which it landed; None if it did not, or is unknown.
        units: compute units that it used; None if unknown.
        fee: lamports that it cost; None if unknown.
        tries: blockhashes that it used: more than one if earlier ones expired.
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
    """Keeps the newest records, and appends each to the file if given.

    Args:
        path: the file, or None.
        keep: number of records in memory.
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
        """Keep a record. A full disk loses the line, not the training."""
        self.records.append(record)
        del self.records[: -self._keep]
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(record), separators=(",", ":")) + "\n")
        except OSError as error:
            logger.warning("the log of transactions %s ends here: %s", self._path, error.strerror)
            self._path = None
