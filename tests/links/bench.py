"""Tokens per second over home links: this project with local steps, with and without overlap, and torch DDP.

All of them train on the same shaped network:

    python tests/links/bench.py --json links.json --png docs/images/links.png

Each node is a process in a network namespace of its own; a relay between them gives every link a rate, a delay and a
loss (``relay.py``). The baseline is the same relay without them, in the same run: blocks of steps with and without the
limits take turns, so that a machine whose speed varies slows both. Needs root, for the namespaces.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from relay import Link, Machine, network
from rich.console import Console
from rich.table import Table

from psyche_lightning.bench.report import picture, write_json
from psyche_lightning.cli.demo.processes import Child, Processes
from psyche_lightning.recipe import load_recipe

HERE = Path(__file__).parent
PORT = 8080
SKIPPED = 3
"""First rounds that do not count: connections, and the pipeline's start."""
TURN = 1
"""Rounds that do not count after the limits were switched: one began before."""
CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")
LEFT_OUT = 2
"""Last rounds that do not count: the last one's time has the run's end in it."""


@dataclass(frozen=True)
class Outcome:
    """One training.

    Attributes:
        name: of the method.
        tokens_per_second: of all nodes together, over the limited links, in the time that this machine had.
        step_seconds: mean time of an optimizer step, by the clock.
        stolen: share of the time in which other guests of the host had this machine's cores.
        computing: share of the time in which a node did not wait for others, 0 to 1; mean of the nodes.
        bytes_up: bytes on a node's link per optimizer step, headers and repetitions included.
        unshaped: tokens per second of the same processes while the relay limited nothing; None: not measured.
        shares: tokens per second of each limited block, as a share of that of the unlimited ones before and after it.
        own_shares: the same without stolen time.
        note: how it was measured, where that is not plain.
    """

    name: str
    tokens_per_second: float
    step_seconds: float
    stolen: float
    computing: float
    bytes_up: float
    unshaped: float | None = None
    shares: tuple[float, ...] = ()
    own_shares: tuple[float, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Block:
    """Steps that were measured together: their time, how long a node waited in it, and its bytes up.

    ``stolen`` is the part of the time that the host gave to its other guests, as Linux counts it.
    """

    seconds: float
    waited: float
    sent: float
    stolen: float

    @property
    def own(self) -> float:
        """Seconds that this machine had."""
        return self.seconds - self.stolen


def wait_for(what: str, processes: Processes, test: Callable[[], Any], limit: float) -> None:
    """Poll ``test`` until it gives something.

    Raises:
        RuntimeError: a process failed, or it took too long; with the end of the processes' output.
    """
    until = time.monotonic() + limit
    while not test():
        failed = [child for child in processes.children if child.code]
        if failed or time.monotonic() > until:
            why = f"{failed[0].name} failed" if failed else f"it took more than {limit:.0f} s"
            raise RuntimeError(f"no {what}: {why}; the output ends with:\n{processes.children[0].tail()}")
        time.sleep(0.2)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """A node's steps so far."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if "seconds" in row]


def train_psyche(name: str, links: list[Link], recipe: str, blocks: int, steps: int, overrides: list[str]) -> Outcome:
    """This project, with its own coordinator on a machine of its own, which is as far away as the nodes.

    Args:
        name: of the outcome.
        links: of the nodes.
        recipe: what they train.
        blocks: blocks of steps over the limited links; one more is measured without limits.
        steps: optimizer steps in a block; with local steps, of as many rounds as have so many.
        overrides: of the recipe.
    """
    resolved = load_recipe(recipe, overrides)
    each = max(1, resolved.distro.local_steps)
    rounds = math.ceil(steps / each)
    away = Link(None, links[0].delay, links[0].loss)
    starts = [SKIPPED + number * (rounds + TURN) + TURN for number in range(2 * blocks + 1)]
    with tempfile.TemporaryDirectory() as scratch, network([*links, away]) as net, Processes() as processes:
        net.shape(False)
        folder, nodes, far = Path(scratch), net.machines[:-1], net.machines[-1]
        log = folder / "log"
        serve = [
            "coordinator",
            "--plain",
            "--host",
            far.address,
            "--port",
            str(PORT),
            "--dir",
            str(folder / "coordinator"),
        ]
        url = processes.add(Child("coordinator", serve, log, inside=far.inside)).url()
        given = [f"total_steps={starts[-1] + rounds + LEFT_OUT}", f"init_min_clients={len(nodes)}", "run.shares=equal"]
        given += overrides
        own = ["--coordinator", url, "--token-file", str(folder / "coordinator" / "owner.token")]
        create = Child("run", ["run", "create", "links", recipe, "--open", *given, *own], log, inside=far.inside)
        if processes.add(create).process.wait():
            raise RuntimeError(f"the run could not be created: {create.tail()}")
        folders = [folder / f"node-{number}" for number in range(len(nodes))]
        for node, own in zip(nodes, folders, strict=True):
            train = ["train", recipe, *given, f"node.directory={own}", f"node.transport_options.host={node.address}"]
            train += ["--coordinator", url, "--run", "links"]
            processes.add(Child(own.name, train, log, inside=node.inside))
        wait_for("first steps", processes, partial(_reached, folders, SKIPPED), 900)
        measured = []
        for number, first in enumerate(starts):
            net.shape(number % 2 == 1)
            measured.append(_measure(folders, nodes, processes, first, rounds))
    free, limited = measured[::2], measured[1::2]
    tokens = resolved.run.global_batch_size_start * resolved.data.seq_len * rounds
    own, seconds = sum(one.own for one in limited), sum(one.seconds for one in limited)
    return Outcome(
        name,
        tokens * blocks / own,
        seconds / blocks / rounds / each,
        1 - own / seconds,
        1 - sum(one.waited for one in limited) / seconds,
        sum(one.sent for one in limited) / blocks / rounds / each,
        tokens * len(free) / sum(one.own for one in free),
        _shares([one.seconds for one in measured]),
        _shares([one.own for one in measured]),
    )


def _shares(seconds: list[float]) -> tuple[float, ...]:
    """The speed of each second block as a share of that of its neighbours."""
    trios = zip(seconds[::2], seconds[1::2], seconds[2::2], strict=False)
    return tuple((before + after) / 2 / limited for before, limited, after in trios)


def _stolen() -> float:
    """Seconds since the start that the host took from a core of this machine, on average (``/proc/stat``)."""
    return int(Path("/proc/stat").read_text().split()[8]) / os.sysconf("SC_CLK_TCK") / (os.cpu_count() or 1)


def _measure(folders: list[Path], nodes: list[Machine], processes: Processes, first: int, rounds: int) -> Block:
    """Wait for the end of a block that begins when the round ``first`` is done."""
    sent, rows, stolen = [], [], []
    for step in (first, first + rounds):
        wait_for(f"round {step}", processes, partial(_reached, folders, step), 1800)
        sent.append(_sent(nodes))
        stolen.append(_stolen())
        rows.append([next(row for row in rows_of(own) if row["step"] == step) for own in folders])
    pairs = list(zip(*rows, strict=True))
    seconds = max(after["seconds"] - before["seconds"] for before, after in pairs)
    waited = statistics.fmean(after["waited"] - before["waited"] for before, after in pairs)
    return Block(seconds, waited, sent[1] - sent[0], stolen[1] - stolen[0])


def _sent(nodes: list[Machine]) -> float:
    """Bytes that a node has sent so far, on average."""
    return statistics.fmean(node.traffic()[0] for node in nodes)


def _reached(folders: list[Path], step: int) -> bool:
    """Whether all nodes have done a step."""
    return all(any(row["step"] >= step for row in rows_of(folder)) for folder in folders)


def train_ddp(name: str, links: list[Link], recipe: str, limit: float) -> Outcome:
    """Torch DDP: one step, or as much of it as the limit allows."""
    resolved = load_recipe(recipe)
    tokens = resolved.data.seq_len * len(links)
    with tempfile.TemporaryDirectory() as scratch, network(links) as net, Processes() as processes:
        nodes, log = net.machines, Path(scratch) / "log"
        for rank, node in enumerate(nodes):
            variables = {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(nodes)),
                "MASTER_ADDR": nodes[0].address,
                "MASTER_PORT": "29500",
                "GLOO_SOCKET_IFNAME": "tun0",
            }
            program = [str(HERE / "allreduce.py")]
            processes.add(Child(f"rank {rank}", [recipe, "1"], log, variables, program, node.inside))
        from psyche_lightning.recipe.estimate import estimate

        expected = estimate(resolved).allreduce_bytes_per_round(len(nodes))
        wait_for("start of DDP", processes, lambda: _sent(nodes) * len(nodes) > 4e6, 300)
        had, begun, before = _stolen(), time.monotonic(), _sent(nodes)
        done: list[dict[str, Any]] = []
        while time.monotonic() - begun < limit and len(done) < len(nodes):
            time.sleep(1)
            done = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        sent = _sent(nodes) - before
        passed = time.monotonic() - begun
        stolen = (_stolen() - had) / passed
    if len(done) == len(nodes):
        seconds = max(row["seconds"] for row in done)
        computing = max(row["computing"] for row in done) / seconds
        return Outcome(name, tokens / seconds / (1 - stolen), seconds, stolen, computing, before + sent)
    seconds = expected / (sent / passed)
    note = f"projected from {sent / 1e6:.0f} MB in {passed:.0f} s of the {expected / 1e6:.0f} MB of a step"
    return Outcome(name, tokens / seconds / (1 - stolen), seconds, stolen, 0.0, expected, note=note)


def _spread(shares: tuple[float, ...]) -> str:
    """Mean, lowest and highest."""
    return f"{statistics.fmean(shares):.0%} ({min(shares):.0%}-{max(shares):.0%})" if shares else ""


def main() -> None:
    """Measure, print a table, write JSON and a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--mbit", type=float, default=20.0, help="what each node can send, Mbit/s")
    parser.add_argument("--round-trip", type=float, default=0.1, help="seconds")
    parser.add_argument("--loss", type=float, default=0.01, help="share of the packets")
    parser.add_argument("--recipe", default=str(HERE / "hundred.yaml"))
    parser.add_argument("--steps", type=int, default=3, help="in a block")
    parser.add_argument("--blocks", type=int, default=5, help="over limited links; one more without limits")
    parser.add_argument("--local-steps", type=int, default=8, help="in a round of that method; 0 leaves it out")
    parser.add_argument("--ddp-limit", type=float, default=600.0, help="seconds for DDP's step; 0 leaves DDP out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the namespaces and the relay end too
    links = [Link(given.mbit * 1e6, given.round_trip / 2, given.loss)] * given.nodes
    console = Console()
    outcomes: list[Outcome] = []
    methods = {"psyche, overlap": ["run.overlap=true"], "psyche, no overlap": ["run.overlap=false"]}
    if given.local_steps:
        batch = load_recipe(given.recipe).run.global_batch_size_start * given.local_steps
        local = [f"distro.local_steps={given.local_steps}", "distro.chunk=32", "distro.k=50", "distro.scale=2"]
        local += [f"global_batch_size_start={batch}", f"global_batch_size_end={batch}", "run.overlap=true"]
        methods[f"psyche, overlap, {given.local_steps} local steps"] = local
    for name, overrides in methods.items():
        console.print(f"[dim]{name} ...[/]")
        outcomes.append(train_psyche(name, links, given.recipe, given.blocks, given.steps, overrides))
    if given.ddp_limit:
        console.print("[dim]DDP ...[/]")
        outcomes.append(train_ddp("torch DDP, gloo", links, given.recipe, given.ddp_limit))
    title = (
        f"{given.nodes} nodes, each {given.mbit:g} Mbit/s up, {1000 * given.round_trip:g} ms round trip, "
        f"{100 * given.loss:g} % loss"
    )
    table = Table("", *(one.name for one in outcomes), title=title)
    rows: dict[str, Callable[[Outcome], str]] = {
        "tokens/s": lambda one: f"{one.tokens_per_second:.2f}",
        "tokens/s, unshaped": lambda one: f"{one.unshaped:.2f}" if one.unshaped else "",
        "share": lambda one: _spread(one.own_shares),
        "share, wall clock": lambda one: _spread(one.shares),
        "step": lambda one: f"{one.step_seconds:.2f} s",
        "of it computing": lambda one: f"{one.computing:.0%}",
        "of it stolen": lambda one: f"{one.stolen:.0%}",
        "up a step": lambda one: f"{one.bytes_up / 1e6:.2f} MB",
    }
    for name, tell in rows.items():
        table.add_row(name, *map(tell, outcomes))
    console.print(table)
    console.print(f"congestion control of this machine: {CONTROL.read_text().strip()}", highlight=False)
    for one in outcomes:
        if one.note:
            console.print(f"{one.name}: {one.note}", highlight=False)
    if given.ddp_limit:
        ratio = outcomes[0].tokens_per_second / outcomes[-1].tokens_per_second
        console.print(f"with overlap, {ratio:.0f} times the tokens/s of DDP")
    write_json(given.json, {**{k: str(v) for k, v in vars(given).items()}, "outcomes": [asdict(o) for o in outcomes]})
    bars = {
        "these links": ([one.name for one in outcomes], [one.tokens_per_second for one in outcomes]),
        "unshaped": ([one.name for one in outcomes], [one.unshaped or math.nan for one in outcomes]),
    }
    picture(given.png, title, "", "tokens per second", bars)


if __name__ == "__main__":
    main()
