"""Bytes of payloads and partial sums, counted by encoding real votes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from math import comb, log2

import numpy as np
import torch

from psyche_lightning.distro import WIRE_VERSION, DistroConfig, Tally, Votes, encode, encode_tally, merge, select
from psyche_lightning.distro.magnitudes import quantize

PSYCHE_BITS = 17
REFERENCE_BITS = 96


@dataclass(frozen=True)
class PayloadRow:
    """Figures for one k.

    Attributes:
        chunk: side of a chunk.
        k: votes per chunk.
        bits: bits per vote, with sign and header.
        limit: ``log2 C(chunk^2, k) / k + 1``.
        megabytes: size of a payload, in 10^6 bytes.
        psyche: the same votes as 16-bit positions and signs, in 10^6 bytes.
        reference: the same votes as int64 and float32, as in the DeMo reference, in 10^6 bytes.
        parameters_ratio: bytes of a float32 gradient for each byte of payload.
    """

    chunk: int
    k: int
    bits: float
    limit: float
    megabytes: float
    psyche: float
    reference: float
    parameters_ratio: float


@dataclass(frozen=True)
class StageRow:
    """Figures for a stage of a schedule.

    Attributes:
        first: its first step of the run.
        rounds: its rounds.
        k: votes per chunk.
        steps: local steps of a round; 0 without.
        bits: bits per vote, with sign, header and, for local steps, magnitude.
        megabytes: size of a payload, in 10^6 bytes.
        ratio: bytes of a float32 gradient, for each local step one, for each byte of payload.
    """

    first: int
    rounds: int
    k: int
    steps: int
    bits: float
    megabytes: float
    ratio: float


@dataclass(frozen=True)
class RelayRow:
    """Figures for a relay of several peers.

    Attributes:
        peers: number of payloads that it merged.
        separate: size of all of them, in 10^6 bytes.
        merged: size of their tally, in 10^6 bytes.
        bits: bits per original vote.
    """

    peers: int
    separate: float
    merged: float
    bits: float


def random_votes(chunks: int, config: DistroConfig, seed: int, version: int = WIRE_VERSION) -> Votes:
    """Votes at uniform positions: the worst case for a set code, and within 0.3 % what late training sends."""
    generator = torch.Generator().manual_seed(seed)
    votes = Votes.empty(chunks, config.k, version)
    for start in range(0, chunks, 1024):
        stop = min(start + 1024, chunks)
        noise = torch.randn(stop - start, config.chunk, config.chunk, generator=generator)
        positions, values = select(noise, config.k)
        votes.positions[start:stop] = positions.numpy()
        votes.signs[start:stop] = np.where(values.numpy() < 0, -1, 1)
        if votes.exponents is not None:
            signs, exponents, _ = quantize(values)
            votes.signs[start:stop], votes.exponents[start:stop] = signs.numpy(), exponents.numpy()
    return votes


def payloads(parameters: int, ks: list[int], chunk: int) -> list[PayloadRow]:
    """Encode random votes for a model with this number of parameters, for each k."""
    rows = []
    for k in ks:
        config = DistroConfig(chunk, k)
        chunks = parameters // config.area
        count = chunks * k
        size = len(encode(random_votes(chunks, config, k), config))
        rows.append(
            PayloadRow(
                chunk,
                k,
                bits=8 * size / count,
                limit=log2(comb(config.area, k)) / k + 1,
                megabytes=size / 1e6,
                psyche=count * PSYCHE_BITS / 8e6,
                reference=count * REFERENCE_BITS / 8e6,
                parameters_ratio=4 * parameters / size,
            )
        )
    return rows


def stages(parameters: int, schedule: DistroConfig, rounds: int) -> list[StageRow]:
    """Encode random votes for each stage of a schedule that comes in a run of so many rounds."""
    rows = []
    for (first, config), count in zip(schedule.stages, schedule.rounds(rounds), strict=True):
        if count:
            chunks = parameters // config.area
            size = len(encode(random_votes(chunks, config, first, config.version), config))
            dense = 4 * parameters * max(1, config.local_steps)
            bits = 8 * size / (chunks * config.k)
            rows.append(StageRow(first, count, config.k, config.local_steps, bits, size / 1e6, dense / size))
    return rows


def relays(chunks: int, k: int, peers: list[int]) -> list[RelayRow]:
    """Merge random votes of peers, and encode the tally."""
    config = DistroConfig(k=k)
    rows: list[RelayRow] = []
    total, done, separate = None, 0, 0
    for count in sorted(peers):
        votes = [random_votes(chunks, config, seed) for seed in range(done, count)]
        separate += sum(len(encode(one, config)) for one in votes)
        new = reduce(merge, [Tally.of(one, config) for one in votes])
        total, done = new if total is None else merge(total, new), count
        size = len(encode_tally(total))
        rows.append(RelayRow(count, separate / 1e6, size / 1e6, 8 * size / (count * k * chunks)))
    return rows


def as_json(parts: Mapping[str, Sequence[PayloadRow | RelayRow | StageRow]]) -> dict[str, list[dict[str, float]]]:
    """The content of ``--json``."""
    return {name: [asdict(row) for row in rows] for name, rows in parts.items()}
