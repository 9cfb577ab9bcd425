"""The payload: votes as canonical bytes.

Version 1, big-endian, most significant bit first::

    u8  version      u8  log2(chunk side)      u16  k      u32  number of chunks
    per chunk, as one stream of bits without gaps, zero-padded to a whole byte at its end:
        k fields of l bits     the low bits of the ascending positions, l = floor(log2(area / k))
        k + (area >> l) bits   their high bits in unary: bit (high_i + i) is set for i = 0 .. k - 1
        k bits                 the signs, 1 = negative

which is the Elias-Fano form of the set of positions, of fixed width, so that any chunk can be found. A chunk without
votes is all zeros, which no set of k >= 1 positions is. Each value has exactly one encoding:
``encode(decode(x)) == x``. At chunk 64 and k = 8 that is 12 bits per vote.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from psyche_lightning.distro.config import WIRE_VERSION, DistroConfig
from psyche_lightning.distro.select import Votes
from psyche_lightning.errors import PayloadError

_HEADER = struct.Struct(">BBHI")
_BATCH_BITS = 1 << 22  # one byte of working memory each, a few times over


class _Fields:
    """Where the fields of a chunk lie, in bits from its start."""

    def __init__(self, config: DistroConfig) -> None:
        self.low = (config.area // config.k).bit_length() - 1
        self.buckets = config.area >> self.low
        self.upper = config.k * self.low
        self.signs = self.upper + config.k + self.buckets
        self.width = self.signs + config.k

    def batches(self, chunks: int) -> Iterator[tuple[int, int]]:
        """Ranges of chunks that begin at whole bytes and need bounded memory."""
        step = max(8, _BATCH_BITS // self.width // 8 * 8)
        return ((start, min(start + step, chunks)) for start in range(0, chunks, step))


def payload_size(chunk_count: int, config: DistroConfig) -> int:
    """Bytes of a payload; they depend on the layout and the configuration alone."""
    return _HEADER.size + (chunk_count * _Fields(config).width + 7) // 8


def encode(votes: Votes, config: DistroConfig) -> bytes:
    """Write votes as a payload.

    Raises:
        ValueError: the votes do not have ``config.k`` columns.
    """
    chunks, k = votes.positions.shape
    if k != config.k or votes.signs.shape != (chunks, k):
        raise ValueError(f"votes of shape {votes.positions.shape} and {votes.signs.shape}; k is {config.k}")
    fields = _Fields(config)
    parts = [_HEADER.pack(WIRE_VERSION, config.chunk.bit_length() - 1, k, chunks)]
    for start, stop in fields.batches(chunks):
        positions, signs = votes.positions[start:stop].astype(np.intp), votes.signs[start:stop]
        bits = np.zeros((stop - start, fields.width), np.uint8)
        for i in range(fields.low):
            bits[:, i : fields.upper : fields.low] = positions >> (fields.low - 1 - i) & 1
        np.put_along_axis(bits[:, fields.upper : fields.signs], (positions >> fields.low) + np.arange(k), 1, axis=1)
        bits[:, fields.signs :] = signs < 0
        bits[signs[:, 0] == 0] = 0
        parts.append(np.packbits(bits).tobytes())
    return b"".join(parts)


def decode(payload: bytes, chunk_count: int, config: DistroConfig) -> Votes:
    """Read a payload that must be for this layout and configuration.

    Args:
        payload: bytes from anyone.
        chunk_count: :attr:`Layout.chunk_count` of this node.
        config: this run's configuration.

    Raises:
        PayloadError: the bytes are not the one encoding of votes for this layout.
    """
    _check_frame(payload, chunk_count, config)
    k, fields = config.k, _Fields(config)
    body = np.frombuffer(payload, np.uint8, offset=_HEADER.size)
    votes = Votes.empty(chunk_count, k)
    for start, stop in fields.batches(chunk_count):
        stream = np.unpackbits(body[start * fields.width // 8 : (stop * fields.width + 7) // 8])
        if stream[(stop - start) * fields.width :].any():
            raise PayloadError("the payload's last byte is not padded with zeros")
        bits = stream[: (stop - start) * fields.width].reshape(stop - start, fields.width)
        unary = bits[:, fields.upper : fields.signs]
        ones = unary.sum(axis=1, dtype=np.intp)
        voted = ones != 0
        _refuse(voted & (ones != k), start, f"sets another number of high bits than k = {k}")
        _refuse(~voted & bits.any(axis=1), start, "casts no votes but is not all zeros")
        positions = (np.nonzero(unary)[1].reshape(-1, k) - np.arange(k)) << fields.low
        for i in range(fields.low):
            bit = bits[:, i : fields.upper : fields.low][voted].astype(np.intp)
            positions |= bit << (fields.low - 1 - i)
        wrong = np.zeros(stop - start, np.bool_)
        wrong[voted] = positions[:, -1] >= config.area
        _refuse(wrong, start, f"has a position beyond its {config.area} coefficients")
        wrong[voted] = (np.diff(positions, axis=1) <= 0).any(axis=1)
        _refuse(wrong, start, "has positions that do not ascend")
        votes.positions[start:stop][voted] = positions
        votes.signs[start:stop][voted] = 1 - 2 * bits[:, fields.signs :][voted].astype(np.int8)
    return votes


def _check_frame(payload: bytes, chunk_count: int, config: DistroConfig) -> None:
    size = payload_size(chunk_count, config)
    if len(payload) < _HEADER.size:
        raise PayloadError(f"the payload ends after {len(payload)} bytes; {size} are expected")
    version, log2, k, chunks = _HEADER.unpack_from(payload)
    if version != WIRE_VERSION:
        raise PayloadError(f"the payload has version {version}; this program reads version {WIRE_VERSION}")
    for what, found, wanted in (
        ("log2 of the chunk side", log2, config.chunk.bit_length() - 1),
        ("k", k, config.k),
        ("number of chunks", chunks, chunk_count),
    ):
        if found != wanted:
            raise PayloadError(f"the payload's {what} is {found}; this run's is {wanted}")
    if len(payload) != size:
        raise PayloadError(f"the payload has {len(payload)} bytes; {size} are expected for {chunk_count} chunks")


def _refuse(wrong: NDArray[np.bool_], start: int, what: str) -> None:
    if wrong.any():
        raise PayloadError(f"chunk {start + int(wrong.argmax())} of the payload {what}")
