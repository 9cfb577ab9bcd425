"""Soak: nodes are killed with -9 for minutes, and new ones come in their place; then everything is checked.

    python tests/chaos/soak.py --minutes 15

Five nodes and a coordinator on this machine train the demo's twin in epochs of some 25 seconds. Every 30 seconds a
random node is killed, a new one with an empty folder takes its place. The first node is spared: its memory and file
descriptors are watched, as are the coordinator's. Prints a table, and JSON with --json FILE; exits with 1 if something
does not hold.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from psyche_lightning.errors import CoordinatorError

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.fleet import Fleet, usage

SETTINGS = [
    "total_steps=1000000",
    "init_min_clients=2",
    "min_clients=2",
    "global_batch_size_start=10",
    "global_batch_size_end=10",
    "epoch_time=20",
    "warmup_time=15",
    "cooldown_time=10",
    "max_round_train_time=10",
    "round_witness_time=5",
]
LONGEST_PAUSE = 60.0
"""Seconds without a new step that the end of an epoch, a kill and the warm-up together may take."""
GROWTH = 1.1
SLACK = 24 << 20
FILES = 8


class Watch:
    """Samples a run once a second."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.epochs: dict[int, str] = {}
        self.samples: dict[str, list[tuple[float, int, int]]] = {"coordinator": [], "node 0": []}
        self.longest = 0.0
        self.step = 0
        self._moved = self._sampled = time.monotonic()
        self._events = 0

    def look(self) -> None:
        """Take one sample."""
        now = time.monotonic()
        try:
            status = self.fleet.status()
        except CoordinatorError:
            return
        if status["step"] > self.step:
            self.step, self._moved = status["step"], now
        elif status["phase"] not in ("paused", "finished"):
            self.longest = max(self.longest, now - self._moved)
        fresh = status["event_count"] - self._events
        for event in status["events"][-fresh:] if fresh else []:
            text = event["text"]
            if event["kind"] == "epoch" and "has ended" in text:
                self.epochs[int(text.split()[1])] = text.partition(": ")[2]
        self._events = status["event_count"]
        if now - self._sampled > 5:
            self._sampled = now
            for name, child in (("coordinator", self.fleet.coordinator), ("node 0", self.fleet.nodes[0])):
                if child.code is None:
                    self.samples[name].append((now, *usage(child.process.pid)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--every", type=float, default=30.0, help="seconds from one kill to the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--keep", type=Path, help="folder for logs and ledgers; a temporary one unless given")
    parser.add_argument("overrides", nargs="*", help="of the run, such as overlap=true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = soak(options, options.keep or Path(scratch) / "soak")
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if figures["problems"] else 0


def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Play it, and return the figures."""
    rng = random.Random(options.seed)
    problems: list[str] = []
    with Fleet(folder, [*SETTINGS, *options.overrides], run="soak") as fleet:
        living = [fleet.start() for _ in range(options.nodes)]
        fleet.until(lambda found: found["step"] > 3, "the first steps", 120)
        watch, kills = Watch(fleet), 0
        began = time.monotonic()
        due, end = began + options.every, began + 60 * options.minutes
        while time.monotonic() < end:
            time.sleep(1)
            watch.look()
            for number in list(living):
                if fleet.nodes[number].code is not None:
                    problems.append(f"node {number} ended by itself: {fleet.nodes[number].tail(3)}")
                    living.remove(number)
            if due < time.monotonic() < end - options.every / 2:
                due += options.every
                victim = rng.choice(living[1:])
                fleet.kill(victim)
                living.remove(victim)
                living.append(fleet.start())
                kills += 1
        seconds = time.monotonic() - began
        fleet.until(lambda found: len(found["clients"]) == len(living), "the last newcomer", 120)
        digests = fleet.conclude(120)
        watch.look()
        status = fleet.status()
        ledger = fleet.ledger()
        differed = sum("differ" in fleet.log(number) for number in fleet.nodes)
        unable = sum(fleet.log(number).count("cannot be applied") for number in fleet.nodes)
    split = {epoch: text for epoch, text in watch.epochs.items() if not _agreed(text)}
    problems += [f"epoch {epoch}: {text}" for epoch, text in split.items()]
    if watch.longest > LONGEST_PAUSE:
        problems.append(f"no step for {watch.longest:.0f} s")
    if len(set(digests.values())) != 1 or set(digests) != set(living):
        problems.append(f"nodes {living} ran at the end, and ended with {digests}")
    if ledger.problems or ledger.rounds != status["step"] - 1:
        problems.append(f"{ledger.rounds} of {status['step'] - 1} rounds in the ledger: {ledger.problems}")
    processes = {name: _growth(name, samples, problems) for name, samples in watch.samples.items()}
    return {
        "seconds": round(seconds),
        "kills": kills,
        "nodes_started": len(fleet.nodes),
        "steps": status["step"] - 1,
        "epochs": len(watch.epochs),
        "epochs_whose_digests_agreed": len(watch.epochs) - len(split),
        "longest_pause_seconds": round(watch.longest, 1),
        "ids_trained_once": ledger.ids,
        "ids_trained_again_later": sum(line.stop - line.start for line in ledger.lines if line.again),
        "ids_not_trained": sum(stop - start for start, stop in ledger.untrained),
        "rounds_undone": ledger.undone,
        "nodes_that_saw_a_difference": differed,
        "rounds_that_could_not_be_applied": unable,
        "final_digests": sorted(set(digests.values())),
        "processes": processes,
        "problems": problems,
    }


def _agreed(text: str) -> bool:
    """Whether all that reported the end of an epoch reported the same parameters."""
    words = text.split()
    return "agreed" in words and words[words.index("by") + 1] == words[words.index("of", words.index("by")) + 1]


def _growth(name: str, samples: list[tuple[float, int, int]], problems: list[str]) -> dict[str, int]:
    """Medians of the second and of the last quarter: what grows in the first is what a process needs."""
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
    memory = [round(statistics.median(sample[1] for sample in part)) for part in (early, late)]
    files = [round(statistics.median(sample[2] for sample in part)) for part in (early, late)]
    if memory[1] > GROWTH * memory[0] + SLACK:
        problems.append(f"the memory of {name} grew from {memory[0] >> 20} to {memory[1] >> 20} MiB")
    if files[1] > files[0] + FILES:
        problems.append(f"the file descriptors of {name} grew from {files[0]} to {files[1]}")
    return {"memory_early": memory[0], "memory_late": memory[1], "files_early": files[0], "files_late": files[1]}


def show(figures: dict[str, Any]) -> None:
    """Print the table."""
    console = Console()
    table = Table("soak", "", show_header=False)
    for name, value in figures.items():
        if name == "processes":
            for process, row in value.items():
                memory = f"{row['memory_early'] >> 20} -> {row['memory_late'] >> 20} MiB"
                table.add_row(process, f"{memory}, {row['files_early']} -> {row['files_late']} files")
        elif name == "final_digests":
            table.add_row("final digest", ", ".join(digest[:16] for digest in value))
        elif name != "problems":
            table.add_row(name.replace("_", " "), f"{value:,}")
    console.print(table)
    for problem in figures["problems"]:
        console.print(f"[bold red]problem:[/] {problem}", markup=True, highlight=False)
    console.print("everything held" if not figures["problems"] else f"{len(figures['problems'])} problems")


if __name__ == "__main__":
    sys.exit(main())
