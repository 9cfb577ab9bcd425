"""How fast this device trains a recipe: from training steps if the model fits, else from operations and a rate."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from psyche_lightning.bench.engine import best
from psyche_lightning.muon import product_dtype, to_directions
from psyche_lightning.plugins import load_plugins
from psyche_lightning.recipe.adapter import adapted
from psyche_lightning.recipe.estimate import Estimate, meta_model, muon_matrices, parameter_dtype

if TYPE_CHECKING:
    from psyche_lightning.lightning.optimizers import TakenStep
    from psyche_lightning.recipe import Recipe

STEPS = 12
"""The most micro-batches to time, after one that does not count."""
MATRIX = 1024
SAMPLE = 1 << 20
"""Parameters of the matrix for timing DisTrO without the model."""
REACHED = 0.5
"""The share of a matrix product's rate that real training steps reach; a third to two thirds were seen."""
_MIXED = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
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
        step_seconds: a step of the node's own optimizer; 0 without local steps.
    """

    sample_seconds: float
    encode_seconds: float
    apply_seconds: float
    micro_batch: int
    steps: int
    how: str
    step_seconds: float = 0.0


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
    step = math.ceil(share / max(1, recipe.distro.densest.local_steps))
    (found,) = measure_all(
        [recipe], estimate, device, nodes=nodes, most=step, fits=fits, seconds=seconds, progress=progress
    )
    return found


def measure_all(
    recipes: Sequence[Recipe],
    estimate: Estimate,
    device: torch.device,
    *,
    nodes: int,
    most: int,
    fits: bool,
    seconds: float,
    tokens_per_second: float | None = None,
    progress: Progress = lambda what, done: None,
) -> list[TrainingSpeed]:
    """The speed of each of several recipes for one model, which differ in what is exchanged and in the optimizer.

    Args:
        recipes: as for :func:`measure`.
        estimate: see there, as for the next two.
        device: see there.
        nodes: see there.
        most: samples of one node in a step, which bound a micro-batch.
        fits: see :func:`measure`.
        seconds: about how many seconds to use for training, and as many for exchanges.
        tokens_per_second: the speed of a node's device, if it is another one. Exchanges then take as much longer or
            shorter than here as training does.
        progress: called with the progress.
    """
    recipe, before = recipes[0], torch.get_num_threads()
    if recipe.trainer.threads is not None:
        torch.set_num_threads(recipe.trainer.threads)
    try:
        progress("matrix products", 0.0)
        rate = matmul_rate(device, _MIXED.get(recipe.trainer.precision, parameter_dtype(recipe)))
        progress("operations of a sample", 0.1)
        operations = sample_flops(recipe, estimate)
        devices = recipe.trainer.devices
        expected = operations / rate / devices  # the best case: a real step takes about twice as long
        most = min(recipe.trainer.micro_batch_size, most)
        trained: _Trained | None = None
        for micro_batch in dict.fromkeys((most, 1) if tokens_per_second is None else ()):
            if fits and devices == 1 and 4 * expected * micro_batch <= seconds:
                trained = _train(recipe, device, micro_batch, seconds, progress)
                break
        exchanges = _exchanges(recipes, estimate, device, nodes, trained, seconds, progress)
    finally:
        torch.set_num_threads(before)
    sample, micro_batch, steps, scale = expected, most, 0, 1.0
    if tokens_per_second is not None:
        sample = recipe.data.seq_len / tokens_per_second
        scale = sample / (expected / REACHED)
        how = "given; DisTrO is as much faster or slower than here as training is"
    elif trained is not None:
        sample, micro_batch, steps = trained.sample_seconds, trained.micro_batch, trained.steps
        how = f"median of {steps} training steps of {micro_batch} samples each"
        if micro_batch != most:
            how += f", because {most} would have taken too long"
    else:
        why = f"a step takes longer than {seconds:g} s" if fits else "the model does not fit"
        why = why if devices == 1 else f"a node has {devices} devices"
        how = (
            f"computed, because {why}: {operations:.3g} operations a sample at the {rate / 1e9:.3g} GFLOP/s of a "
            "matrix product; real steps reach a third to two thirds of that"
        )
    return [
        TrainingSpeed(sample, scale * one.encode, scale * one.apply, micro_batch, steps, how, scale * one.step)
        for one in exchanges
    ]


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


@dataclass(frozen=True)
class _Trained:
    """A model after some training steps, whose gradients it has."""

    model: torch.nn.Module
    sample_seconds: float
    micro_batch: int
    steps: int


def _train(recipe: Recipe, device: torch.device, micro_batch: int, seconds: float, progress: Progress) -> _Trained:
    from psyche_lightning.train.module import CausalModule

    progress("the model", 0.15)
    torch.manual_seed(recipe.run.seed)
    model = load_plugins().models()[recipe.model.name](recipe.model.options)
    model = model.to(device, parameter_dtype(recipe)).train()
    if recipe.model.adapter:
        model = adapted(model, recipe.model.adapter, recipe.model.path, None)
    module = CausalModule(model, recipe.optimizer, recipe.schedule)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", 2)
    mixed = _MIXED.get(recipe.trainer.precision)

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
        progress("training steps", 0.2 + 0.4 * len(times) / STEPS)
    return _Trained(model, statistics.median(times) / micro_batch, micro_batch, len(times))


@dataclass(frozen=True)
class _Exchange:
    """Seconds to encode an update, to apply those of all nodes, and of a step of the node's own optimizer."""

    encode: float
    apply: float
    step: float

    def times(self, factor: float) -> _Exchange:
        return _Exchange(factor * self.encode, factor * self.apply, factor * self.step)


def _exchanges(
    recipes: Sequence[Recipe],
    estimate: Estimate,
    device: torch.device,
    nodes: int,
    trained: _Trained | None,
    seconds: float,
    progress: Progress,
) -> list[_Exchange]:
    """The exchange of each recipe, with the model while there is time for that, else with one matrix."""
    found: list[_Exchange] = []
    began = time.monotonic()
    for number, recipe in enumerate(recipes):
        progress("DisTrO", 0.6 + 0.4 * number / len(recipes))
        if found and (time.monotonic() - began) / len(found) * len(recipes) > seconds:
            trained, found = None, []  # all in one way, so that they compare
            break
        if trained is not None:
            found.append(_exchange(_own_step(recipe, trained.model), nodes, device))
    if found:
        return found
    muon = next((recipe for recipe in recipes if recipe.optimizer.name == "muon"), None)
    products = 0.0 if muon is None else muon_seconds(muon, device)
    return [_exchange_by_size(recipe, estimate, device, nodes, products) for recipe in recipes]


def _own_step(recipe: Recipe, model: torch.nn.Module) -> TakenStep:
    """The step of the recipe's optimizer on the model, as a node takes it."""
    from psyche_lightning.lightning.optimizers import TakenStep
    from psyche_lightning.train.module import CausalModule

    module = CausalModule(model, recipe.optimizer, recipe.schedule)
    optimizer = module.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]  # not that of the first warm-up step, which may move nothing
    return TakenStep(optimizer, module, recipe.distro.densest, recipe.trainer.holding)


def _exchange(step: TakenStep, nodes: int, device: torch.device) -> _Exchange:
    """Encode and apply updates of gradients that are there, and make own steps if the run has local ones."""
    distro, own = step.distro, [0.0]

    def encode() -> bytes:
        with step.working():
            began = time.perf_counter()
            step.step_locally()
            _finish(device)
            own.append(time.perf_counter() - began)
        made = distro.encode()
        _finish(device)
        return made

    rates, theirs = distro.lr_bits(), encode()  # so long ago that its votes must be read, as those of peers
    whole = best(encode, 3)
    one_step = min(own[1:]) if step.local is not None else 0.0
    mine = encode()

    def apply() -> None:
        distro.apply([*[theirs] * (nodes - 1), mine], rates)
        _finish(device)

    return _Exchange(max(0.0, whole - one_step), best(apply, 3), one_step)


def _exchange_by_size(
    recipe: Recipe, estimate: Estimate, device: torch.device, nodes: int, products: float
) -> _Exchange:
    """Like :func:`_exchange`, but from one matrix, scaled to the model's size, plus the seconds of Muon's products."""
    from psyche_lightning.lightning.optimizers import TakenStep

    side = 64 * round((min(SAMPLE, max(estimate.trainable, 64 * 64)) ** 0.5) / 64)
    module = torch.nn.Module()
    weight = module.weight = torch.nn.Parameter(torch.zeros(side, side, device=device))
    weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.AdamW([weight], recipe.optimizer.lr)
    found = _exchange(TakenStep(optimizer, module, replace(recipe.distro.densest, k_for={})), nodes, device)
    found = found.times(estimate.trainable / weight.numel())
    if recipe.optimizer.name != "muon":
        return found
    if recipe.distro.local_steps:
        return replace(found, step=found.step + products)
    return replace(found, encode=found.encode + products)


def muon_seconds(recipe: Recipe, device: torch.device) -> float:
    """Seconds for the products by which Muon makes one step, at the rate of a large product in the dtype of these."""
    counter = FlopCounterMode(display=False)
    matrices = muon_matrices(recipe, meta_model(recipe))
    if not matrices:
        return 0.0
    with torch.no_grad(), counter:
        to_directions([torch.empty_like(one) for one in matrices], [{} for _ in matrices], 0.95)
    return counter.get_total_flops() / matmul_rate(device, product_dtype(device))


def _finish(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
