"""Token files in Psyche's formats (its local.rs): checks their form, and reads blocks of them from anywhere."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from psyche_lightning.data.packed import Unavailable
from psyche_lightning.errors import ConfigError

SUFFIXES = (".bin", ".npy", ".ds")
TOKEN_SIZES = (2, 4)
HEAD_SIZE = 1 << 12
"""Bytes at the beginning of a file that go into its fingerprint."""
MAX_FILES = 10_000
_NPY_MAGIC = b"\x93NUMPY"
_NPY_TYPES = {"<u2": 2, "<u4": 4, "<i4": 4}


class Range(NamedTuple):
    """A part of a file: number of the file, first byte, and number of bytes."""

    file: int
    start: int
    length: int


@dataclass(frozen=True)
class FileInfo:
    """A file as it was when it was opened.

    Attributes:
        name: its path or URL, for messages.
        size: bytes.
        head: its first :data:`HEAD_SIZE` bytes.
        version: changes with the file: a time stamp or an entity tag.
    """

    name: str
    size: int
    head: bytes
    version: str = ""


class Lost(NamedTuple):
    """Why a range is not available, and whether another attempt is useless."""

    reason: str
    lasting: bool = False


class Files(Protocol):
    """Files that can be read by ranges.

    Attributes:
        infos: the files, in order.
    """

    infos: list[FileInfo]

    def read(self, ranges: Sequence[Range]) -> list[bytes | Lost]:
        """Returns the bytes of each range, or why it is not available."""
        ...

    def prefetch(self, ranges: Sequence[Range]) -> None:
        """Start to fetch ranges that will be read soon, as many as fit into memory; returns at once."""
        ...


class LocalFiles:
    """Files on disk.

    Args:
        paths: the files, in order.

    Raises:
        ConfigError: a file cannot be read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self.infos = [_look(path) for path in paths]

    def read(self, ranges: Sequence[Range]) -> list[bytes | Lost]:
        """Returns the bytes of each range, or why it is not available."""
        return [self._read(part) for part in ranges]

    def _read(self, part: Range) -> bytes | Lost:
        info = self.infos[part.file]
        try:
            with self._paths[part.file].open("rb") as file:
                now = os.fstat(file.fileno())
                if (now.st_size, str(now.st_mtime_ns)) != (info.size, info.version):
                    return Lost(changed(info, f"{now.st_size} bytes"), lasting=True)
                file.seek(part.start)
                data = file.read(part.length)
        except OSError as error:
            return Lost(f"{info.name} cannot be read: {error.strerror}")
        return data if len(data) == part.length else Lost(f"{info.name} ends before byte {part.start + part.length}")

    def prefetch(self, ranges: Sequence[Range]) -> None:
        """Do nothing: the operating system reads ahead by itself."""


def changed(info: FileInfo, now: str) -> str:
    """The message about a file that has changed."""
    return (
        f"{info.name} has changed: at the start it had {info.size} bytes, now it has {now}. A run needs the same "
        "samples from beginning to end: restore the old file, or start a new run"
    )


def find_files(places: Sequence[str]) -> list[Path]:
    """The token files at ``places``: files, and files in folders sorted by name; each once, in that order.

    Raises:
        ConfigError: a place does not exist, or a folder has no token files.
    """
    found: dict[Path, None] = {}
    for place in places:
        path = Path(place).expanduser()
        inside = [path]
        if path.is_dir():
            inside = sorted((file for file in path.iterdir() if file.suffix in SUFFIXES), key=lambda file: file.name)
            if not inside:
                raise ConfigError(
                    f"There are no token files in the folder {place!r}: none has the suffix {', '.join(SUFFIXES)}. "
                    "`psyche data tokenize` makes such files from text."
                )
        elif not path.is_file():
            raise ConfigError(
                f"The data path {place!r} does not exist (looked for {path.absolute()}). Expected a token file, a "
                "folder of token files, or a list of these."
            )
        found.update(dict.fromkeys(inside))
    if len(found) > MAX_FILES:
        raise ConfigError(f"There are {len(found)} token files, expected at most {MAX_FILES}; make larger files.")
    return list(found)


def _look(path: Path) -> FileInfo:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            return FileInfo(str(path), status.st_size, file.read(HEAD_SIZE), str(status.st_mtime_ns))
    except OSError as error:
        raise ConfigError(f"The data file {str(path)!r} cannot be read: {error.strerror}.") from error


def npy_header(info: FileInfo) -> tuple[int, int] | None:
    """The bytes before the tokens and the size of a token, for a file with a header of numpy's format; else None.

    Psyche maps ``.npy`` files raw and would read the header as tokens.

    Raises:
        ConfigError: the array is not one row of u16 or u32 tokens, or the file is shorter than its array.
    """
    if not (info.name.endswith(".npy") and info.head.startswith(_NPY_MAGIC)):
        return None
    stream = io.BytesIO(info.head)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except ValueError as error:
        raise ConfigError(f"The header of {info.name} is not in numpy's format: {error}.") from error
    size = _NPY_TYPES.get(dtype.str)
    if size is None or len(shape) != 1:
        raise ConfigError(
            f"{info.name} is an array of type {dtype.str} and shape {shape}, expected one row of tokens of type "
            f"{', '.join(_NPY_TYPES)}."
        )
    if info.size != stream.tell() + shape[0] * size:
        raise ConfigError(
            f"{info.name} has {info.size} bytes, but its header announces {shape[0]} tokens of {size} bytes; copy it "
            "again."
        )
    return stream.tell(), size


class TokenBlocks:
    """Blocks of ``seq_len`` tokens in a row of files. The rest at a file's end is dropped, as in Psyche.

    A file of n tokens has ``n // seq_len`` blocks.

    Args:
        files: raw little-endian tokens, or numpy's format.
        seq_len: tokens of a block.
        token_size: bytes of a token in raw files; None for 2, or what the files' headers say.

    Attributes:
        count: number of blocks.
        fingerprint: lengths and beginnings of the files.
        token_size: bytes of a token.
        tokens: tokens of all files.
        starts: bytes before the tokens of each file.

    Raises:
        ConfigError: the files are not token files, or contradict each other or ``token_size``.
    """

    def __init__(self, files: Files, seq_len: int, token_size: int | None = None) -> None:
        self._files = files
        self._seq_len = seq_len
        headers = [npy_header(info) for info in files.infos]
        sizes = {header[1] for header in headers if header is not None}
        if any(header is None for header in headers) or token_size is not None:
            sizes.add(token_size or TOKEN_SIZES[0])
        if len(sizes) > 1:
            raise ConfigError(
                f"The files have tokens of different sizes, {' and '.join(map(str, sorted(sizes)))} bytes "
                "(option token_size, headers of .npy files); expected one size."
            )
        self.token_size = sizes.pop()
        self.starts = [header[0] if header else 0 for header in headers]
        self._dtype = np.dtype(f"<u{self.token_size}")
        self.tokens = 0
        counts = []
        digest = hashlib.sha256()
        for info, start in zip(files.infos, self.starts, strict=True):
            tokens, rest = divmod(info.size - start, self.token_size)
            if rest:
                raise ConfigError(
                    f"{info.name} has {info.size} bytes, which is not a whole number of tokens of {self.token_size} "
                    "bytes; it is not a token file, token_size is wrong, or the file is incomplete."
                )
            self.tokens += tokens
            counts.append(tokens // seq_len)
            digest.update(info.size.to_bytes(8, "little") + hashlib.sha256(info.head).digest())
        self._ends = np.cumsum(counts, dtype=np.int64)
        self.count = int(self._ends[-1])
        total = sum(info.size for info in files.infos)
        self.fingerprint = f"{len(files.infos)} files, {total} bytes, {digest.hexdigest()}"

    def read(self, numbers: Sequence[int]) -> list[NDArray[Any]]:
        """Returns the blocks with these numbers.

        Raises:
            Unavailable: some of them cannot be read.
        """
        found = self._files.read(self._ranges(numbers))
        lost = {number: part for number, part in zip(numbers, found, strict=True) if isinstance(part, Lost)}
        if lost:
            reasons = list(dict.fromkeys(part.reason for part in lost.values()))
            more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
            raise Unavailable(reasons[0] + more, lost, lasting=any(part.lasting for part in lost.values()))
        return [np.frombuffer(part, self._dtype) for part in found if isinstance(part, bytes)]

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Start to fetch blocks that will be read soon."""
        self._files.prefetch(self._ranges(numbers))

    def _ranges(self, numbers: Sequence[int]) -> list[Range]:
        size = self._seq_len * self.token_size
        files = np.searchsorted(self._ends, numbers, side="right").tolist()
        ranges = []
        for file, number in zip(files, numbers, strict=True):
            place = number - (int(self._ends[file - 1]) if file else 0)
            ranges.append(Range(file, self.starts[file] + place * size, size))
        return ranges
