"""What a step of the engine takes of each device where those of a node divide a model, in processes over gloo."""

from __future__ import annotations

import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from psyche_lightning.bench.engine import PEERS, best, peak, shapes
from psyche_lightning.distro import DistroConfig, ShardedDisTrO


@dataclass(frozen=True)
class RankFigures:
    """The figures of one device.

    Attributes:
        parameters: how many the model has.
        encode: seconds of the fastest encode.
        apply: seconds of the fastest apply, of the payloads of :data:`~psyche_lightning.bench.engine.PEERS` nodes.
        memory: bytes by which the process grew at most: parameters, gradients, delta, and what a step works with; 0 if
            the system does not tell.
    """

    parameters: int
    encode: float
    apply: float
    memory: int


def measure(millions: float, config: DistroConfig, devices: int, repeats: int, threads: int) -> list[RankFigures]:
    """Time a step of a node with so many devices, each a process; one device for comparison.

    Args:
        millions: parameters of the model, in millions.
        config: the run's compression.
        devices: their number.
        repeats: timed calls of each.
        threads: of torch, in each process.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(devices, get_context("spawn")) as processes,
    ):
        rank = partial(_rank, Path(folder, "store"), devices, threads, millions, config, repeats)
        return list(processes.map(rank, range(devices)))  # each waits for the others, so each has a process of its own


def _rank(
    store: Path, devices: int, threads: int, millions: float, config: DistroConfig, repeats: int, rank: int
) -> RankFigures:
    torch.set_num_threads(threads)
    dist.init_process_group(
        "gloo",
        init_method=store.as_uri(),
        rank=rank,
        world_size=devices,
        timeout=timedelta(minutes=10),
    )
    found: list[tuple[int, float, float]] = []
    try:
        memory = peak(lambda: found.append(_times(millions, config, repeats)))
    finally:
        dist.destroy_process_group()
    return RankFigures(*found[0], memory)


def _times(millions: float, config: DistroConfig, repeats: int) -> tuple[int, float, float]:
    """Parameters of the model, and seconds of encode and apply."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    named = []
    for number, shape in enumerate(shapes("blocks", millions)):
        values, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
        parameter = torch.nn.Parameter(distribute_tensor(values * 0.02, mesh, [Shard(0)]))
        parameter.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        named.append((f"p{number:04}", parameter))
    optimizer = ShardedDisTrO(named, 1e-3, config=config)
    payloads, rates = [optimizer.encode() for _ in range(PEERS)], optimizer.lr_bits()
    return (
        sum(parameter.numel() for _, parameter in named),
        best(optimizer.encode, repeats),
        best(lambda: optimizer.apply(payloads, rates), repeats),
    )
