"""What each rank of a node holds of a tensor, and how parts of tensors travel between the ranks.

Every tensor is looked at as one row of elements. FSDP shards its first dimension, so each rank holds an interval of the
row. A tensor that is no DTensor is held as a whole by every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from psyche_lightning.errors import ConfigError, PsycheError

MOVED = 16 << 20
"""Bytes that travel between the ranks at a time."""

Span = tuple[int, int]
"""The first element of an interval, and the first one after it."""


class Ranks:
    """The processes of one node, numbered from 0. All methods but the attributes are collective.

    Args:
        group: their process group; None for the default one.
        device: where the node's tensors are.

    Attributes:
        rank: the number of this process.
        size: how many there are.
        device: where tensors are when they travel: ``device`` with NCCL, else the CPU.

    Raises:
        PsycheError: torch.distributed is not initialized.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> None:
        if not dist.is_initialized():
            raise PsycheError(
                "the ranks of a node need torch.distributed; start them with torchrun or a launcher of Lightning, or "
                "call torch.distributed.init_process_group"
            )
        self._group = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self._group), dist.get_world_size(self._group)
        self.members = dist.get_process_group_ranks(self._group)
        self.device = torch.device(device if "nccl" in dist.get_backend_config(self._group) else "cpu")

    def share(self, data: bytes | None, source: int = 0) -> bytes:
        """Give every rank the bytes of one rank; those that the others pass do not matter."""
        here = self.rank == source
        size = torch.tensor([len(data or b"") if here else 0], device=self.device)
        dist.broadcast(size, group=self._group, group_src=source)
        if not int(size):
            return b""
        buffer = torch.empty(int(size), dtype=torch.uint8)
        if here:
            buffer = torch.frombuffer(bytearray(data or b""), dtype=torch.uint8)
        buffer = buffer.to(self.device)
        dist.broadcast(buffer, group=self._group, group_src=source)
        return data if here and data is not None else buffer.cpu().numpy().tobytes()

    def agree(self, problem: str | None) -> str | None:
        """The problem of the first rank that has one; None if no rank has."""
        flag = torch.tensor([self.size if problem is None else self.rank], device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self._group)
        first = int(flag)
        return None if first == self.size else self.share((problem or "").encode(), first).decode()

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' tensors (float64 or int64), on the CPU."""
        found = values.to(self.device, copy=True)
        dist.all_reduce(found, group=self._group)
        return found.cpu()

    def send(self, tensor: torch.Tensor, target: int) -> None:
        """Send a tensor to another rank, which calls :meth:`receive`; collective for these two alone."""
        if tensor.numel():
            dist.send(tensor.detach().to(self.device).contiguous(), group=self._group, group_dst=target)

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        """Fill a contiguous tensor with what another rank sends."""
        if tensor.numel():
            buffer = tensor if tensor.device == self.device else torch.empty_like(tensor, device=self.device)
            dist.recv(buffer, group=self._group, group_src=source)
            if buffer is not tensor:
                tensor.copy_(buffer)

    def exchange(self, sent: torch.Tensor, sizes: Sequence[int], expected: Sequence[int]) -> torch.Tensor:
        """Send each rank its part of a flat tensor, and give what they sent to this one.

        Args:
            sent: the parts, one after the other.
            sizes: the elements of each part, by rank.
            expected: the elements of what comes, by rank.
        """
        found = torch.empty(sum(expected), dtype=sent.dtype, device=self.device)
        # Bytes, since not every backend knows every dtype.
        width = sent.element_size()
        dist.all_to_all_single(
            found.view(torch.uint8),
            sent.to(self.device).view(torch.uint8),
            [width * size for size in expected],
            [width * size for size in sizes],
            group=self._group,
        )
        return found

    def reshard(self, module: torch.nn.Module) -> None:
        """Have no parameter gathered, which FSDP keeps as it was after a forward pass alone; not collective."""
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    @torch.no_grad()
    def whole(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """A tensor as a whole, on rank 0; None on the others.

        Args:
            tensor: a DTensor, or any other tensor, of which rank 0's counts.
        """
        if not isinstance(tensor, DTensor):
            return tensor.detach() if self.rank == 0 else None
        spans = extents(tensor, self)
        mine = held(tensor)
        if self.rank or spans[0] == (0, tensor.numel()):
            if spans[0] != (0, tensor.numel()):
                self.send(mine, 0)
            return None if self.rank else mine.view(tensor.shape)
        found = torch.empty(tensor.numel(), dtype=tensor.dtype, device=self.device)
        found[slice(*spans[0])] = mine
        for source, (start, stop) in enumerate(spans[1:], 1):
            self.receive(found[start:stop], source)
        return found.view(tensor.shape)

    @torch.no_grad()
    def spread(self, value: torch.Tensor | None, tensor: torch.Tensor) -> None:
        """Replace a tensor by rank 0's value, of which each rank takes what it holds.

        Args:
            value: of the tensor's shape, on rank 0.
            tensor: a DTensor, or any other tensor.
        """
        mine = held(tensor)
        if self.rank:
            self.receive(mine, 0)
            return
        flat = value.detach().to(tensor.dtype).reshape(-1) if value is not None else mine
        for target, (start, stop) in enumerate(extents(tensor, self)):
            if target:
                self.send(flat[start:stop], target)
            else:
                mine.copy_(flat[start:stop])


def extents(tensor: torch.Tensor, ranks: Ranks) -> tuple[Span, ...]:
    """The interval of a tensor's elements that each rank holds.

    Raises:
        ConfigError: the tensor is sharded in another way than by ``fully_shard`` over just these ranks.
    """
    elements = tensor.numel()
    if not isinstance(tensor, DTensor) or tensor.placements == (Replicate(),):
        return ((0, elements),) * ranks.size
    placements, mesh = tensor.placements, tensor.device_mesh
    if placements != (Shard(0),) or mesh.mesh.tolist() != ranks.members:
        shown = ", ".join(map(str, placements))
        raise ConfigError(
            f"a parameter of shape {tuple(tensor.shape)} is placed as ({shown}) on the ranks {mesh.mesh.tolist()}; "
            f"shard the first dimension of each over the ranks {ranks.members}, as fully_shard does with a mesh of one "
            "dimension"
        )
    length = tensor.shape[0]
    each = math.ceil(length / ranks.size)
    row = elements // length if length else 0
    bounds = [min(number * each, length) * row for number in range(ranks.size + 1)]
    return tuple(pairwise(bounds))


@torch.no_grad()
def held(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, as a flat view.

    Raises:
        ConfigError: its elements do not lie one after the other.
    """
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    if not local.is_contiguous():
        raise ConfigError(
            f"a parameter of shape {tuple(tensor.shape)} has the strides {tensor.stride()}; ranks share a model's work "
            "only if each parameter is contiguous"
        )
    return local.detach().view(-1)


@dataclass(frozen=True)
class Move:
    """Elements of a tensor that one rank sends to another.

    Attributes:
        entry: number of the tensor.
        source: the rank that sends them.
        target: the rank that needs them.
        start: the first one.
        stop: the first one after them.
    """

    entry: int
    source: int
    target: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Transfer:
    """Moves between ranks that happen together, a few at a time.

    Args:
        ranks: the ranks; all make the same transfer.
        moves: the moves of all ranks.
        dtypes: of each tensor.
    """

    def __init__(self, ranks: Ranks, moves: Iterable[Move], dtypes: Sequence[torch.dtype]) -> None:
        self._ranks = ranks
        self._steps = [
            (dtype, sorted(step, key=lambda move: (move.source, move.target)))
            for dtype, some in groupby(moves, key=lambda move: dtypes[move.entry])
            for step in _steps(some, MOVED // dtype.itemsize)
        ]

    def __bool__(self) -> bool:
        return bool(self._steps)

    def run(self, read: Callable[[Move], torch.Tensor], write: Callable[[Move, torch.Tensor], None]) -> None:
        """Make the moves.

        Args:
            read: the elements of one of this rank's moves, flat.
            write: takes what came by a move to this rank.
        """
        here = self._ranks.rank
        for dtype, moves in self._steps:
            parts = [move for move in moves if move.source == here]  # by target
            coming = [move for move in moves if move.target == here]  # by source
            sizes, expected = [0] * self._ranks.size, [0] * self._ranks.size
            for move in parts:
                sizes[move.target] += len(move)
            for move in coming:
                expected[move.source] += len(move)
            sent = torch.empty(sum(sizes), dtype=dtype, device=self._ranks.device)
            at = 0
            for move in parts:
                sent[at : at + len(move)] = read(move)
                at += len(move)
            found, at = self._ranks.exchange(sent, sizes, expected), 0
            for move in coming:
                write(move, found[at : at + len(move)])
                at += len(move)


def _steps(moves: Iterable[Move], most: int) -> Iterator[list[Move]]:
    """The moves in lists of at most so many elements; long ones are cut."""
    step: list[Move] = []
    room = most
    for move in moves:
        start = move.start
        while start < move.stop:
            stop = min(move.stop, start + room)
            step.append(replace(move, start=start, stop=stop))
            room -= stop - start
            start = stop
            if not room:
                yield step
                step, room = [], most
    if step:
        yield step
