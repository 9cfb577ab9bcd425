"""Checks and measures the engine on one device: eight minutes at most, everything into one JSON file.

    python tests/device/measure.py --out device.json

It needs torch, numpy and this checkout, and no installation. The accelerator is taken where there is one, otherwise the
CPU with small sizes. The file is written after every part, so that an interrupted run leaves what it has. The exit code
is 1 if a part failed or ran out of time; each such part is named. ``python tests/device/page.py`` puts the files of
``tests/device/results`` into docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import logging
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
if "psyche_lightning" not in sys.modules and importlib.util.find_spec("pluggy") is None:
    # The package's own start wants the plugin host, which no part of the engine needs.
    bare = types.ModuleType("psyche_lightning")
    bare.__path__ = [str(ROOT / "psyche_lightning")]
    sys.modules["psyche_lightning"] = bare

import torch  # noqa: E402 - after the path
from support import golden  # noqa: E402 - after the path

from psyche_lightning.bench.engine import PEERS, StepFigures, load_reference, peak  # noqa: E402 - after the path
from psyche_lightning.distro import DisTrO, DistroConfig, LocalSteps  # noqa: E402 - after the path
from psyche_lightning.distro.aggregate import FLOAT32_VOTES  # noqa: E402 - after the path
from psyche_lightning.distro.holding import Holding  # noqa: E402 - after the path
from psyche_lightning.errors import ConfigError, PsycheError  # noqa: E402 - after the path

FORMAT = 1
"""Of the file; :mod:`page` reads no other."""
SPEED = DistroConfig(chunk=64, k=8)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ADAMW_BYTES = {"float32": 16, "bfloat16": 8}
"""Bytes a parameter of AdamW: parameter, gradient and two averages, all of the parameter's dtype."""
SPARING = "bfloat16, split masters, delta in int8"
FORMS = {
    "float32": (torch.float32, Holding(), 12),
    "bfloat16": (torch.bfloat16, Holding(), 12),
    SPARING: (torch.bfloat16, Holding(masters="split", delta="int8"), 7.1),
}
"""How parameters are held while speed is measured, and the bytes of each with its gradient, delta and master."""
INSTALLED = ("lightning", "pluggy", "typer", "yaml", "aiohttp", "cryptography", "msgpack")
"""What ``psyche demo`` imports besides torch and numpy."""


class WrongError(Exception):
    """Something is not as it must be."""


class LackingError(Exception):
    """A part cannot run here; the text says what it lacks."""


class OutOfTimeError(Exception):
    """A part's time is over."""


@dataclass
class Setting:
    """What the parts share.

    Attributes:
        device: what is measured.
        small: whether sizes are those for a CPU.
        reference: folder of a checkout of the DeMo reference; None to do without.
        ends: when the present part's time is over, on ``clock``.
        save: writes the file.
        found: the figures of all parts so far.
    """

    device: torch.device
    small: bool
    reference: Path | None
    save: Callable[[], None]
    clock: Callable[[], float] = time.monotonic
    ends: float = float("inf")
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds of the present part."""
        return self.ends - self.clock()

    def synchronize(self) -> None:
        """Wait until the device has done everything."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()

    def free(self) -> int | None:
        """Bytes of the device's memory that are free; None if the device does not tell."""
        gc.collect()
        if self.device.type != "cuda":
            return None
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def peak(self, call: Callable[[], object]) -> int:
        """Bytes by which memory in use grew at most during a call; 0 if the device does not tell."""
        if self.device.type != "cuda":
            return peak(call) if self.device.type == "cpu" else 0
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.synchronize()
        return int(torch.cuda.max_memory_allocated(self.device) - before)

    def seconds(self, call: Callable[[], object], repeats: int) -> float:
        """Of the fastest of several calls, after one more."""
        fastest = float("inf")
        for turn in range(1 + repeats):
            self.synchronize()
            began = self.clock()
            call()
            self.synchronize()
            if turn:
                fastest = min(fastest, self.clock() - began)
        return fastest


# ---------------------------------------------------------------------------------------------------------------------
# Exactness
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Matrix products of the surrounding program in another precision: ``high`` is TF32, ``medium`` bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def surroundings(device: torch.device, *more: str) -> dict[str, contextlib.AbstractContextManager[Any]]:
    """The settings of a surrounding program that must not change a byte, and ``more`` without any; each for one use."""
    return {
        "plain": contextlib.nullcontext(),
        "TF32": products("high"),
        "bfloat16 products": products("medium"),
        "autocast": torch.autocast(device.type, torch.bfloat16),
        **{name: contextlib.nullcontext() for name in more},
    }


def golden_rounds(setting: Setting, part: dict[str, Any]) -> None:
    """The recorded rounds of tests/distro give the recorded parameters, whatever surrounds them."""
    wrong, checks = [], 0
    for kind in golden.FILES:
        recorded = golden.recorded(kind)
        names = surroundings(setting.device)
        for name, budget in [*((name, budget) for name in names for budget in (1, 1 << 30)), ("compiled", 1 << 20)]:
            optimizer = golden.optimizer_of(kind, golden.model().to(setting.device), budget)
            apply = torch.compile(optimizer.apply) if name == "compiled" else optimizer.apply
            with surroundings(setting.device, "compiled")[name]:
                found = golden.replay(optimizer, recorded, backwards=budget == 1, apply=apply)
            part["checks"] = checks = checks + 1
            if found != recorded["digest"]:
                wrong.append(f"{kind.__name__}, {name}, budget {budget}: {found[:8]}")
    _none(wrong, "recorded rounds gave other parameters than recorded")


def some_model(dtype: torch.dtype, small: bool, seed: int) -> torch.nn.Module:
    """Odd shapes, in one dtype but for a vector of the other; the same on every device."""
    width = 96 if small else 800
    shapes = [(width, 2 * width + 8), (width + 2,), (3, 70, 65), (1000,), (), (64, width)]
    generator = torch.Generator().manual_seed(seed)
    module = torch.nn.Module()
    for number, shape in enumerate(shapes):
        kind = dtype if number != 1 else torch.bfloat16 if dtype is torch.float32 else torch.float32
        value = torch.randn(shape, generator=generator).mul_(0.02).to(kind)
        module.register_parameter(f"p{number}", torch.nn.Parameter(value))
    return module


def give_gradients(module: torch.nn.Module, seed: int) -> None:
    """Random gradients, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)


def payload_of(optimizer: DisTrO, module: torch.nn.Module, seed: int) -> bytes:
    """A payload of random gradients, or of the displacement by them."""
    give_gradients(module, seed)
    if not isinstance(optimizer, LocalSteps):
        return optimizer.encode()
    with optimizer.working(), torch.no_grad():
        for parameter in module.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad, alpha=1e-3)
    return optimizer.encode()


def optimizer_of(
    kind: type[DisTrO],
    module: torch.nn.Module,
    config: DistroConfig,
    budget: int = 128 << 20,
    holding: Holding | None = None,
) -> DisTrO:
    """The optimizer of the random rounds."""
    options: dict[str, Any] = {"weight_decay": 0.1} if kind is DisTrO else {"scale": 1.7}
    return kind(module.named_parameters(), lr=1e-2, config=config, budget=budget, holding=holding, **options)


def random_rounds(setting: Setting, part: dict[str, Any]) -> None:
    """Random payloads, also of more votes than float32 adds exactly, give the CPU's parameters."""
    wrong, checks = [], 0
    few, many = (DistroConfig(chunk=32, k=8), 5), (DistroConfig(chunk=64, k=24), 44)
    most = DistroConfig(chunk=64, k=96), 40
    assert many[0].k * many[1] > FLOAT32_VOTES, "44 nodes are beyond float32 with k = 24"
    for seed, (config, peers) in enumerate((few, many) if setting.small else (few, many, most)):
        small, budgets = (True, (1, 1 << 20)) if seed == 0 else (setting.small, (1 << 20, 128 << 20))
        for kind in (DisTrO, LocalSteps):
            for name, dtype in DTYPES.items():
                module = some_model(dtype, small, seed)
                here = optimizer_of(kind, module, config)
                payloads = [payload_of(here, module, 1000 * seed + peer) for peer in range(peers)]
                lrs, order = here.lr_bits(), random.Random(seed)
                for _ in range(2):
                    here.apply(payloads, lrs)
                expected = golden.digest(here)
                for around, context in surroundings(setting.device, "compiled", "split masters").items():
                    module = some_model(dtype, small, seed).to(setting.device)
                    holding = Holding(masters="split" if around == "split masters" else "float32")
                    there = optimizer_of(kind, module, config, order.choice(budgets), holding)
                    apply = torch.compile(there.apply) if around == "compiled" else there.apply
                    with context:
                        for _ in range(2):
                            apply(order.sample(payloads, peers), lrs)
                    part["checks"] = checks = checks + 1
                    part["most votes"] = max(part.get("most votes", 0), config.k * peers)
                    if golden.digest(there) != expected:
                        wrong.append(f"{kind.__name__}, {name}, {config.k} votes of {peers} nodes, {around}")
    _none(wrong, "the device gave other parameters than the CPU")


def payloads(setting: Setting, part: dict[str, Any]) -> None:
    """What the device encodes is the same under all settings, and a payload for everybody.

    Other devices need not choose the same votes: gradients differ between machines anyway. How many are the same is
    noted.
    """
    wrong, checks, config = [], 0, DistroConfig(chunk=64, k=8)
    for kind in (DisTrO, LocalSteps):
        for name, dtype in DTYPES.items():
            module = some_model(dtype, setting.small, 7)
            here = optimizer_of(kind, module, config)
            ours = payload_of(here, module, 7)
            made = {}
            for around, context in surroundings(setting.device, "again").items():
                module = some_model(dtype, setting.small, 7).to(setting.device)
                there = optimizer_of(kind, module, config)
                with context:
                    made[around] = payload_of(there, module, 7)
                part["checks"] = checks = checks + 1
                if made[around] != made["plain"]:
                    wrong.append(f"{kind.__name__}, {name}: {around} chose other votes than plain")
            try:
                here.check(made["plain"])
            except PsycheError as error:
                wrong.append(f"{kind.__name__}, {name}: the CPU refuses the payload: {error}")
            part.setdefault("equal to the CPU's", {})[f"{kind.__name__}, {name}"] = made["plain"] == ours
    _none(wrong, "payloads are not what they must be")


def _none(wrong: list[str], what: str) -> None:
    if wrong:
        raise WrongError(f"{what}: {'; '.join(wrong)}")


# ---------------------------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------------------------


def limits(setting: Setting, part: dict[str, Any]) -> None:
    """The device's own rates: bytes a second of a copy, multiply-adds a second of large matrix products."""
    part["bytes a second"] = _copied(setting, (16 if setting.small else 512) << 20)
    side = 512 if setting.small else 8192
    for name, dtype, precision in (
        ("float32", torch.float32, "highest"),
        ("TF32", torch.float32, "high"),
        ("bfloat16", torch.bfloat16, "highest"),
    ):
        matrix = torch.randn(side, side, device=setting.device, dtype=dtype)
        with products(precision):
            seconds = setting.seconds(partial(torch.matmul, matrix, matrix), 3)
        part.setdefault("multiply-adds a second", {})[name] = side**3 / seconds
        setting.save()


def _copied(setting: Setting, count: int) -> float:
    """Bytes a second that a copy of so many reads and writes."""
    source = torch.ones(count // 4, device=setting.device)
    target = torch.empty_like(source)
    return 2 * count / setting.seconds(lambda: target.copy_(source), 5)


def transformer(parameters: float) -> list[tuple[int, ...]]:
    """Shapes of the blocks of a transformer of about so many parameters."""
    width = next(width for width, least in ((4096, 3e9), (2048, 5e8), (1024, 2e7), (256, 0)) if parameters >= least)
    block: list[tuple[int, ...]] = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)] + [(width,)] * 2
    return block * max(1, round(parameters / (12 * width**2)))


def speed(setting: Setting, part: dict[str, Any]) -> None:
    """Time and memory of a step beside the device's limits, AdamW and the reference."""
    rows: list[dict[str, Any]] = part.setdefault("rows", [])
    notes: list[str] = part.setdefault("notes", [])
    part.update({"k": SPEED.k, "chunk": SPEED.chunk, "peers": PEERS})
    reference = None
    if setting.reference is None:
        notes.append("no reference: --reference FOLDER takes a checkout of github.com/bloc97/DeMo")
    else:
        try:
            reference = load_reference(setting.reference)
        except ConfigError as error:
            notes.append(f"no reference: {error}")
    took: dict[str, tuple[float, int]] = {}
    for size in (1e6,) if setting.small else (1e8, 1e9, 7e9):
        for name, (_, _, held) in FORMS.items():
            shapes = transformer(size)
            count = sum(torch.Size(shape).numel() for shape in shapes)
            label = f"{count / 1e6:,.0f} M, {name}"
            room, needed = setting.free(), int(1.1 * held * count)
            if room is not None and needed > room:
                notes.append(f"{label}: does not fit, it needs {needed / 1e9:.0f} GB of {room / 1e9:.0f}")
                continue
            seconds, before = took.get(name, (0.0, count))
            if 1.2 * seconds * count / before > setting.left:
                notes.append(f"{label}: left out, {setting.left:.0f} s of this part's time were left")
                continue
            began = setting.clock()
            rows.append(row := {"parameters": count, "tensors": len(shapes), "form": name})
            _measure(setting, row, shapes, reference, notes, label)
            took[name] = setting.clock() - began, count
            setting.save()


def _measure(
    setting: Setting, row: dict[str, Any], shapes: list[tuple[int, ...]], reference: Any, notes: list[str], label: str
) -> None:
    generator = torch.Generator(setting.device).manual_seed(0)
    dtype, holding, _ = FORMS[row["form"]]

    def fresh() -> list[tuple[str, torch.nn.Parameter]]:
        named = []
        for number, shape in enumerate(shapes):
            both = [torch.empty(shape, dtype=dtype, device=setting.device) for _ in range(2)]
            for one in both:
                one.normal_(generator=generator)
            parameter = torch.nn.Parameter(both[0].mul_(0.02))
            parameter.grad = both[1]
            named.append((f"p{number:05}", parameter))
        return named

    row |= {"peak memory of a step": {}, "memory of the state": {}}
    _measure_ours(setting, row, fresh(), holding)
    if row["form"] == SPARING:
        setting.free()
        return  # the others hold nothing otherwise
    others: dict[str, Callable[[list[torch.nn.Parameter]], Any]] = {
        "adamw": lambda plain: torch.optim.AdamW(plain, lr=1e-3, fused=setting.device.type == "cuda" or None)
    }
    if reference is not None:
        others["reference"] = lambda plain: reference(
            plain,
            lr=1e-3,
            compression_decay=SPEED.decay,
            compression_topk=SPEED.k,
            compression_chunk=SPEED.chunk,
        )
    for name, build in others.items():
        setting.save()
        room, needed = setting.free(), int(1.1 * ADAMW_BYTES[row["form"]] * row["parameters"])
        if room is not None and needed > room:
            notes.append(f"{label}: {name} does not fit, it needs {needed / 1e9:.0f} GB of {room / 1e9:.0f}")
            continue
        try:
            _measure_other(setting, row, name, build([parameter for _, parameter in fresh()]))
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:  # also torch's OutOfMemoryError
            notes.append(f"{label}: {name} failed: {_first_line(error)}")
    setting.free()


def _measure_ours(
    setting: Setting, row: dict[str, Any], named: list[tuple[str, torch.nn.Parameter]], holding: Holding
) -> None:
    optimizer = DisTrO(named, lr=1e-3, config=SPEED, holding=holding)
    rates = optimizer.lr_bits()

    def step() -> None:
        optimizer.apply([optimizer.encode()] * PEERS, rates)

    row["memory of the state"]["step"] = _grown(setting, step)
    row["peak memory of a step"]["step"] = setting.peak(step)
    payload = optimizer.encode()
    row["encode"] = setting.seconds(optimizer.encode, 3)
    row["apply"] = setting.seconds(lambda: optimizer.apply([payload] * PEERS, rates), 3)
    row["step"], row["payload"] = row["encode"] + row["apply"], len(payload)
    found = setting.found.get("limits", {})
    if "multiply-adds a second" in found:
        figures = StepFigures("", row["parameters"], row["tensors"])
        figures.bandwidth, figures.arithmetic = found["bytes a second"], found["multiply-adds a second"]["float32"]
        row["bound"] = figures.bound(SPEED)


def _measure_other(setting: Setting, row: dict[str, Any], name: str, other: Any) -> None:
    row["memory of the state"][name] = _grown(setting, other.step)
    row["peak memory of a step"][name] = setting.peak(other.step)
    row[name] = setting.seconds(other.step, 1 if name == "reference" else 3)


def _grown(setting: Setting, call: Callable[[], object]) -> int:
    """Bytes in use more after a call; 0 where the device does not tell."""
    if setting.device.type != "cuda":
        call()
        return 0
    setting.synchronize()
    before = torch.cuda.memory_allocated(setting.device)
    call()
    setting.synchronize()
    return int(torch.cuda.memory_allocated(setting.device) - before)


def training(setting: Setting, part: dict[str, Any]) -> None:
    """``psyche demo``, some rounds of two nodes on the device."""
    lacking = [name for name in INSTALLED if importlib.util.find_spec(name) is None]
    if lacking:
        raise LackingError(f"`psyche demo` needs {', '.join(lacking)}; install the package (pip install -e .)")
    accelerator = {"cuda": "gpu"}.get(setting.device.type, setting.device.type)
    size = ["--twin", "--rounds", "3"] if setting.small else ["--rounds", "20"]
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "demo.json")
        command = [sys.executable, "-m", "psyche_lightning", "demo", "--nodes", "2", *size]
        command += [f"trainer.accelerator={accelerator}", "--json", str(told), "--keep", str(Path(folder, "demo"))]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            output, _ = process.communicate()
        except BaseException:
            process.terminate()  # the demo ends its nodes
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            raise
        if process.returncode or not told.is_file():
            raise WrongError(f"`psyche demo` ended with {process.returncode}: {output[-2000:]}")
        figures = json.loads(told.read_text())
    part.update({name: figures[name] for name in ("rounds", "parameters", "seconds", "loss", "equal_digests")})
    part["tokens a second"] = figures["pace"]["tokens_per_second"] if figures.get("pace") else None
    if not figures["equal_digests"]:
        raise WrongError("the nodes of `psyche demo` ended with different parameters")


# ---------------------------------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[float, Callable[[Setting, dict[str, Any]], None]]] = {
    "golden rounds": (45, golden_rounds),
    "random rounds": (75, random_rounds),
    "payloads": (30, payloads),
    "limits": (30, limits),
    "speed": (210, speed),
    "training": (90, training),
}
"""Each part's time in seconds, and what it does; what one leaves, the later ones may not use."""


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    found: dict[str, Any] = {
        "device": device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {"name": about.name, "memory": about.total_memory, "capability": f"{about.major}.{about.minor}"}
        found |= {"runtime": torch.version.hip or torch.version.cuda}
    else:
        found["name"] = platform.processor() or platform.machine()
    return found


def choose(name: str | None) -> torch.device:
    """The device of that name, or the one that is there.

    Raises:
        ConfigError: there is none of that name.
    """
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return there or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises each of them
        others = f"cpu or {there}" if there is not None else "cpu"
        raise ConfigError(f"the device {name!r} cannot be used ({_first_line(error)}); there is {others}") from error
    return device


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise an error within the block when the time is over; on Windows never."""

    def over(*_: object) -> None:
        raise OutOfTimeError

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(
    setting: Setting, seconds: float, parts: Mapping[str, tuple[float, Callable[[Setting, dict[str, Any]], None]]]
) -> bool:
    """Run the parts one after the other; returns whether each one held, or could not be tried here.

    Args:
        setting: gets each part's figures, with its ``state``: running, held, failed, out of time or lacking.
        seconds: for all of them.
        parts: as :data:`PARTS`.
    """
    end = setting.clock() + seconds
    for name, (most, work) in parts.items():
        began = setting.clock()
        part = setting.found[name] = {"state": "running"}
        limit = min(most, end - began)
        setting.ends = began + limit
        setting.save()
        try:
            with at_most(limit):
                work(setting, part)
            part["state"] = "held"
        except OutOfTimeError:
            part |= {"state": "out of time", "why": f"it had {limit:.0f} s"}
        except LackingError as error:
            part |= {"state": "lacking", "why": str(error)}
        except Exception as error:
            traceback.print_exc()
            part |= {"state": "failed", "why": f"{type(error).__name__}: {error}"}
        part["seconds"] = round(setting.clock() - began, 1)
        setting.save()
        print(
            f"{name}: {part['state']} in {part['seconds']} s{': ' + part['why'] if 'why' in part else ''}", flush=True
        )
    bad = [name for name, part in setting.found.items() if part["state"] not in ("held", "lacking")]
    print(f"not held: {', '.join(bad)}" if bad else "everything held", flush=True)
    return not bad


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--device", help="such as cuda:0 or cpu; by default the accelerator that is there")
    parser.add_argument("--minutes", type=float, default=8, help="for everything")
    parser.add_argument("--reference", type=Path, help="folder of a checkout of github.com/bloc97/DeMo")
    parser.add_argument("--without", action="append", default=[], choices=PARTS, help="leave a part out")
    given = parser.parse_args(arguments)
    try:
        device = choose(given.device)
    except ConfigError as error:
        parser.error(str(error))
    about = {"format": FORMAT, "date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": machine(device)}

    def save() -> None:
        text = json.dumps({**about, "parts": setting.found}, indent=1) + "\n"
        beside = given.out.with_name(f"{given.out.name}.new")
        beside.write_text(text)
        beside.replace(given.out)

    setting = Setting(device, device.type == "cpu", given.reference, save)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # that each payload is another constant is no news
    parts = {name: part for name, part in PARTS.items() if name not in given.without}
    return 0 if run(setting, 60 * given.minutes, parts) else 1


if __name__ == "__main__":
    sys.exit(main())
