"""Exact aggregation: from the agreed votes to the sign of the update, the same bytes everywhere (invariant I1).

Votes of n = peers * k are summed as integers into V, and the update is ``sign(B V B.T)`` with the integer basis B of
:func:`~psyche_lightning.distro.transform.integer_basis`, |B| <= 127. Both matrix products are exact, whatever the
order of their sums and whether or not they contract into FMA, because each term and each partial sum is an integer that
the format represents:

- ``T = V B.T``: any partial sum of a row b of V is at most ``127 * sum_d |V[b, d]|``, and ``sum |V| <= n``;
- ``X = B T``: any partial sum of column l is at most ``127 * sum_b |T[b, l]| <= 127 * 127 * n``.

float32 represents all integers up to 2^24, and 127^2 n <= 2^24 for n <= 1040; float64 goes to 2^53, n <= 5e11. Below
the limit both give the same integers, hence the same signs. Nothing depends on peers' order, batch size or threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from psyche_lightning.distro.arithmetic import full_precision
from psyche_lightning.distro.config import DistroConfig
from psyche_lightning.distro.layout import Batch, Layout
from psyche_lightning.distro.select import Votes
from psyche_lightning.distro.transform import integer_basis, sandwich

FLOAT32_VOTES = 2**24 // 127**2
"""The most votes per chunk (peers * k) that float32 sums exactly: 1040."""


def batch_limit(device: torch.device) -> int:
    """Chunks that are worked on at a time: what stays in a CPU's cache, or fills an accelerator."""
    return 256 if device.type == "cpu" else 8192


def sign_update(
    votes: Sequence[Votes],
    layout: Layout,
    config: DistroConfig,
    *,
    devices: Sequence[torch.device] | None = None,
    dtype: torch.dtype | None = None,
    limit: int | None = None,
) -> Iterator[torch.Tensor]:
    """Aggregate the votes of all peers.

    Args:
        votes: one per peer, in any order.
        layout: the model's layout.
        config: the run's configuration.
        devices: where each entry's result is computed; the CPU unless given.
        dtype: float32 or float64, by the number of votes unless given.
        limit: chunks per batch, by the device unless given. Neither changes the outcome.

    Yields:
        For each entry of the layout in order a contiguous float32 tensor of its shape on its device, of -1, 0 and 1
        (never -0). Only the tensor in work and a few batches are in memory.
    """
    entries = layout.entries
    devices = devices or [torch.device("cpu")] * len(entries)
    dtype = dtype or (torch.float32 if len(votes) * config.k <= FLOAT32_VOTES else torch.float64)
    limit = limit or min(map(batch_limit, devices))
    engine: _Engine | None = None
    results: dict[int, torch.Tensor] = {}
    following = 0
    for batch in layout.batches(limit, devices):
        device = devices[batch.pieces[0].entry]
        if engine is None or engine.device != device:
            engine = _Engine(config, dtype, device, min(limit, layout.chunk_count))
        for piece in batch.pieces:
            if piece.start == 0:
                shape = entries[piece.entry].shape
                results[piece.entry] = torch.empty(shape, dtype=torch.float32, device=device)
        layout.scatter(batch, engine.signs(votes, batch), results)
        while following < len(entries) and entries[following].offset + entries[following].chunks <= batch.stop:
            if entries[following].chunks == 0:  # a parameter without elements
                results[following] = torch.empty(entries[following].shape, device=devices[following])
            yield results.pop(following)
            following += 1


class _Engine:
    """The basis and the working memory on one device, reused from batch to batch."""

    def __init__(self, config: DistroConfig, dtype: torch.dtype, device: torch.device, limit: int) -> None:
        self.config, self.device = config, device
        self.basis = torch.tensor(integer_basis(config.chunk), dtype=dtype, device=device)
        self.sums, *work = torch.empty(3, limit, config.chunk, config.chunk, dtype=dtype, device=device)
        self.work = (work[0], work[1])

    def signs(self, votes: Sequence[Votes], batch: Batch) -> torch.Tensor:
        """The signs of a batch, [chunks, c, c], in memory that the next call overwrites."""
        count = len(batch)
        sums = self.sums[:count].zero_()
        first = torch.arange(0, count * self.config.area, self.config.area, device=self.device)[:, None]
        for ballot in votes:
            positions = torch.from_numpy(ballot.positions[batch.start : batch.stop]).to(self.device, torch.int64)
            signs = torch.from_numpy(ballot.signs[batch.start : batch.stop]).to(self.device, sums.dtype)
            sums.view(-1).scatter_add_(0, (positions + first).view(-1), signs.view(-1))
        with full_precision(self.device):
            work = (self.work[0][:count], self.work[1][:count])
            return sandwich(self.basis, sums, self.basis.T, work).sign_()
