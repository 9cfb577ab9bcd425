"""A node's promises in a journal that survives ``kill -9`` and power cuts (I8).

Journal format: the magic bytes, then records::

    body length u32 | crc32 of body u32 | crc32 of the eight bytes before u32 | body
    body = key length u16 | key (UTF-8) | value

A record that carries blobs has the highest bit of its first number set, and more fields::

    body length u32 | crc32 of body u32 | length of all blobs u32 | crc32 of the twelve bytes before u32 | body | blobs
    body = key length u16 | key | number of blobs u16 | (SHA-256 | length u32) of each | value

So a promise and the payloads that it names are durable by one write and one sync. Blobs that are rewritten alone have
an empty key. Integers are little-endian. Every append syncs before it returns, so at most the last record can be torn.
The header's checksum separates a torn end from a damaged middle, where a wrong length would hide later records. A blob
counts as absent if its bytes do not have its hash.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import struct
import threading
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from psyche_lightning import system
from psyche_lightning.errors import StoreError
from psyche_lightning.node.files import explained, sync, write_all
from psyche_lightning.wire.canonical import HASH_SIZE, sha256

logger = logging.getLogger(__name__)

MAGIC = b"psyche journal 1\n"
SMALL = 1 << 16
"""Largest blob, in bytes, that a journal's record carries; larger ones are synced as files."""
_PLAIN, _CARRYING = struct.Struct("<III"), struct.Struct("<IIII")
_CARRIES = 1 << 31
_BLOB = struct.Struct(f"<{HASH_SIZE}sI")
_MAX_BODY = 1 << 28


class MemoryJournal:
    """A :class:`Journal` in memory for nodes without a folder."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def append(self, key: str, value: bytes, blobs: Mapping[bytes, bytes] | None = None) -> None:
        """Remember ``value``; the newest value of a key counts. The blobs are kept by a store in memory."""
        self._values[key] = bytes(value)

    def load(self) -> dict[str, bytes]:
        """The newest value of each key, in the order in which the keys first came."""
        return dict(self._values)

    def carries(self, digest: bytes) -> bool:
        """Whether a record carries the blob: none does."""
        return False

    def blobs(self) -> Iterator[bytes]:
        """The blobs of all records: none."""
        return iter(())

    def retain(self, keys: Collection[str], blobs: Collection[bytes] = ()) -> None:
        """Forget every key that is not in ``keys``."""
        self._values = {key: value for key, value in self._values.items() if key in keys}

    def close(self) -> None:
        """Nothing to release."""


class Journal:
    """A file of a node's promises (key to value), with the small blobs that they name; records survive a crash.

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
        self._blobs: dict[bytes, tuple[int, int]] = {}  # where each lies in the file: start and end
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

    def append(self, key: str, value: bytes, blobs: Mapping[bytes, bytes] | None = None) -> None:
        """Write and sync one record; the newest value of a key counts. Any thread may call it.

        Args:
            key: at most 65,535 bytes of UTF-8; empty for blobs alone.
            value: what is promised.
            blobs: bytes by their SHA-256, at most 65,535 of up to :data:`SMALL` bytes, which survive with it.

        Raises:
            StoreError: the disk is full or the file cannot be written; the record is not stored.
        """
        record, places = _record(key, value, blobs or {})
        with self._lock, explained("write to the journal", self.path):
            if self._file.closed:
                raise StoreError(f"the journal {self.path} is closed; open it again to go on")
            try:
                self._file.seek(self._end)
                write_all(self._file, record)
                sync(self._file)
            except OSError:
                # A half-written record would become a damaged middle.
                with contextlib.suppress(OSError):
                    self._file.truncate(self._end)
                raise
            self._note(self._end, _Record(key, bytes(value), places, len(record)))
            self._end += len(record)

    def load(self) -> dict[str, bytes]:
        """The newest value of each key, in the order in which the keys first came."""
        with self._lock:
            return dict(self._values)

    def carries(self, digest: bytes) -> bool:
        """Whether a record carries the blob."""
        return digest in self._blobs

    def blobs(self) -> Iterator[bytes]:
        """The blobs of all records, one at a time.

        Raises:
            StoreError: the file cannot be read.
        """
        for digest in list(self._blobs):
            with self._lock, explained("read the journal", self.path):
                data = self._blob(digest)
            yield data

    def retain(self, keys: Collection[str], blobs: Collection[bytes] = ()) -> None:
        """Forget every key that is not in ``keys`` and other blobs, in one atomic step that also frees the space.

        Raises:
            StoreError: the new file cannot be written; the old one stays.
        """
        with self._lock, explained("rewrite the journal", self.path):
            temporary = self.path.with_name(self.path.name + ".new")
            file: BinaryIO | None = None
            values = [(key, value) for key, value in self._values.items() if key in keys]
            written: list[tuple[int, _Record]] = []
            end = len(MAGIC)
            try:
                file = open(temporary, "w+b", buffering=0)  # noqa: SIM115 - it becomes the journal
                self._claim(file)
                write_all(file, MAGIC)
                carried = (("", b"", {digest: self._blob(digest)}) for digest in self._blobs if digest in blobs)
                for key, value, its in itertools.chain(((key, value, {}) for key, value in values), carried):
                    record, places = _record(key, value, its)
                    write_all(file, record)
                    written.append((end, _Record(key, value, places, len(record))))
                    end += len(record)
                sync(file)
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
            self._file, self._end, self._values, self._blobs = file, end, {}, {}
            for start, one in written:
                self._note(start, one)
            system.sync(self.path.parent)

    def _note(self, start: int, record: _Record) -> None:
        """Take in a record that begins at ``start``."""
        if record.key:
            self._values[record.key] = record.value
        for digest, (first, last) in record.blobs.items():
            self._blobs.setdefault(digest, (start + first, start + last))

    def _blob(self, digest: bytes) -> bytes:
        first, last = self._blobs[digest]
        self._file.seek(first)
        return self._file.read(last - first)

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
        """Read all records, repair the end, and return where the next record goes."""
        if len(data) < len(MAGIC) and MAGIC.startswith(data):
            self._file.seek(0)
            write_all(self._file, MAGIC)
            sync(self._file)
            system.sync(self.path.parent)
            return len(MAGIC)
        if not data.startswith(MAGIC):
            raise StoreError(f"{self.path} is not a journal of this version; move it away or choose another folder")
        offset = len(MAGIC)
        while offset < len(data):
            try:
                record = _parse(data, offset)
            except _DamagedError:
                raise StoreError(
                    f"the journal {self.path} is damaged at byte {offset}, before its end, so what this node promised "
                    "may be lost. Restore the file, or move it away and start this node with a new identity."
                ) from None
            if record is None:
                logger.warning("the last record of the journal %s is torn and cut off", self.path)
                self._file.truncate(offset)
                sync(self._file)
                break
            self._note(offset, record)
            offset += record.size
        return offset


@dataclass(frozen=True)
class _Record:
    """A record of a journal.

    Attributes:
        key: empty if it has blobs alone.
        value: of the key.
        blobs: start and end of each blob in it, by SHA-256.
        size: its bytes.
    """

    key: str
    value: bytes
    blobs: Mapping[bytes, tuple[int, int]]
    size: int


class _DamagedError(Exception):
    """A record before the end of a journal is damaged."""


def _record(key: str, value: bytes, blobs: Mapping[bytes, bytes]) -> tuple[bytes, dict[bytes, tuple[int, int]]]:
    """The bytes of a record, and where in them the blobs begin and end."""
    name = key.encode()
    table = [len(blobs).to_bytes(2, "little"), *(_BLOB.pack(one, len(data)) for one, data in blobs.items())]
    body = len(name).to_bytes(2, "little") + name + b"".join(table if blobs else ()) + value
    if len(body) > _MAX_BODY:
        raise StoreError(f"a journal record of {len(body)} bytes; at most {_MAX_BODY} are accepted: keep it as a blob")
    if blobs:
        head = struct.pack("<III", len(body) | _CARRIES, zlib.crc32(body), sum(map(len, blobs.values())))
    else:
        head = struct.pack("<II", len(body), zlib.crc32(body))
    head += struct.pack("<I", zlib.crc32(head))
    places, end = {}, len(head) + len(body)
    for digest, data in blobs.items():
        places[digest] = end, end + len(data)
        end += len(data)
    return b"".join((head, body, *blobs.values())), places


def _heads(data: bytes, offset: int, header: struct.Struct) -> bool:
    """Whether a record begins here."""
    head = data[offset : offset + header.size]
    return len(head) == header.size and zlib.crc32(head[:-4]) == int.from_bytes(head[-4:], "little")


def _any_heads(data: bytes, offset: int) -> bool:
    """Whether a record begins here or later."""
    return any(_heads(data, at, header) for at in range(offset, len(data)) for header in (_PLAIN, _CARRYING))


def _parse(data: bytes, offset: int) -> _Record | None:
    """The record at ``offset``; None if it is torn and last.

    Raises:
        _DamagedError: it is damaged, and not the last.
    """
    carries = data[offset + 3 : offset + 4] >= b"\x80"
    header = _CARRYING if carries else _PLAIN
    start = offset + header.size
    if start > len(data):
        return None
    length, check, *carried, _ = header.unpack_from(data, offset)
    if not _heads(data, offset, header):
        # The file grew before its bytes arrived: its last ones, or the first page of a long record.
        if not any(data[start:]) or not (any(data[offset:start]) or _any_heads(data, start)):
            return None
        raise _DamagedError
    middle = start + (length & ~_CARRIES)
    after = middle + sum(carried)
    body = data[start:middle]
    if after > len(data) or zlib.crc32(body) != check:
        if after >= len(data):
            return None
        raise _DamagedError
    at = 2 + int.from_bytes(body[:2], "little")
    key, blobs = body[2:at].decode(), {}
    if carries:
        count, at = int.from_bytes(body[at : at + 2], "little"), at + 2
        for digest, size in _BLOB.iter_unpack(body[at : at + count * _BLOB.size]):
            if sha256(data[middle : middle + size]) == digest:
                blobs[digest] = middle - offset, middle - offset + size
            elif after == len(data):
                return None
            middle += size
        at += count * _BLOB.size
    return _Record(key, body[at:], blobs, after - offset)
