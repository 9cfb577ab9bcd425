"""Hostile bytes for the decoders: they refuse each input with a clear error, or it is a canonical encoding."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce

from psyche_lightning.bench.wire import random_votes
from psyche_lightning.distro import (
    STEPS_VERSION,
    WIRE_VERSION,
    DistroConfig,
    Tally,
    Votes,
    decode,
    decode_tally,
    encode,
    encode_tally,
    merge,
)
from psyche_lightning.errors import PayloadError

CASES = [(8, 1, 7), (8, 2, 3), (16, 3, 4), (32, 4, 3), (32, 32, 2), (64, 1, 6), (64, 8, 2), (64, 16, 2)]
"""Chunk side, k and number of chunks: one or several limbs, chunks alone and in groups, with and without low bits."""


@dataclass
class Outcome:
    """What a decoder did.

    Attributes:
        inputs: number of inputs.
        accepted: number of inputs that were canonical encodings.
        slowest: seconds for the slowest input.
    """

    inputs: int = 0
    accepted: int = 0
    slowest: float = 0.0


def mutated(original: bytes, source: random.Random) -> bytes:
    """Change bytes: flip bits, replace bytes, cut, extend, or put noise behind a good header."""
    data = bytearray(original)
    kind = source.randrange(6)
    if kind == 0:
        for _ in range(source.randint(1, 4)):
            data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    elif kind == 1:
        for _ in range(source.randint(1, 4)):
            data[source.randrange(len(data))] = source.choice([0, 1, 0x7F, 0x80, 0xFF, source.randrange(256)])
    elif kind == 2:
        del data[source.randrange(len(data)) :]
    elif kind == 3:
        data += source.randbytes(source.randint(1, 9))
    elif kind == 4:
        head = source.choice([0, 8, 14])
        data[head:] = source.randbytes(max(0, len(data) - head))
    else:
        start = source.randrange(len(data))
        stop = min(len(data), start + source.randint(1, 8))
        data[start:stop] = bytes([source.choice([0, 0xFF])]) * (stop - start)
    return bytes(data)


def fuzz(inputs: int, seed: int) -> dict[str, Outcome]:
    """Give each decoder a number of inputs.

    Raises:
        AssertionError: a decoder accepted an input that is not a canonical encoding.
        Exception: a decoder raised something other than a ``PayloadError``.
    """
    source = random.Random(seed)
    outcomes = {"payloads": Outcome(), "local steps": Outcome(), "tallies": Outcome()}
    pool = []
    for side, k, chunks in CASES:
        config = DistroConfig(side, k)
        for number in range(8):
            votes = [random_votes(chunks, config, 97 * seed + 3 * number + peer) for peer in range(3)]
            votes[0].signs[number % chunks] = 0
            votes[0].positions[number % chunks] = range(k)
            tally = reduce(merge, [Tally.of(one, config) for one in votes])
            moves = random_votes(chunks, config, 97 * seed + 3 * number, STEPS_VERSION)
            moves.put(slice(0, 1), Votes.empty(1, k, STEPS_VERSION))
            pool.append((config, chunks, encode(votes[0], config), encode(moves, config), encode_tally(tally)))
    for _ in range(inputs):
        config, chunks, payload, steps, sums = source.choice(pool)
        for name, original, version in (("payloads", payload, WIRE_VERSION), ("local steps", steps, STEPS_VERSION)):
            data = mutated(original, source)
            _try(outcomes[name], data, partial(_payload_again, data, chunks, config, version))
        data = mutated(sums, source)
        _try(outcomes["tallies"], data, partial(_tally_again, data, chunks, config))
    return outcomes


def _payload_again(data: bytes, chunks: int, config: DistroConfig, version: int) -> bytes:
    return encode(decode(data, chunks, config, version=version), config)


def _tally_again(data: bytes, chunks: int, config: DistroConfig) -> bytes:
    return encode_tally(decode_tally(data, chunks, config, 3))


def _try(outcome: Outcome, data: bytes, again: Callable[[], bytes]) -> None:
    began = time.perf_counter()
    outcome.inputs += 1
    try:
        same = again()
    except PayloadError:
        pass
    else:
        outcome.accepted += 1
        assert same == data, f"accepted, but not canonical: {data.hex()}"
    outcome.slowest = max(outcome.slowest, time.perf_counter() - began)
