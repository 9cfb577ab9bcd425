"""Backups of a coordinator: one file with all runs, the coordinator's key and the owner's token.

The file is a copy of the store (SQLite) with one more table. A running coordinator makes it between two changes. Who
has it can be the coordinator, so only its user may read it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from psyche_lightning import system
from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.errors import CoordinatorError, WireError
from psyche_lightning.server.store import FILE, KEY_FILE, SqliteStore
from psyche_lightning.server.token import FILE as TOKEN_FILE
from psyche_lightning.wire.identity import Identity


@dataclass(frozen=True)
class Backup:
    """What is in a backup.

    Attributes:
        version: of the psyche_lightning that made it.
        made: when, in seconds since 1970.
        key: the coordinator's public key.
        runs: the runs.
    """

    version: str
    made: float
    key: bytes
    runs: list[RunHost]


def look_into(path: Path) -> Backup:
    """Read a backup, and check that it is whole and of a version that this one reads.

    Raises:
        CoordinatorError: it is not (``StoreFailed``).
    """
    with tempfile.TemporaryDirectory() as folder:
        return restore(path, Path(folder) / "runs")


def restore(path: Path, directory: Path) -> Backup:
    """Make the folder of a coordinator from a backup.

    Args:
        path: the backup.
        directory: the folder; new, or without a coordinator.

    Raises:
        CoordinatorError: the file is no backup, is damaged, or is of another version; the folder has a coordinator, or
            cannot be written (``StoreFailed``).
    """
    for name in (FILE, KEY_FILE, TOKEN_FILE):
        if (directory / name).exists():
            raise _failed(
                f"{directory} already has a coordinator's {name}. Restore into a new folder; if what is in this one is "
                "no longer wanted, move it away first"
            )
    with _readable(path) as (copy, version, made, secret, token):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            identity = Identity(secret)
            _write(directory / KEY_FILE, identity.secret_bytes() + identity.public)
            if token is not None:
                _write(directory / TOKEN_FILE, f"{token}\n".encode())
            part = directory / f".{FILE}.part"
            part.unlink(missing_ok=True)
            with closing(sqlite3.connect(part, isolation_level=None)) as store:
                copy.backup(store)
                store.execute("PRAGMA secure_delete=ON")  # the key is in its own file alone
                store.execute("DROP TABLE backup")
            system.sync(part)
            os.replace(part, directory / FILE)  # the last file: a folder without it can be restored again
            system.sync(directory)
        except (OSError, sqlite3.Error) as error:
            raise _failed(f"cannot restore {path} into {directory}: {error}") from error
    store_ = SqliteStore(directory)
    try:
        return Backup(version, made, identity.public, store_.load())
    finally:
        store_.close()


@contextmanager
def _readable(path: Path) -> Iterator[tuple[sqlite3.Connection, str, float, bytes, str | None]]:
    try:
        with path.open("rb") as file:
            file.read(1)
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as copy:
            damage = [text for (text,) in copy.execute("PRAGMA quick_check") if text != "ok"]
            if damage:
                raise WireError(damage[0])
            row = copy.execute("SELECT version, made, key, token FROM backup").fetchone()
            version, made, secret, token = row
            types = (type(version), type(made), type(secret), type(token))
            if types[:3] != (str, float, bytes) or types[3] not in (str, type(None)):
                raise WireError("a value has another type")
            yield copy, version, made, secret, token
    except OSError as error:
        raise _failed(f"cannot read the backup {path}: {error.strerror}") from error
    except (sqlite3.Error, TypeError, WireError) as error:
        raise _failed(
            f"{path} is no whole backup of a coordinator: {error}. Take another one; `psyche coordinator backup` makes "
            "them"
        ) from error


def _write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def keep(data: bytes, path: Path) -> Backup:
    """Check a backup that a coordinator sent, and put it in place of the file ``path`` at once.

    Raises:
        CoordinatorError: it is no backup, or the file cannot be written (``StoreFailed``); the former file stays.
    """
    part: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # with mode 0600
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        found = look_into(Path(part))
        os.replace(part, path)
        system.sync(path.parent)
    except OSError as error:
        raise _failed(f"cannot write the backup {path}: {error.strerror}") from error
    finally:
        if part is not None:
            with contextlib.suppress(OSError):
                os.unlink(part)
    return found


def _failed(text: str) -> CoordinatorError:
    return CoordinatorError(f"{text}.", code="StoreFailed")
