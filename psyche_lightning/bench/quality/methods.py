"""Ways to train one model on several nodes, each with the bytes that a node sends.

All nodes have the same parameters between rounds, so one model serves all of them. Each node has its own samples and
its own optimizer state.
"""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import torch

from psyche_lightning.distro import DisTrO, DistroConfig, LocalSteps, select, transform
from psyche_lightning.distro.holding import DeltaForm, Holding
from psyche_lightning.distro.layout import Layout
from psyche_lightning.errors import ConfigError
from psyche_lightning.muon import MuonAdamW, hidden_matrices

Batches = Sequence[Sequence[torch.Tensor]]
"""Token ids of each step and node, int64 [samples, tokens]."""
Round = Callable[[Batches, Sequence[float]], float]
"""Trains the model with the batches and learning rates of a round's steps; returns the bytes that a node sends."""
Inner = Literal["adamw", "muon"]
RARE = {"then": 0, "since": 0, "delta": "float32"}
"""Fields that most trainings leave at these values, and whose texts then leave them out."""
TITLES = {"adamw": "AdamW", "muon": "Muon"}


@dataclass(frozen=True)
class Method(ABC):
    """One way to train together. Its fields are what can be chosen.

    Attributes:
        name: of the class, in commands.
        title: of the class, for people; ``{inner}`` stands for the optimizer.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    @property
    def steps(self) -> int:
        """Optimizer steps in a round."""
        return int(vars(self).get("h", 1))

    @property
    def family(self) -> str:
        """What it is, without its setting, for people."""
        return self.title.format(inner=TITLES.get(vars(self).get("inner", "")))

    @property
    def setting(self) -> str:
        """Length of a round, and what is sent of each chunk, for people."""
        own = vars(self)
        rounds = [f"H={own['h']}"] if "h" in own else []
        later = f" and {own['then']} from round {own['since']} on" if own.get("then") else ""
        density = [f"k={own['k']}{later}", f"{own['chunk']}x{own['chunk']}"] if "k" in own else []
        held = [f"delta in {own['delta']}"] if own.get("delta", "float32") != "float32" else []
        return ", ".join(rounds + density + held)

    @abstractmethod
    def begin(self, model: torch.nn.Module, nodes: int) -> Round:
        """Prepare to train a model."""

    def __str__(self) -> str:
        given = [(key, value) for key, value in asdict(self).items() if value != RARE.get(key)]
        values = [f"{key}={str(value).lower()}" for key, value in given]
        return f"{self.name}:{','.join(values)}"


@dataclass(frozen=True)
class AllReduce(Method):
    """One optimizer on the mean gradient, as DDP computes it.

    Attributes:
        inner: the optimizer.
    """

    inner: Inner = "adamw"
    name = "allreduce"
    title = "{inner}, all-reduce"

    def begin(self, model: torch.nn.Module, nodes: int) -> Round:
        """Each step takes all nodes' samples at once, which gives the mean gradient."""
        optimizer = _optimizer(self.inner, model)

        def train(batches: Batches, rates: Sequence[float]) -> float:
            for batch, rate in zip(batches, rates, strict=True):
                _step(optimizer, model, torch.cat(list(batch)), rate)
            return ring(model, nodes)

        return train


@dataclass(frozen=True)
class DiLoCo(Method):
    """Nodes take steps of their own, and an outer step of Nesterov's momentum follows the mean of the displacements.

    Attributes:
        h: steps in a round.
        inner: the optimizer of a node's steps.
        outer_rate: learning rate of the outer step.
        momentum: of the outer step.
    """

    h: int = 30
    inner: Inner = "adamw"
    outer_rate: float = 0.7
    momentum: float = 0.9
    name = "diloco"
    title = "DiLoCo of {inner}, float32"

    def begin(self, model: torch.nn.Module, nodes: int) -> Round:
        """Each node trains a copy of its own for a round."""
        copies = [copy.deepcopy(model) for _ in range(nodes)]
        optimizers = [_optimizer(self.inner, one) for one in copies]
        outer = torch.optim.SGD(model.parameters(), self.outer_rate, self.momentum, nesterov=self.momentum > 0)

        def train(batches: Batches, rates: Sequence[float]) -> float:
            for node, (one, optimizer) in enumerate(zip(copies, optimizers, strict=True)):
                with torch.no_grad():
                    for own, shared in zip(one.parameters(), model.parameters(), strict=True):
                        own.copy_(shared)
                for batch, rate in zip(batches, rates, strict=True):
                    _step(optimizer, one, batch[node], rate)
            with torch.no_grad():
                for group in zip(*(one.parameters() for one in (model, *copies)), strict=True):
                    group[0].grad = group[0] - torch.stack(group[1:]).mean(dim=0)
            outer.step()
            return ring(model, nodes)

        return train


@dataclass(frozen=True)
class DeMo(Method):
    """The published DeMo rule in floats: the sign of the transformed mean over those that chose a position.

    Attributes:
        k: coefficients of each chunk that are sent, as a float and a position of 8 bytes.
        chunk: side of the chunks.
        decay: see :class:`~psyche_lightning.distro.DistroConfig`.
    """

    k: int = 12
    chunk: int = 64
    decay: float = 0.999
    name = "demo"
    title = "DeMo rule in floats"

    def begin(self, model: torch.nn.Module, nodes: int) -> Round:
        """Each node has its own delta."""
        config = DistroConfig(self.chunk, self.k, self.decay)
        layout = Layout(model.named_parameters(), config.chunk)
        named = dict(model.named_parameters())
        parameters = [named[entry.name] for entry in layout.entries]
        (whole,) = layout.batches(layout.chunk_count)
        deltas = torch.zeros(nodes, layout.chunk_count, config.chunk, config.chunk)

        def add(chunks: torch.Tensor, tensors: Sequence[torch.Tensor], factor: float) -> None:
            views = layout.views(whole, [layout.folded(number, tensor) for number, tensor in enumerate(tensors)])
            for block, view in zip(layout.blocks(whole, chunks), views, strict=True):
                if view is not None:
                    block.add_(view, alpha=factor)

        def subtract(chunks: torch.Tensor, factor: float) -> None:
            views = layout.views(whole, [layout.folded(number, one) for number, one in enumerate(parameters)])
            for block, view in zip(layout.blocks(whole, chunks), views, strict=True):
                if view is not None:
                    view.sub_(block, alpha=factor)

        def train(batches: Batches, rates: Sequence[float]) -> float:
            for batch, rate in zip(batches, rates, strict=True):
                total = torch.zeros(layout.chunk_count, config.area)
                hits = torch.zeros_like(total)
                for delta, tokens in zip(deltas, batch, strict=True):
                    gradients = torch.autograd.grad(_loss(model, tokens), parameters)
                    with torch.no_grad():
                        add(delta.mul_(config.decay), gradients, rate)
                        positions, values = select(transform.forward(delta), config.k)
                        transform.subtract(delta, positions, values * config.removal)
                        total.scatter_add_(1, positions, values)
                        hits.scatter_add_(1, positions, torch.ones_like(values))
                with torch.no_grad():
                    subtract(transform.inverse((total / hits.clamp(min=1)).view_as(deltas[0])).sign_(), rate)
            return 12 * config.k * layout.chunk_count

        return train


@dataclass(frozen=True)
class Votes(Method):
    """This package's DisTrO: votes at each step.

    Attributes:
        k: votes for each chunk.
        chunk: side of the chunks.
        decay: see :class:`~psyche_lightning.distro.DistroConfig`.
        muon: whether gradients of hidden matrices go through Muon first.
        overlap: whether results are applied one round later.
        then: another k, from the round ``since`` on; 0 for none.
        since: the first round with it, from 1.
        delta: the dtype in which delta is kept.
    """

    k: int = 12
    chunk: int = 64
    decay: float = 0.95
    muon: bool = False
    overlap: bool = False
    then: int = 0
    since: int = 0
    delta: DeltaForm = "float32"
    name = "distro"
    title = "DisTrO"

    @property
    def family(self) -> str:
        """What it is, without its setting, for people."""
        return self.title + ", Muon" * self.muon + ", overlap" * self.overlap

    def begin(self, model: torch.nn.Module, nodes: int) -> Round:
        """Each node has its own DisTrO on the one model."""
        hidden = hidden_matrices(model) if self.muon else {}
        named: dict[bool, list[tuple[str, torch.Tensor]]] = {}
        for name, parameter in model.named_parameters():
            named.setdefault(hidden.get(name, False), []).append((name, parameter))
        config, steps = _compression(self), itertools.count(1)
        optimizers = [
            DisTrO(
                [{"params": group, "muon": muon} for muon, group in named.items()],
                0.0,
                config=config,
                holding=Holding(delta=self.delta),
            )
            for _ in range(nodes)
        ]
        waiting: deque[tuple[list[bytes], int]] = deque()

        def train(batches: Batches, rates: Sequence[float]) -> float:
            for batch, rate in zip(batches, rates, strict=True):
                payloads, step = [], next(steps)
                for optimizer, tokens in zip(optimizers, batch, strict=True):
                    _set_rate(optimizer, rate)
                    optimizer.zero_grad()
                    torch.autograd.backward(_loss(model, tokens))
                    payloads.append(optimizer.encode(step))
                waiting.append((payloads, step))
                if len(waiting) > self.overlap:
                    agreed, its = waiting.popleft()
                    optimizers[0].apply(agreed, optimizers[0].lr_bits(), its)
            return optimizers[0].payload_size(step)

        return train


@dataclass(frozen=True)
class Local(Method):
    """This package's local steps: nodes take steps of their own, and send the strongest entries of where these led.

    Attributes:
        h: steps in a round.
        k: entries of each chunk.
        chunk: side of the chunks.
        decay: of the error feedback; see :class:`~psyche_lightning.distro.DistroConfig`.
        scale: factor on the mean of the displacements.
        inner: the optimizer of a node's steps.
        join_every: steps after which a newcomer takes a node's place, each node's in turn: its optimizer has no state
            and its error feedback is empty. 0 for never.
        then: another k, from the round ``since`` on; 0 for none.
        since: the first round with it, from 1.
        delta: the dtype in which delta is kept.
    """

    h: int = 8
    k: int = 50
    chunk: int = 32
    decay: float = 0.95
    scale: float = 2.0
    inner: Inner = "muon"
    join_every: int = 0
    then: int = 0
    since: int = 0
    delta: DeltaForm = "float32"
    name = "local"
    title = "local steps of {inner}"

    @property
    def setting(self) -> str:
        """Also how often a newcomer takes a node's place."""
        return super().setting + (f", a newcomer every {self.join_every} steps" if self.join_every else "")

    def begin(self, model: torch.nn.Module, nodes: int) -> Round:
        """Each node has its own optimizer, and its own error feedback, on the one model."""
        config, rounds = _compression(self), itertools.count(1)

        def newcomer() -> tuple[LocalSteps, torch.optim.Optimizer]:
            holding = Holding(delta=self.delta)
            shared = LocalSteps(model.named_parameters(), 0.0, config, self.scale, holding=holding)
            return shared, _optimizer(self.inner, model)

        members = [newcomer() for _ in range(nodes)]
        done = joined = 0

        def train(batches: Batches, rates: Sequence[float]) -> float:
            nonlocal done, joined
            while self.join_every and joined < done // self.join_every:
                members[joined % nodes] = newcomer()
                joined += 1
            done += len(batches)
            payloads, round_ = [], next(rounds)
            for node, (sharing, optimizer) in enumerate(members):
                with sharing.working():
                    for batch, rate in zip(batches, rates, strict=True):
                        _step(optimizer, model, batch[node], rate)
                payloads.append(sharing.encode(round_))
            one, _ = members[0]
            one.apply(payloads, one.lr_bits(), round_)
            return one.payload_size(round_)

        return train


KINDS: dict[str, type[Method]] = {kind.name: kind for kind in (AllReduce, DiLoCo, DeMo, Votes, Local)}
DEFAULT = ("allreduce", "allreduce:inner=muon", "demo", "distro", "distro:muon=true", "local")
LONG = (
    "allreduce",
    "allreduce:inner=muon",
    "diloco:h=8",
    "diloco:h=30",
    *(f"demo:k={k}" for k in (2, 12, 32)),
    *(f"distro:k={k},muon={muon}" for muon in ("false", "true") for k in (2, 4, 12, 32)),
    *(f"distro:k=64,chunk=32,muon={muon}" for muon in ("false", "true")),
    "distro:muon=true,overlap=true",
    "local:h=4,k=24",
    *(f"local:k={k}" for k in (12, 50, 128)),
    "local:h=16,k=110",
    "local:k=64,inner=adamw",
)


def method(text: str) -> Method:
    """The method of a text such as ``distro:k=8,chunk=64``; what it leaves out has its default.

    Raises:
        ConfigError: there is no such method or field, or a value is wrong.
    """
    name, _, rest = text.partition(":")
    if name not in KINDS:
        raise ConfigError(f"--method is {text!r}; it begins with one of {', '.join(KINDS)}.")
    kind = KINDS[name]
    types = get_type_hints(kind)
    known = [item.name for item in fields(kind)]
    values: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, _, value = pair.partition("=")
        if key not in known:
            raise ConfigError(f"--method {text!r} has the unknown field {key!r}; {name!r} has {', '.join(known)}.")
        values[key] = _value(types[key], value, f"--method {text!r}: {key}")
    found = kind(**values)
    if isinstance(found, DeMo):
        DistroConfig(found.chunk, found.k, found.decay)  # checks the values
    if isinstance(found, (Votes, Local)):
        if (found.then > 0) != (found.since > 0):
            raise ConfigError(f"--method {text!r}: then and since belong together, such as k=96,then=6,since=24.")
        _compression(found)
    if found.steps < 1:
        raise ConfigError(f"--method {text!r}: h is {found.steps}; choose a whole number from 1 on.")
    if isinstance(found, Local) and found.join_every < 0:
        raise ConfigError(f"--method {text!r}: join_every is {found.join_every}; choose a whole number, 0 for never.")
    return found


def _compression(chosen: Votes | Local) -> DistroConfig:
    """What a method's fields say of k and chunks."""
    later = [{"from_step": chosen.since, "k": chosen.then}] if chosen.then else []
    return DistroConfig(chosen.chunk, chosen.k, chosen.decay, schedule=later)


def _value(kind: Any, text: str, what: str) -> Any:
    choices = {"true": True, "false": False} if kind is bool else {name: name for name in get_args(kind)}
    if choices:
        if text not in choices:
            raise ConfigError(f"{what} is {text!r}; choose {' or '.join(choices)}.")
        return choices[text]
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{what} is {text!r}; a number was expected.") from None


def _optimizer(inner: Inner, model: torch.nn.Module) -> torch.optim.Optimizer:
    if inner == "muon":
        return MuonAdamW(model, weight_decay=0.1)
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)


def _loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _step(optimizer: torch.optim.Optimizer, model: torch.nn.Module, tokens: torch.Tensor, rate: float) -> None:
    _set_rate(optimizer, rate)
    optimizer.zero_grad()
    torch.autograd.backward(_loss(model, tokens))
    optimizer.step()


def ring(model: torch.nn.Module, nodes: int) -> float:
    """Bytes that a node sends in a ring all-reduce of float32: ``2 (n - 1) / n`` models."""
    return 2 * (nodes - 1) / nodes * 4 * sum(parameter.numel() for parameter in model.parameters())
