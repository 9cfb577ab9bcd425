"""Exact aggregation: from the agreed votes to the sign of the update, the same bytes on every node (invariant I1).

Votes of n = peers * k are summed as integers into V. The update is ``sign(X)`` with ``X = B V B.T`` and the integer
basis B of :func:`~psyche_lightning.distro.transform.integer_basis`, |B| <= 127. There are two ways to compute it:

- for few votes, as the sum of their outer products ``s B[:, b] B[:, d].T``. Each product is at most ``127 * 127``, so
  each partial sum is at most ``127 * 127 * n``;
- for many votes, as ``T = V B.T`` and ``X = B T``. A partial sum of row b of V is at most ``127 * sum_d |V[b, d]|``,
  and ``sum |V| <= n``. So a partial sum of column l is at most ``127 * sum_b |T[b, l]| <= 127 * 127 * n``.

All terms and partial sums are integers that the format represents. So both ways are exact, in any order of summation
and with or without FMA: float32 represents all integers up to 2^24, and ``127^2 n <= 2^24`` for n <= 1040.

For more votes, T is still exact, as ``127 n <= 2^24`` for n <= 132104. It is the sum of its s lowest bits L, as signed
numbers, and of ``2^s H``; with s so that ``127 c 2^(s-1) <= 2^24``, partial sums of ``B L`` are small enough. An entry
of H is at most ``|T| / 2^(s-1)``, so those of ``B H`` are at most ``127^2 n / 2^(s-1)``, below 2^22. Then
``X = B L + 2^s B H`` is rounded once, which keeps its sign. Beyond, float64 represents all integers up to 2^53,
n <= 5e11.

All ways give the same signs. Nothing depends on the order of the peers, the batch size or the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import cast

import torch

from psyche_lightning.distro.arithmetic import full_precision
from psyche_lightning.distro.config import DistroConfig
from psyche_lightning.distro.layout import Layout
from psyche_lightning.distro.transform import integer_basis, sandwich
from psyche_lightning.distro.votes import Votes, VotesOn

FLOAT32_VOTES = 2**24 // 127**2
"""The most votes per chunk (peers * k) that float32 sums exactly at once: 1040."""
SPLIT_VOTES = 2**24 // 127
"""The most votes per chunk that float32 sums exactly in two parts: 132,104."""


def sign_update(
    votes: Sequence[Votes],
    layout: Layout,
    config: DistroConfig,
    *,
    devices: Sequence[torch.device] | None = None,
    dtype: torch.dtype | None = None,
    limit: int = 64,
) -> Iterator[torch.Tensor]:
    """Aggregate the votes of all peers. ``devices``, ``dtype`` and ``limit`` do not change the result.

    Args:
        votes: one per peer, in any order, or those of partial sums (:meth:`Tally.votes`).
        layout: the model's layout.
        config: the run's configuration.
        devices: where to compute the result of each entry; the CPU by default.
        dtype: float32 or float64; by default chosen by the number of votes.
        limit: chunks per batch.

    Yields:
        For each entry of the layout, in order, a contiguous float32 tensor of its shape on its device, of -1, 0 and 1
        (never -0). Memory holds only the tensor being computed and a few batches.
    """
    entries = layout.entries
    devices = devices or [torch.device("cpu")] * len(entries)
    aggregator: Aggregator | None = None
    results: list[torch.Tensor | None] = [None] * len(entries)
    following = 0
    for batch in layout.batches(limit, devices):
        device = devices[batch.tiles[0].entry]
        if aggregator is None or aggregator.device != device:
            count = sum(ballot.positions.shape[1] for ballot in votes)
            aggregator = Aggregator(config, count, device, dtype)
        for tile in batch.tiles:
            if results[tile.entry] is None:
                entry = entries[tile.entry]
                results[tile.entry] = torch.empty(entry.rows, entry.cols, dtype=torch.float32, device=device)
        here = [ballot.part(batch.start, batch.stop) for ballot in votes]
        aggregator.load(here or [Votes.empty(len(batch), config.max_k)])
        with full_precision(device):
            signs = aggregator.signs(0, len(batch))
        for view, block in zip(layout.views(batch, results), layout.blocks(batch, signs), strict=True):
            cast(torch.Tensor, view).copy_(block)
        while following < len(entries) and entries[following].offset + entries[following].chunks <= batch.stop:
            done = results[following]
            if done is None:  # a parameter without elements
                done = torch.empty(0, dtype=torch.float32, device=devices[following])
            yield done.view(entries[following].shape)
            results[following] = None
            following += 1


@cache
def _tables(side: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The basis, and its columns with both signs, with a column of zeros for chunks without votes."""
    with torch.inference_mode(False):
        basis = torch.tensor(integer_basis(side), dtype=dtype, device=device)
        return basis, torch.cat([basis.T, -basis.T, torch.zeros_like(basis[:1])])


def split_bits(side: int) -> int:
    """The lowest bits of T that are multiplied alone: as many as keep partial sums over a column within 2^24."""
    return (2**24 // (127 * side)).bit_length()


class Aggregator:
    """The basis on one device, and the arithmetic for n votes per chunk; use it within ``full_precision``.

    Args:
        config: the run's configuration.
        votes: votes that are summed per chunk, peers * k.
        device: where to compute.
        dtype: float32 or float64; by default chosen by the number of votes.
        outer: whether to sum outer products; by default if there are at most as many votes as a chunk has rows.
    """

    def __init__(
        self,
        config: DistroConfig,
        votes: int,
        device: torch.device,
        dtype: torch.dtype | None = None,
        outer: bool | None = None,
    ) -> None:
        self.device = device
        self._side = config.chunk
        self._dtype = dtype or (torch.float32 if votes <= SPLIT_VOTES else torch.float64)
        parts = votes > FLOAT32_VOTES and self._dtype == torch.float32
        self._split = split_bits(config.chunk) if parts else 0
        self._outer = votes <= config.chunk if outer is None else outer
        self._basis, self._columns = _tables(config.chunk, self._dtype, device)
        self._work: list[torch.Tensor] = []

    def load(self, votes: Sequence[Votes | VotesOn]) -> None:
        """Load the votes of one or more peers for the same chunks."""
        here = [VotesOn.of(ballot, self.device) for ballot in votes]
        positions = torch.cat([ballot.positions for ballot in here], dim=1)
        signs = torch.cat([ballot.signs for ballot in here], dim=1)
        if not self._outer:
            self._first, self._second = positions, signs
            return
        rows = positions >> (self._side.bit_length() - 1)
        rows.add_(signs < 0, alpha=self._side)
        rows.masked_fill_(signs == 0, 2 * self._side)
        self._first, self._second = rows.to(torch.int32), (positions & (self._side - 1)).to(torch.int32)

    def signs(self, start: int, stop: int) -> torch.Tensor:
        """The signs of the sums of some loaded chunks, float32 [chunks, c, c].

        The next call overwrites their memory.
        """
        chunks, c = stop - start, self._side
        first, second = self._first[start:stop], self._second[start:stop]
        sums = self._buffer(0, chunks, c, c)
        if self._outer:
            size = chunks, first.shape[1], c
            left, right = self._buffer(1, *size), self._buffer(2, *size)
            torch.index_select(self._columns, 0, first.reshape(-1), out=left.view(-1, c))
            torch.index_select(self._columns, 0, second.reshape(-1), out=right.view(-1, c))
            torch.bmm(left.transpose(1, 2), right, out=sums)
        else:
            where, values = first.to(torch.int64), second.to(self._dtype)
            sums.zero_().view(chunks, c * c).scatter_add_(1, where, values)
            sums = sandwich(self._basis, sums, self._basis.T, (self._buffer(1, chunks, c, c), sums), self._split)
        return sums.sign_().to(torch.float32)

    def _buffer(self, number: int, *size: int) -> torch.Tensor:
        """Working memory, which all calls reuse."""
        elements = math.prod(size)
        if len(self._work) <= number or self._work[number].numel() < elements:
            self._work[number:] = [torch.empty(elements, dtype=self._dtype, device=self.device)]
        return self._work[number][:elements].view(size)
