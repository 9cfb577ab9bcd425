"""Loss against bytes: several nodes train small byte-level language models on the same tokens.

All nodes have the same parameters, so one model serves all of them. Each node has its own samples and its own optimizer
state, and they exchange what the engine sends.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import torch

from psyche_lightning.distro import DisTrO, DistroConfig, select, transform
from psyche_lightning.distro.layout import Layout
from psyche_lightning.errors import ConfigError
from psyche_lightning.plugins import load_plugins
from psyche_lightning.recipe import load_recipe

SIZES: dict[str, dict[str, int]] = {
    "small": {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "kv_lora_rank": 48,
        "v_head_dim": 32,
    },
    "demo": {},
}
"""Differences from the model of the recipe ``demo``."""
CONTEXT = 64
DEFAULT_RATES = (1e-3, 2e-3, 4e-3)
SETTINGS = ("32/64", "2/64", "8/64", "32/32", "64/32")
""""K/CHUNK" of each setting that is compared by default."""


@dataclass(frozen=True)
class Method:
    """One way to train together.

    Attributes:
        family: its name, without the setting.
        rule: ``adamw`` (all-reduce), ``floats`` (the DeMo rule) or ``engine``.
        config: the compression.
        overlap: whether results are applied one round later.
    """

    family: str
    rule: str
    config: DistroConfig = field(default_factory=DistroConfig)
    overlap: bool = False

    @property
    def setting(self) -> str:
        """Votes and chunks, for people; empty without compression."""
        return "" if self.rule == "adamw" else f"k={self.config.k}, {self.config.chunk}x{self.config.chunk}"


@dataclass(frozen=True)
class Plan:
    """What all trainings share.

    Attributes:
        nodes: nodes that train together.
        rounds: rounds of each training.
        batch: samples of a node in a round.
        seeds: trainings with the best learning rate.
        rates: learning rates to try with the first seed.
    """

    nodes: int = 4
    rounds: int = 120
    batch: int = 4
    seeds: int = 3
    rates: tuple[float, ...] = DEFAULT_RATES


@dataclass(frozen=True)
class Row:
    """The result of one method on one model.

    Attributes:
        model: its size.
        family: see :class:`Method`.
        setting: see :class:`Method`.
        rate: the learning rate that was best with the first seed.
        loss: mean validation loss over the seeds, in nats per byte.
        spread: standard deviation of the loss over the seeds.
        sent: bytes that a node sends per round; for the all-reduce those of a ring, ``2 (n - 1) / n`` gradients.
        ratio: bytes of the all-reduce for each byte of this method.
    """

    model: str
    family: str
    setting: str
    rate: float
    loss: float
    spread: float
    sent: float
    ratio: float


def build_model(size: str, seed: int) -> torch.nn.Module:
    """The model of the recipe ``demo`` in one of the :data:`SIZES`."""
    model = load_recipe("demo").model
    torch.manual_seed(seed)
    built: torch.nn.Module = load_plugins().models()[model.name]({**model.config, **SIZES[size]})
    return built


class Text:
    """The sources of Python's standard library, which every machine has; a tenth is held out."""

    def __init__(self) -> None:
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        data = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
        cut = len(data) * 9 // 10
        self.train, self.held_out = data[:cut].long(), data[cut:].long()

    def batch(self, generator: torch.Generator, count: int, *, held_out: bool = False) -> torch.Tensor:
        """Random windows, [count, CONTEXT]."""
        data = self.held_out if held_out else self.train
        starts = torch.randint(0, len(data) - CONTEXT, (count, 1), generator=generator)
        return data[starts + torch.arange(CONTEXT)]


Step = Callable[[list[list[torch.Tensor]], float], None]
"""Takes each node's gradients and the learning rate, and updates the model."""


def all_reduce(model: torch.nn.Module, nodes: int) -> tuple[Step, float]:
    """AdamW on the mean gradient."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())

    def step(gradients: list[list[torch.Tensor]], rate: float) -> None:
        for parameter, *own in zip(model.parameters(), *gradients, strict=True):
            parameter.grad = torch.stack(own).mean(dim=0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()

    return step, 2 * (nodes - 1) / nodes * size


def engine(model: torch.nn.Module, nodes: int, config: DistroConfig, *, overlap: bool = False) -> tuple[Step, float]:
    """This package; with overlap, results are applied one round later."""
    optimizers = [DisTrO(model.named_parameters(), 0.0, config=config) for _ in range(nodes)]
    waiting: deque[list[bytes]] = deque()

    def step(gradients: list[list[torch.Tensor]], rate: float) -> None:
        payloads = []
        for optimizer, own in zip(optimizers, gradients, strict=True):
            for parameter, gradient in zip(model.parameters(), own, strict=True):
                parameter.grad = gradient
            optimizer.param_groups[0]["lr"] = rate
            payloads.append(optimizer.encode())
        waiting.append(payloads)
        if len(waiting) > overlap:
            optimizers[0].apply(waiting.popleft(), optimizers[0].lr_bits())

    return step, optimizers[0].max_payload


def float_rule(model: torch.nn.Module, nodes: int, config: DistroConfig) -> tuple[Step, float]:
    """The DeMo rule in floats: the sign of the inverse transform of the mean over those that chose a position."""
    layout = Layout(model.named_parameters(), config.chunk)
    named = dict(model.named_parameters())
    parameters = [named[entry.name] for entry in layout.entries]
    places = [list(named).index(entry.name) for entry in layout.entries]
    (batch,) = layout.batches(layout.chunk_count)
    deltas = torch.zeros(nodes, layout.chunk_count, config.chunk, config.chunk)

    def fill(chunks: torch.Tensor, own: list[torch.Tensor], rate: float) -> None:
        views = layout.views(batch, [layout.folded(n, own[place]) for n, place in enumerate(places)])
        for block, view in zip(layout.blocks(batch, chunks), views, strict=True):
            if view is not None:
                block.add_(view, alpha=rate)

    @torch.no_grad()
    def step(gradients: list[list[torch.Tensor]], rate: float) -> None:
        total = torch.zeros(layout.chunk_count, config.area)
        hits = torch.zeros_like(total)
        for delta, own in zip(deltas, gradients, strict=True):
            delta.mul_(config.decay)
            fill(delta, own, rate)
            positions, values = select(transform.forward(delta), config.k)
            transform.subtract(delta, positions, values * config.removal)
            total.scatter_add_(1, positions, values)
            hits.scatter_add_(1, positions, torch.ones_like(values))
        signs = transform.inverse((total / hits.clamp(min=1)).view_as(deltas[0])).sign_()
        views = layout.views(batch, [layout.folded(n, parameter) for n, parameter in enumerate(parameters)])
        for block, view in zip(layout.blocks(batch, signs), views, strict=True):
            if view is not None:
                view.sub_(block, alpha=rate)

    return step, 12 * config.k * layout.chunk_count


def build_step(method: Method, model: torch.nn.Module, nodes: int) -> tuple[Step, float]:
    """A method's step, and the bytes that a node sends in a step."""
    if method.rule == "adamw":
        return all_reduce(model, nodes)
    if method.rule == "floats":
        return float_rule(model, nodes, method.config)
    return engine(model, nodes, method.config, overlap=method.overlap)


def train(size: str, method: Method, rate: float, seed: int, plan: Plan) -> tuple[float, float]:
    """Train one model.

    Returns:
        The validation loss, and the bytes that a node sends per round.
    """
    text, model = Text(), build_model(size, seed)
    step, sent = build_step(method, model, plan.nodes)
    data = torch.Generator().manual_seed(seed)
    parameters = list(model.parameters())
    for number in range(plan.rounds):
        gradients = []
        for _ in range(plan.nodes):
            tokens = text.batch(data, plan.batch)
            gradients.append(list(torch.autograd.grad(model(input_ids=tokens, labels=tokens).loss, parameters)))
        schedule = min(1.0, (number + 1) / 10) * (0.55 + 0.45 * math.cos(math.pi * number / plan.rounds))
        step(gradients, rate * schedule)
    fixed, losses = torch.Generator().manual_seed(12345), []
    with torch.no_grad():
        for _ in range(8):
            tokens = text.batch(fixed, 64, held_out=True)
            losses.append(float(model(input_ids=tokens, labels=tokens).loss))
    return mean(losses), sent


def methods(settings: Sequence[str], decay: float) -> list[Method]:
    """The methods to compare; the all-reduce comes first.

    Args:
        settings: ``"K/CHUNK"`` each; the engine and the DeMo rule run with all of them, and with overlap the first.
        decay: see :class:`DistroConfig`.

    Raises:
        ConfigError: a setting has another form, or is out of range.
    """
    found = [Method("AdamW, all-reduce", "adamw")]
    for number, setting in enumerate(settings):
        try:
            k, chunk = map(int, setting.split("/"))
        except ValueError:
            raise ConfigError(f"the setting {setting!r} is not of the form K/CHUNK, such as 8/64") from None
        config = DistroConfig(chunk, k, decay)
        found.append(Method("DeMo rule in floats", "floats", config))
        found.append(Method("this engine", "engine", config))
        if number == 0:
            found.append(Method("this engine, overlap", "engine", config, overlap=True))
    return found


def compare(sizes: Sequence[str], compared: Sequence[Method], plan: Plan, workers: int = 2) -> Iterator[Row]:
    """Train each size with each method, several at a time, in processes of one thread."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for size in sizes:
            tried = {
                (method, rate): pool.submit(train, size, method, rate, 0, plan)
                for method in compared
                for rate in plan.rates
            }
            reference = 0.0
            for method in compared:
                outcomes = {rate: tried[method, rate].result() for rate in plan.rates}
                # A rate at which the training diverged is never the best: NaN is not less than anything, nor more.
                rate = min(outcomes, key=lambda one: (math.isnan(outcomes[one][0]), outcomes[one][0]))
                further = [pool.submit(train, size, method, rate, seed, plan) for seed in range(1, plan.seeds)]
                losses = [outcomes[rate][0], *(one.result()[0] for one in further)]
                sent = outcomes[rate][1]
                reference = reference or sent
                spread = stdev(losses) if len(losses) > 1 else 0.0
                yield Row(size, method.family, method.setting, rate, mean(losses), spread, sent, reference / sent)


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """Plot loss against bytes: one panel per model, one line per family, with the spread over the seeds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row.model for row in rows))
    figure, panels = pyplot.subplots(1, len(models), figsize=(8 * len(models), 5), layout="constrained", squeeze=False)
    for axes, model in zip(panels[0], models, strict=True):
        for family in dict.fromkeys(row.family for row in rows):
            line = sorted((r.sent, r.loss, r.spread, r.setting) for r in rows if (r.model, r.family) == (model, family))
            sent, losses, spreads, settings = zip(*line, strict=True)
            axes.errorbar(sent, losses, spreads, fmt="o-", capsize=3, label=family)
            for place, loss, setting in zip(sent, losses, settings, strict=True):
                axes.annotate(setting, (place, loss), xytext=(5, 5), textcoords="offset points", fontsize=7)
        axes.set(title=f"{title}: {model}", xlabel="bytes that a node sends per round", ylabel="loss, nats per byte")
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
