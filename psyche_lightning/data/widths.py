"""Where the tokens of a file begin and how many bytes one has: from its header, an index beside it, or a look at it."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from psyche_lightning.errors import ConfigError

SIZES = (1, 2, 4, 8)
"""Bytes that a token may have."""
MAX_VOCABULARY = 1 << 20
"""Ids below this are possible where nothing says how many there are."""

_NPY_MAGIC = b"\x93NUMPY"
_NPY_TYPES = {"<u2": 2, "<u4": 4, "<i4": 4}
_LISTED = (2, 4)  # by the header of 256 integers
_HEADER = 256
_DATES = range(20_200_101, 21_000_101)
_INDEX_MAGIC = b"MMIDIDX\0\0"
_INDEX = struct.Struct("<9sQBQQ")
_INDEX_TYPES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
_ENOUGH = 16


class Layout(NamedTuple):
    """The tokens of a file.

    Attributes:
        start: bytes before them.
        size: bytes of a token.
    """

    start: int
    size: int


def layout_of(name: str, size: int, head: bytes) -> Layout | None:
    """What the header of a file says; None if it has none.

    Headers are numpy's (Psyche maps ``.npy`` files raw and would read it as tokens), and that of llm.c and its kin: 256
    integers of 4 bytes, of which the first is a date, the third the number of tokens, and those after it are 0.

    Args:
        name: path or URL of the file.
        size: bytes of the file.
        head: the first bytes of it, at least 1024 if there are so many.

    Raises:
        ConfigError: the header is malformed, describes something else, or the file is shorter than it says.
    """
    if name.endswith(".npy") and head.startswith(_NPY_MAGIC):
        return _numpy_header(name, size, head)
    if len(head) < 4 * _HEADER:
        return None
    integers = np.frombuffer(head[: 4 * _HEADER], "<i4")
    if int(integers[0]) not in _DATES or integers[3:].any():
        return None
    tokens, start = int(integers[2]), 4 * _HEADER
    for width in _LISTED:
        if tokens > 0 and size == start + tokens * width:
            return Layout(start, width)
    raise ConfigError(
        f"{name} has {size} bytes, but its header of {_HEADER} integers announces {tokens} tokens, which need "
        f"{start + 2 * tokens} (2 bytes a token) or {start + 4 * tokens} (4 bytes); copy it again."
    )


def _numpy_header(name: str, size: int, head: bytes) -> Layout:
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except ValueError as error:
        raise ConfigError(f"The header of {name} is not in numpy's format: {error}.") from error
    width = _NPY_TYPES.get(dtype.str)
    if width is None or len(shape) != 1:
        raise ConfigError(
            f"{name} is an array of type {dtype.str} and shape {shape}, expected one row of tokens of type "
            f"{', '.join(_NPY_TYPES)}."
        )
    if size != stream.tell() + shape[0] * width:
        raise ConfigError(
            f"{name} has {size} bytes, but its header announces {shape[0]} tokens of {width} bytes; copy it again."
        )
    return Layout(stream.tell(), width)


def read_index(path: Path, size: int) -> Layout | None:
    """What Megatron's index (``.idx``) beside a file says; None if there is no index.

    Args:
        path: the file of tokens.
        size: its bytes.

    Raises:
        ConfigError: the index is of another kind or of another file.
    """
    index = path.with_suffix(".idx")
    if path.suffix != ".bin" or not index.is_file():
        return None
    try:
        with index.open("rb") as file:
            head = file.read(_INDEX.size)
            if len(head) < _INDEX.size or not head.startswith(_INDEX_MAGIC):
                raise ConfigError(
                    f"{index} is not an index of Megatron's (it does not begin with MMIDIDX). If {path.name} holds raw "
                    "tokens, move the index elsewhere."
                )
            _, version, kind, sequences, _ = _INDEX.unpack(head)
            width = _INDEX_TYPES.get(kind)
            if version != 1 or width is None:
                raise ConfigError(
                    f"{index} has version {version} and the type of tokens {kind}, expected version 1 and a type of "
                    f"integers: {', '.join(map(str, _INDEX_TYPES))}."
                )
            tokens = 0
            while sequences > 0 and (part := file.read(4 * min(sequences, 1 << 18))):
                lengths = np.frombuffer(part[: len(part) // 4 * 4], "<i4")
                tokens += int(lengths.sum(dtype=np.int64))
                sequences -= len(lengths) or sequences
    except OSError as error:
        raise ConfigError(f"The index {str(index)!r} cannot be read: {error.strerror}.") from error
    if sequences or tokens * width != size:
        raise ConfigError(
            f"{path} has {size} bytes, but {index.name} announces {tokens} tokens of {width} bytes; copy both again."
        )
    return Layout(0, width)


def looked_at(size: int, head: bytes, vocab_size: int) -> int | None:
    """The bytes of a token in a raw file, by a look at its beginning; None if it leaves a doubt.

    Ids are below the vocabulary, so the upper bytes of wide tokens are zero or nearly so. Read too narrow, every second
    id would be (nearly) 0, which no text has; read too wide, ids would be far beyond the vocabulary.

    Args:
        size: bytes of the file.
        head: the first bytes of it.
        vocab_size: number of token ids.
    """
    limit = vocab_size if vocab_size <= 1 << 16 else max(vocab_size, MAX_VOCABULARY)  # ids beyond it are found later
    for width in (8, 4):
        if size % width:
            continue
        ids = np.frombuffer(head[: len(head) // width * width], f"<u{width}")
        if len(ids) and int(ids.max()) < limit:
            return width if len(ids) >= _ENOUGH and ids.any() else None
    return 2


def common_width(names: Sequence[str], widths: Sequence[int | None]) -> int:
    """The one size of all files.

    Raises:
        ConfigError: they differ, or none is known.
    """
    known = {width for width in widths if width is not None}
    if len(known) == 1:
        return known.pop()
    if known:
        example = {width: name for name, width in zip(names, widths, strict=True) if width is not None}
        listed = ", ".join(f"{name} {width}" for width, name in sorted(example.items()))
        raise ConfigError(
            f"The files have tokens of different sizes, {' and '.join(map(str, sorted(known)))} bytes ({listed}), by "
            "their headers, indices and contents, and the option token_size; expected one size."
        )
    raise ConfigError(
        f"{names[0]} does not show how many bytes a token has: it is too short, or begins with zeros. Set token_size "
        "to 2 (uint16), 4 (uint32, int32) or 8 (int64)."
    )
