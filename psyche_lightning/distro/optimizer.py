"""The optimizer: compresses the local update and applies the agreed ones (invariants I1 and I2)."""

from __future__ import annotations

import logging
import math
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from psyche_lightning.distro import statistics, transform
from psyche_lightning.distro.aggregate import Aggregator
from psyche_lightning.distro.arithmetic import full_precision
from psyche_lightning.distro.arrivals import Arrivals, norms_of
from psyche_lightning.distro.config import WIRE_VERSION, DistroConfig
from psyche_lightning.distro.delta import Delta
from psyche_lightning.distro.holding import Holding
from psyche_lightning.distro.internals import (
    add_to_each,
    clear_each,
    multiply_each,
    norms_of_each,
    note_step,
    subtract_from_each,
    untraced,
)
from psyche_lightning.distro.layout import Batch, Layout
from psyche_lightning.distro.masters import Masters, bits_sum
from psyche_lightning.distro.payload import PayloadCodec
from psyche_lightning.distro.saved import checksum, damage
from psyche_lightning.distro.votes import VotesOn, select
from psyche_lightning.errors import ConfigError, PayloadError, PsycheError
from psyche_lightning.muon import MOMENTUM, check_matrix, to_directions

if TYPE_CHECKING:
    from psyche_lightning.distro.shards import Ranks

logger = logging.getLogger(__name__)

_ENDLESS = (
    "the gradient of {!r} has the norm {}, but it must be finite; skip this batch, clip gradients, or lower the "
    "learning rate"
)


class NonFiniteGradientError(PsycheError, FloatingPointError):
    """The norm of a gradient is infinite or NaN in float32. Nothing has changed, and the node must send nothing."""


class DisTrO(torch.optim.Optimizer):
    """Optimizer whose nodes exchange only the signs of the strongest DCT components of their accumulated gradients.

    Alone, it works like any optimizer: ``loss.backward(); optimizer.step()``. In a run, :meth:`encode` makes this
    node's payload, and :meth:`apply` applies the payloads on which all nodes agreed. Equal parameters, payloads and
    learning rates give equal parameters, to the bit. All numbers are float32 on the parameter's device. A parameter of
    another dtype has a float32 master and holds its rounded value. If somebody else changes the parameter (for example
    by loading a checkpoint into the module), the master takes the new values where the two differ.

    If the configuration has a schedule, payloads depend on the run's step, which the methods take as ``step``. Without
    one, it does not matter.

    Args:
        parameters: ``(name, parameter)`` pairs such as ``module.named_parameters()``, or groups: dictionaries whose
            ``"params"`` holds such pairs (or parameters, with their names in ``"param_names"``), with their own ``lr``
            and ``weight_decay`` if wanted. Frozen parameters stay as they are. In a group with ``"muon": True``, all
            of whose parameters are matrices, gradients become Muon's directions (with the group's ``momentum``, 0.95)
            before they are added to delta.
        lr: the size of each parameter's step; schedulers may change it in the groups.
        weight_decay: ``p *= 1 - lr * weight_decay`` before each step.
        config: the run's compression.
        holding: how this node holds numbers; by default in float32.
        budget: bytes of working memory for :meth:`encode` and :meth:`apply`, not counting payloads and, in encode, 3 k
            bytes per chunk for the votes. Nodes may choose it freely: results do not depend on it.

    Attributes:
        layout: how the parameters are cut into chunks.
        config: as given.
        holding: as given.
        budget: as given.
        nonce: how often :meth:`encode` ran since delta was last empty.
        observing: whether :meth:`apply` computes the agreement of :meth:`figures`, which costs about as much as itself.
        version: of its payloads.
        ranks: None; those of a node with several devices, which share
            :class:`~psyche_lightning.distro.sharded.ShardedDisTrO`.

    Raises:
        ConfigError: names are missing or not unique, nothing is trainable, or a value is out of range.
    """

    version = WIRE_VERSION
    ranks: Ranks | None = None

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.Tensor]] | Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.0,
        config: DistroConfig | None = None,
        budget: int = 128 << 20,
        holding: Holding | None = None,
    ) -> None:
        self.config = config or DistroConfig()
        self.holding = holding or Holding()
        if budget <= 0:
            raise ConfigError(f"budget is {budget!r}; choose the bytes of working memory for encode and apply")
        self.budget = budget
        self.nonce = 0
        self.observing = False
        self._norms: list[float] = []  # of the last gradients
        self._sent: deque[bytes] = deque(maxlen=2)  # with overlap, the last but one is applied
        self._agreement: list[float] = []
        self._delta: Delta | None = None
        self._saved: list[torch.Tensor] | None = None  # the published bytes, while parameters hold others
        defaults = {"lr": lr, "weight_decay": weight_decay, "muon": False, "momentum": 0.95}
        super().__init__(named_groups(parameters), defaults)
        named: dict[str, torch.Tensor] = {}
        owner: dict[str, int] = {}
        for number, group in enumerate(self.param_groups):
            _check_weight_decay(group["weight_decay"])
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if name in named:
                    raise ConfigError(f"two parameters are named {name!r}; give each its own name")
                if group["muon"]:
                    check_matrix(parameter, f'a group with "muon": True has {name!r}')
                named[name], owner[name] = parameter, number
        self.layout = Layout(named.items(), self.config.chunk)
        self._codecs = {stage.k: self._make_codec(stage) for _, stage in self.config.stages}
        self._parameters = [named[entry.name] for entry in self.layout.entries]
        self._masters = Masters(self.layout, self._parameters, split=self.holding.masters == "split")
        self._owners = [owner[entry.name] for entry in self.layout.entries]
        self._devices = [parameter.device for parameter in self._parameters]
        if self.config.float32_gradients:
            for parameter in self._parameters:
                parameter.grad_dtype = torch.float32
        self._home = self._devices[0] if len(set(self._devices)) == 1 else torch.device("cpu")  # of a node's votes
        self._on_cpu = all(device.type == "cpu" for device in self._devices)
        self._arrivals: Arrivals | None = None
        if self.holding.gradients == "streamed":
            self._check_streamed()
            limit = self._limit(self.config.max_k)
            self._arrivals = Arrivals(
                self.layout, self._parameters, self._deltas, self._rates, self.config.decay, limit
            )
        self._bits: tuple[tuple[float, ...], tuple[int, ...]] = (), ()  # the newest rates, and their bits
        self.lr_bits()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a group after construction: the layout is part of what all nodes agreed on.

        Raises:
            ConfigError: the optimizer already exists.
        """
        if hasattr(self, "layout"):
            raise ConfigError("the parameters of a run are fixed; make them trainable before DisTrO is constructed")
        super().add_param_group(param_group)

    @property
    def layout_digest(self) -> bytes:
        """SHA-256 of names, shapes, chunk, k with its schedule, and wire version (:meth:`Layout.digest`)."""
        return self.layout.digest(self.config, self.version)

    @property
    def max_payload(self) -> int:
        """The size of the largest payload of this layout, in bytes: of every one without a schedule."""
        return max(self.payload_sizes)

    @property
    def payload_sizes(self) -> tuple[int, ...]:
        """The sizes of payloads in the stages of the schedule, in bytes; one without a schedule."""
        return tuple(self._codecs[stage.k].size for _, stage in self.config.stages)

    def payload_size(self, step: int | None = None) -> int:
        """The size of every payload of a step, in bytes."""
        return self._codec(step).size

    def abstention(self, step: int | None = None) -> bytes:
        """The payload of a step without votes."""
        return self._codec(step).abstention

    def _codec(self, step: int | None) -> PayloadCodec:
        """Writes and reads the payloads of a step.

        Raises:
            PsycheError: there is a schedule, and no step.
        """
        if step is None and self.config.schedule:
            raise PsycheError(
                "the configuration has a schedule, so payloads depend on the step of the run, from 1; give it as step="
            )
        return self._codecs[self.config.at(step or 1).k]

    def _make_codec(self, stage: DistroConfig) -> PayloadCodec:
        """What writes and reads the payloads of a stage."""
        return PayloadCodec(self.layout, stage, self.version)

    def lr_bits(self) -> tuple[int, ...]:
        """The current learning rate of each group, as the bits of its float32 value.

        Raises:
            ConfigError: a learning rate is negative or not finite.
        """
        rates = tuple(float(group["lr"]) for group in self.param_groups)
        return self._bits[1] if self._bits[0] == rates else self._checked_bits(rates)

    def _checked_bits(self, rates: tuple[float, ...]) -> tuple[int, ...]:
        values = np.array(rates, np.float32)
        if not (np.isfinite(values) & (values >= 0)).all():
            raise ConfigError(f"the learning rates are {values.tolist()}; each must be finite and not negative")
        # -0.0 equals 0.0 but has other bits; adding 0 makes it 0.0.
        self._bits = rates, tuple((values + np.float32(0)).view(np.uint32).tolist())
        return self._bits[1]

    def check(self, payload: bytes, step: int | None = None) -> None:
        """Refuse a payload that :meth:`apply` would refuse for that step.

        Raises:
            PayloadError: the payload is not canonical for this layout and the step's k.
        """
        self._codec(step).check(payload)

    @untraced
    @torch.no_grad()
    def encode(self, step: int | None = None) -> bytes:
        """Add the gradients to delta, and compress delta.

        ``delta = decay * delta + lr * grad``. The k strongest coefficients of each chunk become votes, and ``removal``
        times their component is subtracted from delta. A missing gradient counts as zero. Gradients that become Muon's
        directions are overwritten by these.

        Args:
            step: of the run.

        Returns:
            The payload: the signs of the chosen coefficients.

        Raises:
            NonFiniteGradientError: a norm is not finite; the text names the parameter. Nothing has changed, but that
                streamed gradients of other parameters stay in delta.
        """
        codec, layout = self._codec(step), self.layout
        config = codec.config
        self._check_gradients()
        rates, delta = _floats(self.lr_bits()), self._deltas()
        directions = self._directions()
        gradients = [
            None if parameter.grad is None else layout.folded(number, directions.get(number, parameter.grad))
            for number, parameter in enumerate(self._parameters)
        ]
        votes: VotesOn | None = None
        shape = (2, min(self._limit(config.max_k), layout.chunk_count), config.chunk, config.chunk)
        work: torch.Tensor | None = None  # two batches of chunks, for the transform
        with full_precision(*self._devices):
            for batch in layout.batches(shape[1], list(zip(self._devices, codec.ks, strict=True))):
                k = codec.ks[batch.tiles[0].entry]
                chunks = delta.open(batch)
                if work is None or work.device != chunks.device:
                    work = torch.empty(shape, dtype=torch.float32, device=chunks.device)
                half, whole = work[:, : len(batch)]
                if self._arrivals is None:
                    chunks.mul_(config.decay)
                    views = layout.views(batch, gradients)
                    for rate, ours, added in self._by_rate(rates, batch, layout.blocks(batch, chunks), views):
                        add_to_each(ours, added, rate)
                chosen, values = select(transform.forward(chunks, (half, whole)), k)
                some = VotesOn.chosen(chosen, values.sign())
                if len(batch) == layout.chunk_count and k == config.max_k:
                    votes = some
                else:
                    votes = votes or VotesOn.empty(layout.chunk_count, config.max_k, self._home)
                    votes.put(slice(batch.start, batch.stop), some)
                if config.removal:
                    transform.subtract(chunks, chosen, values.mul_(config.removal))
                    if batch.padding:
                        clear_each(layout.padding(batch, chunks))
                delta.close(batch, chunks)
        self.nonce += 1
        payload = codec.encode(votes or VotesOn.empty(layout.chunk_count, config.max_k, self._home))
        self._sent.append(payload)
        return payload

    @untraced
    @torch.no_grad()
    def apply(self, payloads: Sequence[bytes], lrs: Sequence[int], step: int | None = None) -> None:
        """Move the parameters by the agreed payloads: ``p *= 1 - lr * weight_decay``, then ``p -= lr * sign``.

        The result is a pure function of the parameters, the set of payloads and the learning rates (I1). Without
        payloads nothing changes, not even by weight decay.

        Args:
            payloads: the agreed payloads, in any order.
            lrs: the agreed learning rate of each group, as :meth:`lr_bits` gives them.
            step: the payloads' step of the run, which may be an earlier one than that of the newest gradients.

        Raises:
            PayloadError: a payload or a learning rate is malformed; nothing has changed.
        """
        self._not_looking_ahead("apply")
        rates = self._checked_rates(lrs)
        layout, codec = self.layout, self._codec(step)
        config = codec.config
        self._agreement = []
        span = self._checked_span(payloads, codec)
        if not payloads:
            return
        # Compute 1 - lr * wd in double and round it once to float32: the same factor on every node.
        decays = [group["weight_decay"] for group in self.param_groups]
        factors = [float(np.float32(1 - lr * decay)) for lr, decay in zip(rates, decays, strict=True)]
        aggregator: Aggregator | None = None
        first = last = 0  # the chunks whose votes are loaded
        self._masters.begin()
        with full_precision(*self._devices):
            for batch in layout.batches(self._limit(len(payloads) * config.max_k), self._devices):
                device = self._devices[batch.tiles[0].entry]
                if aggregator is None or aggregator.device != device:
                    aggregator, last = Aggregator(config, len(payloads) * config.max_k, device), batch.start
                if batch.stop > last:
                    first, last = batch.start, min(batch.start + span, layout.chunk_count)
                    aggregator.load(codec.decode_on(device, payloads, first, last))
                signs = layout.blocks(batch, aggregator.signs(batch.start - first, batch.stop - first))
                views = self._masters.open(batch)
                # Two kernels, which round once each: a fused one would round differently on some devices. lr * sign is
                # exact, so the second gives the same with and without FMA.
                for factor, ours, _ in self._by_rate(factors, batch, views, signs):
                    if factor != 1:
                        multiply_each(ours, factor)
                for rate, ours, theirs in self._by_rate(rates, batch, views, signs):
                    subtract_from_each(ours, theirs, rate)
                self._masters.close(batch)
        self._finish(payloads, codec)

    def _finish(self, payloads: Sequence[bytes], codec: PayloadCodec) -> None:
        """After the published values have moved: the parameters follow, and figures are made."""
        self._masters.end()
        for other in self._codecs.values():
            if other is not codec:  # of another stage, whose payloads hardly come again
                other.forget()
        note_step(self)
        own = next((sent for sent in self._sent if sent in payloads), None) if self.observing else None
        if own is not None:
            owners = np.repeat(self._owners, [entry.chunks for entry in self.layout.entries])
            groups = len(self.param_groups)
            area = self.config.area
            self._agreement = statistics.agreement(own, payloads, codec.decode, owners, groups, area)

    def figures(self) -> list[dict[str, float]]:
        """Figures of the last step, a dictionary for each parameter group.

        ``gradient_norm`` and ``momentum_norm`` are the L2 norms of the gradient that was added last, and of delta;
        ``agreement`` is the share of this node's votes with the sign of the others' sum in the results applied last,
        NaN without others or if :attr:`observing` was off.
        """
        groups = len(self.param_groups)
        momentum = [float(torch.linalg.vector_norm(value)) for _, value in self.delta()] or [0.0] * len(self._owners)
        columns = {
            "gradient_norm": statistics.norms(self._norms or [0.0] * len(self._owners), self._owners, groups),
            "momentum_norm": statistics.norms(momentum, self._owners, groups),
            "agreement": self._agreement or [math.nan] * groups,
        }
        return [{name: values[group] for name, values in columns.items()} for group in range(groups)]

    def _directions(self) -> dict[int, torch.Tensor]:
        """What Muon makes of the gradients of its matrices, by the number of the parameter."""
        found: dict[int, torch.Tensor] = {}
        for owner, group in enumerate(self.param_groups):
            numbers = [
                number
                for number, parameter in enumerate(self._parameters)
                if group["muon"] and self._owners[number] == owner and parameter.grad is not None
            ]
            if numbers:
                matrices = [self._parameters[number] for number in numbers]
                gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
                states = [self.state[matrix] for matrix in matrices]
                found |= zip(numbers, to_directions(gradients, states, float(group["momentum"])), strict=True)
        return found

    def _by_rate(
        self, rates: Sequence[float], batch: Batch, some: Sequence[Any], others: Sequence[Any]
    ) -> Iterator[tuple[float, list[torch.Tensor], list[torch.Tensor]]]:
        """The tiles of a batch, grouped by the rate of their parameter's group; leaves out None."""
        if len(rates) == 1 and all(other is not None for other in others):
            yield rates[0], list(some), list(others)
            return
        owners = [self._owners[tile.entry] for tile in batch.tiles]
        for owner in dict.fromkeys(owners):
            pairs = [
                (one, other)
                for one, other, its in zip(some, others, owners, strict=True)
                if its == owner and one is not None and other is not None
            ]
            if pairs:
                ones, twos = zip(*pairs, strict=True)
                yield rates[owner], list(ones), list(twos)

    def _limit(self, votes: int) -> int:
        """Chunks per batch: as many as fit into the caches of a CPU, or into the budget."""
        config = self.config
        chunk = 4 * (6 * config.area + 4 * votes * config.chunk)  # bytes of all buffers, rounded up
        roomy = max(1, self.budget // 2 // chunk)
        if self._on_cpu:
            return min(roomy, 64 * (64 // config.chunk) ** 2 * min(8, torch.get_num_threads()))
        return min(roomy, 8192)

    def _checked_span(self, payloads: Sequence[bytes], codec: PayloadCodec) -> int:
        """Chunks whose votes of all payloads fit into half the budget, but at least one batch.

        Raises:
            PayloadError: not all chunks fit, so parts are decoded later, and a payload is malformed: none is used then.
        """
        votes = max(1, len(payloads) * codec.config.max_k)
        span = max(self._limit(votes), self.budget // 2 // (16 * votes))
        if span < self.layout.chunk_count:
            for payload in payloads:
                codec.decode(payload)
        return span

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Encode, and apply this node's own payload, as a node does that is alone in its run.

        A schedule counts the calls of :meth:`encode` since delta was last empty.

        Args:
            closure: computes the gradients and returns the loss; called at the look-ahead point if the configuration
                says so.

        Returns:
            The closure's result.
        """
        return step_alone(self, closure)

    @contextmanager
    def look_ahead(self) -> Iterator[None]:
        """Within the block, parameters hold ``p - lr * sign(delta)``; afterwards the same bytes as before (I2)."""
        self._not_looking_ahead("look_ahead")
        lrs = _floats(self.lr_bits())
        with torch.no_grad():
            self._saved = [parameter.detach().clone() for parameter in self._parameters]
        try:
            with torch.no_grad():
                for number, parameter in enumerate(self._parameters):
                    if self._delta is not None:
                        ahead = self._delta.get(number).sign_().mul_(-lrs[self._owners[number]])
                        parameter.copy_(ahead.add_(self._masters.get(number)))
            yield
        finally:
            with torch.no_grad():
                for parameter, saved in zip(self._parameters, self._saved, strict=True):
                    parameter.copy_(saved)
            self._saved = None

    def _deltas(self) -> Delta:
        """Delta, which is empty at first."""
        if self._delta is None:
            self._delta = Delta(self.layout, self._devices, self.holding.delta)
        return self._delta

    def _rates(self) -> list[float]:
        """The current learning rate of each entry."""
        rates = _floats(self.lr_bits())
        return [rates[owner] for owner in self._owners]

    def _check_streamed(self) -> None:
        """Refuse to stream gradients where they are needed together.

        Raises:
            ConfigError: they are.
        """
        why = "Muon makes a direction of a whole gradient" if any(one["muon"] for one in self.param_groups) else None
        if self.version != WIRE_VERSION:
            why = "local steps are made by an optimizer that needs them"
        if why is not None:
            raise ConfigError(
                f"trainer.gradients is 'streamed', which frees each gradient as it comes, but {why}. Choose "
                "trainer.gradients=kept."
            )

    @property
    def arrived(self) -> bool:
        """Whether a streamed gradient came since the last :meth:`encode` or :meth:`begin_gradients`."""
        return self._arrivals is not None and self._arrivals.arrived

    def begin_gradients(self, before: Callable[[], None] | None = None) -> None:
        """Begin a round of streamed gradients; those of a round that was given up stay in delta.

        Args:
            before: called before the first gradient of this and of each further round, such as to set learning rates.
        """
        if self._arrivals is not None:
            self._arrivals.begin()
            self._arrivals.before = before or self._arrivals.before

    def reset(self) -> None:
        """Empty delta and Muon's momentum; parameters stay."""
        self._delta = None
        self.begin_gradients()
        for state in self.state.values():
            state.pop(MOMENTUM, None)
        self.nonce = 0

    def held(self) -> dict[str, int]:
        """Bytes that this node holds between two steps besides parameters and gradients, by what they are."""
        momentum = sum(tensor.nbytes for _, tensor in self.momentum())
        delta = 0 if self._delta is None else self._delta.held
        return {"masters": self._masters.held, "delta": delta, "momentum": momentum}

    def delta(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields delta of each parameter, in the layout's order, as ``(name, float32 copy)``; nothing at first."""
        if self._delta is not None:
            for number, entry in enumerate(self.layout.entries):
                yield entry.name, self._delta.get(number)

    def load_delta(self, name: str, tensor: torch.Tensor) -> None:
        """Replace delta of one parameter.

        Raises:
            PsycheError: the name is unknown, or shape or dtype are wrong.
        """
        self._deltas().put(self.layout.expected(name, tensor), tensor)

    def momentum(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields Muon's momentum of each matrix that has one, as ``(name, float32 tensor)``, not copied."""
        for entry, parameter in zip(self.layout.entries, self._parameters, strict=True):
            if MOMENTUM in self.state.get(parameter, {}):
                yield entry.name, self.state[parameter][MOMENTUM]

    def load_momentum(self, name: str, tensor: torch.Tensor) -> None:
        """Replace Muon's momentum of one matrix.

        Raises:
            PsycheError: the name is unknown, or shape or dtype are wrong.
        """
        parameter = self._parameters[self.layout.expected(name, tensor)]
        self.state[parameter][MOMENTUM] = tensor.to(parameter.device, copy=True)

    def published(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the parameters that all nodes share, in the layout's order, as ``(name, float32 tensor)``.

        For a parameter of another dtype it yields the master. Tensors are not copied, but for split masters.
        """
        self._not_looking_ahead("published")
        for number, entry in enumerate(self.layout.entries):
            yield entry.name, self._masters.get(number).detach()

    def prints(self) -> torch.Tensor:
        """The sum of the bits of each parameter's published values, int64, [parameters], modulo 2^64."""
        self._not_looking_ahead("prints")
        return torch.stack([bits_sum(self._masters.get(number)).cpu() for number in range(len(self._parameters))])

    @torch.no_grad()
    def load_published(self, name: str, tensor: torch.Tensor) -> None:
        """Set one parameter to another node's :meth:`published` value.

        Raises:
            PsycheError: the name is unknown, or shape or dtype are wrong.
        """
        self._not_looking_ahead("load_published")
        self._masters.put(self.layout.expected(name, tensor), tensor)

    def state_dict(self) -> dict[str, Any]:
        """Like torch's, with ``delta`` and perhaps ``master`` for each parameter, the nonce and a checksum."""
        self._not_looking_ahead("state_dict")
        found = super().state_dict()
        state = {key: dict(values) for key, values in found["state"].items()}
        names = [name for group in self.param_groups for name in group["param_names"]]  # torch numbers in this order
        for name, delta in self.delta():
            state.setdefault(names.index(name), {})["delta"] = delta
        with torch.no_grad():
            for number, entry in enumerate(self.layout.entries):
                if (master := self._masters.saved(number)) is not None:
                    state.setdefault(names.index(entry.name), {})["master"] = master
        tensors = {f"{what} of {names[key]}": value for key, saved in state.items() for what, value in saved.items()}
        about = {"nonce": self.nonce}
        return {**found, "state": state, **about, "checksum": checksum(about, tensors)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict` exactly; torch's own method would round the state to the parameters' dtype.

        Leaves delta and masters out, with a warning, if they are damaged or not finite; delta then begins empty.

        Raises:
            ConfigError: the state belongs to other parameters.
        """
        self._not_looking_ahead("load_state_dict")
        groups = state_dict["param_groups"]
        ours = [group["param_names"] for group in self.param_groups]
        theirs = [group.get("param_names") for group in groups]
        if ours != theirs:
            raise ConfigError(f"this state is for the parameters {theirs}; the model has {ours}")
        state: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
        for mine, saved in zip(self.param_groups, groups, strict=True):
            for parameter, key, name in zip(mine["params"], saved["params"], mine["param_names"], strict=True):
                state[parameter] = {}
                for what, tensor in state_dict["state"].get(key, {}).items():
                    if tensor.shape != parameter.shape:
                        raise ConfigError(
                            f"the {what} of {name!r} was saved with shape {tuple(tensor.shape)}; "
                            f"the parameter has {tuple(parameter.shape)}"
                        )
                    with torch.inference_mode(False):
                        copy = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
                        state[parameter][what] = copy.copy_(tensor)
        rules = [{name: group[name] for name in ("muon", "momentum")} for group in self.param_groups]
        kept = [{**saved, **rule} for saved, rule in zip(groups, rules, strict=True)]
        super().load_state_dict({"state": {}, "param_groups": kept})
        self.reset()
        about = {"nonce": int(state_dict["nonce"])}
        tensors = {
            f"{what} of {name}": tensor
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            for what, tensor in state[parameter].items()
        }
        problem = damage(tensors, checksum(about, tensors), state_dict.get("checksum"))
        if problem is not None:
            logger.warning("the saved state of DisTrO is damaged and left out, so delta begins empty: %s", problem)
            return
        names = {
            id(p): name
            for group in self.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
        }
        for parameter, values in state.items():
            if "delta" in values and parameter.requires_grad:
                self.load_delta(names[id(parameter)], values.pop("delta"))
            if names[id(parameter)] in self.layout.number:
                self._masters.restore(self.layout.number[names[id(parameter)]], values.pop("master", None))
            self.state[parameter] = values
        self.nonce = about["nonce"]

    def _check_gradients(self) -> None:
        if self._arrivals is not None:
            self._norms = norms_of(self._arrivals.end(), values_of)
            self._refuse_endless([0.0 if math.isnan(norm) else norm for norm in self._norms], _ENDLESS)
            return
        kinds: dict[torch.dtype, list[int]] = {}
        for number, parameter in enumerate(self._parameters):
            if (gradient := parameter.grad) is None or parameter.numel() == 0:
                continue
            if gradient.layout != torch.strided:
                name = self.layout.entries[number].name
                raise ConfigError(f"the gradient of {name!r} is sparse; DisTrO needs dense ones (sparse=False)")
            kinds.setdefault(torch.promote_types(gradient.dtype, torch.float32), []).append(number)
        found = [0.0] * len(self._parameters)
        for dtype, numbers in kinds.items():
            gradients = [cast(torch.Tensor, self._parameters[number].grad) for number in numbers]
            norms = [norm.to(torch.float32) for norm in norms_of_each(gradients, dtype)]
            for number, norm in zip(numbers, values_of(norms), strict=True):
                found[number] = norm
        self._refuse_endless(found, _ENDLESS)
        self._norms = found

    def _refuse_endless(self, norms: Sequence[float], text: str) -> None:
        """Refuse norms of parameters of which one is not finite.

        Args:
            norms: one per parameter.
            text: what is wrong with a parameter, to be formatted with its name and its norm.

        Raises:
            NonFiniteGradientError: one is not finite.
        """
        problem = first_endless([entry.name for entry in self.layout.entries], norms, text)
        if problem is not None:
            raise NonFiniteGradientError(problem)

    def _checked_rates(self, lrs: Sequence[int]) -> list[float]:
        if len(lrs) != len(self.param_groups):
            raise PayloadError(
                f"{len(lrs)} learning rates; the optimizer has {len(self.param_groups)} parameter groups"
            )
        # The sign bit and the exponent of infinities and NaN: everything from 0x7F800000 on.
        if not all(0 <= bits < 0x7F800000 for bits in lrs):
            raise PayloadError(f"the learning rates have the bits {list(lrs)}; each must be finite and not negative")
        return _floats(lrs)

    def _not_looking_ahead(self, what: str) -> None:
        if self._saved is not None:
            raise PsycheError(
                f"{what} was called within look_ahead() or working(), where parameters are not the published ones"
            )


def step_alone(optimizer: DisTrO, closure: Callable[[], Any] | None) -> Any:
    """:meth:`DisTrO.step` of an optimizer with the methods of :class:`DisTrO`."""
    loss = None
    if closure is not None:
        with torch.enable_grad(), optimizer.look_ahead() if optimizer.config.lookahead else nullcontext():
            loss = closure()
    lrs, step = optimizer.lr_bits(), optimizer.nonce + 1
    optimizer.apply([optimizer.encode(step)], lrs, step)
    return loss


def first_endless(names: Sequence[str], norms: Sequence[float], text: str) -> str | None:
    """What is wrong with the first parameter whose norm is not finite; None if all are.

    Args:
        names: of the parameters.
        norms: of the parameters.
        text: to be formatted with a name and a norm.
    """
    for name, norm in zip(names, norms, strict=True):
        if not math.isfinite(norm):
            return text.format(name, norm)
    return None


def named_groups(parameters: Iterable[tuple[str, torch.Tensor]] | Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups with ``params`` and ``param_names``; a parameter that is tied within a group appears once.

    Raises:
        ConfigError: a parameter has no name.
    """
    items = list(parameters)
    groups = cast(list[dict[str, Any]], items if items and isinstance(items[0], dict) else [{"params": items}])
    named = []
    for group in groups:
        pairs = list(group["params"])
        if "param_names" in group:
            pairs = list(zip(group["param_names"], pairs, strict=True))
        if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            raise ConfigError("DisTrO needs the parameters' names; pass module.named_parameters()")
        unique: dict[int, tuple[str, torch.Tensor]] = {}
        for name, parameter in pairs:
            unique.setdefault(id(parameter), (name, parameter))
        names, tensors = [name for name, _ in unique.values()], [tensor for _, tensor in unique.values()]
        named.append({**group, "params": tensors, "param_names": names})
    return named


def _check_weight_decay(value: Any) -> None:
    """Check a weight decay.

    Raises:
        ConfigError: it is not a finite number from 0.
    """
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ConfigError(f"weight_decay is {value!r}; choose a finite number that is not negative")


def _floats(bits: Sequence[int]) -> list[float]:
    return list(struct.unpack(f"{len(bits)}f", struct.pack(f"{len(bits)}I", *bits)))


def values_of(scalars: list[torch.Tensor]) -> list[float]:
    """Bring scalars to the host, with one synchronization per device."""
    devices = {scalar.device for scalar in scalars}
    if len(devices) == 1:
        return cast(list[float], torch.stack(scalars).tolist())
    values: dict[int, float] = {}
    for device in devices:
        here = [number for number, scalar in enumerate(scalars) if scalar.device == device]
        values.update(zip(here, torch.stack([scalars[number] for number in here]).tolist(), strict=True))
    return [values[number] for number in range(len(scalars))]
