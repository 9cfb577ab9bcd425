"""Partial sums: what a relay sends on instead of its peers' payloads.

The sum of votes is a sum of integers, so peers may be added in any order and grouping: :func:`merge` is associative and
commutative. The update from a tally equals the update from the payloads in it, to the bit.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from psyche_lightning.distro.config import WIRE_VERSION, DistroConfig
from psyche_lightning.distro.votes import Votes
from psyche_lightning.errors import PayloadError

_HEADER = struct.Struct(">BBIQ")
_KIND = 0x80 | WIRE_VERSION  # a payload's first byte is the version alone


@dataclass(frozen=True, eq=False)
class Tally:
    """The nonzero sums of some peers' votes.

    Attributes:
        chunks: chunks of the model.
        area: coefficients in a chunk.
        keys: int64, strictly ascending: chunk * area + position.
        sums: int32, the sum at each key, never 0.
    """

    chunks: int
    area: int
    keys: NDArray[np.int64]
    sums: NDArray[np.int32]

    @staticmethod
    def of(votes: Votes, config: DistroConfig) -> Tally:
        """The tally of one peer's votes."""
        chunks = len(votes.positions)
        keys = np.arange(chunks, dtype=np.int64)[:, None] * config.area + votes.positions
        cast = votes.signs != 0
        return Tally(chunks, config.area, keys[cast], votes.signs[cast].astype(np.int32))

    @property
    def units(self) -> int:
        """The number of single votes in the sums."""
        return int(np.abs(self.sums).sum())

    def votes(self) -> Votes:
        """The tally as votes, with as many columns as the fullest chunk has single votes; unused ones have sign 0.

        A sum of 3 becomes three votes for one position, so :func:`sign_update` accepts the result.
        """
        repeats = np.abs(self.sums)
        keys, signs = np.repeat(self.keys, repeats), np.repeat(np.sign(self.sums), repeats)
        chunk = keys // self.area
        counts = np.bincount(chunk, minlength=self.chunks)
        column = np.arange(len(keys)) - np.repeat(np.cumsum(counts) - counts, counts)
        shape = self.chunks, max(1, int(counts.max(initial=0)))
        found = Votes(np.zeros(shape, np.int16), np.zeros(shape, np.int8))
        found.positions[chunk, column] = keys % self.area
        found.signs[chunk, column] = signs
        return found


def merge(one: Tally, other: Tally) -> Tally:
    """The tally of the peers of both.

    Raises:
        ValueError: they have different layouts.
    """
    if (one.chunks, one.area) != (other.chunks, other.area):
        raise ValueError(f"tallies of {one.chunks} x {one.area} and {other.chunks} x {other.area} coefficients")
    keys, where = np.unique(np.concatenate([one.keys, other.keys]), return_inverse=True)
    sums = np.zeros(len(keys), np.int32)
    sums[where[: len(one.keys)]] = one.sums
    sums[where[len(one.keys) :]] += other.sums
    return Tally(one.chunks, one.area, keys[sums != 0], sums[sums != 0])


def encode_tally(tally: Tally) -> bytes:
    """Write a tally, in about ``log2(coefficients / votes) + 3`` bits per single vote.

    The header is big-endian: u8 ``0x80 | version``, u8 log2 of the chunk side, u32 chunks, u64 single votes n. A stream
    of bits follows: for each of the n keys, in ascending order, its ``l = floor(log2(chunks * area / n))`` low bits;
    the high bits of all keys in unary, where bit ``high_i + i`` of ``n + (chunks * area >> l)`` bits is set; n signs, 1
    = negative; zeros up to a whole byte. This is the Elias-Fano code of a multiset.
    """
    repeats = np.abs(tally.sums)
    keys, negative = np.repeat(tally.keys, repeats), np.repeat(tally.sums < 0, repeats)
    low, upper = _shape(tally.chunks * tally.area, len(keys))
    header = _HEADER.pack(_KIND, tally.area.bit_length() // 2, tally.chunks, len(keys))
    bits = np.zeros(len(keys) * (low + 1) + upper, np.uint8)
    lows = bits[: len(keys) * low].reshape(len(keys), low)
    for bit in range(low):
        lows[:, bit] = keys >> (low - 1 - bit) & 1
    bits[len(keys) * low + (keys >> low) + np.arange(len(keys))] = 1
    bits[len(bits) - len(keys) :] = negative
    return header + np.packbits(bits).tobytes()


def decode_tally(payload: bytes, chunk_count: int, config: DistroConfig, peers: int) -> Tally:
    """Read a tally for this layout.

    Args:
        payload: untrusted bytes.
        chunk_count: :attr:`Layout.chunk_count` of this node.
        config: this run's configuration.
        peers: the most peers that the tally may contain.

    Raises:
        PayloadError: the bytes are not the canonical encoding of a tally of at most ``peers`` peers for this layout.
    """
    if len(payload) < _HEADER.size:
        raise PayloadError(f"the tally ends after {len(payload)} bytes; its header has {_HEADER.size}")
    kind, log2, chunks, count = _HEADER.unpack_from(payload)
    if (kind, log2, chunks) != (_KIND, config.chunk.bit_length() - 1, chunk_count):
        raise PayloadError(f"the tally has the header {payload[: _HEADER.size].hex()} of another version or layout")
    most = peers * config.max_k * chunk_count
    if count > most:
        raise PayloadError(f"the tally has {count} votes; {peers} peers have at most {most}")
    low, upper = _shape(chunk_count * config.area, count)
    size = count * (low + 1) + upper
    if len(payload) != _HEADER.size + (size + 7) // 8:
        raise PayloadError(f"the tally has {len(payload)} bytes; {_HEADER.size + (size + 7) // 8} are expected")
    bits = np.unpackbits(np.frombuffer(payload, np.uint8, offset=_HEADER.size))
    if bits[size:].any():
        raise PayloadError("the tally's last byte is not padded with zeros")
    high = np.flatnonzero(bits[count * low : count * low + upper])
    if len(high) != count:
        raise PayloadError(f"the tally sets {len(high)} high bits for {count} votes")
    keys = (high - np.arange(count)).astype(np.int64) << low
    lows = bits[: count * low].reshape(count, low)
    for bit in range(low):
        keys |= lows[:, bit].astype(np.int64) << (low - 1 - bit)
    signs = 1 - 2 * bits[size - count : size].astype(np.int32)
    same = np.diff(keys) == 0
    if (np.diff(keys) < 0).any() or (keys[-1:] >= chunk_count * config.area).any():
        raise PayloadError("the tally's keys do not ascend, or end beyond its coefficients")
    if (same & (np.diff(signs) != 0)).any():
        raise PayloadError("the tally has votes of both signs for one coefficient")
    first = np.flatnonzero(np.concatenate([[True], ~same])[:count])
    sums = np.add.reduceat(signs, first).astype(np.int32) if count else np.zeros(0, np.int32)
    if (np.abs(sums) > peers).any():
        raise PayloadError(f"the tally has a sum of more than {peers} votes")
    return Tally(chunk_count, config.area, keys[first], sums)


def _shape(universe: int, count: int) -> tuple[int, int]:
    """The low bits of each key, and the bits of the unary part."""
    if count == 0:
        return 0, 0
    low = max(0, (universe // count).bit_length() - 1)
    return low, count + (universe >> low)
