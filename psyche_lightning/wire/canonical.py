"""The canonical encoding, which has one form for each value, and SHA-256, which addresses blobs and commitments."""

from __future__ import annotations

import hashlib
from typing import Any

import msgpack

from psyche_lightning.errors import WireError

HASH_SIZE = 32
ZERO_HASH = bytes(HASH_SIZE)


def sha256(*parts: bytes | memoryview) -> bytes:
    """Hash the concatenation of ``parts``."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def pack(value: Any) -> bytes:
    """Encode lists, ints, bytes, text, booleans and None; refuses dictionaries, whose order is not canonical."""
    return bytes(msgpack.packb(value, use_bin_type=True, strict_types=False))


def unpack(data: bytes, *, max_size: int) -> Any:
    """Decode what :func:`pack` wrote, and nothing else.

    Args:
        data: the encoded bytes.
        max_size: the largest number of bytes that the caller accepts; also limits every element.

    Returns:
        The value; all sequences are lists.

    Raises:
        WireError: the bytes are too long, malformed, of a type that is not allowed, or not the canonical encoding.
    """
    if len(data) > max_size:
        raise WireError(f"a message of {len(data)} bytes; at most {max_size} are accepted")
    try:
        value = msgpack.unpackb(
            data,
            raw=False,
            use_list=True,
            strict_map_key=True,
            max_str_len=max_size,
            max_bin_len=max_size,
            max_array_len=max_size,
            max_map_len=0,
            max_ext_len=0,
        )
    except Exception as error:  # msgpack raises many types, which all mean the same here
        raise WireError(f"not a canonical message: {type(error).__name__}") from error
    try:
        again = pack(value)
    except Exception as error:
        raise WireError(f"not a canonical message: {type(error).__name__}") from error
    if again != data:
        raise WireError("not a canonical message: this is not the canonical encoding of its value")
    return value
