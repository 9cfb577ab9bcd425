"""Saves a chain to disk: one file, which is replaced as a whole.

Layout: 8 bytes of magic and version, the SHA-256 of the rest, and a zstd frame with msgpack. Loading executes nothing,
and allocates memory only for data that the file has.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import filelock
import msgpack
import zstandard
from solders.account import Account
from solders.pubkey import Pubkey

from psyche_lightning_localnet.chain import LocalChain
from psyche_lightning_localnet.clock import SlotClock
from psyche_lightning_localnet.errors import LedgerError
from psyche_lightning_localnet.state import Record

MAGIC = b"psyloc\x00\x01"
MAX_SIZE = 8 << 30
"""Largest size of an unpacked snapshot in bytes."""
SNAPSHOT = "snapshot"
_FIELDS = [item.name for item in fields(Record)]
_TUPLES = {item.name for item in fields(Record) if str(item.type).startswith("tuple")}


class Ledger:
    """A folder that keeps a chain.

    Args:
        folder: the folder's path; created if missing. One process uses it at a time.
        interval: seconds between snapshots of a running chain.

    Attributes:
        folder: as given.
        interval: as given.

    Raises:
        LedgerError: the folder is unusable, or another process uses it.
    """

    def __init__(self, folder: Path, *, interval: float = 30.0) -> None:
        self.folder = folder
        self.interval = interval
        self._saved = -1
        self._generation = self._written = 0
        self._writing = threading.Lock()
        self._lock = filelock.FileLock(folder / "lock", timeout=0, is_singleton=False)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except filelock.Timeout:
            raise LedgerError(
                f"the ledger {folder} is used by another local chain; stop it or choose another folder"
            ) from None
        except OSError as error:
            raise LedgerError(f"cannot use the ledger {folder}: {error.strerror or error}") from error

    def close(self) -> None:
        """Release the folder, so that another process can use it."""
        self._lock.release()

    def reset(self) -> None:
        """Delete the saved chain."""
        self._path.unlink(missing_ok=True)

    def load(self, clock: SlotClock, **settings: Any) -> LocalChain | None:
        """Load the saved chain; None if the folder has none.

        Args:
            clock: the chain's clock from now on; this method sets it to the saved slot and time. A running clock then
                follows the wall clock, and a frozen one stays at the saved time.
            settings: further arguments of :class:`LocalChain`.

        Raises:
            LedgerError: the file is damaged or has another version.
        """
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LedgerError(f"cannot read {self._path}: {error.strerror or error}") from error
        try:
            state = _unpack(content)
            clock.begin(state["slot"], state["unix_ms"])
            chain = LocalChain(clock, seed=state["seed"], **settings)
            chain.restore(
                {Pubkey(row[0]): _account(row) for row in state["accounts"]},
                [_record(row) for row in state["records"]],
                count=state["count"],
                airdrops=state["airdrops"],
            )
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, zstandard.ZstdError) as error:
            raise LedgerError(
                f"{self._path} is damaged or of another version ({error}). Move it away, or start with --reset."
            ) from error
        if clock.running:
            chain.follow_wall()
        self._saved = chain.history.count
        return chain

    def behind(self, chain: LocalChain) -> bool:
        """Whether some transactions are not saved."""
        return chain.history.count != self._saved

    def save(self, chain: LocalChain) -> None:
        """Save a chain.

        Raises:
            LedgerError: the disk is full or fails. The previous file stays.
        """
        self._write(*self._capture(chain))

    async def save_aside(self, chain: LocalChain) -> None:
        """Save the current state of a running chain, in another thread.

        Raises:
            LedgerError: the disk is full or fails. The previous file stays.
        """
        try:
            await asyncio.get_running_loop().run_in_executor(None, self._write, *self._capture(chain))
        except LedgerError:
            self._saved = -1
            raise

    @property
    def _path(self) -> Path:
        return self.folder / SNAPSHOT

    def _capture(self, chain: LocalChain) -> tuple[int, dict[str, Any]]:
        # Accounts and records are immutable, so a list of them is a snapshot.
        self._generation += 1
        self._saved = chain.history.count
        return self._generation, {
            "seed": chain.seed,
            "slot": chain.slot,
            "unix_ms": chain.clock.unix_ms(),
            "count": chain.history.count,
            "airdrops": chain.airdrops,
            "accounts": list(chain.accounts.newest()),
            "records": list(chain.history),
        }

    def _write(self, generation: int, state: dict[str, Any]) -> None:
        state["accounts"] = [
            (bytes(key), account.lamports, bytes(account.owner), account.executable, bytes(account.data))
            for key, account in state["accounts"]
        ]
        state["records"] = [[getattr(record, name) for name in _FIELDS] for record in state["records"]]
        body = zstandard.ZstdCompressor(level=1).compress(msgpack.packb(state))
        new = self.folder / f"{SNAPSHOT}.{generation}.new"
        with self._writing:
            if generation < self._written:
                return
            try:
                with new.open("wb") as file:
                    file.write(MAGIC + hashlib.sha256(body).digest() + body)
                    file.flush()
                    os.fsync(file.fileno())
                new.replace(self._path)
                _sync_folder(self.folder)
            except OSError as error:
                new.unlink(missing_ok=True)
                raise LedgerError(f"cannot save the chain in {self.folder}: {error.strerror or error}") from error
            self._written = generation


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders, and writes their entries itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unpack(content: bytes) -> dict[str, Any]:
    head, body = content[: len(MAGIC)], content[len(MAGIC) + 32 :]
    if head != MAGIC:
        raise ValueError("its first bytes are not those of such a file")
    if not hmac.compare_digest(content[len(MAGIC) : len(MAGIC) + 32], hashlib.sha256(body).digest()):
        raise ValueError("its checksum is wrong")
    if not 0 < zstandard.frame_content_size(body) <= MAX_SIZE:
        raise ValueError("its size is out of bounds")
    packed = zstandard.ZstdDecompressor().decompress(body)
    state = msgpack.unpackb(packed)
    if not isinstance(state, dict):
        raise ValueError("it has no fields")
    return state


def _account(row: list[Any]) -> Account:
    _, lamports, owner, executable, data = row
    return Account(lamports, data, Pubkey(owner), executable)


def _record(row: list[Any]) -> Record:
    values: list[Any] = [tuple(value) if name in _TUPLES else value for name, value in zip(_FIELDS, row, strict=True)]
    return Record(*values)
