"""How the parameters of a model are cut into square chunks.

Parameters stand in ascending byte order of their names. Matrices are padded with zeros to whole chunks; more
dimensions fold into two, at the place that needs the fewest chunks (leading dimensions into the rows where several do);
scalars and vectors are cut in runs of ``chunk * chunk``. The chunks of a matrix are numbered row by row, and those of
all parameters are numbered through.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from psyche_lightning.distro.config import WIRE_VERSION, DistroConfig
from psyche_lightning.errors import ConfigError


@dataclass(frozen=True)
class Entry:
    """One parameter's place.

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
        """How many chunks it takes."""
        return self.grid[0] * self.grid[1]

    @property
    def in_runs(self) -> bool:
        """Whether it is cut in runs (vectors and scalars)."""
        return len(self.shape) < 2


@dataclass(frozen=True)
class Piece:
    """Chunks ``start`` to ``stop`` of one entry: whole chunk rows, or a part of one."""

    entry: int
    start: int
    stop: int


@dataclass(frozen=True)
class Batch:
    """Chunks ``start`` to ``stop`` of the whole model, and the pieces that they consist of."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]

    def __len__(self) -> int:
        return self.stop - self.start


class Layout:
    """The chunks of a model's trainable parameters.

    Args:
        named_parameters: ``(name, parameter)``; frozen ones are left out, a tied one stands under its first name.
            Only their metadata is used, so parameters on the meta device do.
        chunk: side of a chunk.

    Attributes:
        entries: in ascending order of the names.
        chunk: side of a chunk.
        chunk_count: chunks of all entries.

    Raises:
        ConfigError: two parameters have one name, none is trainable, or one is not of a real floating-point dtype.
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
                    f"parameter {name!r} is {parameter.dtype}; only real floating-point ones can be trained"
                )
            trainable[name] = parameter
        if not trainable:
            raise ConfigError("the model has no trainable parameter; set requires_grad on those that shall be trained")
        self.chunk = chunk
        self.chunk_count = 0
        entries = []
        for name in sorted(trainable, key=str.encode):
            entries.append(self._place(name, trainable[name]))
            self.chunk_count += entries[-1].chunks
        self.entries = tuple(entries)

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

    def digest(self, config: DistroConfig) -> bytes:
        """SHA-256 of what payloads depend on: wire version, chunk, k, names and shapes (not the dtypes)."""
        state = hashlib.sha256(b"psyche distro layout\0")
        state.update(struct.pack(">BHII", WIRE_VERSION, self.chunk, config.k, len(self.entries)))
        for entry in self.entries:
            name = entry.name.encode()
            state.update(struct.pack(">I", len(name)) + name + struct.pack(">I", len(entry.shape)))
            state.update(struct.pack(f">{len(entry.shape)}Q", *entry.shape))
        return state.digest()

    def batches(self, limit: int, split: Sequence[Hashable] | None = None) -> Iterator[Batch]:
        """Cut the chunks, in order, into batches.

        Args:
            limit: the most chunks in a batch.
            split: one value per entry; a batch never holds entries of two values (such as devices).
        """
        pieces: list[Piece] = []
        start = stop = 0
        for index, entry in enumerate(self.entries):
            columns, done = entry.grid[1], 0
            if pieces and split is not None and split[index] != split[pieces[-1].entry]:
                yield Batch(start, stop, tuple(pieces))
                pieces, start = [], stop
            while done < entry.chunks:
                room = limit - (stop - start)
                if done % columns == 0 and room >= columns:
                    count = min(room // columns * columns, entry.chunks - done)
                else:
                    count = min(room, columns - done % columns)
                pieces.append(Piece(index, done, done + count))
                done, stop = done + count, stop + count
                if stop - start == limit:
                    yield Batch(start, stop, tuple(pieces))
                    pieces, start = [], stop
        if pieces:
            yield Batch(start, stop, tuple(pieces))

    def gather(self, batch: Batch, tensors: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        """Copy the chunks of a batch out of tensors.

        Args:
            batch: one of :meth:`batches`.
            tensors: one per entry, in order, of any strides.
            out: at least ``len(batch)`` chunks, [chunks, c, c], overwritten; padding becomes zero.

        Returns:
            ``out[: len(batch)]``.
        """
        for piece, blocks in self._blocks(batch, out):
            entry = self.entries[piece.entry]
            if entry.in_runs:
                values = self._run(piece, tensors[piece.entry].reshape(-1))
                flat = blocks.view(-1)
                flat[: len(values)] = values
                flat[len(values) :] = 0
                continue
            grid, rectangle = self._rectangle(piece, tensors[piece.entry].reshape(entry.rows, entry.cols))
            height, width = grid[0] * self.chunk, grid[1] * self.chunk
            if rectangle.shape != (height, width):
                padding = (0, width - rectangle.shape[1], 0, height - rectangle.shape[0])
                rectangle = torch.nn.functional.pad(rectangle, padding)
            blocks.view(*grid, self.chunk, self.chunk).copy_(self._chunked(rectangle, grid))
        return out[: len(batch)]

    def scatter(
        self, batch: Batch, blocks: torch.Tensor, tensors: Sequence[torch.Tensor] | Mapping[int, torch.Tensor]
    ) -> None:
        """Copy the chunks of a batch into tensors.

        Args:
            batch: one of :meth:`batches`.
            blocks: [chunks, c, c]; what lies in the padding is dropped.
            tensors: contiguous, by number of entry; those that the batch touches suffice.
        """
        for piece, source in self._blocks(batch, blocks):
            entry = self.entries[piece.entry]
            if entry.in_runs:
                values = self._run(piece, tensors[piece.entry].view(-1))
                values.copy_(source.reshape(-1)[: len(values)])
                continue
            grid, rectangle = self._rectangle(piece, tensors[piece.entry].view(entry.rows, entry.cols))
            height, width = grid[0] * self.chunk, grid[1] * self.chunk
            whole = source.view(*grid, self.chunk, self.chunk)
            if rectangle.shape == (height, width):
                self._chunked(rectangle, grid).copy_(whole)
            else:
                plain = whole.transpose(1, 2).reshape(height, width)
                rectangle.copy_(plain[: rectangle.shape[0], : rectangle.shape[1]])

    def _blocks(self, batch: Batch, blocks: torch.Tensor) -> Iterator[tuple[Piece, torch.Tensor]]:
        done = 0
        for piece in batch.pieces:
            count = piece.stop - piece.start
            yield piece, blocks[done : done + count]
            done += count

    def _run(self, piece: Piece, flat: torch.Tensor) -> torch.Tensor:
        area = self.chunk * self.chunk
        return flat[piece.start * area : piece.stop * area]

    def _rectangle(self, piece: Piece, matrix: torch.Tensor) -> tuple[tuple[int, int], torch.Tensor]:
        """The grid of a piece's chunks, and the part of the matrix that they cover."""
        columns, c = self.entries[piece.entry].grid[1], self.chunk
        row, column = divmod(piece.start, columns)
        count = piece.stop - piece.start
        height, width = (count // columns, columns) if count >= columns else (1, count)
        return (height, width), matrix[row * c : (row + height) * c, column * c : (column + width) * c]

    def _chunked(self, rectangle: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """A view of [rows, columns] as [chunk rows, chunk columns, c, c]."""
        return rectangle.view(grid[0], self.chunk, grid[1], self.chunk).transpose(1, 2)
