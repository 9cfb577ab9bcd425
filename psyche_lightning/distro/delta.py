"""Delta: what a node has accumulated and not yet sent, in the order in which it is transformed.

The DeMo paper calls it the momentum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from psyche_lightning.distro.layout import Batch, Layout


class Delta:
    """Delta of all parameters, stored as chunks, so that a step only copies gradients into it.

    Elements that belong to no parameter are zero. Everything is float32, on the parameter's device.

    Args:
        layout: the model's layout.
        devices: one per entry.
    """

    def __init__(self, layout: Layout, devices: Sequence[torch.device]) -> None:
        self._layout = layout
        counts = dict.fromkeys(devices, 0)
        self._shift = []  # to add to a chunk's number for its place on its device
        for entry, device in zip(layout.entries, devices, strict=True):
            self._shift.append(counts[device] - entry.offset)
            counts[device] += entry.chunks
        self._devices = list(devices)
        size = layout.chunk, layout.chunk
        with torch.inference_mode(False):
            self._chunks = {
                device: torch.zeros(count, *size, dtype=torch.float32, device=device)
                for device, count in counts.items()
            }

    def chunks(self, batch: Batch) -> torch.Tensor:
        """The chunks of a batch on one device, [chunks, c, c]; writing to them changes delta."""
        entry = batch.tiles[0].entry
        start = batch.start + self._shift[entry]
        return self._chunks[self._devices[entry]][start : start + len(batch)]

    def get(self, number: int) -> torch.Tensor:
        """A copy of an entry's delta, in the parameter's shape."""
        entry = self._layout.entries[number]
        found = torch.empty(entry.rows, entry.cols, dtype=torch.float32, device=self._devices[number])
        for view, block in self._pairs(number, found):
            view.copy_(block)
        return found.view(entry.shape)

    def put(self, number: int, value: torch.Tensor) -> None:
        """Replace an entry's delta; ``value`` has the parameter's shape."""
        entry = self._layout.entries[number]
        for view, block in self._pairs(number, value.detach().reshape(entry.rows, entry.cols)):
            block.copy_(view)

    def _pairs(self, number: int, matrix: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """An entry's tiles, in its matrix and in the chunks."""
        layout, entry = self._layout, self._layout.entries[number]
        if not entry.chunks:
            return []
        matrices: list[torch.Tensor | None] = [None] * len(layout.entries)
        matrices[number] = matrix
        batch = layout.whole(number)
        views = cast(list[torch.Tensor], layout.views(batch, matrices))
        return list(zip(views, layout.blocks(batch, self.chunks(batch)), strict=True))
