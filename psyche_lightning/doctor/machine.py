"""Examines the machine, and what a recipe needs of it."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from psyche_lightning import system
from psyche_lightning.doctor.finding import Finding, Verdict, count, duration, size
from psyche_lightning.plugins import load_plugins
from psyche_lightning.system import devices

if TYPE_CHECKING:
    import torch

    from psyche_lightning.recipe import Recipe
    from psyche_lightning.recipe.estimate import Estimate

AREA, RECIPE = "machine", "recipe"
OLDEST = (3, 10)
LEAST_MEMORY, LEAST_DISK = 2e9, 2e9
LEAST_KEPT = 64 << 20
"""The least bytes of agreed payloads that a node keeps."""
SNAPSHOTS = 3
"""Snapshots of the parameters on disk at a time: the epoch's first one, and two within the epoch."""
WRITES = 16
"""Small writes; the median counts."""
SLOW_WRITE = 0.05
FILES, FILES_PER_PEER = 128, 4
"""Open files and sockets of a node, and how many more for each peer."""
BUSY = 0.5
"""Load of other programs, per core, from which on measurements suffer."""
ROOM = 1.3
"""Memory for activations and the framework, as a factor on the known memory."""
_CGROUP = Path("/sys/fs/cgroup")


def examine(folder: Path = Path()) -> list[Finding]:
    """Examine Python, torch, threads, memory, disk, files, clock and plugins.

    Args:
        folder: the folder for a node's files.
    """
    import torch

    cores = system.cores()
    load = system.load()
    busy = load is not None and load > BUSY * cores
    memory, disk = available_memory(), free_disk(folder)
    python = sys.version_info[:2] >= OLDEST
    return [
        Finding(
            AREA,
            "python",
            f"{platform.python_version()} on {platform.system()} {platform.machine()}",
            Verdict.OK if python else Verdict.PROBLEM,
            "" if python else f"install Python {'.'.join(map(str, OLDEST))} or newer",
        ),
        Finding(AREA, "torch", f"{torch.__version__}, {', '.join(devices())}"),
        Finding(
            AREA,
            "threads",
            f"torch uses {torch.get_num_threads()}, {cores} cores" + ("" if load is None else f", load {load:.1f}"),
            Verdict.WARNING if busy else Verdict.OK,
            "other programs use the cores: training will be slower, and so are the measurements now" * busy,
        ),
        _enough(AREA, "memory", memory, LEAST_MEMORY, "free", "close programs; small recipes may still fit"),
        _enough(AREA, "disk", disk, LEAST_DISK, f"free in {folder.resolve()}", "free space, or use another folder"),
        open_files(AREA, 1),
        _clock(time.time()),
        *_plugins(),
    ]


def needs(recipe: Recipe, estimate: Estimate, folder: Path, nodes: int, device: torch.device) -> list[Finding]:
    """Compare memory, disk and files that a recipe needs with those of this machine.

    Args:
        recipe: the run.
        estimate: its size.
        folder: the node's folder.
        nodes: nodes of the run.
        device: the device that computes.
    """
    return [_memory(estimate, device), _disk(recipe, estimate, folder), open_files(RECIPE, nodes)]


def choose_device(recipe: Recipe) -> tuple[torch.device, Finding]:
    """Returns the device on which the recipe trains, and a row about it."""
    import torch

    wanted, there = recipe.trainer.accelerator, list(devices())
    kind = there[-1] if wanted in ("auto", "gpu") else wanted
    verdict, advice = Verdict.OK, ""
    if kind not in there or (wanted == "gpu" and kind == "cpu"):
        verdict = Verdict.PROBLEM
        advice = f"torch has only {', '.join(there)} here: set trainer.accelerator=auto, or install another torch"
        kind = "cpu"
    precision, threads = recipe.trainer.precision, recipe.trainer.threads or torch.get_num_threads()
    if kind == "cuda" and precision.startswith("bf16") and not torch.cuda.is_bf16_supported():
        verdict, advice = Verdict.WARNING, "this GPU computes bfloat16 slowly; 32-true or 16-mixed may be faster"
    device = torch.device(kind)
    name = torch.cuda.get_device_name(device) if kind == "cuda" else kind
    value = f"{name}, parameters {recipe.model.dtype}, precision {precision}"
    if kind == "cpu":
        value += f", {threads} of {system.cores()} cores"
    return device, Finding(RECIPE, "device", value, verdict, advice)


def available_memory() -> int | None:
    """Bytes that this process may still use before the machine or its container is full; None when not known."""
    found = []
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024)
    with suppress(OSError, ValueError):  # the text is no number if there is no limit
        limit = int((_CGROUP / "memory.max").read_text())
        found.append(max(0, limit - int((_CGROUP / "memory.current").read_text())))
    return min(found, default=system.memory())


def free_memory(device: torch.device) -> int | None:
    """Free bytes of the memory in which a device trains; None when not known."""
    import torch

    if device.type != "cuda":
        return available_memory()
    free: int = torch.cuda.mem_get_info(device)[0]
    return free


def free_disk(folder: Path) -> int | None:
    """Free bytes on the disk of a folder, which need not exist yet; None when not known."""
    try:
        return shutil.disk_usage(_there(folder)).free
    except OSError:
        return None


def write_seconds(folder: Path) -> float | None:
    """Median seconds until a small write in a folder is safely on disk; None if the folder cannot be written."""
    times = []
    with suppress(OSError), tempfile.TemporaryFile(dir=_there(folder)) as file:
        for _ in range(WRITES):
            began = time.perf_counter()
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times) if times else None


def open_files(area: str, nodes: int) -> Finding:
    """Compare the limit on open files with what a node in a run of this size needs."""
    needed = FILES + FILES_PER_PEER * nodes
    soft, hard = system.open_files()
    if soft is None or soft >= 2 * needed:
        text = "no limit" if soft is None else f"{soft:,} may be open"
        return Finding(area, "open files", f"{text}, a node in a run of {nodes} needs about {needed}")
    verdict = Verdict.WARNING if soft >= needed else Verdict.PROBLEM
    more = "any number" if hard is None else f"{hard:,}"
    advice = f"raise it before training: ulimit -n {2 * needed} ({more} are allowed)"
    return Finding(
        area, "open files", f"{soft:,} may be open, a node in a run of {nodes} needs about {needed}", verdict, advice
    )


def _there(folder: Path) -> Path:
    """The folder, or the nearest folder above it that exists."""
    place = folder.resolve()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def _enough(area: str, name: str, have: int | None, least: float, where: str, advice: str) -> Finding:
    if have is None:
        return Finding(area, name, "this system does not tell how much is free", Verdict.UNKNOWN)
    good = have >= least
    return Finding(area, name, f"{size(have)} {where}", Verdict.OK if good else Verdict.WARNING, "" if good else advice)


def _clock(now: float) -> Finding:
    text = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if time.gmtime(now).tm_year < 2025:
        return Finding(AREA, "clock", text, Verdict.PROBLEM, "set this machine's clock: server certificates fail")
    return Finding(AREA, "clock", text)


def _plugins() -> list[Finding]:
    loaded = load_plugins()
    entries = [entry for registry in loaded.registries() for entry in registry.registrations.values()]
    names = sorted({entry.distribution for entry in entries})
    found = [Finding(AREA, "plugins", f"{len(entries)} of {', '.join(names)}")]
    for failure in loaded.failures:
        value = f"{failure.plugin} of {failure.distribution} {failure.version} failed to load: {failure.error}"
        advice = f"update or uninstall it: pip install -U {failure.distribution}; all other plugins still work"
        found.append(Finding(AREA, "plugin", value, Verdict.WARNING, advice))
    for registry in loaded.registries():
        for name in registry.conflicts:
            found.append(
                Finding(AREA, "plugin", f"two plugins register {name!r}", Verdict.WARNING, registry.conflict(name))
            )
    return found


def _memory(estimate: Estimate, device: torch.device) -> Finding:
    memory = estimate.memory
    if device.type == "cpu":
        memory = {**memory, "a copy while a checkpoint is written": estimate.copied}
    needed = sum(memory.values())
    parts = ", ".join(f"{name} {size(amount)}" for name, amount in memory.items())
    have = free_memory(device)
    value = f"{size(needed)} without activations ({parts})"
    if have is None:
        return Finding(RECIPE, "memory", value, Verdict.UNKNOWN)
    value += f"; {size(have)} free"
    if needed > have:
        return Finding(RECIPE, "memory", value, Verdict.PROBLEM, "train a smaller model, or use a larger machine")
    if ROOM * needed > have:
        return Finding(RECIPE, "memory", value, Verdict.WARNING, "activations may not fit; lower micro_batch_size")
    return Finding(RECIPE, "memory", value)


def disk_needed(recipe: Recipe, estimate: Estimate) -> int:
    """The most bytes that a node writes: snapshots, payloads, delta, and checkpoints."""
    parameters = estimate.stored
    snapshot = max(parameters, 4 * estimate.trainable)  # snapshots hold float32 masters
    kept = max(snapshot, LEAST_KEPT)
    return SNAPSHOTS * snapshot + kept + 4 * estimate.trainable + (recipe.checkpoint.keep + 1) * parameters


def write_finding(seconds: float | None) -> Finding:
    """A row about durable writes."""
    if seconds is None:
        advice = "choose another folder with node.directory=DIR"
        return Finding(RECIPE, "disk writes", "the folder cannot be written to", Verdict.PROBLEM, advice)
    slow = seconds > SLOW_WRITE
    advice = "each round waits for several such writes: a local SSD is faster than a network drive" * slow
    value = f"on disk after {duration(seconds)}"
    return Finding(RECIPE, "disk writes", value, Verdict.WARNING if slow else Verdict.OK, advice)


def _disk(recipe: Recipe, estimate: Estimate, folder: Path) -> Finding:
    needed, have = disk_needed(recipe, estimate), free_disk(folder)
    value = f"up to {size(needed)} for snapshots, payloads and checkpoints"
    if have is None:
        return Finding(RECIPE, "disk", value, Verdict.UNKNOWN)
    value += f"; {size(have)} free in {folder.resolve()}"
    if needed > have:
        advice = "free space, choose another folder with node.directory=DIR, or lower checkpoint.keep"
        return Finding(RECIPE, "disk", value, Verdict.PROBLEM, advice)
    return Finding(RECIPE, "disk", value)


def model_size(estimate: Estimate) -> Finding:
    """A row about the size of the model and its payload."""
    value = f"{count(estimate.parameters)} parameters"
    if estimate.trainable != estimate.parameters:
        value += f", {count(estimate.trainable)} of them trained"
    value += f"; a payload of {size(estimate.payload)} a round"
    if len(estimate.stages) > 1:
        value += f" where its schedule has the largest k, {size(estimate.published)} in the whole run"
    return Finding(RECIPE, "model", value)
