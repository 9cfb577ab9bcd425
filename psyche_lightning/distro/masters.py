"""Masters: the float32 values of parameters, of which one of fewer bits shows the rounded ones.

A split master is the bfloat16 parameter, rounded to nearest with ties to even, and 16 bits: the difference between the
bits of the float32 value and those of the parameter, from -0x8000 to 0x8000. These are one value too many for 16 bits.
So both ends, where the value lies halfway between two parameters, are kept as -0x8000, and the places of those that
mean 0x8000 stand in a list. Of values whose last bits are random, one in 131,072 is in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from psyche_lightning.distro.layout import Batch, Layout
from psyche_lightning.errors import ConfigError

_HALF = 0x8000
_BAND = 1 << 18
"""Elements of a matrix that are joined or split at once, to bound what that takes."""


class Masters:
    """The values that all nodes share, of all entries of a layout, in float32.

    A float32 parameter is its own master. If somebody else changes another one (for example by loading a checkpoint
    into the module), its master takes the new values where the two differ; a split master is then of the new values
    alone.

    A step goes through all batches of chunks, in order: :meth:`begin`, then for each batch :meth:`open`, changes to
    the views, :meth:`close`, then :meth:`end`.

    Args:
        layout: the model's layout.
        parameters: one per entry.
        split: whether bfloat16 parameters have split masters.

    Raises:
        ConfigError: masters are to be split, but a parameter has another dtype of less than 32 bits.
    """

    def __init__(self, layout: Layout, parameters: Sequence[torch.Tensor], split: bool) -> None:
        self._layout = layout
        self._parameters = parameters
        self._split = [split and parameter.dtype != torch.float32 for parameter in parameters]
        for entry, parameter, its in zip(layout.entries, parameters, self._split, strict=True):
            if its and parameter.dtype != torch.bfloat16:
                raise ConfigError(
                    f"trainer.masters is 'split', which splits the masters of bfloat16 parameters; {entry.name!r} is "
                    f"{parameter.dtype}. Choose trainer.masters=float32."
                )
        self._wide: list[torch.Tensor | None] = [None] * len(parameters)  # float32 masters
        self._low: list[torch.Tensor | None] = [None] * len(parameters)  # of split ones: int16, [rows, cols]
        self._sums: list[torch.Tensor | None] = [None] * len(parameters)  # of the parameters' bits, to notice changes
        self._ties: NDArray[np.int64] = np.zeros(0, np.int64)  # ascending: chunk * area + place within the chunk
        self._matrices: list[torch.Tensor | None] = []  # during a step: of float32
        self._highs: list[torch.Tensor | None] = []  # during a step: the bits of parameters with split masters
        self._found: list[NDArray[np.int64]] = []
        self._buffer: torch.Tensor | None = None

    def get(self, number: int) -> torch.Tensor:
        """An entry's values, float32 in the parameter's shape: the tensor that holds them; of a split one, a copy."""
        self._settle([number])
        if not self._split[number]:
            return self._target(number)
        entry = self._layout.entries[number]
        low, high = cast(torch.Tensor, self._low[number]), self._high(number)
        found = torch.empty(entry.rows, entry.cols, dtype=torch.float32, device=low.device)
        bits = found.view(torch.int32)
        bits.copy_(high).bitwise_left_shift_(16).add_(low)
        if len(places := self._ties_of(number)):
            bits.view(-1)[torch.from_numpy(self._flat(number, places)).to(low.device)] += 2 * _HALF
        return found.view(entry.shape)

    def put(self, number: int, values: torch.Tensor) -> None:
        """Set an entry's values, float32 in the parameter's shape, and the parameter to the rounded ones."""
        parameter = self._parameters[number]
        self._settle([number])
        if self._split[number]:
            self._put_split(number, values)
            self._note([number])
            return
        target = self._target(number)
        target.copy_(values)
        if target is not parameter:
            parameter.copy_(target)

    def saved(self, number: int) -> torch.Tensor | None:
        """A master to save beside its parameter, in float32; None if the parameter is its own, or nothing is known."""
        if self._split[number] and self._low[number] is not None:
            return self.get(number)
        return self._wide[number]

    def restore(self, number: int, master: torch.Tensor | None) -> None:
        """Take a saved master. The parameter may be loaded before or after, and its own values count where they differ.

        Args:
            number: of the entry.
            master: float32 in the parameter's shape, which is not copied; None for the parameter's values.
        """
        self._wide[number], self._low[number] = master, None

    @property
    def held(self) -> int:
        """Bytes of masters, besides the parameters."""
        tensors = [one for one in (*self._wide, *self._low) if one is not None]
        return sum(one.nbytes for one in tensors) + self._ties.nbytes

    def begin(self) -> None:
        """Begin a step."""
        layout, numbers = self._layout, range(len(self._parameters))
        self._settle(numbers)
        targets = [None if self._split[number] else self._target(number) for number in numbers]
        self._matrices = [None if one is None else layout.folded(number, one) for number, one in enumerate(targets)]
        self._highs = [self._high(number) if self._split[number] else None for number in numbers]
        self._found = []

    def open(self, batch: Batch) -> list[torch.Tensor]:
        """The tiles of a batch as float32 views, as :meth:`Layout.views` gives those of float32 parameters."""
        layout = self._layout
        views = layout.views(batch, self._matrices)
        if not any(view is None for view in views):
            return cast(list[torch.Tensor], views)
        bits = self._bits(batch)
        blocks = layout.blocks(batch, bits)
        for block, high in zip(blocks, layout.views(batch, self._highs), strict=True):
            if high is not None:
                block.copy_(high)
        bits.bitwise_left_shift_(16)
        for block, low in zip(blocks, layout.views(batch, self._low), strict=True):
            if low is not None:
                block.add_(low)
        start, area = batch.start * layout.chunk**2, layout.chunk**2
        first, last = np.searchsorted(self._ties, [start, batch.stop * area])
        if first < last:
            bits.view(-1)[torch.from_numpy(self._ties[first:last] - start).to(bits.device)] += 2 * _HALF
        return [block.view(torch.float32) if view is None else view for view, block in zip(views, blocks, strict=True)]

    def close(self, batch: Batch) -> None:
        """Keep what became of the views of a batch, the last one that was opened."""
        layout = self._layout
        highs, lows = layout.views(batch, self._highs), layout.views(batch, self._low)
        if all(view is None for view in highs):
            return
        high, low, ties = _split(cast(torch.Tensor, self._buffer)[: len(batch)])
        for views, parts in ((highs, layout.blocks(batch, high)), (lows, layout.blocks(batch, low))):
            for view, part in zip(views, parts, strict=True):
                if view is not None:
                    view.copy_(part)
        if len(ties):
            self._found.append(ties + batch.start * layout.chunk**2)

    def end(self) -> None:
        """End a step: parameters show the values."""
        halves = [number for number, its in enumerate(self._split) if its]
        for number, parameter in enumerate(self._parameters):
            shape = parameter.shape
            if self._split[number]:
                high = cast(torch.Tensor, self._highs[number])
                if not _same_memory(high, parameter):  # its strides allowed no view
                    parameter.copy_(high.view(torch.bfloat16).view(shape))
                continue
            matrix, target = cast(torch.Tensor, self._matrices[number]), self._target(number)
            if not _same_memory(matrix, target):
                target.copy_(matrix.view(shape))
            if target is not parameter:
                parameter.copy_(target)
        if halves:
            self._ties = np.concatenate([np.zeros(0, np.int64), *self._found])
            self._note(halves)
        self._matrices, self._highs, self._found, self._buffer = [], [], [], None

    def _target(self, number: int) -> torch.Tensor:
        """The float32 tensor with an entry's values, if it has no split master."""
        wide = self._wide[number]
        return self._parameters[number] if wide is None else wide

    def _high(self, number: int) -> torch.Tensor:
        """The bits of a bfloat16 parameter, int16 [rows, cols]: a view if its strides allow one."""
        return self._layout.folded(number, self._parameters[number].detach().view(torch.int16))

    def _bits(self, batch: Batch) -> torch.Tensor:
        """Zeros for the chunks of a batch, int32 [chunks, c, c]."""
        device, size = self._parameters[batch.tiles[0].entry].device, self._layout.chunk
        if self._buffer is None or len(self._buffer) < len(batch) or self._buffer.device != device:
            self._buffer = torch.empty(len(batch), size, size, dtype=torch.int32, device=device)
        return self._buffer[: len(batch)].zero_()

    def _settle(self, numbers: Sequence[int]) -> None:
        """Make masters that are lacking, and give way to changes that others made to parameters."""
        for number in numbers:
            parameter, master = self._parameters[number], self._wide[number]
            if parameter.dtype == torch.float32:
                self._wide[number] = None
            elif master is not None:
                changed = master.to(parameter.dtype) != parameter
                if not master.is_cpu or changed.any():  # elsewhere, to ask takes longer than to write
                    master.copy_(torch.where(changed, parameter.detach().to(torch.float32), master))
            elif not self._split[number]:
                with torch.inference_mode(False):
                    self._wide[number] = parameter.detach().to(torch.float32).contiguous()
        halves = [number for number in numbers if self._split[number]]
        new = [number for number in halves if self._low[number] is None]
        for number in new:
            master, self._wide[number] = self._wide[number], None
            entry = self._layout.entries[number]
            with torch.inference_mode(False):
                self._low[number] = torch.zeros(
                    entry.rows, entry.cols, dtype=torch.int16, device=self._parameters[number].device
                )
            self._replace_ties(number, np.zeros(0, np.int64))
            if master is not None:
                self._put_split(number, master)
        self._note(new)
        known = [number for number in halves if number not in new] if new else halves
        if known:
            now = _whole_numbers([bits_sum(self._parameters[number]) for number in known])
            then = _whole_numbers([cast(torch.Tensor, self._sums[number]) for number in known])
            for number, its, before in zip(known, now, then, strict=True):
                if its != before:
                    cast(torch.Tensor, self._low[number]).zero_()
                    self._replace_ties(number, np.zeros(0, np.int64))
                    self._note([number])

    def _note(self, numbers: Sequence[int]) -> None:
        """Remember what parameters hold now."""
        for number in numbers:
            self._sums[number] = bits_sum(self._parameters[number])

    def _put_split(self, number: int, values: torch.Tensor) -> None:
        """Split values into a parameter and its 16 bits more."""
        entry, low = self._layout.entries[number], cast(torch.Tensor, self._low[number])
        high, matrix = self._high(number), values.detach().reshape(entry.rows, entry.cols)
        found = [np.zeros(0, np.int64)]
        band = max(1, _BAND // max(1, entry.cols))
        for row in range(0, entry.rows, band):
            bits = matrix[row : row + band].to(high.device, copy=True).contiguous().view(torch.int32)
            upper, lower, ties = _split(bits)
            high[row : row + band], low[row : row + band] = upper, lower
            found.append(ties + row * entry.cols)
        parameter = self._parameters[number]
        if not _same_memory(high, parameter):
            parameter.detach().copy_(high.view(torch.bfloat16).view(entry.shape))
        self._replace_ties(number, self._placed(number, np.concatenate(found)))

    def _ties_of(self, number: int) -> NDArray[np.int64]:
        first, last = np.searchsorted(self._ties, self._bounds(number))
        return self._ties[first:last]

    def _replace_ties(self, number: int, places: NDArray[np.int64]) -> None:
        first, last = np.searchsorted(self._ties, self._bounds(number))
        if first < last or len(places):
            self._ties = np.concatenate([self._ties[:first], np.sort(places), self._ties[last:]])

    def _bounds(self, number: int) -> tuple[int, int]:
        entry, area = self._layout.entries[number], self._layout.chunk**2
        return entry.offset * area, (entry.offset + entry.chunks) * area

    def _flat(self, number: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places in chunks as places in the entry's matrix, counted row by row."""
        entry, c = self._layout.entries[number], self._layout.chunk
        within = places - entry.offset * c * c
        if entry.in_runs:
            return within
        chunk, place = np.divmod(within, c * c)
        row = chunk // entry.grid[1] * c + place // c
        return cast(NDArray[np.int64], row * entry.cols + chunk % entry.grid[1] * c + place % c)

    def _placed(self, number: int, flat: NDArray[np.int64]) -> NDArray[np.int64]:
        """The inverse of :meth:`_flat`; not sorted."""
        entry, c = self._layout.entries[number], self._layout.chunk
        if entry.in_runs:
            return flat + entry.offset * c * c
        row, column = np.divmod(flat, max(1, entry.cols))
        chunk = entry.offset + row // c * entry.grid[1] + column // c
        return cast(NDArray[np.int64], chunk * c * c + row % c * c + column % c)


def bits_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's words, int64 modulo 2^64; any single change alters it."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if flat.numel() % 8 == flat.storage_offset() % 8 == 0:
        return flat.view(torch.int64).sum()
    return (flat if flat.numel() % 4 or flat.storage_offset() % 4 else flat.view(torch.int32)).sum(dtype=torch.int64)


def _split(bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.int64]]:
    """Split float32 values.

    Args:
        bits: theirs, int32 and contiguous; overwritten.

    Returns:
        The bits of the rounded values, the 16 bits that these lack, both int16, and the ascending places of ties that
        mean 0x8000.
    """
    high = bits.view(torch.float32).to(torch.bfloat16).view(torch.int16)
    bits.sub_(high.to(torch.int32).bitwise_left_shift_(16))
    ties = (bits.view(-1) == _HALF).nonzero().view(-1)
    low = bits.to(torch.int16)  # of 0x8000, the lower 16 bits are those of -0x8000
    return high, low, ties.cpu().numpy()


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _whole_numbers(scalars: Sequence[torch.Tensor]) -> list[int]:
    """Bring int64 scalars to the host, with one synchronization if they are on one device."""
    if len({scalar.device for scalar in scalars}) == 1:
        return cast(list[int], torch.stack(list(scalars)).tolist())
    return [int(scalar) for scalar in scalars]
