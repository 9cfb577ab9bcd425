"""Loss against bytes: small byte-level language models trained by several nodes on the same tokens.

All nodes have the same parameters, so one model serves them all: each node has its own samples and its own optimizer
state, and what they exchange is what the engine sends.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn

from psyche_lightning.distro import DisTrO, DistroConfig, select, transform
from psyche_lightning.distro.layout import Layout

SIZES = {"small": (64, 2), "medium": (96, 3)}
"""Width and layers."""
CONTEXT = 64
RATES = (2e-3, 4e-3, 8e-3)


@dataclass(frozen=True)
class Row:
    """One method on one model.

    Attributes:
        model: its size.
        method: its name.
        rate: the learning rate, the best of a few on the first seed.
        loss: mean validation loss over the seeds, in nats per byte.
        spread: its standard deviation over the seeds.
        sent: bytes that a node sends per round; for the all-reduce those of a ring, ``2 (n - 1) / n`` gradients.
        ratio: bytes of the all-reduce per byte of this method.
    """

    model: str
    method: str
    rate: float
    loss: float
    spread: float
    sent: float
    ratio: float


class Model(nn.Module):
    """A causal transformer over bytes; called with tokens, [batch, length], it gives the mean loss."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of each next byte, in nats."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        mask = nn.Transformer.generate_square_subsequent_mask(inputs.shape[1])
        hidden = self.blocks(self.tokens(inputs) + self.places.weight, mask=mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())


class Text:
    """The sources of Python's standard library: on every machine, and a tenth held out."""

    def __init__(self) -> None:
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        data = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
        cut = len(data) * 9 // 10
        self.train, self.held_out = data[:cut].long(), data[cut:].long()

    def batch(self, generator: torch.Generator, count: int, *, held_out: bool = False) -> torch.Tensor:
        """Random windows, [count, CONTEXT + 1]."""
        data = self.held_out if held_out else self.train
        starts = torch.randint(0, len(data) - CONTEXT - 1, (count, 1), generator=generator)
        return data[starts + torch.arange(CONTEXT + 1)]


Step = Callable[[list[list[torch.Tensor]], float], None]
"""Takes each node's gradients and the learning rate, and moves the model."""


def all_reduce(model: Model, nodes: int) -> tuple[Step, float]:
    """AdamW on the mean gradient."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())

    def step(gradients: list[list[torch.Tensor]], rate: float) -> None:
        for parameter, *own in zip(model.parameters(), *gradients, strict=True):
            parameter.grad = torch.stack(own).mean(dim=0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()

    return step, 2 * (nodes - 1) / nodes * size


def engine(model: Model, nodes: int, config: DistroConfig, *, overlap: bool = False) -> tuple[Step, float]:
    """This package; with overlap, a round's results are applied one round later."""
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


def float_rule(model: Model, nodes: int, config: DistroConfig) -> tuple[Step, float]:
    """The DeMo rule: values in floats, the mean of those that hit a position, and the sign of its inverse."""
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


def train(
    size: str,
    build: Callable[[Model, int], tuple[Step, float]],
    rate: float,
    seed: int,
    text: Text,
    *,
    nodes: int,
    rounds: int,
    batch: int,
) -> tuple[float, float]:
    """Train one model.

    Returns:
        The validation loss, and the bytes that a node sends per round.
    """
    torch.manual_seed(seed)
    model = Model(*SIZES[size])
    step, sent = build(model, nodes)
    data = torch.Generator().manual_seed(seed)
    parameters = list(model.parameters())
    for number in range(rounds):
        gradients = []
        for _ in range(nodes):
            loss = model(text.batch(data, batch))
            gradients.append(list(torch.autograd.grad(loss, parameters)))
        schedule = min(1.0, (number + 1) / 10) * (0.55 + 0.45 * math.cos(math.pi * number / rounds))
        step(gradients, rate * schedule)
    fixed = torch.Generator().manual_seed(12345)
    with torch.no_grad():
        losses = [float(model(text.batch(fixed, 64, held_out=True))) for _ in range(8)]
    return mean(losses), sent


def methods(ks: list[int], chunk: int) -> dict[str, Callable[[Model, int], tuple[Step, float]]]:
    """What is compared, by name; the all-reduce comes first."""
    found: dict[str, Callable[[Model, int], tuple[Step, float]]] = {"AdamW, all-reduce": all_reduce}
    middle = DistroConfig(chunk, ks[len(ks) // 2])
    found[f"DeMo rule in floats, k={middle.k}"] = lambda model, nodes: float_rule(model, nodes, middle)
    for k in ks:
        config = DistroConfig(chunk, k)
        found[f"this engine, k={k}"] = lambda model, nodes, config=config: engine(model, nodes, config)  # type: ignore[misc]
    found[f"this engine, k={middle.k}, overlap"] = lambda model, nodes: engine(model, nodes, middle, overlap=True)
    return found


def compare(
    sizes: list[str], ks: list[int], chunk: int, *, nodes: int, rounds: int, batch: int, seeds: int
) -> Iterator[Row]:
    """Train each size with each method; rates are tuned on the first seed."""
    text = Text()
    for size in sizes:
        reference = 0.0
        for name, build in methods(ks, chunk).items():
            outcomes = {}
            for rate in RATES:
                outcomes[rate] = train(size, build, rate, 0, text, nodes=nodes, rounds=rounds, batch=batch)
            rate = min(outcomes, key=lambda tried: outcomes[tried][0])
            losses, sent = [outcomes[rate][0]], outcomes[rate][1]
            for seed in range(1, seeds):
                losses.append(train(size, build, rate, seed, text, nodes=nodes, rounds=rounds, batch=batch)[0])
            reference = reference or sent
            spread = stdev(losses) if seeds > 1 else 0.0
            yield Row(size, name, rate, mean(losses), spread, sent, reference / sent)
