"""Delta: what a node has accumulated and not yet sent, in the order in which it is transformed.

The DeMo paper calls it the momentum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from psyche_lightning.distro.holding import DeltaForm
from psyche_lightning.distro.layout import Batch, Layout

BLOCK = 256
"""Values that have one scale in common, with 8 bits each; a chunk of side 8 has fewer."""
_LEAST = 1e-36
"""Scales below it count as 0."""


class Delta:
    """Delta of all parameters, stored as chunks, so that a step only copies gradients into it.

    Elements that belong to no parameter are zero. Everything is on the parameter's device, and float32 to its users.

    Args:
        layout: the model's layout.
        devices: one per entry.
        form: the dtype in which it is kept.
    """

    def __init__(self, layout: Layout, devices: Sequence[torch.device], form: DeltaForm = "float32") -> None:
        self._layout = layout
        self._block = min(BLOCK, layout.chunk**2)
        counts = dict.fromkeys(devices, 0)
        self._shift = []  # to add to a chunk's number for its place on its device
        for entry, device in zip(layout.entries, devices, strict=True):
            self._shift.append(counts[device] - entry.offset)
            counts[device] += entry.chunks
        self._devices = list(devices)
        size = layout.chunk, layout.chunk
        self._scales: dict[torch.device, torch.Tensor] = {}
        with torch.inference_mode(False):
            self._chunks = {
                device: torch.zeros(count, *size, dtype=getattr(torch, form), device=device)
                for device, count in counts.items()
            }
            if form == "int8":
                blocks = layout.chunk**2 // self._block
                self._scales = {device: torch.zeros(count, blocks, device=device) for device, count in counts.items()}

    @property
    def held(self) -> int:
        """Its bytes."""
        return sum(one.nbytes for one in (*self._chunks.values(), *self._scales.values()))

    def open(self, batch: Batch) -> torch.Tensor:
        """The chunks of a batch on one device, float32 [chunks, c, c]; changes to them count after :meth:`close`."""
        kept, scales = self._kept(batch)
        if scales is None:
            return kept.to(torch.float32)  # itself, if it is that
        found = kept.to(torch.float32)
        found.view(*scales.shape, self._block).mul_(scales[:, :, None])
        return found

    def close(self, batch: Batch, chunks: torch.Tensor) -> None:
        """Keep what :meth:`open` gave for a batch, which may have changed."""
        kept, scales = self._kept(batch)
        if kept.dtype == torch.float32:
            return
        if scales is None:
            kept.copy_(chunks)
            return
        # The value of largest magnitude becomes -128, whatever its sign, so its scale has that sign, and is exact. Put
        # back unchanged, every value stays as it was.
        blocks = chunks.view(*scales.shape, self._block)
        low, high = torch.aminmax(blocks, dim=-1)
        largest = torch.where(high > -low, high, low).div_(-128)
        scales.copy_(largest.masked_fill_(largest.abs() < _LEAST, 0))
        inverse = torch.where(scales == 0, 0, 1 / scales)
        kept.view(blocks.shape).copy_((blocks * inverse[:, :, None]).round_().clamp_(-128, 127))

    def _kept(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The chunks of a batch as they are kept, and the scales of their blocks if they have 8 bits."""
        entry = batch.tiles[0].entry
        device, start = self._devices[entry], batch.start + self._shift[entry]
        scales = self._scales.get(device)
        part = slice(start, start + len(batch))
        return self._chunks[device][part], None if scales is None else scales[part]

    def get(self, number: int) -> torch.Tensor:
        """A copy of an entry's delta, in the parameter's shape."""
        entry = self._layout.entries[number]
        found = torch.empty(entry.rows, entry.cols, dtype=torch.float32, device=self._devices[number])
        if entry.chunks:
            batch = self._layout.whole(number)
            for view, block in self._pairs(number, batch, found, self.open(batch)):
                view.copy_(block)
        return found.view(entry.shape)

    def put(self, number: int, value: torch.Tensor) -> None:
        """Replace an entry's delta; ``value`` has the parameter's shape."""
        entry = self._layout.entries[number]
        if entry.chunks:
            batch = self._layout.whole(number)
            chunks = self.open(batch)
            for view, block in self._pairs(number, batch, value.detach().reshape(entry.rows, entry.cols), chunks):
                block.copy_(view)
            self.close(batch, chunks)

    def _pairs(
        self, number: int, batch: Batch, matrix: torch.Tensor, chunks: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """An entry's tiles, in its matrix and in its chunks."""
        matrices: list[torch.Tensor | None] = [None] * len(self._layout.entries)
        matrices[number] = matrix
        views = cast(list[torch.Tensor], self._layout.views(batch, matrices))
        return list(zip(views, self._layout.blocks(batch, chunks), strict=True))
