"""Payloads on a device: what :mod:`~psyche_lightning.distro.codec` does with numpy, as torch operations.

Bytes are equal. Nothing but a payload and one truth value comes to the host, so writing waits for the device once, and
reading once. On the CPU numpy is quicker.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from psyche_lightning.distro import codec, magnitudes
from psyche_lightning.distro.config import STEPS_VERSION, WIRE_VERSION, DistroConfig
from psyche_lightning.distro.sets import LIMB
from psyche_lightning.distro.votes import VotesOn

_MASK = (1 << LIMB) - 1
_BATCH_BITS = 1 << 22  # bits of a batch; working memory is some ten bytes for each


def computes(device: torch.device) -> bool:
    """Whether payloads are written and read on that device itself: MPS has no float64, which this needs."""
    return device.type not in ("cpu", "mps")


def encode(votes: VotesOn, config: DistroConfig) -> bytes:
    """Write votes as :func:`codec.encode` does; waits for the device once."""
    chunks = len(votes.positions)
    code = _code(config.area, config.k, votes.signs.device)
    step = code.batch(1) * code.plan.group
    parts = [
        _packed(code.write(votes.positions[start : start + step], votes.signs[start : start + step]))
        for start in range(0, chunks, step)
    ]
    version = WIRE_VERSION
    if votes.exponents is not None:
        version, step = STEPS_VERSION, _chunks_at_once(1, config.k)
        for start in range(0, chunks, step):
            here = slice(start, start + step)
            parts.append(_packed(_magnitude_bits(votes.signs[here], votes.exponents[here])))
    body = torch.cat(parts).cpu().numpy().tobytes() if parts else b""
    return codec.header(chunks, config, version) + body


def decode_each(
    payloads: Sequence[bytes],
    chunk_count: int,
    config: DistroConfig,
    device: torch.device,
    start: int,
    stop: int,
    version: int = WIRE_VERSION,
) -> list[VotesOn]:
    """Read payloads as :func:`codec.decode_each` does, onto a device; waits for it once."""
    codec.check_frames(payloads, chunk_count, config, version)
    code, count = _code(config.area, config.k, device), len(payloads)
    group = code.plan.group
    raw = np.frombuffer(b"".join(payload + bytes(8) for payload in payloads), np.uint8).reshape(count, -1)
    data = torch.from_numpy(raw.copy()).to(device)[:, codec.HEADER_SIZE :]
    positions = torch.empty(count, stop - start, config.k, dtype=torch.int16, device=device)
    signs = torch.empty(positions.shape, dtype=torch.int8, device=device)
    wrong = torch.zeros((), dtype=torch.bool, device=device)
    step, last = code.batch(count), -(-stop // group)
    for first in range(start // group, last, step):
        groups = min(step, last - first)
        found, its, bad = code.read(data, first, groups)
        wrong |= bad | its[:, max(0, chunk_count - first * group) :].any()
        skip, room = max(0, start - first * group), first * group - start
        here = slice(max(0, room), min(room + groups * group, stop - start))
        there = slice(skip, skip + here.stop - here.start)
        positions[:, here], signs[:, here] = found[:, there], its[:, there]
    exponents: Sequence[torch.Tensor | None] = [None] * count
    if version == STEPS_VERSION:
        for payload in payloads:
            magnitudes.check_padding(payload, chunk_count, config.k)
        second = data[:, codec.votes_size(chunk_count, config) :]
        each = torch.empty(count, stop - start, dtype=torch.int8, device=device)
        step = _chunks_at_once(count, config.k)
        for begin in range(0, stop - start, step):
            some = signs[:, begin : begin + step]
            each[:, begin : begin + step], bad = _read_magnitudes(second, some, start + begin)
            wrong |= bad
        exponents = list(each)
    if wrong.item():
        codec.decode_each(payloads, chunk_count, config, start, stop, version)  # says what is wrong
        raise RuntimeError("a device and the host read a payload differently; please report this")
    return [VotesOn(*each) for each in zip(positions, signs, exponents, strict=True)]


class _Code:
    """Writes and reads groups for one chunk area and k on a device; otherwise like the one of the codec."""

    def __init__(self, area: int, k: int, device: torch.device) -> None:
        host = codec.code_of(area, k)
        self.plan, self.k, self.device = host.plan, k, device
        self.votes, self.bits = host.votes, host.bits
        self.places = torch.tensor(host.places, dtype=torch.int64, device=device) if self.plan.group > 1 else None
        self.tables = [
            torch.from_numpy(table).to(device) for table in host.ranks.tables
        ]  # each [its limbs, universe + 1]
        self.guesses = [
            (guess.drop, guess.first, torch.from_numpy(guess.positions).to(device)) for guess in host.ranks.guesses
        ]
        self.last = torch.from_numpy(host.last).to(device)
        self.spread = (
            torch.arange(k, device=device) if self.plan.low else torch.zeros(k, dtype=torch.int64, device=device)
        )

    def batch(self, payloads: int) -> int:
        """Groups per batch, which fill whole bytes."""
        return max(8, _BATCH_BITS // payloads // self.bits // 8 * 8)

    def write(self, positions: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
        """The bits of whole groups, uint8 [groups, bits]."""
        shape, group = self.plan, self.plan.group
        count = -(-len(positions) // group)
        missing = count * group - len(positions)
        if missing:
            positions = torch.nn.functional.pad(positions, (0, 0, 0, missing))
            signs = torch.nn.functional.pad(signs, (0, 0, 0, missing))
        wide = positions.to(torch.int64)
        silent = signs[:, 0] == 0
        words = torch.zeros(shape.limbs, len(wide), dtype=torch.int64, device=self.device)
        for table, chosen in zip(self.tables, ((wide >> shape.low) + self.spread).T, strict=True):
            words[shape.limbs - len(table) :] += table[:, chosen]
        words[-1] += 1
        words = _carry(words).masked_fill_(silent, 0)
        if self.places is not None:
            words = (words.view(count, group) * self.places).sum(dim=1)[None]
        fields = ((wide & ((1 << shape.low) - 1)) << 1 | (signs < 0)).masked_fill_(silent[:, None], 0)
        bits = _bits_of(words.T, LIMB).reshape(count, -1)
        parts = _bits_of(fields, shape.low + 1).reshape(count, -1)
        return torch.cat([bits[:, bits.shape[1] - shape.word :], parts], dim=1)

    def read(self, data: torch.Tensor, first: int, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Undo :meth:`write` for some groups.

        Args:
            data: the bytes of each payload's groups, uint8 [payloads, bytes], with at least 8 more.
            first: the number of the first group.
            groups: how many.

        Returns:
            Positions and signs, [payloads, chunks, k], and whether anything is wrong.
        """
        shape, group, k = self.plan, self.plan.group, self.k
        count = len(data)
        begin = (torch.arange(first, first + groups, device=self.device) * self.bits)[:, None]
        words = torch.empty(shape.limbs, count * groups, dtype=torch.int64, device=self.device)
        for limb in range(shape.limbs):
            end = shape.word - LIMB * (shape.limbs - 1 - limb)
            width = min(LIMB, end)
            words[limb] = _fields(data, begin + (end - width), width).view(-1)
        wrong = self._beyond(words).any()
        if self.places is not None:
            words = (words.view(-1, 1) // self.places % shape.states).view(1, -1)
        silent = ~words.any(dim=0)
        words[-1] -= (~silent).to(torch.int64)
        high = self._unrank(_carry(words)) - self.spread[:, None]
        offsets = begin + shape.word + torch.arange(self.votes, device=self.device) * (shape.low + 1)
        fields = _fields(data, offsets, shape.low + 1).view(-1, k)
        wrong |= (silent[:, None] & (fields != 0)).any()
        positions = high.T << shape.low | fields >> 1
        if shape.low:
            positions = torch.where(silent[:, None], torch.arange(k, device=self.device), positions)
            wrong |= (positions[:, 1:] <= positions[:, :-1]).any()
        signs = (1 - 2 * (fields & 1)).masked_fill_(silent[:, None], 0)
        size = count, groups * group, k
        return positions.to(torch.int16).view(size), signs.to(torch.int8).view(size), wrong

    def _beyond(self, words: torch.Tensor) -> torch.Tensor:
        beyond = torch.zeros(words.shape[1], dtype=torch.bool, device=self.device)
        for limb, last in zip(words.flip(0), self.last.flip(0), strict=True):
            beyond = (limb > last) | ((limb == last) & beyond)
        return beyond

    def _unrank(self, ranks: torch.Tensor) -> torch.Tensor:
        """The sets, [k, count], of ranks, [limbs, count]."""
        sets = torch.empty(self.k, ranks.shape[1], dtype=torch.int64, device=self.device)
        rest = ranks
        for size in reversed(range(self.k)):
            table, (drop, first, positions) = self.tables[size], self.guesses[size]
            rest = rest[len(rest) - len(table) :]
            value = rest[0].to(torch.float64)
            for limb in rest[1:]:
                value = value * 2.0**LIMB + limb
            keys = (value * (1 + 2.0**-40)).clamp_(min=0.5).view(torch.int64)
            # What is no rank leads nowhere, but must not lead out of the table.
            found = positions[((keys >> drop) - first).clamp_(max=len(positions) - 1)]
            found = found - (_carry(rest - table[:, found])[0] < 0).to(torch.int64)
            found = found.clamp_(min=0)
            sets[size], rest = found, _carry(rest - table[:, found])
        return sets


@cache
def _code(area: int, k: int, device: torch.device) -> _Code:
    with torch.inference_mode(False):
        return _Code(area, k, device)


def _carry(limbs: torch.Tensor) -> torch.Tensor:
    """Like that of sets: all limbs but the first come into range, in place."""
    for limb in range(len(limbs) - 1, 0, -1):
        limbs[limb - 1] += limbs[limb] >> LIMB
        limbs[limb] &= _MASK
    return limbs


def _bits_of(numbers: torch.Tensor, width: int) -> torch.Tensor:
    """The lowest bits of integers, the highest of them first, uint8 [..., width]."""
    shifts = torch.arange(width - 1, -1, -1, device=numbers.device)
    return (numbers[..., None] >> shifts & 1).to(torch.uint8)


def _packed(bits: torch.Tensor) -> torch.Tensor:
    """Bits as bytes, the first bit highest; zeros fill the last byte."""
    flat = bits.reshape(-1)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=bits.device)
    return (flat * weights).sum(dim=1, dtype=torch.uint8)


def _fields(data: torch.Tensor, offsets: torch.Tensor, width: int) -> torch.Tensor:
    """Fields of ``width`` bits, at most 56, at these bit offsets of each row of bytes: int64, [rows, *offsets]."""
    size = (width + 14) // 8  # bytes that a field may touch
    ahead = torch.arange(size, device=data.device)
    some = data[:, (offsets >> 3)[..., None] + ahead].to(torch.int64)
    window = (some << (8 * (size - 1 - ahead))).sum(dim=-1)
    return window >> (8 * size - width - (offsets & 7)) & ((1 << width) - 1)


def _chunks_at_once(payloads: int, k: int) -> int:
    """Chunks whose magnitudes are a batch, and fill whole bytes."""
    return max(8, _BATCH_BITS // payloads // (magnitudes.EXPONENT_BITS + k) // 8 * 8)


def _magnitude_bits(signs: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    exponent_bits = _bits_of(exponents.to(torch.int64), magnitudes.EXPONENT_BITS)
    return torch.cat([exponent_bits, (signs.abs() == 2).to(torch.uint8)], dim=1)


def _read_magnitudes(data: torch.Tensor, signs: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exponents, [payloads, chunks], and whether anything is wrong; ``signs`` become signs times magnitudes."""
    _, chunks, k = signs.shape
    width = magnitudes.EXPONENT_BITS + k
    begin = torch.arange(start, start + chunks, device=data.device) * width
    exponents = _fields(data, begin, magnitudes.EXPONENT_BITS)
    doubles = _fields(data, begin[:, None] + magnitudes.EXPONENT_BITS + torch.arange(k, device=data.device), 1)
    silent = signs[..., 0] == 0
    wrong = (silent & ((exponents != 0) | (doubles != 0).any(dim=2))).any()
    wrong |= (~silent & (doubles == 1).all(dim=2) & (exponents < magnitudes.LARGEST)).any()
    signs *= (1 + doubles).to(torch.int8)
    return exponents.to(torch.int8), wrong
