"""Tokens per second of ``psyche demo`` beside torch DDP: processes of one machine that train the same over loopback."""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psyche_lightning import system
from psyche_lightning.errors import ConfigError, PsycheError, counted
from psyche_lightning.recipe import Recipe, load_recipe

WARM_UP = 10
"""First rounds, which do not count: connections are made, and memory is taken."""
ENDING = 2
"""Last rounds, which do not count: their time has the end of the run in it."""
ASK_SECONDS = 15.0
"""Seconds in which a process may end by itself before it is killed."""


@dataclass(frozen=True)
class Task:
    """What both train.

    Attributes:
        recipe: name or path of the recipe.
        overrides: its ``key=value``.
        twin: whether it is the recipe's CPU-sized twin.
        nodes: processes that train.
        rounds: rounds that are timed in each training. DDP makes as many optimizer steps in a round as a node does.

    Raises:
        ConfigError: DDP cannot train it, as its samples do not divide among the nodes, or it needs a GPU or bfloat16.
    """

    recipe: str
    overrides: tuple[str, ...]
    twin: bool
    nodes: int
    rounds: int

    def __post_init__(self) -> None:
        recipe, parts = self.resolved, self.nodes * self.steps
        start, end = recipe.run.global_batch_size_start, recipe.run.global_batch_size_end
        computing = recipe.trainer
        if start != end or start % parts:
            each = f"{self.nodes} nodes, {counted(self.steps, 'step')} each"
            raise ConfigError(
                f"The run has {start} to {end} samples in a round, and DDP needs a number that does not change and "
                f"divides by {parts} ({each}). Set global_batch_size_start={parts} and global_batch_size_end={parts}, "
                "or a multiple."
            )
        if (computing.accelerator, computing.precision) != ("cpu", "32-true"):
            raise ConfigError(
                "DDP trains on the CPU in float32 here. Add trainer.accelerator=cpu trainer.precision=32-true."
            )

    @property
    def resolved(self) -> Recipe:
        """The recipe."""
        return load_recipe(self.recipe, self.overrides, twin=self.twin)

    @property
    def steps(self) -> int:
        """Optimizer steps that a node makes in a round."""
        return max(1, self.resolved.distro.local_steps)

    @property
    def tokens(self) -> int:
        """Tokens of all nodes in the timed rounds."""
        recipe = self.resolved
        return self.rounds * recipe.run.global_batch_size_start * recipe.data.seq_len


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
        ddp: tokens per second of each training with DDP.
        psyche: of each with psyche; each ran between two with DDP.
        waited: the share of its time in which a node waited for others, mean of the nodes, of each psyche training.
    """

    ddp: tuple[float, ...]
    psyche: tuple[float, ...]
    waited: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Each of psyche's speeds, as a share of the mean of DDP's before and after it."""
        pairs = zip(self.ddp, self.psyche, self.ddp[1:], strict=False)
        return tuple(speed / statistics.fmean((before, after)) for before, speed, after in pairs)


def compare(task: Task, repeats: int, tell: Callable[[str], None] = lambda what: None) -> Comparison:
    """Train with both in turn, each time with new processes.

    Args:
        task: what to train.
        repeats: trainings with psyche; there is one more with DDP.
        tell: called before each with what begins.

    Raises:
        PsycheError: a process failed; with the end of its output.
    """
    ddp, psyche, waited = [], [], []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        for number in range(2 * repeats + 1):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            if number % 2:
                tell(f"psyche demo, {number // 2 + 1} of {repeats}")
                speed, share = _train_psyche(task, folder)
                psyche.append(speed)
                waited.append(share)
            else:
                tell(f"torch DDP, {number // 2 + 1} of {repeats + 1}")
                ddp.append(_train_ddp(task, folder))
    return Comparison(tuple(ddp), tuple(psyche), tuple(waited))


def _train_psyche(task: Task, folder: Path) -> tuple[float, float]:
    """Tokens per second, and the share of the time that a node waited."""
    given = [task.recipe, "--nodes", str(task.nodes), "--rounds", str(WARM_UP + task.rounds + ENDING)]
    given += ["--twin"] if task.twin else []
    # Validation is no part of training, and DDP makes none.
    command = ["-m", "psyche_lightning", "demo", "--recipe", *given, "--keep", str(folder / "demo")]
    run([[*command, *task.overrides, "trainer.validate_every=0"]], folder / "log")
    seconds, waited = [], []
    for path in sorted((folder / "demo").glob("node-*/metrics.jsonl")):
        rows = {row["step"]: row for row in map(json.loads, path.read_text().splitlines()) if "waited" in row}
        before, after = rows[WARM_UP], rows[WARM_UP + task.rounds]
        seconds.append(after["seconds"] - before["seconds"])
        waited.append((after["waited"] - before["waited"]) / seconds[-1])
    return task.tokens / statistics.fmean(seconds), statistics.fmean(waited)


def _train_ddp(task: Task, folder: Path) -> float:
    """Tokens per second."""
    what = json.dumps([task.recipe, task.overrides, task.twin, task.nodes, task.rounds])
    command = ["-m", __name__, what, (folder / "meeting").as_uri()]
    logs = run([[*command, str(rank)] for rank in range(task.nodes)], folder / "log")
    return task.tokens / statistics.fmean(json.loads(text.splitlines()[-1])["seconds"] for text in logs)


def run(commands: Sequence[Sequence[str]], log: Path) -> list[str]:
    """Run Python processes at the same time, to their end.

    Args:
        commands: the arguments of each.
        log: where each writes its output, with its number after the name.

    Returns:
        The output of each.

    Raises:
        PsycheError: one failed; the others are stopped.
    """
    logs = [log.with_name(f"{log.name}-{number}") for number in range(len(commands))]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for arguments, path in zip(commands, logs, strict=True):
            with path.open("wb") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *arguments],
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},  # as psyche demo does
                        start_new_session=True,
                    )
                )
        while any(process.poll() is None for process in processes):
            for process, path in zip(processes, logs, strict=True):
                if process.poll():
                    tail = "\n".join(path.read_text(errors="replace").splitlines()[-12:])
                    raise PsycheError(f"a process of the measurement failed; its output ends with:\n{tail}")
            time.sleep(0.2)
    finally:
        for process in processes:
            system.send_signal(process, signal.SIGINT)  # psyche demo stops its own processes then
        deadline = time.monotonic() + ASK_SECONDS
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.05)
        for process in processes:
            system.send_signal(process, system.KILL)
            process.wait()
    return [path.read_text(errors="replace") for path in logs]


# -- a process of DDP -------------------------------------------------------------------------------------------------


def _rank(task: Task, meeting: str, rank: int) -> float:
    """Train as one process; returns the seconds of the timed rounds."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader
    from torch.utils.data.distributed import DistributedSampler

    from psyche_lightning.plugins import load_plugins
    from psyche_lightning.train.module import INPUTS, CausalModule, ProviderDataset, call_options

    recipe = task.resolved
    torch.set_num_threads(recipe.trainer.threads or 1)
    torch.manual_seed(recipe.run.seed)
    plugins = load_plugins()
    model = plugins.models()[recipe.model.name](dict(recipe.model.options)).train()
    data = ProviderDataset(plugins.data_providers()[recipe.data.name](recipe.data.options, seed=recipe.run.seed))
    made = CausalModule(model, recipe.optimizer, recipe.schedule).configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    # Not before the optimizer: what torch loads for that would keep the group's threads alive at the end.
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=task.nodes)
    parallel = DistributedDataParallel(model)
    share = recipe.run.global_batch_size_start // task.nodes // task.steps
    micro = min(recipe.trainer.micro_batch_size, share)
    sampler: DistributedSampler[Any] = DistributedSampler(data, task.nodes, rank, shuffle=False)
    batches = _endless(DataLoader(data, batch_size=micro, sampler=sampler, drop_last=True))
    options = call_options(model)
    began = 0.0
    for step in range((WARM_UP + task.rounds) * task.steps):
        if step == WARM_UP * task.steps:
            began = time.monotonic()
        left = share
        while left:
            batch = next(batches)
            size = min(left, micro)
            inputs = {name: batch[name][:size] for name in INPUTS if name in batch}
            parallel.require_backward_grad_sync = left == size  # as no_sync() does
            loss = parallel(**inputs, **options).loss * (size / share)
            loss.backward()
            left -= size
        if recipe.optimizer.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    seconds = time.monotonic() - began
    dist.destroy_process_group()
    return seconds


def _endless(batches: Any) -> Iterator[Any]:
    return itertools.chain.from_iterable(itertools.repeat(batches))


if __name__ == "__main__":
    name, given, small, count, timed = json.loads(sys.argv[1])
    seconds = _rank(Task(name, tuple(given), small, count, timed), sys.argv[2], int(sys.argv[3]))
    print(json.dumps({"seconds": seconds}), flush=True)
    os._exit(0)  # threads of the process group, which torch may keep, can hold up the usual end
