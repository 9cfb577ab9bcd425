"""Puts matrices together, each on one rank, for what cannot be computed from the fragments of several ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest

import torch

from psyche_lightning.distro.fragments import Fragment, FragmentIndex
from psyche_lightning.distro.layout import Layout
from psyche_lightning.distro.shards import Move, Ranks, Transfer


class Matrices:
    """Matrices that the ranks of a node have in fragments. Each has a rank where it is computed with as a whole.

    Args:
        ranks: the node's ranks.
        layout: of the whole model.
        fragments: those of all ranks.
        numbers: of the matrices in the layout.
        device: where this rank computes.
    """

    def __init__(
        self,
        ranks: Ranks,
        layout: Layout,
        fragments: Sequence[Fragment],
        numbers: Iterable[int],
        device: torch.device,
    ) -> None:
        self._ranks, self._layout, self._device = ranks, layout, device
        self._index = FragmentIndex([part for part in fragments if part.rank == ranks.rank])
        self._parts = {number: [part for part in fragments if part.entry == number] for number in numbers}
        self._homes: dict[int, int] = {}  # the rank of each, those with most work first
        load = [0] * ranks.size
        for number in sorted(self._parts, key=self._work, reverse=True):
            home = load.index(min(load))
            self._homes[number] = home
            load[home] += self._work(number)

    def _work(self, number: int) -> int:
        """What the products of a matrix with its transpose take, in multiplications."""
        entry = self._layout.entries[number]
        return entry.rows * entry.cols * min(entry.rows, entry.cols)

    @torch.no_grad()
    def change(
        self,
        numbers: Collection[int],
        values: Sequence[Mapping[int, torch.Tensor]],
        compute: Callable[[int, list[torch.Tensor]], None],
    ) -> None:
        """Change matrices as a whole, at any time at most one on each rank. Collective.

        Args:
            numbers: those to change, the same on every rank.
            values: one mapping for each kind of value that matrices have: from the number of each of this rank's
                fragments of them to its values, float32. They are overwritten.
            compute: gets the number of a matrix and its values of each kind, float32, [rows, columns], and overwrites
                these.
        """
        queues: list[list[int]] = [[] for _ in range(self._ranks.size)]
        for number, home in self._homes.items():
            if number in numbers:
                queues[home].append(number)
        for turn in zip_longest(*queues):
            self._turn([number for number in turn if number is not None], values, compute)

    def _turn(
        self,
        numbers: Sequence[int],
        values: Sequence[Mapping[int, torch.Tensor]],
        compute: Callable[[int, list[torch.Tensor]], None],
    ) -> None:
        """:meth:`change` for at most one matrix of each rank."""
        there = [
            Move(number, part.rank, self._homes[number], part.start, part.stop)
            for number in numbers
            for part in self._parts[number]
        ]
        back = [replace(move, source=move.target, target=move.source) for move in there]
        mine = next((number for number in numbers if self._homes[number] == self._ranks.rank), None)
        shape = (0,) if mine is None else self._layout.entries[mine].shape
        wholes = [torch.empty(shape, device=self._device) for _ in values]
        for parts, whole in zip(values, wholes, strict=True):
            self._bring(there, partial(self._in_fragment, parts), partial(_in_whole, whole))
        if mine is not None:
            compute(mine, wholes)
        for parts, whole in zip(values, wholes, strict=True):
            self._bring(back, partial(_in_whole, whole), partial(self._in_fragment, parts))

    def _bring(
        self, moves: Sequence[Move], source: Callable[[Move], torch.Tensor], target: Callable[[Move], torch.Tensor]
    ) -> None:
        """Make moves of float32 values between two places, of each of which the functions give a view."""

        def write(move: Move, values: torch.Tensor) -> None:
            target(move).copy_(values)

        Transfer(self._ranks, moves, [torch.float32] * len(self._layout.entries)).run(source, write)

    def _in_fragment(self, values: Mapping[int, torch.Tensor], move: Move) -> torch.Tensor:
        number, first = self._index.place(move.entry, move.start)
        return values[number].view(-1)[move.start - first : move.stop - first]


def _in_whole(whole: torch.Tensor, move: Move) -> torch.Tensor:
    return whole.view(-1)[move.start : move.stop]
