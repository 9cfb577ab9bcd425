"""How the parameters of a model are cut into square chunks.

Parameters are in ascending byte order of their names. Zeros pad matrices to whole chunks. Tensors of more dimensions
fold into two where that takes the fewest chunks (if several places do, most dimensions go into the rows). Scalars and
vectors are cut into runs of ``chunk * chunk``. The chunks of a matrix are numbered row by row, and the numbers continue
from one parameter to the next.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from psyche_lightning.distro.config import WIRE_VERSION, DistroConfig
from psyche_lightning.errors import ConfigError, PsycheError


@dataclass(frozen=True)
class Entry:
    """The place of one parameter.

    Attributes:
        name: the parameter's name.
        shape: its shape.
        dtype: its dtype on this node.
        rows: rows of the folded matrix; 1 for vectors and scalars.
        cols: columns of the folded matrix.
        grid: chunk rows and chunk columns; ``(runs, 1)`` for vectors and scalars.
        offset: number of its first chunk.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: int
    cols: int
    grid: tuple[int, int]
    offset: int

    @property
    def chunks(self) -> int:
        """The number of its chunks."""
        return self.grid[0] * self.grid[1]

    @property
    def in_runs(self) -> bool:
        """Whether it is cut into runs (vectors and scalars)."""
        return len(self.shape) < 2


@dataclass(frozen=True)
class Tile:
    """A part of one entry that is a regular grid in matrix and chunks: whole chunks, or the same part of edge chunks.

    Attributes:
        entry: number of the entry.
        size: chunk rows, rows within a chunk, chunk columns, columns within a chunk.
        row: its first row in the matrix.
        column: its first column in the matrix.
        width: columns of the matrix that a chunk spans: the side, or the area for runs.
        offset: elements before it in the batch's chunks.
        strides: strides of the four dimensions in the batch's chunks.
    """

    entry: int
    size: tuple[int, int, int, int]
    row: int
    column: int
    width: int
    offset: int
    strides: tuple[int, int, int, int]


@dataclass(frozen=True)
class Batch:
    """Chunks ``start`` to ``stop`` of the whole model, and their tiles.

    Attributes:
        start: its first chunk.
        stop: the first chunk after it.
        tiles: the parts to copy.
        padding: the parts that belong to no parameter, as size, offset and strides like those of tiles.
    """

    start: int
    stop: int
    tiles: tuple[Tile, ...]
    padding: tuple[tuple[tuple[int, int, int, int], int, tuple[int, int, int, int]], ...]

    def __len__(self) -> int:
        return self.stop - self.start


class Layout:
    """The chunks of a model's trainable parameters.

    Args:
        named_parameters: ``(name, parameter)``; frozen ones are left out, and a tied one has its first name. Only
            metadata is used, so parameters on the meta device work.
        chunk: side of a chunk.

    Attributes:
        entries: the parameters, in ascending order of their names.
        chunk: side of a chunk.
        chunk_count: chunks of all entries.
        number: the number of the entry of each name.

    Raises:
        ConfigError: two parameters have one name, none is trainable, or a dtype is not real floating-point.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, torch.Tensor]], chunk: int = 64) -> None:
        trainable: dict[str, torch.Tensor] = {}
        for name, parameter in named_parameters:
            if not parameter.requires_grad or any(parameter is other for other in trainable.values()):
                continue
            if name in trainable:
                raise ConfigError(f"two parameters are named {name!r}; give each its own name")
            if not parameter.dtype.is_floating_point:
                raise ConfigError(
                    f"parameter {name!r} is {parameter.dtype}; only real floating-point parameters can be trained"
                )
            trainable[name] = parameter
        if not trainable:
            raise ConfigError("the model has no trainable parameter; set requires_grad on those that should be trained")
        self.chunk = chunk
        self.chunk_count = 0
        entries = []
        for name in sorted(trainable, key=str.encode):
            entries.append(self._place(name, trainable[name]))
            self.chunk_count += entries[-1].chunks
        self.entries = tuple(entries)
        self.number = {entry.name: number for number, entry in enumerate(entries)}
        self._batches: dict[tuple[int, tuple[Hashable, ...] | None], tuple[Batch, ...]] = {}
        self._parts: dict[tuple[int, int], tuple[Batch, ...]] = {}

    def _place(self, name: str, parameter: torch.Tensor) -> Entry:
        shape, c = tuple(parameter.shape), self.chunk
        if len(shape) < 2:
            grid = (math.ceil(parameter.numel() / (c * c)), 1)
            return Entry(name, shape, parameter.dtype, 1, parameter.numel(), grid, self.chunk_count)
        folds = [(math.prod(shape[:split]), math.prod(shape[split:])) for split in range(len(shape) - 1, 0, -1)]
        rows, cols = min(folds, key=lambda fold: math.ceil(fold[0] / c) * math.ceil(fold[1] / c))
        return Entry(
            name, shape, parameter.dtype, rows, cols, (math.ceil(rows / c), math.ceil(cols / c)), self.chunk_count
        )

    def digest(self, config: DistroConfig, version: int = WIRE_VERSION) -> bytes:
        """SHA-256 of what payloads depend on: wire version, chunk, k, names and shapes (not dtypes).

        If parameters have their own k, or k has a schedule, these are included.
        """
        state = hashlib.sha256(b"psyche distro layout\0")
        state.update(struct.pack(">BHII", version, self.chunk, config.k, len(self.entries)))
        for entry in self.entries:
            name = entry.name.encode()
            state.update(struct.pack(">I", len(name)) + name + struct.pack(">I", len(entry.shape)))
            state.update(struct.pack(f">{len(entry.shape)}Q", *entry.shape))
        if config.k_for:
            state.update(struct.pack(f">{len(self.entries)}H", *(config.k_of(entry.name) for entry in self.entries)))
        if config.schedule:
            for first, stage in config.stages:
                state.update(struct.pack(">IH", first, stage.k))
        return state.digest()

    def expected(self, name: str, tensor: torch.Tensor) -> int:
        """The number of the entry to which a float32 tensor of the right shape belongs.

        Raises:
            PsycheError: the name is unknown, or shape or dtype are wrong.
        """
        if name not in self.number:
            raise PsycheError(f"no trainable parameter is named {name!r}; there are {', '.join(self.number)}")
        shape = self.entries[self.number[name]].shape
        if tensor.shape != shape or tensor.dtype != torch.float32:
            raise PsycheError(
                f"parameter {name!r} was sent as {tensor.dtype} {tuple(tensor.shape)}; "
                f"torch.float32 {shape} is expected"
            )
        return self.number[name]

    def batches(self, limit: int, split: Sequence[Hashable] | None = None) -> tuple[Batch, ...]:
        """Cut the chunks, in order, into batches.

        Args:
            limit: the most chunks in a batch.
            split: one value per entry; a batch never holds entries of two values (such as devices).
        """
        key = limit, None if split is None else tuple(split)
        if key not in self._batches:
            if len(self._batches) == 4:
                self._batches.clear()
            self._batches[key] = tuple(self._cut(limit, split))
        return self._batches[key]

    def _cut(self, limit: int, split: Sequence[Hashable] | None) -> Iterator[Batch]:
        tiles: list[Tile] = []
        start = stop = 0
        for index, entry in enumerate(self.entries):
            done = 0
            if stop > start and split is not None and split[index] != split[tiles[-1].entry]:
                yield self._batch(start, stop, tiles)
                tiles, start = [], stop
            while done < entry.chunks:
                count = _regular(entry, done, limit - (stop - start))
                tiles.extend(self._tiles(index, done, count, stop - start))
                done, stop = done + count, stop + count
                if stop - start == limit:
                    yield self._batch(start, stop, tiles)
                    tiles, start = [], stop
        if stop > start:
            yield self._batch(start, stop, tiles)

    def parts(self, number: int, limit: int) -> tuple[Batch, ...]:
        """All chunks of one entry, in order, as batches of at most ``limit`` chunks."""
        key = number, limit
        if key not in self._parts:
            entry, done, found = self.entries[number], 0, []
            while done < entry.chunks:
                count, first = _regular(entry, done, limit), entry.offset + done
                found.append(self._batch(first, first + count, list(self._tiles(number, done, count, 0))))
                done += count
            self._parts[key] = tuple(found)
        return self._parts[key]

    def whole(self, number: int) -> Batch:
        """All chunks of one entry, as a batch."""
        entry = self.entries[number]
        stop = entry.offset + entry.chunks
        return self._batch(entry.offset, stop, list(self._tiles(number, 0, entry.chunks, 0)))

    def blocks(self, batch: Batch, chunks: torch.Tensor) -> list[torch.Tensor]:
        """The tiles of a batch as views of its chunks.

        Args:
            batch: one of :meth:`batches`.
            chunks: contiguous, at least ``len(batch)`` chunks, [chunks, c, c].
        """
        first = chunks.storage_offset()
        return [chunks.as_strided(tile.size, tile.strides, first + tile.offset) for tile in batch.tiles]

    def padding(self, batch: Batch, chunks: torch.Tensor) -> list[torch.Tensor]:
        """The parts of a batch's chunks that belong to no parameter, as views; ``chunks`` as for :meth:`blocks`."""
        first = chunks.storage_offset()
        return [chunks.as_strided(size, strides, first + offset) for size, offset, strides in batch.padding]

    def views(
        self, batch: Batch, matrices: Sequence[torch.Tensor | None] | Mapping[int, torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """The tiles of a batch as views of the parameters, or of tensors with their shapes.

        Args:
            batch: one of :meth:`batches`.
            matrices: one :func:`folded` tensor per entry of the batch, by its number, or None.

        Returns:
            For each tile the view whose elements correspond to its view in :meth:`blocks`; None if there is no matrix.
        """
        found: list[torch.Tensor | None] = []
        for tile in batch.tiles:
            matrix = matrices[tile.entry]
            if matrix is None:
                found.append(None)
                continue
            down, right = matrix.stride()
            strides = (self.chunk * down, down, tile.width * right, right)
            first = matrix.storage_offset() + tile.row * down + tile.column * right
            found.append(matrix.as_strided(tile.size, strides, first))
        return found

    def folded(self, number: int, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of an entry's shape as its matrix: a view if its strides allow one, else a copy."""
        entry = self.entries[number]
        return tensor.detach().reshape(entry.rows, entry.cols)

    def _batch(self, start: int, stop: int, tiles: list[Tile]) -> Batch:
        padding = []
        for tile in tiles:
            down, rows, right, cols = tile.size
            full = tile.width if self.entries[tile.entry].in_runs else self.chunk
            if cols < full:
                padding.append(((down, rows, right, full - cols), tile.offset + cols, tile.strides))
            if rows < self.chunk and not self.entries[tile.entry].in_runs:
                size = down, self.chunk - rows, right, self.chunk
                padding.append((size, tile.offset + rows * self.chunk, tile.strides))
        return Batch(start, stop, tuple(tiles), tuple(padding))

    def _tiles(self, index: int, first: int, count: int, before: int) -> Iterator[Tile]:
        """Tiles of chunks of one entry (whole chunk rows, or a part of one), after ``before`` chunks of the batch."""
        entry, c = self.entries[index], self.chunk
        area, columns = c * c, entry.grid[1]
        if entry.in_runs:
            spans = [(0, 0, 1, 1)], _spans(first, count, entry.cols, area)
            width, strides = area, (0, 0, area, 1)
        else:
            row, column = divmod(first, columns)
            height, wide = (count // columns, columns) if count >= columns else (1, count)
            spans = _spans(row, height, entry.rows, c), _spans(column, wide, entry.cols, c)
            width, strides = c, (wide * area, c, area, 1)
        for down, top, chunk_rows, rows in spans[0]:
            for right, left, chunk_columns, cols in spans[1]:
                offset = before * area + down * strides[0] + right * area
                yield Tile(index, (chunk_rows, rows, chunk_columns, cols), top, left, width, offset, strides)


def _regular(entry: Entry, done: int, room: int) -> int:
    """Of an entry's chunks after ``done``, how many are whole chunk rows, or a part of one, within ``room``."""
    columns = entry.grid[1]
    if done % columns == 0 and room >= columns:
        return min(room // columns * columns, entry.chunks - done)
    return min(room, columns - done % columns)


def _spans(first: int, count: int, length: int, side: int) -> list[tuple[int, int, int, int]]:
    """Along one dimension: the whole chunks, and the used part of the last one.

    Returns:
        ``(chunks before it, first element, chunks, elements of each)``.
    """
    whole = min(first + count, length // side) - first
    spans = [(0, first * side, whole, side)] if whole else []
    if whole < count:
        spans.append((whole, (first + whole) * side, 1, length % side))
    return spans
