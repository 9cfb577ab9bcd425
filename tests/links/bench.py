"""Tokens per second over home links: this project with and without overlap, and torch DDP, on the same shaped network.

    python tests/links/bench.py --json links.json --png docs/images/links.png

Each node is a process in a network namespace of its own; a relay between them gives every link a rate, a delay and a
loss (``relay.py``). The baseline is the same relay without them. Needs root, for the namespaces.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from relay import Link, Machine, network
from rich.console import Console
from rich.table import Table

from psyche_lightning.bench.report import picture, write_json
from psyche_lightning.recipe import load_recipe

HERE = Path(__file__).parent
THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM")}
PORT = 8080
SKIPPED = 3
"""First steps that do not count: connections, and the pipeline's start."""
LEFT_OUT = 2
"""Last steps that do not count: the last one's time has the run's end in it."""


@dataclass(frozen=True)
class Outcome:
    """One training.

    Attributes:
        name: of the method and its links.
        tokens_per_second: of all nodes together.
        step_seconds: mean time of a step.
        computing: share of the time in which a node did not wait for others, 0 to 1.
        bytes_up: bytes on a node's link per step, headers and repetitions included.
        note: how it was measured, where that is not plain.
    """

    name: str
    tokens_per_second: float
    step_seconds: float
    computing: float
    bytes_up: float
    note: str = ""


@contextlib.contextmanager
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """A list whose processes are ended when the block is left."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        yield started
    finally:
        for process in started:
            process.terminate()
        for process in started:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def start(machine: Machine, arguments: Sequence[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
    """Run Python on a machine."""
    environment = {**os.environ, **THREADS, "PYTHONUNBUFFERED": "1", **variables}
    with log.open("ab") as output:
        return subprocess.Popen(
            machine.command([sys.executable, *arguments]), stdout=output, stderr=subprocess.STDOUT, env=environment
        )


def wait_for(what: str, log: Path, test: Any, limit: float) -> Any:
    """Poll ``test`` until it gives something.

    Raises:
        TimeoutError: it took too long; with the end of the log.
    """
    until = time.monotonic() + limit
    while not (found := test()):
        if time.monotonic() > until:
            raise TimeoutError(f"{what} took more than {limit:.0f} s; the log ends with:\n{log.read_text()[-2000:]}")
        time.sleep(0.2)
    return found


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """A node's steps so far."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if "seconds" in row]


def train_psyche(name: str, links: list[Link], recipe: str, steps: int, overrides: list[str]) -> Outcome:
    """This project, with its own coordinator on a machine of its own, which is as far away as the nodes."""
    resolved = load_recipe(recipe)
    away = Link(None, links[0].delay, links[0].loss)
    with tempfile.TemporaryDirectory() as scratch, network([*links, away]) as machines, processes() as running:
        folder, nodes, far = Path(scratch), machines[:-1], machines[-1]
        url, log = f"http://{far.address}:{PORT}", folder / "log"
        serve = ["coordinator", "--host", far.address, "--port", str(PORT), "--dir", str(folder / "coordinator")]
        running.append(start(far, ["-m", "psyche_lightning.cli", *serve], log))
        given = [f"total_steps={steps + LEFT_OUT}", f"init_min_clients={len(nodes)}", *overrides]
        wait_for("the coordinator's start", log, lambda: "http" in log.read_text(), 60)
        create = ["-m", "psyche_lightning.cli", "run", "create", "links", recipe, *given, "--coordinator", url]
        made = subprocess.run(far.command([sys.executable, *create]), capture_output=True, text=True, check=False)
        if made.returncode:
            raise RuntimeError(f"the run could not be created: {made.stderr}\nthe coordinator: {log.read_text()}")
        folders = [folder / f"node-{number}" for number in range(len(nodes))]
        for node, own in zip(nodes, folders, strict=True):
            train = ["train", recipe, *given, f"node.dir={own}", f"node.options.host={node.address}"]
            train += ["--coordinator", url, "--run", "links"]
            running.append(start(node, ["-m", "psyche_lightning.cli", *train], log))
        seen: dict[int, int] = {}
        wait_for("training", log, lambda: _reached(folders, nodes, seen, SKIPPED), 900)
        wait_for("training", log, lambda: _reached(folders, nodes, seen, steps), 1800)
        first, last = (
            [next(row for row in rows_of(own) if row["step"] == step) for own in folders] for step in (SKIPPED, steps)
        )
    seconds = max(b["seconds"] - a["seconds"] for a, b in zip(first, last, strict=True))
    waited = [b["waited"] - a["waited"] for a, b in zip(first, last, strict=True)]
    counted = steps - SKIPPED
    tokens = resolved.run.global_batch_size_start * resolved.data.seq_len
    sent = (seen[steps] - seen[SKIPPED]) / counted / len(nodes)
    return Outcome(name, tokens * counted / seconds, seconds / counted, 1 - max(waited) / seconds, sent)


def _reached(folders: list[Path], nodes: list[Machine], seen: dict[int, int], step: int) -> bool:
    """Whether all nodes have done a step; notes the bytes sent when they have."""
    if not all(any(row["step"] >= step for row in rows_of(folder)) for folder in folders):
        return False
    seen[step] = sum(node.traffic()[0] for node in nodes)
    return True


def train_ddp(name: str, links: list[Link], recipe: str, limit: float) -> Outcome:
    """Torch DDP: one step, or as much of it as the limit allows."""
    resolved = load_recipe(recipe)
    tokens = resolved.data.seq_len * len(links)
    with tempfile.TemporaryDirectory() as scratch, network(links) as nodes, processes() as running:
        log = Path(scratch) / "log"
        for rank, node in enumerate(nodes):
            variables = {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(nodes)),
                "MASTER_ADDR": nodes[0].address,
                "MASTER_PORT": "29500",
                "GLOO_SOCKET_IFNAME": "tun0",
            }
            running.append(start(node, [str(HERE / "allreduce.py"), recipe, "1"], log, **variables))
        from psyche_lightning.recipe.estimate import estimate

        expected = estimate(resolved).allreduce_bytes_per_round(len(nodes))
        wait_for("DDP's start", log, lambda: sum(node.traffic()[0] for node in nodes) > 4e6, 300)
        begun, before = time.monotonic(), sum(node.traffic()[0] for node in nodes) / len(nodes)
        done: list[dict[str, Any]] = []
        while time.monotonic() - begun < limit and len(done) < len(nodes):
            time.sleep(1)
            done = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        sent = sum(node.traffic()[0] for node in nodes) / len(nodes) - before
        passed = time.monotonic() - begun
    if len(done) == len(nodes):
        seconds = max(row["seconds"] for row in done)
        computing = max(row["computing"] for row in done) / seconds
        return Outcome(name, tokens / seconds, seconds, computing, before + sent)
    seconds = expected / (sent / passed)
    note = f"projected from {sent / 1e6:.0f} MB in {passed:.0f} s of the {expected / 1e6:.0f} MB of a step"
    return Outcome(name, tokens / seconds, seconds, 0.0, expected, note)


def main() -> None:
    """Measure, print a table, write JSON and a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--mbit", type=float, default=20.0, help="what each node can send, Mbit/s")
    parser.add_argument("--round-trip", type=float, default=0.1, help="seconds")
    parser.add_argument("--loss", type=float, default=0.01, help="share of the packets")
    parser.add_argument("--recipe", default=str(HERE / "hundred.yaml"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--ddp-limit", type=float, default=300.0, help="seconds for DDP's step; 0 leaves DDP out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    given = parser.parse_args()
    shaped = [Link(given.mbit * 1e6, given.round_trip / 2, given.loss)] * given.nodes
    plain = [Link()] * given.nodes
    console = Console()
    outcomes: list[Outcome] = []
    runs = [("overlap, unshaped", plain, True), ("overlap", shaped, True), ("no overlap", shaped, False)]
    for name, links, overlap in runs:
        console.print(f"[dim]psyche, {name} ...[/]")
        overrides = [f"run.overlap={str(overlap).lower()}"]
        outcomes.append(train_psyche(f"psyche, {name}", links, given.recipe, given.steps, overrides))
    if given.ddp_limit:
        console.print("[dim]DDP ...[/]")
        outcomes.append(train_ddp("DDP, gloo", shaped, given.recipe, given.ddp_limit))
    title = (
        f"{given.nodes} nodes, each {given.mbit:g} Mbit/s up, {1000 * given.round_trip:g} ms round trip, "
        f"{100 * given.loss:g} % loss"
    )
    table = Table("", "tokens/s", "of unshaped", "step, s", "computing", "bytes up a step", title=title)
    for one in outcomes:
        table.add_row(
            one.name,
            f"{one.tokens_per_second:.2f}",
            f"{one.tokens_per_second / outcomes[0].tokens_per_second:.1%}",
            f"{one.step_seconds:.1f}",
            f"{one.computing:.0%}",
            f"{one.bytes_up / 1e6:.2f} MB",
        )
    console.print(table)
    for one in outcomes:
        if one.note:
            console.print(f"{one.name}: {one.note}", highlight=False)
    if given.ddp_limit:
        ratio = outcomes[1].tokens_per_second / outcomes[-1].tokens_per_second
        console.print(f"with overlap, {ratio:.0f} times the tokens/s of DDP")
    write_json(given.json, {**{k: str(v) for k, v in vars(given).items()}, "outcomes": [asdict(o) for o in outcomes]})
    lines = {"tokens/s": ([one.name for one in outcomes], [one.tokens_per_second for one in outcomes])}
    picture(given.png, title, "", "tokens per second", lines)


if __name__ == "__main__":
    main()
