"""DisTrO by several ranks, each of which encodes and applies its own chunks; to other nodes they are one node.

Parameters are DTensors as ``fully_shard`` makes them (or whole on every rank). A chunk needs all its rows, but a rank's
shard may end within a row of chunks. So a model is cut into fragments, which are whole rows of chunks:

- what lies within a rank's shard is that rank's, and is trained where it is, without a copy;
- a row of chunks across the border of two shards belongs to one of the ranks, which has a copy of it. Its gradients
  travel to that rank, and its parameters back.

Each rank has an ordinary optimizer for its fragments (the part). Only votes meet on rank 0, which writes the payload.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.tensor import DTensor

from psyche_lightning.distro import statistics
from psyche_lightning.distro.config import DistroConfig
from psyche_lightning.distro.fragments import Fragment, FragmentIndex, fragments
from psyche_lightning.distro.holding import Holding
from psyche_lightning.distro.layout import Layout
from psyche_lightning.distro.local import LocalSteps
from psyche_lightning.distro.matrices import Matrices
from psyche_lightning.distro.optimizer import DisTrO, named_groups, step_alone
from psyche_lightning.distro.part import Part, PartCodec, StepsPart
from psyche_lightning.distro.shards import Move, Ranks, Transfer, extents, held
from psyche_lightning.distro.votes import Votes
from psyche_lightning.errors import ConfigError, PayloadError, PsycheError
from psyche_lightning.muon import check_matrix
from psyche_lightning.system import return_memory


class ShardedDisTrO:
    """:class:`DisTrO` or :class:`LocalSteps` for a model that the ranks of one node share.

    It has the methods of these two, with the same results: payloads, published bytes and delta are those of one device
    with equal gradients. Every rank constructs it after ``fully_shard`` and calls its methods in the same order with
    equal arguments; methods that are not collective say so. No rank ever holds the whole model: where tensors are given
    out or taken as a whole, rank 0 has one at a time.

    Args:
        parameters: as for :class:`DisTrO`: DTensors, each with its first dimension sharded over the ranks of ``group``,
            or tensors that are whole and equal on every rank.
        lr: as for :class:`DisTrO`.
        weight_decay: as for :class:`DisTrO`.
        config: the run's compression, which also says whether there are local steps.
        budget: as for :class:`DisTrO`, of each rank.
        holding: as for :class:`DisTrO`.
        group: the node's ranks; None for torch's default group.

    Attributes:
        layout: how the whole model is cut into chunks.
        config: as given.
        holding: as given.
        param_groups: the parameter groups; schedulers may change their learning rates, on all ranks alike.
        observing: whether :meth:`apply` computes the agreement of :meth:`figures`.
        ranks: the node's ranks.

    Raises:
        ConfigError: as for :class:`DisTrO`; or a parameter is sharded in another way, there is not a chunk for each
            rank, or the configuration has what sharded parameters cannot have.
        PsycheError: torch.distributed is not initialized.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.Tensor]] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        config: DistroConfig | None = None,
        budget: int = 128 << 20,
        holding: Holding | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.config = config or DistroConfig()
        self.holding = holding or Holding()
        self.observing = False
        self._agreement: list[float] = []
        self._sent: list[bytes] = []
        self._unsent = False  # whether some shards hold other values than the fragments of other ranks say
        groups = named_groups(parameters)
        pairs = [pair for one in groups for pair in zip(one["param_names"], one["params"], strict=True)]
        self.layout = Layout(pairs, self.config.chunk)
        named = dict(pairs)
        self._tensors = [named[entry.name] for entry in self.layout.entries]
        owner = {name: number for number, one in enumerate(groups) for name in one["param_names"]}
        self._owners = [owner[entry.name] for entry in self.layout.entries]
        self.ranks = Ranks(group, self._tensors[0].device)
        self._check(groups)
        if self._tensors[0].device.type == "cpu":
            return_memory()  # parameters that FSDP gathers and frees in each layer
        self._spans = [extents(tensor, self.ranks) for tensor in self._tensors]
        self._fragments = fragments(self.layout, self._spans, self.ranks.size)
        self._mine = [fragment for fragment in self._fragments if fragment.rank == self.ranks.rank]
        self._index = FragmentIndex(self._mine)
        self._copies = [torch.nn.Parameter(self._new(part)) for part in self._mine]
        self._part = self._make_part(groups, lr, weight_decay, budget, holding)
        self.param_groups = [
            {**part, "params": one["params"], "param_names": one["param_names"]}
            for part, one in zip(self._part.param_groups, groups, strict=True)
        ]
        own = [tensor.dtype for tensor in self._tensors]
        wide = [torch.promote_types(dtype, torch.float32) for dtype in own]
        there, back = self._pulls(), self._pushes()
        self._gradients_there = Transfer(self.ranks, there, wide)
        self._before: Callable[[], None] = lambda: None  # called before the first streamed gradient of a round
        self._streamed = False  # whether one came
        self._awaited: dict[Move, torch.Tensor] = {}  # what came for the delta of other ranks
        self._sent_of: dict[int, list[Move]] = {}
        for move in there:
            if move.source == self.ranks.rank:
                self._sent_of.setdefault(move.entry, []).append(move)
        if self.holding.gradients == "streamed":
            for number, tensor in enumerate(self._tensors):
                if isinstance(tensor, DTensor):  # gradients of the others are not yet added up over the ranks
                    hook = partial(self._stream, number)
                    tensor.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call] # torch's own
        self._there, self._back = Transfer(self.ranks, there, own), Transfer(self.ranks, back, own)
        self._entry_back = {
            number: Transfer(self.ranks, [move for move in back if move.entry == number], own)
            for number in dict.fromkeys(move.entry for move in back)
        }

    def _check(self, groups: Sequence[dict[str, Any]]) -> None:
        """Refuse what only a node with one device can have, and what none can."""
        for one in groups:
            for name, tensor in zip(one["param_names"], one["params"], strict=True):
                if one.get("muon"):
                    check_matrix(tensor, f'a group with "muon": True has {name!r}')
        low = [tensor.dtype for tensor in self._tensors if tensor.dtype != torch.float32]
        if self.config.float32_gradients and low:
            raise ConfigError(
                f"distro.float32_gradients is true, but fully_shard gives gradients in the parameters' dtype {low[0]}; "
                "keep float32 parameters and compute in bfloat16 (MixedPrecisionPolicy), or set it to false"
            )

    def _make_part(
        self,
        groups: Sequence[dict[str, Any]],
        lr: float,
        weight_decay: float,
        budget: int,
        holding: Holding | None,
    ) -> Part:
        parts: list[dict[str, Any]] = []
        for one in groups:
            rest = {key: value for key, value in one.items() if key not in ("params", "param_names")}
            parts.append({"lr": lr, "weight_decay": weight_decay, **rest, "params": [], "param_names": []})
        for number, (fragment, copy) in enumerate(zip(self._mine, self._copies, strict=True)):
            name = self.layout.entries[fragment.entry].name
            its = parts[self._owners[fragment.entry]]
            its["params"].append((f"{number:08} {name}[{fragment.start}:{fragment.stop}]", copy))
        for one in parts:
            del one["param_names"]
        kind = StepsPart if self.config.local_steps else Part
        muon = {number: owner for number, owner in enumerate(self._owners) if groups[owner].get("muon")}
        matrices = Matrices(self.ranks, self.layout, self._fragments, muon, self._tensors[0].device)
        return kind(
            parts, lr, self.config, budget, holding, self.layout, self._mine, self.ranks, muon, matrices, self._given
        )

    def _given(self, numbers: Sequence[int]) -> list[int]:
        """Which of some parameters have a gradient, on any rank."""
        here = torch.tensor([self._tensors[number].grad is not None for number in numbers], dtype=torch.int64)
        return [number for number, ranks in zip(numbers, self.ranks.sums(here).tolist(), strict=True) if ranks]

    def _new(self, part: Fragment) -> torch.Tensor:
        """The memory of a fragment: what the rank holds, or that of a copy."""
        if part.held:
            return self._view(part, held(self._tensors[part.entry]))
        tensor = self._tensors[part.entry]
        return self._shaped(part, torch.zeros(part.stop - part.start, dtype=tensor.dtype, device=tensor.device))

    def _view(self, part: Fragment, mine: torch.Tensor) -> torch.Tensor:
        """A fragment within what the rank holds of its parameter or gradient, flat."""
        first = self._spans[part.entry][self.ranks.rank][0]
        return self._shaped(part, mine[part.start - first : part.stop - first])

    def _shaped(self, part: Fragment, flat: torch.Tensor) -> torch.Tensor:
        entry = self.layout.entries[part.entry]
        return flat if entry.in_runs else flat.view(-1, entry.cols)

    def _pulls(self) -> list[Move]:
        """What the owners of fragments need of the others' shards."""
        return [
            Move(part.entry, rank, part.rank, max(part.start, start), min(part.stop, stop))
            for part in self._fragments
            if not part.held
            for rank, (start, stop) in enumerate(self._spans[part.entry])
            if start < part.stop and part.start < stop
        ]

    def _pushes(self) -> list[Move]:
        """What each rank's shards need of the others' fragments, and of its own ones that are copies."""
        return [
            Move(part.entry, part.rank, rank, max(part.start, start), min(part.stop, stop))
            for part in self._fragments
            for rank, (start, stop) in enumerate(self._spans[part.entry])
            if start < part.stop and part.start < stop and not (part.held and rank == part.rank)
        ]

    @property
    def version(self) -> int:
        """Of its payloads."""
        return self._part.version

    @property
    def nonce(self) -> int:
        """How often :meth:`encode` ran since delta was last empty."""
        return self._part.nonce

    @nonce.setter
    def nonce(self, value: int) -> None:
        self._part.nonce = value

    @property
    def layout_digest(self) -> bytes:
        """As :attr:`DisTrO.layout_digest`, of the whole model."""
        return self.layout.digest(self.config, self.version)

    @property
    def max_payload(self) -> int:
        """As :attr:`DisTrO.max_payload`."""
        return self._part.max_payload

    @property
    def payload_sizes(self) -> tuple[int, ...]:
        """As :attr:`DisTrO.payload_sizes`."""
        return self._part.payload_sizes

    def payload_size(self, step: int | None = None) -> int:
        """As :meth:`DisTrO.payload_size`; not collective."""
        return self._part.payload_size(step)

    def abstention(self, step: int | None = None) -> bytes:
        """As :meth:`DisTrO.abstention`; not collective."""
        return self._part.abstention(step)

    def check(self, payload: bytes, step: int | None = None) -> None:
        """As :meth:`DisTrO.check`; not collective."""
        self._part.check(payload, step)

    @property
    def part(self) -> DisTrO:
        """This rank's own optimizer, with its fragments; for saving its delta."""
        return self._part

    def lr_bits(self) -> tuple[int, ...]:
        """As :meth:`DisTrO.lr_bits`; not collective."""
        for ours, part in zip(self.param_groups, self._part.param_groups, strict=True):
            part["lr"] = ours["lr"]
        return self._part.lr_bits()

    @torch.no_grad()
    def encode(self, step: int | None = None) -> bytes:
        """As :meth:`DisTrO.encode`, or with local steps as :meth:`LocalSteps.encode`; the payload on every rank."""
        self.lr_bits()  # the part has the newest rates
        with self._gradients():
            self._part.encode(step)
        codec = self._part.codec(step)
        assert codec.votes is not None
        payload = self.ranks.share(self._joined(codec))
        codec.votes = None
        self._sent = [*self._sent[-1:], payload]
        return payload

    def check_gradients(self) -> None:
        """As :meth:`LocalSteps.check_gradients`, with the same error on every rank."""
        with self._gradients():
            cast(LocalSteps, self._part).check_gradients()

    @torch.no_grad()
    def apply(self, payloads: Sequence[bytes], lrs: Sequence[int], step: int | None = None) -> None:
        """As :meth:`DisTrO.apply` or :meth:`LocalSteps.apply`.

        Raises:
            PayloadError: a payload or a learning rate is malformed. Ranks whose chunks are well-formed have applied
                them then, so the node must not go on; :meth:`check` finds such payloads before.
        """
        self._settle()
        problem = None
        try:
            self._part.apply(payloads, lrs, step)
        except PayloadError as error:
            problem = str(error)
        problem = self.ranks.agree(problem)
        if problem is not None:
            raise PayloadError(problem)
        self._push()
        self._agreement = self._agreed(payloads, step) if self.observing else []

    def figures(self) -> list[dict[str, float]]:
        """As :meth:`DisTrO.figures`, on every rank."""
        figures = self._part.figures()
        names = ("gradient_norm", "momentum_norm")
        squares = torch.tensor([[one[name] ** 2 for name in names] for one in figures], dtype=torch.float64)
        norms = self.ranks.sums(squares).sqrt().tolist()
        agreement = json.loads(self.ranks.share(json.dumps(self._agreement).encode())) or [float("nan")] * len(norms)
        return [
            {**dict(zip(names, values, strict=True)), "agreement": share}
            for values, share in zip(norms, agreement, strict=True)
        ]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As :meth:`DisTrO.step`."""
        return step_alone(cast(DisTrO, self), closure)

    @contextmanager
    def look_ahead(self) -> Iterator[None]:
        """As :meth:`DisTrO.look_ahead`."""
        self.lr_bits()
        self._settle()
        with self._part.look_ahead():
            self._unsent = True
            self._push()
            self._unsent = True
            yield
        self._push()

    @contextmanager
    def working(self) -> Iterator[None]:
        """As :meth:`LocalSteps.working`."""
        self._settle()
        self._unsent = True
        with cast(LocalSteps, self._part).working():
            yield
            self._pull()
        self._push()

    @property
    def arrived(self) -> bool:
        """As :attr:`DisTrO.arrived`; not collective."""
        return self._streamed

    def begin_gradients(self, before: Callable[[], None] | None = None) -> None:
        """As :meth:`DisTrO.begin_gradients`; not collective."""
        self._before = before or self._before
        self._streamed = False
        self._awaited.clear()
        self._part.begin_gradients()

    @torch.no_grad()
    def _stream(self, entry: int, tensor: torch.Tensor) -> None:
        """Take a gradient that is there for all ranks: add it to delta, or keep what is for another rank's delta."""
        gradient, tensor.grad = _flat_gradient(tensor), None
        if gradient is None:
            return
        if not self._streamed:
            self._before()
            self.lr_bits()  # the part has the newest rates
            self._streamed = True
        first = self._spans[entry][self.ranks.rank][0]
        for move in self._sent_of.get(entry, ()):
            values = gradient[move.start - first : move.stop - first].to(torch.float32)
            if move in self._awaited:
                self._awaited[move] += values
            else:
                self._awaited[move] = values.clone()
        for number, part in self._index.of(entry):
            if part.held:
                _set_gradient(self._copies[number], self._view(part, gradient))
                self._part.stream(number)

    def reset(self) -> None:
        """As :meth:`DisTrO.reset`; not collective."""
        self._part.reset()
        self.begin_gradients()

    def held(self) -> dict[str, int]:
        """As :meth:`DisTrO.held`, of this rank; not collective."""
        copies = sum(copy.nbytes for part, copy in zip(self._mine, self._copies, strict=True) if not part.held)
        return {**self._part.held(), "copies": copies}

    def published(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As :meth:`DisTrO.published` on rank 0, where tensors are copies.

        On other ranks the iterator yields nothing, but must be exhausted: this sends their fragments.
        """
        self._settle()
        return self._collected(self._part.published_of)

    def load_published(self, name: str, tensor: torch.Tensor | None) -> None:
        """As :meth:`DisTrO.load_published`; the tensor is given by rank 0."""
        self._settle()
        number = self._distribute(name, tensor, self._part.load_published)
        if number in self._entry_back:
            self._entry_back[number].run(self._from_fragment, self._to_shard)

    def delta(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As :meth:`DisTrO.delta` on rank 0; other ranks must exhaust the iterator, as that of :meth:`published`."""
        return self._collected(self._part.delta_of) if self._part.has_delta else iter(())

    def load_delta(self, name: str, tensor: torch.Tensor | None) -> None:
        """As :meth:`DisTrO.load_delta`; the tensor is given by rank 0."""
        self._distribute(name, tensor, self._part.load_delta)

    def momentum(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As :meth:`DisTrO.momentum` on rank 0; other ranks must exhaust the iterator, as that of :meth:`published`."""
        here = torch.zeros(len(self.layout.entries), dtype=torch.int64)
        for number, part in enumerate(self._mine):
            here[part.entry] += self._part.has_momentum(number)
        some = {number for number, ranks in enumerate(self.ranks.sums(here).tolist()) if ranks}
        return self._collected(self._part.momentum_of, some)

    def load_momentum(self, name: str, tensor: torch.Tensor | None) -> None:
        """As :meth:`DisTrO.load_momentum`; the tensor is given by rank 0."""
        self._distribute(name, tensor, self._part.load_momentum)

    def state_dict(self) -> dict[str, Any]:
        """The state of this rank's part, for :meth:`load_state_dict` of a node with as many ranks; not collective."""
        return {**self._part.state_dict(), "rank": self.ranks.rank, "ranks": self.ranks.size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict` of the same rank exactly, as :meth:`DisTrO.load_state_dict` does; not collective.

        Raises:
            ConfigError: the state belongs to another rank, or to other parameters.
        """
        theirs, ours = [(state_dict.get("rank"), state_dict.get("ranks")), (self.ranks.rank, self.ranks.size)]
        if theirs != ours:
            raise ConfigError(
                f"this state is of rank {theirs[0]} of {theirs[1]}; this is rank {ours[0]} of {ours[1]}. Resume with "
                "as many devices as before"
            )
        self._part.load_state_dict(state_dict)
        for group, part in zip(self.param_groups, self._part.param_groups, strict=True):
            group["lr"] = part["lr"]

    def prints(self) -> torch.Tensor:
        """As :meth:`DisTrO.prints`, on every rank; the sums differ from one device's, but are as telling."""
        self._settle()
        found = torch.zeros(len(self.layout.entries), dtype=torch.int64)
        for part, bits in zip(self._mine, self._part.prints().tolist(), strict=True):
            found[part.entry] += bits
        return self.ranks.sums(found)

    def _joined(self, codec: PartCodec) -> bytes | None:
        """The payload of all ranks' votes, on rank 0."""
        whole = codec.whole
        mine = codec.votes
        assert mine is not None
        if self.ranks.rank:
            self.ranks.send(torch.from_numpy(_packed(mine)), 0)
            return None
        k, steps = mine.signs.shape[1], mine.exponents is not None
        votes = Votes.empty(self.layout.chunk_count, k, self.version)
        for rank in range(self.ranks.size):
            theirs = [part for part in self._fragments if part.rank == rank]
            chunks = np.concatenate([np.arange(part.chunk, part.chunk + part.chunks) for part in theirs])
            if rank:
                buffer = torch.empty(len(chunks) * (3 * k + steps), dtype=torch.uint8)
                self.ranks.receive(buffer, rank)
                votes.put(chunks, _unpacked(buffer.numpy(), len(chunks), k, steps))
            else:
                votes.put(chunks, mine)
        return whole.encode(votes)

    def _agreed(self, payloads: Sequence[bytes], step: int | None) -> list[float]:
        """The agreement of :meth:`figures`, on rank 0."""
        own = next((sent for sent in self._sent if sent in payloads), None)
        if self.ranks.rank or own is None:
            return []
        owners = np.repeat(self._owners, [entry.chunks for entry in self.layout.entries])
        decode = self._part.codec(step).whole.decode
        return statistics.agreement(own, payloads, decode, owners, len(self.param_groups), self.config.area)

    @contextmanager
    def _gradients(self) -> Iterator[None]:
        """Within the block, fragments have their gradients."""
        self._bind()
        gradients = [_flat_gradient(tensor) for tensor in self._tensors]

        def read(move: Move) -> torch.Tensor:
            gradient, first = gradients[move.entry], self._spans[move.entry][self.ranks.rank][0]
            for whole in self._sent_of[move.entry] if self._awaited else ():
                if whole in self._awaited and whole.start <= move.start < whole.stop:
                    gradient, first = self._awaited[whole], whole.start
            if gradient is None:
                return torch.zeros(move.stop - move.start, device=self._tensors[move.entry].device)
            return gradient[move.start - first : move.stop - first]

        def write(move: Move, values: torch.Tensor) -> None:
            number, first = self._index.place(move.entry, move.start)
            copy = self._copies[number]
            if copy.grad is None:
                _set_gradient(copy, torch.empty(copy.shape, dtype=values.dtype, device=copy.device))
            flat = cast(torch.Tensor, copy.grad).view(-1)
            flat[move.start - first : move.stop - first] = values

        try:
            for part, copy in zip(self._mine, self._copies, strict=True):
                gradient = gradients[part.entry]
                if part.held and gradient is not None:
                    _set_gradient(copy, self._view(part, gradient))
            self._gradients_there.run(read, write)
            if self.holding.gradients == "streamed":
                for number, copy in enumerate(self._copies):
                    if copy.grad is not None:
                        self._part.stream(number)
            yield
        finally:
            self._streamed = False
            self._awaited.clear()
            for copy in self._copies:
                copy.grad = None

    def _settle(self) -> None:
        """Make fragments hold what the ranks' shards say, which somebody else may have changed."""
        if self._unsent:  # a block ended early, and shards still have what it made of them
            self._push()
        self._pull()

    @torch.no_grad()
    def _pull(self) -> None:
        """Bring what lies in others' shards into the fragments that are copies."""
        self._bind()
        self._there.run(self._from_shard, self._to_fragment)

    @torch.no_grad()
    def _push(self) -> None:
        """Bring fragments that are copies, or that others hold as well, into the ranks' shards."""
        self._bind()
        self._back.run(self._from_fragment, self._to_shard)
        self._unsent = False

    def _bind(self) -> None:
        """Follow parameters whose memory somebody has replaced."""
        for number, part in enumerate(self._mine):
            if part.held:
                view = self._view(part, held(self._tensors[part.entry]))
                if view.data_ptr() != self._copies[number].data_ptr():
                    self._copies[number].data = view

    def _from_shard(self, move: Move) -> torch.Tensor:
        first = self._spans[move.entry][self.ranks.rank][0]
        return held(self._tensors[move.entry])[move.start - first : move.stop - first]

    def _to_shard(self, move: Move, values: torch.Tensor) -> None:
        self._from_shard(move).copy_(values)

    def _from_fragment(self, move: Move) -> torch.Tensor:
        number, first = self._index.place(move.entry, move.start)
        return self._copies[number].detach().view(-1)[move.start - first : move.stop - first]

    def _to_fragment(self, move: Move, values: torch.Tensor) -> None:
        self._from_fragment(move).copy_(values)

    @torch.no_grad()
    def _collected(
        self, values: Callable[[int], torch.Tensor], some: Collection[int] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields float32 tensors of which each rank has its fragments, all or some of them, on rank 0."""
        parts = {number: list(its) for number, its in groupby(self._fragments, key=lambda part: part.entry)}
        for number, entry in enumerate(self.layout.entries):
            if some is not None and number not in some:
                continue
            found = torch.empty(0 if self.ranks.rank else entry.rows * entry.cols, device=self._tensors[number].device)
            for part in parts.get(number, ()):
                if part.rank == self.ranks.rank:
                    mine = values(self._index.place(part.entry, part.start)[0]).reshape(-1)
                    if self.ranks.rank:
                        self.ranks.send(mine, 0)
                    else:
                        found[part.start : part.stop] = mine
                elif not self.ranks.rank:
                    self.ranks.receive(found[part.start : part.stop], part.rank)
            if not self.ranks.rank:
                yield entry.name, found.view(entry.shape)

    @torch.no_grad()
    def _distribute(self, name: str, tensor: torch.Tensor | None, load: Callable[[str, torch.Tensor], None]) -> int:
        """Give each rank the fragments of rank 0's tensor; the number of the entry."""
        problem = None
        if tensor is not None:
            try:
                self.layout.expected(name, tensor)
            except PsycheError as error:
                problem = str(error)
        problem = self.ranks.agree(problem)
        if problem is not None:
            raise PsycheError(problem)
        number = self.layout.number[name]
        for part in self._fragments:
            if part.entry != number:
                continue
            here = part.rank == self.ranks.rank
            flat = None if tensor is None else tensor.detach().reshape(-1)[part.start : part.stop]
            if not self.ranks.rank and not here:
                self.ranks.send(cast(torch.Tensor, flat), part.rank)
            elif here:
                place, _ = self._index.place(part.entry, part.start)
                if self.ranks.rank:
                    flat = torch.empty(part.stop - part.start, device=self.ranks.device)
                    self.ranks.receive(flat, 0)
                load(self._part.layout.entries[place].name, self._shaped(part, cast(torch.Tensor, flat)))
        return number


def _flat_gradient(tensor: torch.Tensor) -> torch.Tensor | None:
    """What this rank has of a tensor's gradient, flat."""
    gradient = tensor.grad
    if gradient is None:
        return None
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    if local.layout != torch.strided:
        raise ConfigError("a gradient is sparse; DisTrO needs dense ones (sparse=False)")
    return local.detach().reshape(-1)


def _set_gradient(parameter: torch.nn.Parameter, gradient: torch.Tensor) -> None:
    """Give a parameter a gradient, of whatever dtype."""
    parameter.grad = None
    parameter.grad_dtype = gradient.dtype
    parameter.grad = gradient


def _packed(votes: Votes) -> NDArray[np.uint8]:
    """Votes as bytes, for another rank."""
    parts = [votes.positions, votes.signs, *([] if votes.exponents is None else [votes.exponents])]
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8).reshape(-1) for part in parts])


def _unpacked(data: NDArray[np.uint8], chunks: int, k: int, steps: bool) -> Votes:
    """Undo :func:`_packed`."""
    positions = data[: 2 * chunks * k].view(np.int16).reshape(chunks, k)
    signs = data[2 * chunks * k : 3 * chunks * k].view(np.int8).reshape(chunks, k)
    return Votes(positions, signs, data[3 * chunks * k :].view(np.int8) if steps else None)
