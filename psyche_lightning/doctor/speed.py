"""How quickly this device trains a recipe: steps of its own where they fit, else operations and a measured rate."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from psyche_lightning.bench.engine import best
from psyche_lightning.distro import DisTrO
from psyche_lightning.plugins import load_plugins
from psyche_lightning.recipe.estimate import Estimate, meta_model

if TYPE_CHECKING:
    from psyche_lightning.recipe import Recipe

STEPS = 12
"""Micro-batches that are timed at most, after one that is not."""
MATRIX = 1024
SAMPLE = 4 << 20
"""Parameters of the matrix on which DisTrO is timed when the model itself is not built."""
_DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}
Progress = Callable[[str, float], None]
"""Called with what is done now, and which part of all is behind, 0 to 1."""


@dataclass(frozen=True)
class Speed:
    """What a device does; times in seconds.

    Attributes:
        sample_seconds: forward and backward of one sample.
        encode_seconds: of one's own update, DisTrO.
        apply_seconds: of all nodes' updates.
        micro_batch: samples that went through at once.
        steps: micro-batches that were timed; 0 when it was computed instead.
        how: how these figures came about, for people.
    """

    sample_seconds: float
    encode_seconds: float
    apply_seconds: float
    micro_batch: int
    steps: int
    how: str


def measure(
    recipe: Recipe,
    estimate: Estimate,
    device: torch.device,
    *,
    nodes: int,
    share: int,
    fits: bool,
    seconds: float,
    progress: Progress = lambda what, done: None,
) -> Speed:
    """Train a few micro-batches of random tokens, if that takes no longer than it may; else compute.

    Args:
        recipe: what is trained, with which precision and threads.
        estimate: its size.
        device: that computes.
        nodes: whose updates are applied.
        share: samples of one node in a round.
        fits: whether the model fits into the memory.
        seconds: to spend, about.
        progress: is told how far it is.
    """
    before = torch.get_num_threads()
    if recipe.trainer.threads is not None:
        torch.set_num_threads(recipe.trainer.threads)
    try:
        progress("matrix products", 0.0)
        rate = matmul_rate(device, _DTYPES.get(recipe.trainer.precision, getattr(torch, recipe.model.dtype)))
        progress("operations of a sample", 0.1)
        operations = sample_flops(recipe, estimate)
        expected = operations / rate  # at best: a real step takes about twice as long
        most = min(recipe.trainer.micro_batch_size, share)
        for micro_batch in dict.fromkeys((most, 1)):
            if fits and 4 * expected * micro_batch <= seconds:
                speed = _train(recipe, device, micro_batch, nodes, seconds, progress)
                shortened = "" if micro_batch == most else f", as {most} would have taken too long"
                return replace(speed, how=speed.how + shortened)
        progress("DisTrO", 0.6)
        encode, apply = _distro_by_size(recipe, estimate, device, nodes)
        why = f"a step takes longer than {seconds:g} s" if fits else "the model does not fit"
        how = (
            f"computed, as {why}: {operations:.3g} operations a sample at the {rate / 1e9:.3g} GFLOP/s of a matrix "
            "product; real steps reach a third to two thirds of that"
        )
        return Speed(expected, encode, apply, most, 0, how)
    finally:
        torch.set_num_threads(before)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second (a multiply-add counts as two) of a large matrix product."""
    matrix = torch.randn(MATRIX, MATRIX, device=device, dtype=dtype)

    def product() -> None:
        torch.mm(matrix, matrix)
        _finish(device)

    return 2 * MATRIX**3 / best(product, 5)


def sample_flops(recipe: Recipe, estimate: Estimate) -> float:
    """Operations of forward and backward of one sample, counted on the meta device.

    A model that cannot be run there counts as 6 operations for each trainable parameter and token.
    """
    counter = FlopCounterMode(display=False)
    try:
        model = meta_model(recipe).train()
        ids = torch.zeros(1, recipe.data.seq_len, dtype=torch.long, device="meta")
        with counter:
            model(input_ids=ids, labels=ids).loss.backward()
    except Exception:  # whatever a model does with values that are not there
        return 6.0 * estimate.trainable * recipe.data.seq_len
    return float(counter.get_total_flops())


def _train(
    recipe: Recipe, device: torch.device, micro_batch: int, nodes: int, seconds: float, progress: Progress
) -> Speed:
    from psyche_lightning.train.module import CausalModule

    progress("the model", 0.15)
    torch.manual_seed(recipe.run.seed)
    dtype = torch.bfloat16 if recipe.trainer.precision == "bf16-true" else getattr(torch, recipe.model.dtype)
    model = load_plugins().models()[recipe.model.name](recipe.model.options).to(device, dtype).train()
    module = CausalModule(model, recipe.optimizer, recipe.schedule)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 2)
    mixed = _DTYPES[recipe.trainer.precision] if recipe.trainer.precision.endswith("-mixed") else None

    def step() -> None:
        ids = torch.randint(vocabulary, (micro_batch, recipe.data.seq_len), device=device)
        context = torch.autocast(device.type, mixed) if mixed else contextlib.nullcontext()
        with context:
            loss = module.training_step({"input_ids": ids, "labels": ids}, 0)
        loss.backward()  # type: ignore[no-untyped-call]
        _finish(device)

    step()
    times: list[float] = []
    until = time.monotonic() + seconds / 2
    while len(times) < 2 or (len(times) < STEPS and time.monotonic() < until):
        model.zero_grad()
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
        progress("training steps", 0.2 + 0.6 * len(times) / STEPS)
    progress("DisTrO", 0.8)
    encode, apply = _distro(recipe, list(model.named_parameters()), nodes, device)
    how = f"median of {len(times)} training steps of {micro_batch} samples each"
    return Speed(statistics.median(times) / micro_batch, encode, apply, micro_batch, len(times), how)


def _distro(recipe: Recipe, named: list[tuple[str, Any]], nodes: int, device: torch.device) -> tuple[float, float]:
    """Seconds of encoding and of applying the updates of ``nodes``."""
    optimizer = DisTrO(named, lr=recipe.optimizer.lr, config=recipe.distro)
    rates, payload = optimizer.lr_bits(), optimizer.encode()

    def encode() -> None:
        optimizer.encode()
        _finish(device)

    def apply() -> None:
        optimizer.apply([payload] * nodes, rates)
        _finish(device)

    return best(encode, 3), best(apply, 3)


def _distro_by_size(recipe: Recipe, estimate: Estimate, device: torch.device, nodes: int) -> tuple[float, float]:
    """The same from one matrix, scaled to the model's size."""
    side = 64 * round((min(SAMPLE, max(estimate.trainable, 64 * 64)) ** 0.5) / 64)
    weight = torch.nn.Parameter(torch.zeros(side, side, device=device))
    weight.grad = torch.randn_like(weight)
    times = _distro(recipe, [("weight", weight)], nodes, device)
    factor = estimate.trainable / weight.numel()
    return times[0] * factor, times[1] * factor


def _finish(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
