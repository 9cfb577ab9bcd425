"""Trains one small byte-level language model with one method."""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import time
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from psyche_lightning import distro, muon
from psyche_lightning.bench.quality import methods
from psyche_lightning.bench.quality.methods import Method, ring
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


@dataclass(frozen=True)
class Task:
    """What all methods are given alike.

    Attributes:
        size: of the model, one of :data:`SIZES`.
        nodes: nodes that train together.
        steps: optimizer steps.
        batch: samples of a node in a step.
    """

    size: str = "small"
    nodes: int = 4
    steps: int = 120
    batch: int = 4


@dataclass(frozen=True)
class Training:
    """One training, which always has the same outcome.

    Attributes:
        task: model and tokens.
        method: how nodes train together.
        rate: the highest learning rate; all methods have the same schedule.
        seed: of parameters and tokens.
    """

    task: Task
    method: Method
    rate: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """How a training ended.

    Attributes:
        loss: validation loss in nats per byte; NaN if it diverged.
        sent: bytes that a node sends in all.
        seconds: how long it took.
    """

    loss: float
    sent: float
    seconds: float


def build_model(size: str, seed: int) -> torch.nn.Module:
    """The model of the recipe ``demo`` in one of the :data:`SIZES`."""
    name, config = _described(size)
    torch.manual_seed(seed)
    built: torch.nn.Module = load_plugins().models()[name](config)
    return built


class Text:
    """The sources of Python's standard library, which every machine has; a tenth is held out."""

    def __init__(self) -> None:
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        data = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
        cut = len(data) * 9 // 10
        self.train, self.held_out = data[:cut].long(), data[cut:].long()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all bytes, in hex."""
        return hashlib.sha256(torch.cat([self.train, self.held_out]).numpy().tobytes()).hexdigest()

    def batch(self, generator: torch.Generator, count: int, *, held_out: bool = False) -> torch.Tensor:
        """Random windows, [count, CONTEXT]."""
        data = self.held_out if held_out else self.train
        starts = torch.randint(0, len(data) - CONTEXT, (count, 1), generator=generator)
        return data[starts + torch.arange(CONTEXT)]


def train(training: Training) -> Outcome:
    """Train a model, and measure it on text that it has not seen.

    Every method gets the same tokens in each step.
    """
    began = time.perf_counter()
    task, method = training.task, training.method
    text, model = Text(), build_model(task.size, training.seed)
    train_round = method.begin(model, task.nodes)
    data = torch.Generator().manual_seed(training.seed)
    sent = 0.0
    for first in range(0, task.steps, method.steps):
        steps = range(first, min(first + method.steps, task.steps))
        batches = [[text.batch(data, task.batch) for _ in range(task.nodes)] for _ in steps]
        sent += train_round(batches, [training.rate * _schedule(step / task.steps, step) for step in steps])
    fixed, losses = torch.Generator().manual_seed(12345), []
    with torch.no_grad():
        for _ in range(8):
            tokens = text.batch(fixed, 64, held_out=True)
            losses.append(float(model(input_ids=tokens, labels=tokens).loss))
    loss = mean(losses)
    return Outcome(loss if math.isfinite(loss) else math.nan, sent, time.perf_counter() - began)


def key(training: Training) -> dict[str, Any]:
    """All that the outcome of a training depends on, as JSON values."""
    task = training.task
    return {
        "method": str(training.method),
        "size": task.size,
        "nodes": task.nodes,
        "steps": task.steps,
        "batch": task.batch,
        "rate": training.rate,
        "seed": training.seed,
        "surroundings": _surroundings(task.size),
    }


@cache
def all_reduced(task: Task) -> float:
    """Bytes that a node sends in all if each step has a ring all-reduce of float32."""
    return task.steps * ring(build_model(task.size, 0), task.nodes)


def _schedule(done: float, step: int) -> float:
    """A warm-up of ten steps, and half a cosine down to a tenth."""
    return min(1.0, (step + 1) / 10) * (0.55 + 0.45 * math.cos(math.pi * done))


def _described(size: str) -> tuple[str, dict[str, Any]]:
    """Name and configuration of a model."""
    model = load_recipe("demo").model
    return model.name, {**model.config, **SIZES[size]}


@cache
def _surroundings(size: str) -> str:
    """A digest of the model, the text, the code that trains, and torch's version."""
    name, config = _described(size)
    model = type(build_model(size, 0))
    folders = (Path(distro.__file__).parent, Path(inspect.getfile(model)).parent)
    files = [*(file for folder in folders for file in sorted(folder.glob("*.py")))]
    files += [Path(module.__file__ or "") for module in (methods, muon)] + [Path(__file__)]
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    parts = [name, sorted(config.items()), CONTEXT, Text().digest, torch.__version__, code]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
