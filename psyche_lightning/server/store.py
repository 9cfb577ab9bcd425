"""Stores a server's runs and its key, in SQLite and a file or in memory (invariant I8)."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from psyche_lightning.coordinator.delivery import CHANGING_DELIVERIES, MAX_DELIVERIES
from psyche_lightning.coordinator.history import (
    CHANGING_EVALUATIONS,
    CHANGING_METRICS,
    MAX_EVALUATIONS,
    MAX_EVENTS,
    MAX_METRICS,
)
from psyche_lightning.coordinator.host import MAX_ROUNDS, RunHost
from psyche_lightning.coordinator.metrics import MAX_PAST
from psyche_lightning.errors import CoordinatorError, PsycheError, WireError
from psyche_lightning.server.limits import MAX_ARCHIVED
from psyche_lightning.version import __version__
from psyche_lightning.wire.identity import Identity

logger = logging.getLogger(__name__)

FILE = "coordinator.sqlite3"
KEY_FILE = "coordinator.key"
VERSION = 1
"""Of the tables; the file has it as SQLite's ``user_version``. Stores of before have 0, and the same tables."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS run (run_id TEXT PRIMARY KEY, created TEXT NOT NULL, state TEXT);
CREATE TABLE IF NOT EXISTS manifest (run_id TEXT PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS archive (id TEXT PRIMARY KEY, line TEXT NOT NULL, status BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS entry (
    run_id TEXT, kind TEXT, number INTEGER, text TEXT NOT NULL, PRIMARY KEY (run_id, kind, number)
) WITHOUT ROWID;
"""

_LISTS = {
    "events": ("event", MAX_EVENTS, 0),
    "metrics": ("metric", MAX_METRICS, CHANGING_METRICS),
    "past": ("past", MAX_PAST, 1),
    "deliveries": ("delivery", MAX_DELIVERIES, CHANGING_DELIVERIES),
    "evaluations": ("evaluation", MAX_EVALUATIONS, CHANGING_EVALUATIONS),
}
"""The growing lists of a run's history: the kind of their entries, how many are kept, and how many may still change."""


_BACKUP = "CREATE TABLE backup (version TEXT, made REAL, key BLOB, token TEXT)"


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

    def archive(self, run_id: str, record: dict[str, Any]) -> None:
        """Delete a run, and keep its record (see :func:`~psyche_lightning.server.archive.record_of`).

        Raises:
            CoordinatorError: see :meth:`create`; the run is still there.
        """

    def archived(self) -> list[dict[str, Any]]:
        """The lines of the archived runs, newest first."""
        ...

    def archived_status(self, scope: str) -> dict[str, Any]:
        """The status of an archived run."""
        ...

    def forget(self, scope: str) -> None:
        """Delete an archived run.

        Raises:
            CoordinatorError: see :meth:`create`; it is still there.
        """

    def save(self, host: RunHost) -> None:
        """Store a change of a run.

        Raises:
            CoordinatorError: see :meth:`create`; the next call stores this change, too.
        """

    def backup(self, token: str | None, made: float) -> bytes:
        """A backup, as :mod:`~psyche_lightning.server.backup` reads it: all runs, the key and the owner's token.

        Args:
            token: the owner's token; None if there is none.
            made: the date, in seconds since 1970.

        Raises:
            CoordinatorError: it cannot be made (``StoreFailed``), or the runs are in memory alone (``NoBackup``).
        """
        ...

    def close(self) -> None:
        """Close the files."""


class MemoryStore:
    """Keeps runs in memory, until the process ends."""

    def __init__(self) -> None:
        self._hosts: dict[str, RunHost] = {}
        self._created: dict[str, dict[str, Any]] = {}
        self._archive: dict[str, dict[str, Any]] = {}
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

    def archive(self, run_id: str, record: dict[str, Any]) -> None:
        """Keep the record in place of the run."""
        self.remove(run_id)
        self._archive[record["line"]["id"]] = record
        for scope in list(self._archive)[:-MAX_ARCHIVED]:
            del self._archive[scope]

    def archived(self) -> list[dict[str, Any]]:
        """The lines."""
        return [record["line"] for record in reversed(self._archive.values())]

    def archived_status(self, scope: str) -> dict[str, Any]:
        """The status."""
        status: dict[str, Any] = self._archive[scope]["status"]
        return status

    def forget(self, scope: str) -> None:
        """Delete the record."""
        del self._archive[scope]

    def save(self, host: RunHost) -> None:
        """Do nothing: the run itself is kept."""

    def backup(self, token: str | None, made: float) -> bytes:
        """Refuse."""
        raise CoordinatorError("this coordinator keeps its runs in memory alone; there is no backup", code="NoBackup")

    def close(self) -> None:
        """Do nothing."""


@dataclass
class _Saved:
    """What is stored of a run.

    Attributes:
        epoch: epoch of the stored rounds.
        height: height of the newest stored round.
        counts: entries of each list of the history.
        width: rounds of a stretch of the past.
        version: of the nodes.
        nodes: numbers of the nodes.
        manifest: the stored manifest.
    """

    epoch: int = 0
    height: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    width: int = 1
    version: int = -1
    nodes: set[int] = field(default_factory=set)
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
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                self._database.close()
                raise CoordinatorError(
                    f"the coordinator's store {self._path} was written by a newer psyche_lightning: it has version "
                    f"{version}, and this one ({__version__}) reads up to {VERSION}. Start the newer one, or restore a "
                    "backup from before the upgrade into another folder: `psyche coordinator restore`.",
                    code="StoreFailed",
                )
            # A full disk takes no write, and what is stored is read from it nevertheless.
            stamp = f"PRAGMA user_version={VERSION};" if version < VERSION else ""
            self._database.executescript(f"BEGIN EXCLUSIVE; {_SCHEMA} {stamp} COMMIT;")
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
                state = _opened(text, f"the state of run {run_id!r}")
                data = {
                    **state,
                    "manifest": _opened(manifest[0], f"the manifest of run {run_id!r}") if manifest else None,
                    "history": self._entries(run_id, "round")[1],
                    **{name: self._list(run_id, kind) for name, (kind, *_) in _LISTS.items()},
                }
                # Earlier versions had no such lists.
                data["past"] |= {"width": 1, **state.get("past", {})}
                data["nodes"] = {"count": 0, **state.get("nodes", {}), **self._list(run_id, "node")}
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
            self._remove(run_id)
        self._saved.pop(run_id, None)

    def _remove(self, run_id: str) -> None:
        for table in ("run", "manifest", "entry"):
            self._database.execute(f"DELETE FROM {table} WHERE run_id = ?", (run_id,))

    def archive(self, run_id: str, record: dict[str, Any]) -> None:
        """Delete the run and insert the record; the oldest records beyond the limit go."""
        status = zlib.compress(json.dumps(record["status"]).encode())
        row = (record["line"]["id"], _sealed(record["line"]), status)
        with self._transaction():
            self._remove(run_id)
            self._database.execute("REPLACE INTO archive VALUES (?, ?, ?)", row)
            newest = "SELECT rowid FROM archive ORDER BY rowid DESC LIMIT ?"
            self._database.execute(f"DELETE FROM archive WHERE rowid NOT IN ({newest})", (MAX_ARCHIVED,))
        self._saved.pop(run_id, None)

    def archived(self) -> list[dict[str, Any]]:
        """The lines; those that are damaged are left out."""
        lines = []
        for scope, text in self._database.execute("SELECT id, line FROM archive ORDER BY rowid DESC"):
            with suppress(WireError):
                lines.append(_opened(text, f"the closed run {scope!r}"))
        return lines

    def archived_status(self, scope: str) -> dict[str, Any]:
        """The status."""
        row = self._database.execute("SELECT status FROM archive WHERE id = ?", (scope,)).fetchone()
        try:
            status: dict[str, Any] = json.loads(zlib.decompress(row[0]))
        except (zlib.error, ValueError) as error:
            raise CoordinatorError(f"the history of the closed run {scope!r} is damaged", code="StoreFailed") from error
        return status

    def forget(self, scope: str) -> None:
        """Delete the record."""
        with self._transaction():
            self._database.execute("DELETE FROM archive WHERE id = ?", (scope,))

    def save(self, host: RunHost) -> None:
        """Write the changes."""
        with self._transaction():
            self._write(host, self._saved[host.state.run_id])
        self._saved[host.state.run_id] = _saved(host)

    def backup(self, token: str | None, made: float) -> bytes:
        """Copy everything as it is between two changes; needs as much room beside the file for a moment."""
        part: str | None = None
        try:
            descriptor, part = tempfile.mkstemp(prefix=".backup.", dir=self._path.parent)  # with mode 0600
            os.close(descriptor)
            with closing(sqlite3.connect(part, isolation_level=None)) as copy:
                self._database.backup(copy)
                copy.execute("PRAGMA journal_mode=DELETE")  # so that it is one file
                copy.execute(_BACKUP)
                row = (__version__, float(made), self.identity().secret_bytes(), token)
                copy.execute("INSERT INTO backup VALUES (?, ?, ?, ?)", row)
            return Path(part).read_bytes()
        except (OSError, sqlite3.Error) as error:
            raise CoordinatorError(
                f"cannot make a backup in {self._path.parent}: {error}. It needs as much room there as the runs have.",
                code="StoreFailed",
                retryable=True,
            ) from error
        finally:
            if part is not None:
                with suppress(OSError):
                    os.unlink(part)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _write(self, host: RunHost, saved: _Saved) -> None:
        run_id = host.state.run_id
        if host.rounds_epoch != saved.epoch:
            self._database.execute("DELETE FROM entry WHERE run_id = ? AND kind = 'round'", (run_id,))
            saved = replace(saved, epoch=host.rounds_epoch, height=0)
        if host.history.past.width != saved.width:
            self._database.execute("DELETE FROM entry WHERE run_id = ? AND kind = 'past'", (run_id,))
            saved = replace(saved, counts={**saved.counts, "past": 0})
        data = host.dump(
            rounds_from=saved.height,
            since={
                **{name: max(0, saved.counts.get(name, 0) - changing) for name, (_, _, changing) in _LISTS.items()},
                "nodes": saved.version,
            },
        )
        rounds = data.pop("history")
        first = rounds[0]["height"] if rounds else 0
        self._append(run_id, "round", first, rounds, MAX_ROUNDS)
        for name, (kind, limit, _) in _LISTS.items():
            self._append(run_id, kind, data[name].pop("first"), data[name].pop("items"), limit)
        nodes = data["nodes"].pop("items")
        rows = [(run_id, "node", node["number"], _sealed(node)) for node in nodes]
        self._database.executemany("REPLACE INTO entry VALUES (?, ?, ?, ?)", rows)
        gone = saved.nodes - {node.number for node in host.history.nodes}
        forget = "DELETE FROM entry WHERE run_id = ? AND kind = 'node' AND number = ?"
        self._database.executemany(forget, [(run_id, number) for number in gone])
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

    def _list(self, run_id: str, kind: str) -> dict[str, Any]:
        """A list of the history as :meth:`RunHost.load` reads it."""
        first, items = self._entries(run_id, kind)
        return {"first": first, "items": items}

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
            advice = (
                "The run stands still until it can be stored: free space or make the directory writable. A change that "
                "its owner asked for may be made then; `psyche run status` shows it."
            )
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
        {
            "events": history.events.count,
            "metrics": history.metrics.count,
            "past": len(history.past.stretches),
            "deliveries": history.deliveries.count,
            "evaluations": history.evaluations.count,
        },
        history.past.width,
        history.nodes.version,
        {node.number for node in history.nodes},
        host.manifest,
    )
