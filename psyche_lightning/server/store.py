"""Stores a server's runs and its key, in SQLite and a file or in memory (invariant I8)."""

from __future__ import annotations

import json
import logging
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from psyche_lightning.coordinator.history import (
    CHANGING_EVALUATIONS,
    CHANGING_METRICS,
    MAX_EVALUATIONS,
    MAX_EVENTS,
    MAX_METRICS,
)
from psyche_lightning.coordinator.host import MAX_ROUNDS, RunHost
from psyche_lightning.errors import CoordinatorError, PsycheError, WireError
from psyche_lightning.wire.identity import Identity

logger = logging.getLogger(__name__)

FILE = "coordinator.sqlite3"
KEY_FILE = "coordinator.key"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS run (run_id TEXT PRIMARY KEY, created TEXT NOT NULL, state TEXT);
CREATE TABLE IF NOT EXISTS manifest (run_id TEXT PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS entry (
    run_id TEXT, kind TEXT, number INTEGER, text TEXT NOT NULL, PRIMARY KEY (run_id, kind, number)
) WITHOUT ROWID;
"""


class Store(Protocol):
    """Keeps runs. A change is durable when the method returns."""

    def identity(self) -> Identity:
        """The coordinator's key, always the same.

        Raises:
            ConfigError: it cannot be read or written, or other users can read it.
        """
        ...

    def load(self) -> list[RunHost]:
        """Returns all runs, in order of creation.

        Raises:
            PsycheError: the stored data cannot be read.
        """
        ...

    def create(self, host: RunHost, created: dict[str, Any]) -> None:
        """Store a new run, and the request that created it.

        Raises:
            CoordinatorError: the run cannot be stored (``StoreFailed``, retryable); nothing is kept.
        """

    def created(self, run_id: str) -> dict[str, Any]:
        """The request that created the run."""
        ...

    def remove(self, run_id: str) -> None:
        """Delete a run.

        Raises:
            CoordinatorError: see :meth:`create`; the run is still there.
        """

    def save(self, host: RunHost) -> None:
        """Store a change of a run.

        Raises:
            CoordinatorError: see :meth:`create`; the next call stores this change, too.
        """

    def close(self) -> None:
        """Close the files."""


class MemoryStore:
    """Keeps runs in memory, until the process ends."""

    def __init__(self) -> None:
        self._hosts: dict[str, RunHost] = {}
        self._created: dict[str, dict[str, Any]] = {}
        self._identity = Identity.generate()

    def identity(self) -> Identity:
        """A key of this object."""
        return self._identity

    def load(self) -> list[RunHost]:
        """Returns the runs themselves."""
        return list(self._hosts.values())

    def create(self, host: RunHost, created: dict[str, Any]) -> None:
        """Keep the run."""
        self._hosts[host.state.run_id], self._created[host.state.run_id] = host, created

    def created(self, run_id: str) -> dict[str, Any]:
        """The request that created the run."""
        return self._created[run_id]

    def remove(self, run_id: str) -> None:
        """Delete the run."""
        del self._hosts[run_id], self._created[run_id]

    def save(self, host: RunHost) -> None:
        """Do nothing: the run itself is kept."""

    def close(self) -> None:
        """Do nothing."""


@dataclass
class _Saved:
    """What is stored of a run.

    Attributes:
        epoch: epoch of the stored rounds.
        height: height of the newest stored round.
        events: number of events.
        metrics: number of rows of figures.
        evaluations: number of evaluations.
        manifest: the stored manifest.
    """

    epoch: int = 0
    height: int = 0
    events: int = 0
    metrics: int = 0
    evaluations: int = 0
    manifest: dict[str, Any] | None = None


class SqliteStore:
    """Keeps runs in one SQLite file, and the key in a file beside it; each change is on disk when the call returns.

    A run is a row that each change rewrites, and entries (rounds of the epoch, events, figures) that changes add. Each
    text begins with its checksum. Events and figures decide nothing: those that are damaged are left out.

    Args:
        directory: folder of the file; created if missing. Only one process at a time can use it.

    Raises:
        CoordinatorError: the file cannot be opened (``StoreFailed``).
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE
        self._saved: dict[str, _Saved] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._failed("open", error.strerror or str(error)) from error
        try:
            # The server's loop runs in one thread, but perhaps not in the one that opened the file.
            self._database = sqlite3.connect(self._path, timeout=2.0, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.executescript(f"BEGIN EXCLUSIVE; {_SCHEMA} COMMIT;")
        except sqlite3.Error as error:
            locked = "locked" in str(error)
            reason = "another coordinator uses it" if locked else str(error)
            raise self._failed("open", reason) from error

    def identity(self) -> Identity:
        """The key in the folder; made if missing."""
        return Identity.load_or_create(self._path.with_name(KEY_FILE), "coordinator")

    def load(self) -> list[RunHost]:
        """Returns all runs."""
        hosts = []
        try:
            rows = self._database.execute("SELECT run_id, state FROM run WHERE state IS NOT NULL ORDER BY rowid")
            for run_id, text in rows.fetchall():
                manifest = self._database.execute("SELECT text FROM manifest WHERE run_id = ?", (run_id,)).fetchone()
                data = {
                    **_opened(text, f"the state of run {run_id!r}"),
                    "manifest": _opened(manifest[0], f"the manifest of run {run_id!r}") if manifest else None,
                    "history": self._entries(run_id, "round")[1],
                    "events": dict(zip(("first", "items"), self._entries(run_id, "event"), strict=True)),
                    "metrics": dict(zip(("first", "items"), self._entries(run_id, "metric"), strict=True)),
                    "evaluations": dict(zip(("first", "items"), self._entries(run_id, "evaluation"), strict=True)),
                }
                host = RunHost.load(data)
                figures, stored = host.history.metrics, data["metrics"]
                if figures.count < stored["first"] + len(stored["items"]):  # rows of an older version were left out
                    with self._transaction():
                        self._database.execute("DELETE FROM entry WHERE run_id = ? AND kind = 'metric'", (run_id,))
                        self._append(run_id, "metric", **figures.dump(), limit=MAX_METRICS)
                self._saved[run_id] = _saved(host)
                hosts.append(host)
        except (sqlite3.Error, ValueError, TypeError, WireError) as error:
            raise CoordinatorError(
                f"the coordinator's store {self._path} cannot be read: {error}. "
                "Restore it, or start with another --dir.",
                code="StoreFailed",
            ) from error
        return hosts

    def create(self, host: RunHost, created: dict[str, Any]) -> None:
        """Insert a run."""
        run_id = host.state.run_id
        with self._transaction():
            self._database.execute("INSERT INTO run (run_id, created) VALUES (?, ?)", (run_id, _sealed(created)))
            self._write(host, _Saved())
        self._saved[run_id] = _saved(host)

    def created(self, run_id: str) -> dict[str, Any]:
        """The request that created the run."""
        row = self._database.execute("SELECT created FROM run WHERE run_id = ?", (run_id,)).fetchone()
        created: dict[str, Any] = _opened(row[0], f"the creation of run {run_id!r}")
        return created

    def remove(self, run_id: str) -> None:
        """Delete the run."""
        with self._transaction():
            for table in ("run", "manifest", "entry"):
                self._database.execute(f"DELETE FROM {table} WHERE run_id = ?", (run_id,))
        self._saved.pop(run_id, None)

    def save(self, host: RunHost) -> None:
        """Write the changes."""
        with self._transaction():
            self._write(host, self._saved[host.state.run_id])
        self._saved[host.state.run_id] = _saved(host)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _write(self, host: RunHost, saved: _Saved) -> None:
        run_id = host.state.run_id
        if host.rounds_epoch != saved.epoch:
            self._database.execute("DELETE FROM entry WHERE run_id = ? AND kind = 'round'", (run_id,))
            saved = replace(saved, epoch=host.rounds_epoch, height=0)
        data = host.dump(
            rounds_from=saved.height,
            events_from=saved.events,
            metrics_from=max(0, saved.metrics - CHANGING_METRICS),
            evaluations_from=max(0, saved.evaluations - CHANGING_EVALUATIONS),
        )
        rounds = data.pop("history")
        first = rounds[0]["height"] if rounds else 0
        self._append(run_id, "round", first, rounds, MAX_ROUNDS)
        self._append(run_id, "event", **data.pop("events"), limit=MAX_EVENTS)
        self._append(run_id, "metric", **data.pop("metrics"), limit=MAX_METRICS)
        self._append(run_id, "evaluation", **data.pop("evaluations"), limit=MAX_EVALUATIONS)
        manifest = data.pop("manifest")
        if manifest is not saved.manifest:
            self._database.execute("REPLACE INTO manifest VALUES (?, ?)", (run_id, _sealed(manifest)))
        self._database.execute("UPDATE run SET state = ? WHERE run_id = ?", (_sealed(data), run_id))

    def _append(self, run_id: str, kind: str, first: int, items: list[Any], limit: int) -> None:
        rows = [(run_id, kind, number, _sealed(item)) for number, item in enumerate(items, first)]
        self._database.executemany("REPLACE INTO entry VALUES (?, ?, ?, ?)", rows)
        if rows:
            old = (run_id, kind, first + len(rows) - limit)
            self._database.execute("DELETE FROM entry WHERE run_id = ? AND kind = ? AND number < ?", old)

    def _entries(self, run_id: str, kind: str) -> tuple[int, list[Any]]:
        rows = self._database.execute(
            "SELECT number, text FROM entry WHERE run_id = ? AND kind = ? ORDER BY number", (run_id, kind)
        ).fetchall()
        first, items = rows[0][0] if rows else 0, []
        for number, text in rows:
            try:
                items.append(_opened(text, f"the {kind} {number} of run {run_id!r}"))
            except WireError as error:
                if kind == "round":
                    raise
                logger.warning("%s and left out, with those before it", error)
                first, items = number + 1, []
        return first, items

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._database.execute("BEGIN IMMEDIATE")
            yield
            self._database.execute("COMMIT")
        except BaseException as error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise self._failed("write", str(error)) from error
            raise

    def _failed(self, what: str, reason: str) -> PsycheError:
        advice = "Stop what uses it, make the directory writable, or start with another --dir."
        if what == "write":
            advice = "The run accepts no change until it can be stored: free space or make the directory writable."
        return CoordinatorError(
            f"cannot {what} the coordinator's store {self._path}: {reason}. {advice}",
            code="StoreFailed",
            retryable=what == "write",
        )


def _sealed(value: Any) -> str:
    """A JSON value as a text with its checksum: eight digits of hex, then the JSON."""
    text = json.dumps(value)
    return f"{zlib.crc32(text.encode()):08x}{text}"


def _opened(text: str, what: str) -> Any:
    """The value in what :func:`_sealed` made, or in plain JSON, which earlier versions wrote.

    Raises:
        WireError: it is damaged.
    """
    plain = text if text[:1] in ("{", "[") or text == "null" else text[8:]
    if plain is not text and text[:8] != f"{zlib.crc32(plain.encode()):08x}":
        raise WireError(f"{what} is damaged")
    try:
        return json.loads(plain)
    except ValueError as error:
        raise WireError(f"{what} is damaged: {error}") from error


def _saved(host: RunHost) -> _Saved:
    height = host.rounds[-1].height if host.rounds else 0
    history = host.history
    return _Saved(
        host.rounds_epoch,
        height,
        history.events.count,
        history.metrics.count,
        history.evaluations.count,
        host.manifest,
    )
