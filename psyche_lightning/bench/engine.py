"""Time and memory of a step of DisTrO and of local steps, next to AdamW, the machine's limits and the reference."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from psyche_lightning.distro import DisTrO, DistroConfig, LocalSteps, decode, encode
from psyche_lightning.errors import ConfigError

PEERS = 4
TRAFFIC = 20
"""Bytes per float32 parameter that a step must move: gradient read, delta and parameter read and written."""


@dataclass
class StepFigures:
    """Figures of one model.

    Attributes:
        name: the kind of model.
        parameters: number of parameters.
        tensors: number of tensors.
        times: seconds of each part, the best of several runs.
        local: those of local steps with equal entries: also of ``working``, the way there and back.
        memory: additional bytes at the peak of each step; empty if the system does not tell.
        bandwidth: bytes per second of a large copy, read and written.
        arithmetic: multiply-adds per second of a large float32 matrix product.
    """

    name: str
    parameters: int
    tensors: int
    times: dict[str, float] = field(default_factory=dict)
    local: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    bandwidth: float = 0.0
    arithmetic: float = 0.0

    @property
    def step(self) -> float:
        """Seconds for encode and apply."""
        return self.times["encode"] + self.times["apply"]

    def bound(self, config: DistroConfig) -> float:
        """Seconds of a step's unavoidable traffic or of its arithmetic, whichever is longer, at the measured rates."""
        products = 2 * config.chunk + config.k + min(PEERS * config.k, 2 * config.chunk)
        return self.parameters * max(TRAFFIC / self.bandwidth, products / self.arithmetic)


def shapes(kind: str, millions: float) -> list[tuple[int, ...]]:
    """Shapes of a model: ``blocks`` of a transformer, or 300 tensors that are ``small`` or ``odd``.

    The dimensions are multiples of 64, as in language models. With ``odd`` they are not, and padding to whole chunks
    adds another half.
    """
    total = int(millions * 1e6)
    if kind in ("small", "odd"):
        width = max(1, int((total / 100 / 1.5) ** 0.5))
        width = width if kind == "odd" else max(128, round(width / 128) * 128)
        return [(width, width * 3 // 2)] * 100 + [(width,)] * 200
    width = next(width for width in (1024, 512, 128) if total >= 20 * width**2 or width == 128)
    block: list[tuple[int, ...]] = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)] + [(width,)] * 2
    return block * max(1, round(total / (12 * width**2)))


def load_reference(path: Path) -> Any:
    """The class ``DeMo`` of a checkout of bloc97/DeMo; its gather returns copies of its own result.

    Raises:
        ConfigError: ``demo.py`` does not exist, or a package that it imports is missing.
    """
    file = path / "demo.py" if path.is_dir() else path
    spec = importlib.util.spec_from_file_location("reference_demo", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ConfigError(f"{file} does not exist; give the folder of a checkout of github.com/bloc97/DeMo")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ConfigError(f"the reference needs a package that is missing ({error}); install it first") from error

    class Alone(module.DeMo):  # type: ignore[misc, name-defined]
        def _demo_all_gather(self, idx: torch.Tensor, val: torch.Tensor) -> Any:
            return [idx.clone() for _ in range(PEERS)], [val.clone() for _ in range(PEERS)]

    return Alone


def limits() -> tuple[float, float]:
    """Bytes per second of a large copy and multiply-adds per second of a large matrix product."""
    source, target = torch.ones(2, 16 << 20)
    copy = best(lambda: target.copy_(source), 5)
    matrix = torch.randn(1536, 1536)
    return 8 * source.numel() / copy, 1536**3 / best(lambda: matrix @ matrix, 5)


def measure(kind: str, millions: float, config: DistroConfig, reference: Any, repeats: int) -> StepFigures:
    """Time a model's step; all candidates in turn, the best run of each."""
    generator = torch.Generator().manual_seed(0)

    def parameters() -> list[tuple[str, torch.nn.Parameter]]:
        found = []
        for number, shape in enumerate(shapes(kind, millions)):
            parameter = torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
            parameter.grad = torch.randn(shape, generator=generator)
            found.append((f"p{number:04}", parameter))
        return found

    named = parameters()
    count = sum(parameter.numel() for _, parameter in named)
    names = {"blocks": "transformer", "small": "300 tensors", "odd": "300 odd tensors"}
    result = StepFigures(names[kind], count, len(named))
    result.bandwidth, result.arithmetic = limits()
    _measure_ours(result, named, config, repeats)
    gc.collect()
    plain = [parameter for _, parameter in named]
    if reference is not None:
        _measure_reference(result, plain, config, reference, max(1, repeats - 2))
        gc.collect()
    result.times["adamw"] = best(torch.optim.AdamW(plain, lr=1e-3).step, repeats)
    return result


def _measure_ours(
    result: StepFigures, named: list[tuple[str, torch.nn.Parameter]], config: DistroConfig, repeats: int
) -> None:
    distro, local = DisTrO(named, lr=1e-3, config=config), LocalSteps(named, lr=1e-3, config=config)

    @torch.no_grad()
    def work() -> None:
        with local.working():
            for _, parameter in named:
                parameter.sub_(cast(torch.Tensor, parameter.grad), alpha=1e-3)

    def nothing() -> None:
        with local.working():
            pass

    for optimizer, prepare, name in ((distro, None, "step"), (local, work, "round of local steps")):
        if prepare is not None:
            prepare()
        result.memory[name] = peak(partial(_exchange, optimizer))
    ours, theirs = _parts(distro, lambda: None), _parts(local, work)
    calls = {(name, part): call for part in ours for name, call in (("ours", ours[part]), ("local", theirs[part]))}
    found = in_turn({**calls, ("local", "working"): nothing}, repeats, {("local", "encode"): work})
    result.times = {part: seconds for (name, part), seconds in found.items() if name == "ours"}
    result.local = {part: seconds for (name, part), seconds in found.items() if name == "local"}


def _exchange(optimizer: DisTrO) -> None:
    optimizer.apply([optimizer.encode()] * PEERS, optimizer.lr_bits())


def _parts(optimizer: DisTrO, prepare: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """What is timed of an optimizer; ``prepare`` comes before each of its encodes."""
    config, chunks, rates = optimizer.config, optimizer.layout.chunk_count, optimizer.lr_bits()
    payloads = []
    for _ in range(PEERS):
        prepare()
        payloads.append(optimizer.encode())
    unpack = partial(decode, chunk_count=chunks, config=config, version=optimizer.version)
    votes = unpack(payloads[0])
    return {
        "encode": optimizer.encode,
        "of it pack": lambda: encode(votes, config),
        "apply": lambda: optimizer.apply(payloads, rates),
        "of it unpack": lambda: [unpack(payload) for payload in payloads],
    }


def _measure_reference(
    result: StepFigures, plain: list[torch.nn.Parameter], config: DistroConfig, reference: Any, repeats: int
) -> None:
    theirs = reference(
        plain, lr=1e-3, compression_decay=config.decay, compression_topk=config.k, compression_chunk=config.chunk
    )
    result.memory["reference"] = peak(theirs.step)
    result.times["reference"] = best(theirs.step, repeats)


def in_turn(
    calls: Mapping[Any, Callable[[], object]], repeats: int, before: Mapping[Any, Callable[[], object]] | None = None
) -> dict[Any, float]:
    """Seconds of the fastest of several calls of each, after a warm-up.

    Each is called once, then all once more, so that a slow minute of the machine meets all of them.

    Args:
        calls: what to time.
        repeats: timed calls of each.
        before: what to do before a call of those names, untimed.
    """
    found = dict.fromkeys(calls, float("inf"))
    for turn in range(1 + repeats):
        for name, call in calls.items():
            (before or {}).get(name, lambda: None)()
            began = time.perf_counter()
            call()
            if turn:
                found[name] = min(found[name], time.perf_counter() - began)
    return found


def best(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of several calls, after one warm-up call."""
    return in_turn({"": call}, repeats)[""]


def peak(call: Callable[[], object]) -> int:
    """Bytes by which the process grew at most during a call; 0 if the system does not tell (only Linux does)."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # memory that earlier calls freed must count again
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident size so far
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    call()
    return 0


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
