"""How fast this device trains a recipe: from training steps if the model fits, else from operations and a rate."""

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
from psyche_lightning.distro import LocalSteps, shared_optimizer
from psyche_lightning.plugins import load_plugins
from psyche_lightning.recipe.adapter import adapted
from psyche_lightning.recipe.estimate import Estimate, meta_model

if TYPE_CHECKING:
    from psyche_lightning.recipe import Recipe

STEPS = 12
"""The most micro-batches to time, after one that does not count."""
MATRIX = 1024
SAMPLE = 4 << 20
"""Parameters of the matrix for timing DisTrO without the model."""
_DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}
Progress = Callable[[str, float], None]
"""Called with what is measured now, and the fraction of everything that is done."""


@dataclass(frozen=True)
class TrainingSpeed:
    """The speed of a device; times in seconds.

    Attributes:
        sample_seconds: forward and backward of one sample.
        encode_seconds: encoding this node's update.
        apply_seconds: applying all nodes' updates.
        micro_batch: samples in a micro-batch.
        steps: micro-batches that were timed; 0 if the figures were computed instead.
        how: where the figures come from, for people.
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
) -> TrainingSpeed:
    """Train a few micro-batches of random tokens if the model fits and there is time, else compute the speed.

    Args:
        recipe: what to train, with its precision and threads.
        estimate: its size.
        device: the device that computes.
        nodes: number of nodes whose updates are applied.
        share: samples of one node in a round.
        fits: whether the model fits into memory.
        seconds: about how many seconds to use.
        progress: called with the progress.
    """
    before = torch.get_num_threads()
    if recipe.trainer.threads is not None:
        torch.set_num_threads(recipe.trainer.threads)
    try:
        progress("matrix products", 0.0)
        rate = matmul_rate(device, _DTYPES.get(recipe.trainer.precision, getattr(torch, recipe.model.dtype)))
        progress("operations of a sample", 0.1)
        operations = sample_flops(recipe, estimate)
        expected = operations / rate  # the best case: a real step takes about twice as long
        most = min(recipe.trainer.micro_batch_size, share)
        for micro_batch in dict.fromkeys((most, 1)):
            if fits and 4 * expected * micro_batch <= seconds:
                speed = _train(recipe, device, micro_batch, nodes, seconds, progress)
                shortened = "" if micro_batch == most else f", because {most} would have taken too long"
                return replace(speed, how=speed.how + shortened)
        progress("DisTrO", 0.6)
        encode, apply = _distro_by_size(recipe, estimate, device, nodes)
        why = f"a step takes longer than {seconds:g} s" if fits else "the model does not fit"
        how = (
            f"computed, because {why}: {operations:.3g} operations a sample at the {rate / 1e9:.3g} GFLOP/s of a "
            "matrix product; real steps reach a third to two thirds of that"
        )
        return TrainingSpeed(expected, encode, apply, most, 0, how)
    finally:
        torch.set_num_threads(before)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product; a multiply-add counts as two."""
    matrix = torch.randn(MATRIX, MATRIX, device=device, dtype=dtype)

    def product() -> None:
        torch.mm(matrix, matrix)
        _finish(device)

    return 2 * MATRIX**3 / best(product, 5)


def sample_flops(recipe: Recipe, estimate: Estimate) -> float:
    """Operations for forward and backward of one sample, counted on the meta device.

    For a model that cannot run there, each trainable parameter and token counts as 6 operations.
    """
    counter = FlopCounterMode(display=False)
    try:
        model = meta_model(recipe).train()
        ids = torch.zeros(1, recipe.data.seq_len, dtype=torch.long, device="meta")
        with counter:
            model(input_ids=ids, labels=ids).loss.backward()
    except Exception:  # models may fail in any way without real values
        return 6.0 * estimate.trainable * recipe.data.seq_len
    return float(counter.get_total_flops())


def _train(
    recipe: Recipe, device: torch.device, micro_batch: int, nodes: int, seconds: float, progress: Progress
) -> TrainingSpeed:
    from psyche_lightning.train.module import CausalModule

    progress("the model", 0.15)
    torch.manual_seed(recipe.run.seed)
    dtype = torch.bfloat16 if recipe.trainer.precision == "bf16-true" else getattr(torch, recipe.model.dtype)
    model = load_plugins().models()[recipe.model.name](recipe.model.options).to(device, dtype).train()
    if recipe.model.adapter:
        model = adapted(model, recipe.model.adapter, recipe.model.path, None)
    module = CausalModule(model, recipe.optimizer, recipe.schedule)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 2)
    mixed = _DTYPES[recipe.trainer.precision] if recipe.trainer.precision.endswith("-mixed") else None

    def step() -> None:
        ids = torch.randint(vocabulary, (micro_batch, recipe.data.seq_len), device=device)
        context = torch.autocast(device.type, mixed) if mixed else contextlib.nullcontext()
        with context:
            loss = module.training_step({"input_ids": ids, "labels": ids}, 0)
        assert loss is not None  # all labels are trained
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
    return TrainingSpeed(statistics.median(times) / micro_batch, encode, apply, micro_batch, len(times), how)


def _distro(recipe: Recipe, named: list[tuple[str, Any]], nodes: int, device: torch.device) -> tuple[float, float]:
    """Seconds to encode an update, and to apply the updates of ``nodes`` nodes."""
    optimizer = shared_optimizer(named, recipe.optimizer.lr, recipe.distro)

    def encode() -> bytes:
        with optimizer.working() if isinstance(optimizer, LocalSteps) else contextlib.nullcontext():
            pass
        made = optimizer.encode()
        _finish(device)
        return made

    rates, payload = optimizer.lr_bits(), encode()

    def apply() -> None:
        optimizer.apply([payload] * nodes, rates)
        _finish(device)

    return best(encode, 3), best(apply, 3)


def _distro_by_size(recipe: Recipe, estimate: Estimate, device: torch.device, nodes: int) -> tuple[float, float]:
    """Like :func:`_distro`, but from one matrix, scaled to the model's size."""
    side = 64 * round((min(SAMPLE, max(estimate.trainable, 64 * 64)) ** 0.5) / 64)
    weight = torch.nn.Parameter(torch.zeros(side, side, device=device))
    weight.grad = torch.randn_like(weight)
    times = _distro(recipe, [("weight", weight)], nodes, device)
    factor = estimate.trainable / weight.numel()
    return times[0] * factor, times[1] * factor


def _finish(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
