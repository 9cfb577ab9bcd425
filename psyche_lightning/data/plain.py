"""Reads text files, also compressed ones, and tells text from other bytes."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, cast

from psyche_lightning.errors import ConfigError

COMPRESSED = (".gz", ".bz2", ".xz")
MAX_FILE = 16 << 30
"""The most bytes of text that one file may have, also after decompression."""

_PACKERS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}
_OTHERS = {
    b"\x28\xb5\x2f\xfd": "zstd data", b"7z\xbc\xaf": "a 7z archive", b"PK\3\4": "a zip archive",
    b"PAR1": "a parquet file", b"ARROW1": "an arrow file", b"\x93NUMPY": "a numpy array",
    b"%PDF-": "a PDF document", b"\x89PNG": "a picture",
    b"\xff\xfe": "text in UTF-16", b"\xfe\xff": "text in UTF-16",
}  # fmt: skip
_SAMPLE = 1 << 16
_STRANGE = 0.3
_NO_LETTER = re.compile("[\ufffd\x00-\x07\x0e-\x1a\x1c-\x1f]")
"""What text does not have: bytes that are no UTF-8, and control characters but white space, backspace and escape."""


def suffix(file: Path) -> str:
    """The suffix that says what a file holds, without that of its compression: ``.jsonl`` of ``a.jsonl.gz``."""
    return Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file's name matches one of the `fnmatch` patterns, with or without the suffix of its compression."""
    bare = name.removesuffix(Path(name).suffix) if Path(name).suffix in COMPRESSED else name
    return any(fnmatchcase(one, pattern) for one in (name, bare) for pattern in patterns)


def open_text(file: Path) -> IO[bytes]:
    """Open a file for reading its bytes, decompressed if they are compressed, whatever its name is.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as plain:
        head = plain.read(8)
    packer = next((name for magic, name in _PACKERS.items() if head.startswith(magic)), None)
    if packer == "gzip":
        return cast("IO[bytes]", gzip.open(file, "rb"))
    if packer == "bzip2":
        return bz2.open(file, "rb")
    if packer == "xz":
        return lzma.open(file, "rb")
    return file.open("rb")


def read_text(file: Path, most: int = MAX_FILE) -> bytes:
    """Returns the bytes of a text file, decompressed, or the first ``most`` of them.

    Raises:
        ConfigError: the file cannot be read or decompressed, or is too large.
    """
    with explained(file), open_text(file) as stream:
        data = stream.read(min(most, MAX_FILE) + (most == MAX_FILE))
    if len(data) > MAX_FILE:
        raise ConfigError(f"The text {str(file)!r} is larger than {MAX_FILE} bytes; split it into several files.")
    return data


@contextlib.contextmanager
def explained(file: Path) -> Iterator[None]:
    """Turns errors of reading a file into errors for people.

    Raises:
        ConfigError: the file cannot be read or decompressed.
    """
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ConfigError(f"The text {str(file)!r} cannot be read: {error.strerror}.") from error
        raise ConfigError(f"The text {str(file)!r} is damaged, it cannot be decompressed: {error}.") from error


def what_else(data: bytes) -> str | None:
    """What bytes are if they are not text, for people; None if they are text.

    Text has no zero bytes, and at most three tenths of its beginning are something else than UTF-8.
    """
    for magic, name in _OTHERS.items():
        if data.startswith(magic):
            return name
    if b"\0" in data:
        return "binary: it has zero bytes"
    sample = data[:_SAMPLE].decode("utf-8", errors="replace")
    strange = len(_NO_LETTER.findall(sample))
    return "binary: much of it is not UTF-8" if strange > max(1, _STRANGE * len(sample)) else None
