"""Stores a node's blobs by SHA-256."""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from psyche_lightning import system
from psyche_lightning.node.files import explained, sync
from psyche_lightning.wire.canonical import HASH_SIZE, sha256

logger = logging.getLogger(__name__)


class BlobStore(Protocol):
    """Bytes by their SHA-256; every method may be called from any thread."""

    def put(self, data: bytes, durable: bool = True) -> bytes:
        """Keep ``data`` and return its SHA-256; ``durable`` data survives a power cut from then on.

        Raises:
            StoreError: the folder is full or cannot be written.
        """
        ...

    def get(self, digest: bytes) -> bytes | None:
        """The bytes, or None when they are missing or damaged."""
        ...

    def has(self, digest: bytes) -> bool:
        """Whether the blob is here (its bytes are not read)."""
        ...

    def size(self, digest: bytes) -> int | None:
        """Size of the blob in bytes, or None if missing."""
        ...

    def delete(self, digest: bytes) -> None:
        """Forget the blob; does nothing if it is missing."""
        ...

    def retain(self, keep: Collection[bytes]) -> None:
        """Forget every blob not in ``keep`` that was here at the last call or before this process began.

        Newer blobs stay until the next call: their writer may not have announced them yet.
        """
        ...


class MemoryBlobStore:
    """A :class:`BlobStore` in memory."""

    def __init__(self) -> None:
        self._blobs: dict[bytes, bytes] = {}
        self._young: set[bytes] = set()
        self._lock = threading.Lock()

    def put(self, data: bytes, durable: bool = True) -> bytes:
        """Keep ``data`` (a copy, when it is not ``bytes``) and return its SHA-256."""
        digest = sha256(data)
        with self._lock:
            self._blobs[digest] = bytes(data)
            self._young.add(digest)
        return digest

    def get(self, digest: bytes) -> bytes | None:
        """The bytes, or None."""
        return self._blobs.get(digest)

    def has(self, digest: bytes) -> bool:
        """Whether the blob is here."""
        return digest in self._blobs

    def size(self, digest: bytes) -> int | None:
        """Bytes of the blob, or None."""
        data = self._blobs.get(digest)
        return None if data is None else len(data)

    def delete(self, digest: bytes) -> None:
        """Forget the blob."""
        self._blobs.pop(digest, None)

    def retain(self, keep: Collection[bytes]) -> None:
        """See :meth:`BlobStore.retain`."""
        with self._lock:
            kept = self._young.union(keep)
            self._blobs = {digest: data for digest, data in self._blobs.items() if digest in kept}
            self._young = set()


class DirectoryBlobStore:
    """A :class:`BlobStore` in a folder that belongs to one process at a time; files are named ``aa/aabbcc...``.

    A file gets its name only when it is complete. A read checks the content against the name: a file that fails is
    removed and counts as absent, so the node fetches it again.

    Args:
        path: the folder; created when missing. Unfinished files of an earlier process are removed.

    Raises:
        StoreError: the folder cannot be created or read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._names = itertools.count()
        self._written: set[bytes] = set()  # by this object: a file of an earlier process may be torn
        self._durable: set[bytes] = set()  # those of them that are synced
        self._young: set[bytes] = set()
        self._new_folders: set[Path] = set()  # whose names are not synced
        with explained("prepare the blob folder", self.path):
            (self.path / "tmp").mkdir(parents=True, exist_ok=True)
            for leftover in (self.path / "tmp").iterdir():
                leftover.unlink(missing_ok=True)

    def put(self, data: bytes, durable: bool = True) -> bytes:
        """See :meth:`BlobStore.put`."""
        digest = sha256(data)
        target = self._file(digest)
        with self._lock:
            self._young.add(digest)
        with explained("write to the blob folder", self.path):
            if digest in (self._durable if durable else self._written) and target.exists():
                return digest
            if not target.parent.is_dir():
                target.parent.mkdir(exist_ok=True)
                self._new_folders.add(target.parent)
            temporary = self.path / "tmp" / f"{os.getpid()}-{next(self._names)}"
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    if durable:
                        sync(file)
                with self._lock:
                    os.replace(temporary, target)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
            self._written.add(digest)
            if durable:
                system.sync(target.parent)
                if new := self._new_folders.copy():  # others may make more meanwhile
                    system.sync(self.path)
                    self._new_folders -= new
                self._durable.add(digest)
        return digest

    def get(self, digest: bytes) -> bytes | None:
        """See :meth:`BlobStore.get`.

        Raises:
            StoreError: the file is there but cannot be read.
        """
        data = self._read(digest)
        if data is None or sha256(data) == digest:
            return data
        with self._lock:  # unless a put replaced it meanwhile
            data = self._read(digest)
            if data is None or sha256(data) == digest:
                return data
            self._unlink(digest)
        logger.warning("the blob %s in %s is damaged and removed", digest.hex()[:12], self.path)
        return None

    def has(self, digest: bytes) -> bool:
        """See :meth:`BlobStore.has`."""
        return self.size(digest) is not None

    def size(self, digest: bytes) -> int | None:
        """See :meth:`BlobStore.size`."""
        with explained("read the blob folder", self.path):
            try:
                return self._file(digest).stat().st_size
            except FileNotFoundError:
                return None

    def delete(self, digest: bytes) -> None:
        """See :meth:`BlobStore.delete`."""
        with self._lock:
            self._unlink(digest)

    def retain(self, keep: Collection[bytes]) -> None:
        """See :meth:`BlobStore.retain`."""
        with self._lock, explained("clear the blob folder", self.path):
            kept = {digest.hex() for digest in self._young.union(keep)}
            self._young = set()
            for file in self.path.glob("??/*"):
                if file.name not in kept and len(file.name) == 2 * HASH_SIZE:
                    self._unlink(bytes.fromhex(file.name))

    def _file(self, digest: bytes) -> Path:
        if len(digest) != HASH_SIZE:
            raise ValueError(f"a blob is named by {HASH_SIZE} bytes, not {len(digest)}")
        name = digest.hex()
        return self.path / name[:2] / name

    def _read(self, digest: bytes) -> bytes | None:
        with explained("read the blob folder", self.path):
            try:
                return self._file(digest).read_bytes()
            except FileNotFoundError:
                return None

    def _unlink(self, digest: bytes) -> None:
        self._written.discard(digest)
        self._durable.discard(digest)
        with explained("delete from the blob folder", self.path):
            self._file(digest).unlink(missing_ok=True)
