"""The owner's token of a coordinator server: made beside its runs, shown by the commands that change runs.

Only its file and the environment carry it, so no list of processes and no log shows it. A running ``psyche
coordinator`` notes under ``psyche-lightning/coordinators`` of the user's state folder where its token lies, so the same
user's commands on the same machine find it by the coordinator's URL. The coordinator keeps its note locked: one that
nobody locks was left by a process that died, and whoever listens on that port now must not get the token.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from psyche_lightning import system
from psyche_lightning.errors import ConfigError
from psyche_lightning.sites import is_loopback

logger = logging.getLogger(__name__)

FILE = "owner.token"
"""The token's name in the folder of a coordinator's runs."""
MAX_SIZE = 512
"""Bytes of a token's file; a longer file is something else."""
_ANY = ("0.0.0.0", "::")  # coordinators on these also listen on loopback


def read_token(path: Path) -> str:
    """The token in a file.

    Raises:
        ConfigError: the file cannot be read, other users can read it, or it has no token.
    """
    try:
        with path.open("rb") as file:
            open_to_others = system.open_to_others(file)
            data = file.read(MAX_SIZE + 1)
    except OSError as error:
        raise ConfigError(
            f"cannot read the owner's token {path}: {error.strerror}. `psyche coordinator` keeps it as {FILE} in the "
            "folder of its runs (--dir)."
        ) from error
    if open_to_others:
        raise ConfigError(
            f"other users can read the owner's token {path}. If one may have seen it, remove the file and restart the "
            f"coordinator, which makes a new one; otherwise: chmod 600 {path}"
        )
    if len(data) > MAX_SIZE:
        data = b""
    return check_token(data.decode(errors="replace").strip(), str(path))


def check_token(token: str, source: str) -> str:
    """Returns the token, which must be one line of plain ASCII.

    Raises:
        ConfigError: it is something else; the text names ``source``, and nothing of the token.
    """
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(
            f"{source} has no owner's token; expected one line of plain ASCII, as `psyche coordinator` writes to {FILE}"
        )
    return token


def load_or_create(path: Path) -> tuple[str, bool]:
    """The token in a file, and whether this call made it: 32 random bytes, in a file for this user only.

    Raises:
        ConfigError: as of :func:`read_token`, or the file cannot be written.
    """
    if path.exists():
        return read_token(path), False
    token = secrets.token_urlsafe(32)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, fresh = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # with mode 0600
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{token}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)  # a crash leaves no half token
        system.sync(path.parent)
    except OSError as error:
        raise ConfigError(f"cannot write the owner's token {path}: {error.strerror}") from error
    return token, True


@contextmanager
def announced(url: str, path: Path) -> Iterator[bool]:
    """Note where the token of the coordinator on ``url`` lies, until the context ends; yields whether that worked."""
    parts = urlsplit(url)
    try:
        note = _notes() / _name(parts.hostname or "", parts.port)
        note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = note.open("a+b", buffering=0)
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        logger.warning("cannot note where the owner's token lies: %s. Commands need --token-file %s", error, path)
        yield False
        return
    with file:
        noted = system.claim(file)
        for _ in range(20):  # nodes that look for the token hold the note of a coordinator that died for a moment
            if noted:
                break
            time.sleep(0.05)
            noted = system.claim(file)
        if noted:
            try:
                file.truncate(0)
                file.write(os.fsencode(path.resolve()))
            except OSError as error:
                logger.warning("cannot write %s: %s. Commands need --token-file %s", note, error.strerror, path)
        try:
            yield noted
        finally:
            if noted:
                with contextlib.suppress(OSError):
                    note.unlink()


def find_token(url: str) -> str | None:
    """The token of a coordinator that this user runs on this machine; None if there is none at this URL.

    Raises:
        ConfigError: see :func:`read_token`.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    hosts = ("127.0.0.1", "::1", *_ANY) if is_loopback(host) else ()
    for each in dict.fromkeys((host, *hosts)):
        with contextlib.suppress(OSError, RuntimeError), (_notes() / _name(each, parts.port)).open("r+b") as note:
            if not system.claim(note):
                return read_token(Path(os.fsdecode(note.read())))
    return None


def own_token(url: str) -> bytes:
    """What :func:`find_token` finds, with which a node proves that its user owns the coordinator; else empty."""
    try:
        return (find_token(url) or "").encode()
    except ConfigError as error:
        logger.warning("%s", error)
        return b""


def _notes() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "psyche-lightning" / "coordinators"


def _name(host: str, port: int | None) -> str:
    return f"{host.replace(':', '_')}-{port or 80}"
