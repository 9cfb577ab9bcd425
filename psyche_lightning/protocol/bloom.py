"""Bloom filters over FNV-1a, byte for byte as in Psyche (its bloom.rs).

They decide only, in a health check, whether witnesses heard from a client.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache

from psyche_lightning.errors import WireError
from psyche_lightning.protocol.state import BLOOM_KEYS, BLOOM_WORDS
from psyche_lightning.wire.canonical import sha256

BLOOM_SIZE = 8 * (BLOOM_KEYS + BLOOM_WORDS)
"""Bytes of a serialized filter: 8 keys, then 16 words of bits, all u64 LE."""

_FNV_PRIME = 0x100000001B3
_MASK = (1 << 64) - 1


def fnv1a(key: int, item: bytes) -> int:
    """64-bit FNV-1a of ``item`` with ``key`` as initial state."""
    state = key
    for byte in item:
        state = ((state ^ byte) * _FNV_PRIME) & _MASK
    return state


@lru_cache(maxsize=64)  # a witness makes two filters with them
def bloom_keys(seed: int) -> tuple[int, ...]:
    """The eight u64 keys of a round's filters, derived from its seed; Psyche's witnesses draw theirs at random.

    Key *i* is the first 8 bytes (LE) of ``S("psyche-lightning bloom 1", LE64(seed), byte(i))``.
    """
    prefix = b"psyche-lightning bloom 1" + struct.pack("<Q", seed)
    return tuple(int.from_bytes(sha256(prefix, bytes([i]))[:8], "little") for i in range(BLOOM_KEYS))


@lru_cache(maxsize=16384)  # a round's filters have equal keys and mostly equal items
def _positions(keys: tuple[int, ...], words: int, item: bytes) -> tuple[int, ...]:
    return tuple(fnv1a(key, item) % (64 * words) for key in keys)


class Bloom:
    """A set of byte strings that may also claim members that it does not have.

    Args:
        keys: u64 keys; each gives one position.
        words: number of 64-bit words.
        bits: the bits so far; bit ``p`` of the integer is position ``p``.
    """

    def __init__(self, keys: Sequence[int], words: int = BLOOM_WORDS, bits: int = 0) -> None:
        self.keys = tuple(keys)
        self.words = words
        self.bits = bits

    @classmethod
    def of(cls, seed: int, items: Iterable[bytes] = ()) -> Bloom:
        """A filter for the round with that seed, with ``items`` as members."""
        bloom = cls(bloom_keys(seed))
        for item in items:
            bloom.add(item)
        return bloom

    @classmethod
    def from_bytes(cls, data: bytes) -> Bloom:
        """Read a serialized filter of 8 keys and 16 words.

        Raises:
            WireError: the data does not have 192 bytes.
        """
        if len(data) != BLOOM_SIZE:
            raise WireError(f"a Bloom filter of {len(data)} bytes; it has {BLOOM_SIZE}")
        keys = struct.unpack_from(f"<{BLOOM_KEYS}Q", data)
        return cls(keys, BLOOM_WORDS, int.from_bytes(data[8 * BLOOM_KEYS :], "little"))

    def to_bytes(self) -> bytes:
        """Keys, then words, all u64 LE."""
        return struct.pack(f"<{len(self.keys)}Q", *self.keys) + self.bits.to_bytes(8 * self.words, "little")

    def positions(self, item: bytes) -> tuple[int, ...]:
        """The bit positions of ``item``, one for each key."""
        return _positions(self.keys, self.words, item)

    def add(self, item: bytes) -> None:
        """Make ``item`` a member."""
        for position in self.positions(item):
            self.bits |= 1 << position

    def __contains__(self, item: bytes) -> bool:
        return all(self.bits >> position & 1 for position in self.positions(item))


def participants_bloom(seed: int, signers: Iterable[bytes]) -> bytes:
    """The serialized filter by which a witness of the round with that seed names the clients that it heard from."""
    return Bloom.of(seed, (sha256(signer) for signer in signers)).to_bytes()
