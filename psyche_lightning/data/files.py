"""Token files, as Psyche (its local.rs) and others write them: reads blocks of them from anywhere."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from psyche_lightning.data.named import ALL, of_split
from psyche_lightning.data.packed import Unavailable
from psyche_lightning.data.widths import MAX_VOCABULARY, Layout, common_width, layout_of, looked_at, read_index
from psyche_lightning.errors import ConfigError

SUFFIXES = (".bin", ".npy", ".ds")
TOKEN_SIZES = (2, 4)
"""Bytes of a token in the files that psyche writes."""
HEAD_SIZE = 1 << 12
"""Bytes at the beginning of a file that go into its fingerprint."""
MAX_FILES = 10_000


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
        index: what an index beside it says of its tokens.
    """

    name: str
    size: int
    head: bytes
    version: str = ""
    index: Layout | None = None


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


def find_files(places: Sequence[str], split: str = ALL) -> list[Path]:
    """The token files at ``places``: files, and files in folders sorted by name; each once, in that order.

    Args:
        places: files and folders.
        split: the split of the files in folders, by their names.

    Raises:
        ConfigError: a place does not exist, or a folder has no token files or no such split.
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
            inside = [path / name for name in of_split(path, [file.name for file in inside], split)]
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
            head = file.read(HEAD_SIZE)
    except OSError as error:
        raise ConfigError(f"The data file {str(path)!r} cannot be read: {error.strerror}.") from error
    size = status.st_size
    return FileInfo(str(path), size, head, str(status.st_mtime_ns), read_index(path, size))


class TokenBlocks:
    """Blocks of ``seq_len`` tokens in a row of files. The rest at a file's end is dropped, as in Psyche.

    A file of n tokens has ``n // seq_len`` blocks.

    Args:
        files: raw little-endian tokens, or tokens after a header (:mod:`~psyche_lightning.data.widths`).
        seq_len: tokens of a block.
        token_size: bytes of a token in raw files; None to look at the files.
        vocab_size: number of token ids, with which ``token_size`` is compared; None for data whose token size is sure.

    Attributes:
        count: number of blocks.
        fingerprint: lengths and beginnings of the files.
        token_size: bytes of a token.
        tokens: tokens of all files.
        starts: bytes before the tokens of each file.

    Raises:
        ConfigError: the files are not token files, or contradict each other or ``token_size``.
    """

    def __init__(
        self, files: Files, seq_len: int, token_size: int | None = None, vocab_size: int | None = None
    ) -> None:
        self._files = files
        self._seq_len = seq_len
        headers = [info.index or layout_of(info.name, info.size, info.head) for info in files.infos]
        limit = vocab_size or MAX_VOCABULARY
        seen = [
            header.size if header else looked_at(info.size, info.head, limit)
            for info, header in zip(files.infos, headers, strict=True)
        ]
        names = [info.name for info in files.infos]
        if token_size is None:
            self.token_size = common_width(names, seen)
        else:
            self.token_size = token_size
            wide = [name for name, width in zip(names, seen, strict=True) if width not in (None, 2, token_size)]
            other = [name for name, header in zip(names, headers, strict=True) if header and header.size != token_size]
            if other or (wide and vocab_size is not None):
                wrong = (other or wide)[0]
                raise ConfigError(
                    f"token_size is {token_size}, but {wrong} has tokens of {seen[names.index(wrong)]} bytes, by its "
                    f"{'header or index' if other else 'contents'}; remove token_size."
                )
        self.starts = [header.start if header else 0 for header in headers]
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
        width = "" if self.token_size == 2 else f" of {self.token_size}-byte tokens"
        self.fingerprint = f"{len(files.infos)} files, {total} bytes{width}, {digest.hexdigest()}"

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
