"""Parameters as blobs: an index that names every tensor, and pieces addressed by their hash (invariant I6).

The SHA-256 of the index *is* the parameter digest: a two-level hash tree by name. A node that knows the digest can
fetch index and pieces from any peers at once, and checks every byte.

Index layout: canonical msgpack of ``[2, [[due step, first id, last id], ...], [name, dtype, [dimension, ...], bytes,
[piece hash, ...]], ...]``: the data ids that are open after the parameters' last round, then the tensors in ascending
byte-wise order of names. Pieces hold the little-endian contiguous tensor bytes, 16 MiB each, the last one shorter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from psyche_lightning.errors import WireError
from psyche_lightning.protocol.open_ids import OpenIds
from psyche_lightning.wire.canonical import HASH_SIZE, pack, sha256, unpack

VERSION = 2
MAX_OPEN = 65536
PIECE_SIZE = 16 * 1024 * 1024
MAX_INDEX_SIZE = 64 * 1024 * 1024
MAX_TENSOR_SIZE = 1 << 40
DTYPE_SIZES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}

Put = Callable[[bytes], bytes]
"""Stores a blob and returns its SHA-256."""
Get = Callable[[bytes], bytes]
"""Returns a blob by SHA-256."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of an index.

    Attributes:
        name: parameter name.
        dtype: one of :data:`DTYPE_SIZES`.
        shape: dimensions.
        size: bytes of its data.
        pieces: SHA-256 of each piece.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    pieces: tuple[bytes, ...]


def cut(data: bytes | memoryview) -> list[memoryview]:
    """The pieces of a tensor's bytes; none for an empty tensor."""
    view = memoryview(data).cast("B")
    return [view[i : i + PIECE_SIZE] for i in range(0, len(view), PIECE_SIZE)]


def entry_of(name: str, dtype: str, shape: Sequence[int], data: bytes | memoryview, put: Put | None) -> TensorEntry:
    """Describe a tensor, storing its pieces when ``put`` is given."""
    pieces = cut(data)
    hashes = tuple(put(bytes(piece)) if put else sha256(piece) for piece in pieces)
    return TensorEntry(name, dtype, tuple(shape), sum(len(piece) for piece in pieces), hashes)


@dataclass(frozen=True)
class Piece:
    """A part of a tensor.

    Attributes:
        digest: SHA-256 of its bytes.
        size: number of bytes.
        tensor: name of the (first) tensor that has it.
    """

    digest: bytes
    size: int
    tensor: str


@dataclass(frozen=True)
class Index:
    """Parameters by their hashes.

    Attributes:
        tensors: in ascending byte-wise order of names.
        open_ids: data ids still to train again; a node that takes the parameters needs them.
    """

    tensors: tuple[TensorEntry, ...]
    open_ids: OpenIds = ()

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size for entry in self.tensors)

    @property
    def pieces(self) -> list[Piece]:
        """Every piece once, tensor by tensor."""
        found: dict[bytes, Piece] = {}
        for entry in self.tensors:
            for place, digest in enumerate(entry.pieces):
                size = min(PIECE_SIZE, entry.size - place * PIECE_SIZE)
                found.setdefault(digest, Piece(digest, size, entry.name))
        return list(found.values())


def encode_index(tensors: Iterable[TensorEntry], open_ids: OpenIds = ()) -> bytes:
    """Encode an index; its SHA-256 is the digest of the parameters."""
    rows = sorted(tensors, key=lambda entry: entry.name.encode())
    tail = ([e.name, e.dtype, list(e.shape), e.size, list(e.pieces)] for e in rows)
    return pack([VERSION, [[due, start, stop - 1] for due, start, stop in open_ids], *tail])


def decode_index(data: bytes) -> Index:
    """Decode an index.

    Raises:
        WireError: it is not canonical, or sizes, types and pieces do not fit together.
    """
    rows = unpack(data, max_size=MAX_INDEX_SIZE)
    if not isinstance(rows, list) or len(rows) < 2 or rows[0] != VERSION:
        raise WireError(f"a parameter index begins with its version, {VERSION}, and the open ids")
    tensors = tuple(_entry(row) for row in rows[2:])
    names = [entry.name.encode() for entry in tensors]
    if any(a >= b for a, b in itertools.pairwise(names)):
        raise WireError("the tensors of a parameter index are not in ascending order of their names")
    return Index(tensors, _open_ids(rows[1]))


def _open_ids(rows: object) -> OpenIds:
    if not isinstance(rows, list) or len(rows) > MAX_OPEN:
        raise WireError(f"the open ids of a parameter index are a list of at most {MAX_OPEN}")
    found = []
    for row in rows:
        match row:
            case [int(due), int(first), int(last)] if due >= 0 <= first <= last < 1 << 64 and bool not in map(
                type, row
            ):
                found.append((due, first, last + 1))
            case _:
                raise WireError("open ids of a parameter index are [due step, first id, last id]")
    if any(a >= b for a, b in itertools.pairwise(found)):
        raise WireError("the open ids of a parameter index are not in ascending order")
    return tuple(found)


def _entry(row: object) -> TensorEntry:
    match row:
        case [str(name), str(dtype), list(shape), int(size), list(pieces)] if dtype in DTYPE_SIZES:
            pass
        case _:
            raise WireError("a tensor of a parameter index has name, known dtype, shape, size and pieces")
    if any(type(n) is not int or not 0 <= n <= MAX_TENSOR_SIZE for n in shape) or len(shape) > 16:
        raise WireError(f"tensor {name!r} has an impossible shape")
    if size != math.prod(shape) * DTYPE_SIZES[dtype] or size > MAX_TENSOR_SIZE:
        raise WireError(f"tensor {name!r} claims {size} bytes, but its shape and dtype disagree")
    if len(pieces) != -(-size // PIECE_SIZE) or any(not isinstance(p, bytes) or len(p) != HASH_SIZE for p in pieces):
        raise WireError(f"tensor {name!r} of {size} bytes has {-(-size // PIECE_SIZE)} pieces, each a SHA-256")
    return TensorEntry(name, dtype, tuple(shape), size, tuple(pieces))


def first_difference(mine: Index, theirs: Index) -> str:
    """The name of the first tensor, in name order, that differs between two indices; empty when none does."""
    ours, others = {e.name: e for e in mine.tensors}, {e.name: e for e in theirs.tensors}
    for name in sorted(ours.keys() | others.keys()):
        if ours.get(name) != others.get(name):
            return name
    return ""
