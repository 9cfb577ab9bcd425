"""Stores a node's blobs by SHA-256 and its promises in a journal that survives ``kill -9`` (I8).

Journal format: the magic bytes, then records::

    body length u32 | crc32 of body u32 | crc32 of the eight bytes before u32 | body
    body = key length u16 | key (UTF-8) | value

Integers are little-endian. Every append syncs before it returns, so at most the last record can be torn. The header's
checksum separates a torn end from a damaged middle, where a wrong length would hide later records.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import struct
import threading
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from psyche_lightning import system
from psyche_lightning.errors import StoreError
from psyche_lightning.wire.canonical import HASH_SIZE, sha256

logger = logging.getLogger(__name__)

MAGIC = b"psyche journal 1\n"
_HEADER = struct.Struct("<III")
_MAX_BODY = 1 << 28


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
        self._durable: set[bytes] = set()  # already written and synced by this object
        self._young: set[bytes] = set()
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
            if (not durable or digest in self._durable) and target.exists():
                return digest
            if not target.parent.is_dir():
                target.parent.mkdir(exist_ok=True)
                system.sync(self.path)
            temporary = self.path / "tmp" / f"{os.getpid()}-{next(self._names)}"
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    if durable:
                        _sync(file)
                with self._lock:
                    os.replace(temporary, target)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
            if durable:
                system.sync(target.parent)
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
        self._durable.discard(digest)
        with explained("delete from the blob folder", self.path):
            self._file(digest).unlink(missing_ok=True)


class MemoryJournal:
    """A :class:`Journal` in memory for nodes without a folder."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def append(self, key: str, value: bytes) -> None:
        """Remember ``value``; the newest value of a key counts."""
        self._values[key] = bytes(value)

    def load(self) -> dict[str, bytes]:
        """The newest value of each key, in the order in which the keys first came."""
        return dict(self._values)

    def retain(self, keys: Collection[str]) -> None:
        """Forget every key that is not in ``keys``."""
        self._values = {key: value for key, value in self._values.items() if key in keys}

    def close(self) -> None:
        """Nothing to release."""


class Journal:
    """A small file of a node's promises (key to value); appended records survive a crash.

    Args:
        path: the file; created, with its folder, if missing. A torn last record is cut off. Other processes
            cannot open it meanwhile.

    Raises:
        StoreError: the file cannot be read or written, is in use, is not a journal, or is damaged before its end.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._values: dict[str, bytes] = {}
        with explained("open the journal", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            self._file: BinaryIO = os.fdopen(descriptor, "r+b", buffering=0)
            try:
                self._claim(self._file)
                self._end = self._replay(self._file.read())
            except BaseException:
                self._file.close()
                raise

    def append(self, key: str, value: bytes) -> None:
        """Write and sync one record; the newest value of a key counts. Any thread may call it.

        Raises:
            StoreError: the disk is full or the file cannot be written; the record is not stored.
        """
        record = _record(key, value)
        with self._lock, explained("write to the journal", self.path):
            if self._file.closed:
                raise StoreError(f"the journal {self.path} is closed; open it again to go on")
            try:
                self._file.seek(self._end)
                write_all(self._file, record)
                _sync(self._file)
            except OSError:
                # A half-written record would become a damaged middle.
                with contextlib.suppress(OSError):
                    self._file.truncate(self._end)
                raise
            self._end += len(record)
            self._values[key] = bytes(value)

    def load(self) -> dict[str, bytes]:
        """The newest value of each key, in the order in which the keys first came."""
        with self._lock:
            return dict(self._values)

    def retain(self, keys: Collection[str]) -> None:
        """Forget every key that is not in ``keys``, in one atomic step that also frees the space.

        Raises:
            StoreError: the new file cannot be written; the old one stays.
        """
        with self._lock, explained("rewrite the journal", self.path):
            values = {key: value for key, value in self._values.items() if key in keys}
            temporary = self.path.with_name(self.path.name + ".new")
            file: BinaryIO | None = None
            try:
                file = open(temporary, "w+b", buffering=0)  # noqa: SIM115 - it becomes the journal
                self._claim(file)
                data = MAGIC + b"".join(_record(key, value) for key, value in values.items())
                write_all(file, data)
                _sync(file)
                if not system.MOVES_OPEN_FILES:
                    file.close()
                    self._replace(temporary)
                    file = self._file
                else:
                    os.replace(temporary, self.path)
                    self._file.close()
            except BaseException:
                if file is not None:
                    file.close()
                temporary.unlink(missing_ok=True)
                raise
            self._file, self._end, self._values = file, len(data), values
            system.sync(self.path.parent)

    def _replace(self, temporary: Path) -> None:
        """Replace the old file while neither is open; this releases the lock for a moment."""
        self._file.close()
        try:
            os.replace(temporary, self.path)
        finally:
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115 - stays open, too
            self._claim(self._file)

    def close(self) -> None:
        """Release the file; idempotent."""
        with self._lock:
            self._file.close()

    def _claim(self, file: BinaryIO) -> None:
        """Keep other processes away."""
        if not system.claim(file):
            raise StoreError(
                f"another process uses the journal {self.path}. Two nodes cannot share a folder: stop the other one, "
                "or give this node a folder of its own."
            )

    def _replay(self, data: bytes) -> int:
        """Read all records into ``_values``, repair the end, and return where the next record goes."""
        if len(data) < len(MAGIC) and MAGIC.startswith(data):
            self._file.seek(0)
            write_all(self._file, MAGIC)
            _sync(self._file)
            system.sync(self.path.parent)
            return len(MAGIC)
        if not data.startswith(MAGIC):
            raise StoreError(f"{self.path} is not a journal of this version; move it away or choose another folder")
        offset = len(MAGIC)
        while offset < len(data):
            body, after = self._parse(data, offset)
            if body is None:
                logger.warning("the last record of the journal %s is torn and cut off", self.path)
                self._file.truncate(offset)
                _sync(self._file)
                break
            size = int.from_bytes(body[:2], "little")
            self._values[body[2 : 2 + size].decode()] = body[2 + size :]
            offset = after
        return offset

    def _parse(self, data: bytes, offset: int) -> tuple[bytes | None, int]:
        """The record at ``offset`` and the next offset; no body if it is torn and last."""
        start = offset + _HEADER.size
        if start > len(data):
            return None, offset
        length, check, header_check = _HEADER.unpack_from(data, offset)
        if zlib.crc32(data[offset : start - 4]) != header_check:
            if not any(data[start:]):  # the file grew before its bytes arrived
                return None, offset
            raise self._damaged(offset)
        body = data[start : start + length]
        if len(body) == length and zlib.crc32(body) == check:
            return body, start + length
        if start + length >= len(data):
            return None, offset
        raise self._damaged(offset)

    def _damaged(self, offset: int) -> StoreError:
        return StoreError(
            f"the journal {self.path} is damaged at byte {offset}, before its end, so what this node promised may be "
            "lost. Restore the file, or move it away and start this node with a new identity."
        )


def _record(key: str, value: bytes) -> bytes:
    name = key.encode()
    body = len(name).to_bytes(2, "little") + name + value
    if len(body) > _MAX_BODY:
        raise StoreError(f"a journal record of {len(body)} bytes; at most {_MAX_BODY} are accepted: keep it as a blob")
    head = struct.pack("<II", len(body), zlib.crc32(body))
    return head + struct.pack("<I", zlib.crc32(head)) + body


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write everything to an unbuffered file: one write may be partial.

    Raises:
        OSError: it cannot be written; a part may be there.
    """
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def explained(action: str, path: Path) -> Iterator[None]:
    """Turn an operating system error within into one with advice.

    Args:
        action: what fails, such as ``"write to the journal"``.
        path: its file or folder.

    Raises:
        StoreError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "Free some space there, or choose a folder on another disk"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "Make it writable for this user, or choose another folder"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            advice = "Something else has that name: move it away, or choose another folder"
        else:
            advice = "Check the disk, or choose another folder"
        reason = error.strerror or str(error)
        raise StoreError(f"cannot {action} {path}: {reason}. {advice}; what was stored before is kept.") from error
