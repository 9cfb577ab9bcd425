"""Divides a model among the ranks of a node: into whole rows of chunks, each of which belongs to one rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from psyche_lightning.distro.layout import Entry, Layout
from psyche_lightning.distro.shards import Span
from psyche_lightning.errors import ConfigError


@dataclass(frozen=True)
class Fragment:
    """Whole rows of chunks of one parameter, which one rank encodes and applies.

    Attributes:
        entry: number of the parameter in the layout.
        rank: the rank.
        start: its first element in the parameter.
        stop: the first element after it.
        held: whether it lies in what that rank holds of the parameter.
        chunk: its first chunk in the whole model.
        chunks: its number of chunks.
    """

    entry: int
    rank: int
    start: int
    stop: int
    held: bool
    chunk: int
    chunks: int


class FragmentIndex:
    """Finds the fragments of one rank by their elements.

    Args:
        mine: the rank's fragments.
    """

    def __init__(self, mine: Sequence[Fragment]) -> None:
        self._of_entry: dict[int, list[tuple[int, Fragment]]] = {}
        for number, part in enumerate(mine):
            self._of_entry.setdefault(part.entry, []).append((number, part))

    def of(self, entry: int) -> Sequence[tuple[int, Fragment]]:
        """The fragments of a parameter, with their numbers."""
        return self._of_entry.get(entry, ())

    def place(self, entry: int, element: int) -> tuple[int, int]:
        """The number of the fragment that has an element of a parameter, and the first element of that fragment."""
        for number, part in self._of_entry[entry]:
            if part.start <= element < part.stop:
                return number, part.start
        raise AssertionError((entry, element))


def fragments(layout: Layout, spans: Sequence[Sequence[Span]], ranks: int) -> list[Fragment]:
    """Divide a model among ranks, the same way on every rank.

    Args:
        layout: of the whole model.
        spans: what each rank holds of each parameter (:func:`~psyche_lightning.distro.shards.extents`).
        ranks: their number.

    Returns:
        The fragments in the order of their chunks.

    Raises:
        ConfigError: there is nothing to do for some rank.
    """
    found: list[Fragment] = []
    shared: list[tuple[int, int, list[int]]] = []  # parameter, row of chunks, the ranks that might have it
    load = [0] * ranks
    for number, entry in enumerate(layout.entries):
        row, rows = _row(entry, layout.chunk), entry.grid[0]
        elements = entry.rows * entry.cols
        if not entry.chunks:
            continue
        for first, last, owner, candidates in _divided(spans[number], row, rows, elements):
            if owner is None:
                shared.append((number, first, candidates))
            else:
                found.append(_fragment(number, entry, row, (first, last), owner, spans[number]))
                load[owner] += found[-1].chunks
    for number, first, candidates in shared:
        owner = min(candidates, key=lambda rank: load[rank])
        entry = layout.entries[number]
        found.append(_fragment(number, entry, _row(entry, layout.chunk), (first, first + 1), owner, spans[number]))
        load[owner] += found[-1].chunks
    if 0 in load:
        raise ConfigError(
            f"the node has {ranks} ranks, but the model has only {layout.chunk_count} chunks of "
            f"{layout.chunk}x{layout.chunk}, and rank {load.index(0)} would have none; use fewer devices, or a smaller "
            "distro.chunk"
        )
    return sorted(found, key=lambda fragment: fragment.chunk)


def _row(entry: Entry, chunk: int) -> int:
    """Elements in a row of chunks of a parameter."""
    return chunk * chunk if entry.in_runs else chunk * entry.cols


def _divided(
    spans: Sequence[Span], row: int, rows: int, elements: int
) -> Iterator[tuple[int, int, int | None, list[int]]]:
    """Divide a parameter's rows of chunks: the first row, the one after the last, and their rank.

    For a single row that any of some ranks might have there is no rank, but these.
    """
    everyone = list(range(len(spans)))
    if all(span == (0, elements) for span in spans):
        each = rows // len(spans)
        for rank in everyone if each else ():
            yield rank * each, (rank + 1) * each, rank, []
        for number in range(each * len(spans), rows):
            yield number, number + 1, None, everyone
        return
    border = set()
    for rank, (start, stop) in enumerate(spans):
        first, last = -(-start // row), rows if stop == elements else stop // row
        if first < last and start < stop:
            yield first, last, rank, []
        border |= {at // row for at in (start, stop) if at % row and at < elements}
    for number in sorted(border):
        begin, end = number * row, min(number * row + row, elements)
        yield number, number + 1, None, [r for r in everyone if spans[r][0] < end and spans[r][1] > begin]


def _fragment(number: int, entry: Entry, row: int, rows: Span, rank: int, spans: Sequence[Span]) -> Fragment:
    start, stop = rows[0] * row, min(rows[1] * row, entry.rows * entry.cols)
    columns = entry.grid[1]
    within = spans[rank][0] <= start and stop <= spans[rank][1]
    return Fragment(number, rank, start, stop, within, entry.offset + rows[0] * columns, (rows[1] - rows[0]) * columns)
