"""The payload: votes as canonical bytes, versions 2 and 3 (``docs/wire-format.md`` describes them on one page).

Big-endian, most significant bit first::

    u8  version      u8  log2(chunk side)      u16  k      u32  number of chunks
    for each group of g chunks, one stream of bits without gaps; zeros fill the last byte of the payload:
        w bits             the ranks of the g chunks' sets, as digits to the base C(n, k) + 1, the last chunk's highest
        g k (l + 1) bits   for each vote the l low bits of its position, and its sign, 1 = negative
    in version 3, those of local steps, for each chunk, one stream of bits like the first:
        5 bits             its exponent
        k bits             for each vote its magnitude, 1 = two

The order of a chunk's positions carries no information, so their set is numbered
(:mod:`~psyche_lightning.distro.sets`). The digit 0 stands for a chunk without votes, whose other bits are zero as well,
and for the chunks that the last group lacks. Every value has exactly one encoding: ``encode(decode(x)) == x``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache
from math import comb

import numpy as np
from numpy.typing import NDArray

from psyche_lightning.distro import magnitudes
from psyche_lightning.distro.config import STEPS_VERSION, WIRE_VERSION, DistroConfig
from psyche_lightning.distro.sets import LIMB, Ranks, carry, plan, to_bytes, to_limbs
from psyche_lightning.distro.votes import Votes
from psyche_lightning.errors import PayloadError

_HEADER = struct.Struct(">BBHI")
HEADER_SIZE = _HEADER.size
FEW = 4
"""Chunks that are sooner written without numpy."""
_BATCH_BITS = 1 << 21  # bits of a batch; working memory is a few bytes for each


class _Code:
    """Writes and reads the groups for one chunk area and k."""

    def __init__(self, area: int, k: int) -> None:
        self.plan, self.k, self.area = plan(area, k), k, area
        self.votes = self.plan.group * k
        self.bits = self.plan.word + self.votes * (self.plan.low + 1)
        self.batch = max(8, _BATCH_BITS // self.bits // 8 * 8)  # groups per batch, which fill whole bytes
        self.ranks = Ranks(self.plan.universe, k, self.plan.limbs)
        self.offsets = self.plan.word + np.arange(self.votes) * (self.plan.low + 1)  # of votes in a group
        self.spread = np.arange(k)[:, None] if self.plan.low else 0
        self.places = [self.plan.states**place for place in range(self.plan.group)]
        self.last = to_limbs([self.plan.states**self.plan.group - 1], self.plan.limbs)

    def groups(self, chunks: int) -> int:
        return -(-chunks // self.plan.group)

    def write(self, positions: NDArray[np.int16], signs: NDArray[np.int8]) -> NDArray[np.uint8]:
        """The bits of whole groups, [groups, bits], one bit in each byte."""
        shape, group = self.plan, self.plan.group
        count = self.groups(len(positions))
        missing = count * group - len(positions)
        if missing:
            positions = np.pad(positions, ((0, missing), (0, 0)))
            signs = np.pad(signs, ((0, missing), (0, 0)))
        silent = signs[:, 0] == 0
        words = self.ranks.rank((positions.T >> shape.low) + self.spread)
        words[-1] += 1
        words = carry(words)
        words[:, silent] = 0
        if group > 1:
            words = np.array(self.places) @ words.reshape(count, group).T[None]
        fields = ((positions & ((1 << shape.low) - 1)) << 1 | (signs < 0)).astype(">u2")
        fields[silent] = 0
        bits = np.empty((count, self.bits), np.uint8)
        wide = np.unpackbits(to_bytes(words).reshape(-1)).reshape(count, -1)
        bits[:, : shape.word] = wide[:, wide.shape[1] - shape.word :]
        parts = np.unpackbits(fields.view(np.uint8).reshape(-1)).reshape(-1, 16)[:, 15 - shape.low :]
        bits[:, shape.word :] = parts.reshape(count, -1)
        return bits

    def written_singly(self, positions: NDArray[np.int16], signs: NDArray[np.int8]) -> bytes:
        """What :meth:`write` gives, packed: one vote after the other, which is quicker for :data:`FEW` chunks."""
        low, group, each = self.plan.low, self.plan.group, self.k * (self.plan.low + 1)
        chunks = list(zip(positions.tolist(), signs.tolist(), strict=True))
        stream = 0
        for first in range(0, len(chunks), group):
            word = fields = 0
            for place, (chosen, votes) in enumerate(chunks[first : first + group]):
                own = 0
                if votes[0]:
                    ranks = (comb((at >> low) + bool(low) * n, n + 1) for n, at in enumerate(chosen))
                    word += (1 + sum(ranks)) * self.places[place]
                    for at, sign in zip(chosen, votes, strict=True):
                        own = own << low + 1 | (at & (1 << low) - 1) << 1 | (sign < 0)
                fields |= own << (group - 1 - place) * each
            stream = (stream << self.plan.word | word) << group * each | fields
        size = self.groups(len(chunks)) * self.bits
        return (stream << -size % 8).to_bytes((size + 7) // 8, "big")

    def read(
        self, data: NDArray[np.uint8], offset: int, first: int, groups: int
    ) -> tuple[NDArray[np.int16], NDArray[np.int8]]:
        """Undo :meth:`write`, for the same ``groups`` groups of several payloads, one payload after the other.

        Args:
            data: the bytes around them, [payloads, bytes], with at least 8 more behind.
            offset: bits before the first group.
            first: the number of the first group, for error messages.
            groups: how many.
        """
        shape, group, k = self.plan, self.plan.group, self.k
        windows = _windows(data)
        begin = np.arange(offset, offset + groups * self.bits, self.bits)
        words = np.empty((shape.limbs, len(data) * groups), np.int64)
        for limb in range(shape.limbs):
            end = shape.word - LIMB * (shape.limbs - 1 - limb)
            width = min(LIMB, end)
            start = begin + (end - width)
            at = start >> 3
            wide = windows.take(at, axis=1).astype(np.int64) << 32 | windows.take(at + 4, axis=1)
            words[limb] = (wide >> (64 - width) - (start & 7) & (1 << width) - 1).reshape(-1)
        _refuse(self._beyond(words), first, groups, group, "a word beyond the number of sets")
        if group > 1:
            words = np.stack([words[0] // place % shape.states for place in self.places], 1).reshape(1, -1)
        silent = ~words.any(axis=0)
        words[-1] -= ~silent
        positions = self.ranks.unrank(carry(words)) - self.spread
        starts = (begin[:, None] + self.offsets).astype(np.int32)
        shifts = (31 - shape.low - (starts & 7)).astype(np.uint32)
        parts = windows.take(starts >> 3, axis=1) >> shifts & np.uint32((2 << shape.low) - 1)
        fields = parts.astype(np.int16).reshape(-1, k)
        chunks = first * group, groups * group, 1
        _refuse(silent & fields.any(axis=1), *chunks, "low bits or signs but no votes")
        positions = (positions.T << shape.low | fields >> 1).astype(np.int16)
        if shape.low:
            positions[silent] = np.arange(k)
            _refuse((positions[:, 1:] <= positions[:, :-1]).any(axis=1), *chunks, "positions that do not ascend")
        signs = (1 - 2 * (fields & 1)).astype(np.int8)
        signs[silent] = 0
        return positions, signs

    def _beyond(self, words: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which words are not below ``states ** group``."""
        beyond = np.zeros(words.shape[1], np.bool_)
        for limb, last in zip(words[::-1], self.last[::-1], strict=True):
            beyond = (limb > last) | ((limb == last) & beyond)
        return beyond


@cache
def code_of(area: int, k: int) -> _Code:
    """The code of that chunk area and k."""
    return _Code(area, k)


def payload_size(chunk_count: int, config: DistroConfig, version: int = WIRE_VERSION) -> int:
    """Bytes of a payload; they depend only on the layout, the configuration and the version."""
    second = magnitudes.size(chunk_count, config.k) if version == STEPS_VERSION else 0
    return _HEADER.size + votes_size(chunk_count, config) + second


def votes_size(chunk_count: int, config: DistroConfig) -> int:
    """Bytes of the groups, which follow the header."""
    shape = plan(config.area, config.k)
    groups = -(-chunk_count // shape.group)
    return (groups * (shape.word + shape.group * config.k * (shape.low + 1)) + 7) // 8


def header(chunk_count: int, config: DistroConfig, version: int) -> bytes:
    """The first bytes of a payload."""
    return _HEADER.pack(version, config.chunk.bit_length() - 1, config.k, chunk_count)


def encode(votes: Votes, config: DistroConfig) -> bytes:
    """Write votes as a payload, of version 3 if they have exponents.

    Raises:
        ValueError: the votes do not have ``config.k`` columns, or their magnitudes have another, canonical form.
    """
    chunks, k = votes.positions.shape
    if k != config.k or votes.signs.shape != (chunks, k):
        raise ValueError(f"votes of shape {votes.positions.shape} and {votes.signs.shape}; k is {config.k}")
    code = code_of(config.area, k)
    version = WIRE_VERSION if votes.exponents is None else STEPS_VERSION
    parts = [header(chunks, config, version)]
    step = code.batch * code.plan.group
    if chunks <= FEW:
        parts.append(code.written_singly(votes.positions, votes.signs))
    else:
        for start in range(0, chunks, step):
            bits = code.write(votes.positions[start : start + step], votes.signs[start : start + step])
            parts.append(np.packbits(bits).tobytes())
    if votes.exponents is not None:
        parts.append(magnitudes.write(votes.signs, votes.exponents))
    return b"".join(parts)


def decode(
    payload: bytes,
    chunk_count: int,
    config: DistroConfig,
    start: int = 0,
    stop: int | None = None,
    version: int = WIRE_VERSION,
) -> Votes:
    """Read a payload for this layout and configuration.

    Args:
        payload: untrusted bytes.
        chunk_count: :attr:`Layout.chunk_count` of this node.
        config: this run's configuration.
        start: the first wanted chunk.
        stop: the chunk after the last wanted one, by default all; the others are not checked.
        version: this run's version of payloads.

    Returns:
        The votes of the chunks ``start`` to ``stop``.

    Raises:
        PayloadError: the bytes are not the canonical encoding of votes for this layout.
    """
    return decode_each([payload], chunk_count, config, start, stop, version)[0]


def decode_each(
    payloads: Sequence[bytes],
    chunk_count: int,
    config: DistroConfig,
    start: int = 0,
    stop: int | None = None,
    version: int = WIRE_VERSION,
) -> list[Votes]:
    """Read one or more payloads at once, quicker than one after the other; otherwise as :func:`decode`."""
    check_frames(payloads, chunk_count, config, version)
    stop = chunk_count if stop is None else stop
    code, count = code_of(config.area, config.k), len(payloads)
    group = code.plan.group
    middle = _HEADER.size + votes_size(chunk_count, config)
    bodies = [np.frombuffer(payload, np.uint8, middle - _HEADER.size, _HEADER.size) for payload in payloads]
    positions = np.empty((count, stop - start, config.k), np.int16)
    signs = np.empty(positions.shape, np.int8)
    step, last = max(8, code.batch // count // 8 * 8), -(-stop // group)
    for first in range(start // group, last, step):
        groups = min(step, last - first)
        begin, end = first * code.bits, (first + groups) * code.bits
        some = [body[begin // 8 : (end + 7) // 8] for body in bodies]
        data = np.zeros((count, len(some[0]) + 8), np.uint8)
        for row, its in zip(data, some, strict=True):
            row[:-8] = its
        shape = count, groups * group, config.k
        read = [part.reshape(shape) for part in code.read(data, begin % 8, first, groups)]
        beyond = read[1][:, max(0, chunk_count - first * group) :].any()
        _refuse(beyond, chunk_count, 1, 1, "votes beyond the last chunk")
        skip, room = max(0, start - first * group), first * group - start
        here = slice(max(0, room), min(room + groups * group, stop - start))
        there = slice(skip, skip + here.stop - here.start)
        positions[:, here], signs[:, here] = read[0][:, there], read[1][:, there]
    if version != STEPS_VERSION:
        return list(map(Votes, positions, signs))
    seconds = np.stack([np.frombuffer(payload, np.uint8, offset=middle) for payload in payloads])
    return list(map(Votes, positions, signs, magnitudes.read(seconds, signs, chunk_count, start)))


def check_frames(payloads: Sequence[bytes], chunk_count: int, config: DistroConfig, version: int) -> None:
    """Check all of some payloads but their votes: sizes, headers and the bits after the last group.

    Raises:
        PayloadError: one is wrong.
    """
    code, size = code_of(config.area, config.k), HEADER_SIZE + votes_size(chunk_count, config)
    unused = code.groups(chunk_count) * code.bits % 8
    for payload in payloads:
        _check_frame(payload, chunk_count, config, version)
        if unused and payload[size - 1] & ((1 << (8 - unused)) - 1):
            raise PayloadError("the last byte of the payload's votes is not padded with zeros")


def _check_frame(payload: bytes, chunk_count: int, config: DistroConfig, expected: int) -> None:
    size = payload_size(chunk_count, config, expected)
    if len(payload) < _HEADER.size:
        raise PayloadError(f"the payload ends after {len(payload)} bytes; {size} are expected")
    version, log2, k, chunks = _HEADER.unpack_from(payload)
    if version != expected:
        raise PayloadError(f"the payload has version {version}; this run's is {expected}")
    for what, found, wanted in (
        ("log2 of the chunk side", log2, config.chunk.bit_length() - 1),
        ("k", k, config.k),
        ("number of chunks", chunks, chunk_count),
    ):
        if found != wanted:
            raise PayloadError(f"the payload's {what} is {found}; this run's is {wanted}")
    if len(payload) != size:
        raise PayloadError(f"the payload has {len(payload)} bytes; {size} are expected for {chunk_count} chunks")


def _windows(data: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """The four bytes from each place on as a number, for [rows, bytes], which are contiguous."""
    rows, count = data.shape
    windows: NDArray[np.uint32] = np.ndarray((rows, count - 3), ">u4", data.data, strides=(count, 1)).astype(np.uint32)
    return windows


def _refuse(wrong: NDArray[np.bool_] | np.bool_, start: int, count: int, step: int, what: str) -> None:
    """Refuse payloads of which some parts are wrong: ``count`` of each payload, the first being ``start``."""
    if wrong.any():
        raise PayloadError(f"chunk {(start + int(wrong.argmax()) % count) * step} of the payload has {what}")
