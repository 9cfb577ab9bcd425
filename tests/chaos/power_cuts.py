"""Kills all nodes and the coordinator at once, again and again; each time one node and the coordinator must suffice.

    python tests/chaos/power_cuts.py --times 20 --seed 1

Three real nodes train the demo's twin. At a random moment everything gets ``kill -9``. Then the coordinator and one
node come back with their folders, the run must go on from its last decided round, and the other nodes follow. Where
that node had not yet verified a round that the two others decided, it must say so, and a second one must suffice. At
the end all digests must be equal, and the ledgers must show each data id once.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.fleet import Fleet

SETTINGS = [
    "total_steps=1000000",
    "init_min_clients=1",
    "min_clients=1",
    "global_batch_size_start=6",
    "global_batch_size_end=6",
    "epoch_time=20",
    "warmup_time=15",
    "cooldown_time=15",
    "max_round_train_time=12",
    "waiting_for_members_extra_time=2",
]
NODES = 3


@dataclass
class Cuts:
    """What the power cuts did.

    Attributes:
        steps: for each cut the step before it, and the first one that was trained after it.
        waited: cuts after which the first node lacked the last results.
        digests: the nodes' at the end.
        problems: of the ledgers.
        ids: data ids trained.
    """

    steps: list[tuple[int, int]] = field(default_factory=list)
    waited: int = 0
    digests: dict[int, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    ids: int = 0


def cut_power(folder: Path, times: int, seed: int) -> Cuts:
    """Cut the power so many times.

    Raises:
        FleetError: the run did not go on, or did not end.
        AssertionError: it went back, or the nodes or their ledgers differ.
    """
    rng, cuts = random.Random(seed), Cuts()
    with Fleet(folder, SETTINGS) as fleet:
        for _ in range(NODES):
            fleet.start()
        fleet.until(lambda found: _all_train(found, 10), "an epoch of all nodes")
        for _ in range(times):
            time.sleep(rng.uniform(0.5, 6.0))
            found = fleet.status()
            before, epoch = found["step"], found["epoch"]
            for number in fleet.nodes:
                fleet.kill(number)
            fleet.restart_coordinator()
            first, *others = rng.sample(sorted(fleet.nodes), NODES)
            fleet.start(number=first)
            goes_on = partial(_goes_on, epoch)
            lacks = partial(_lacks_results, fleet.place(first), datetime.now().astimezone())
            found = fleet.until(lambda found, goes_on=goes_on, lacks=lacks: goes_on(found) or lacks(), "one node")
            if not goes_on(found):
                cuts.waited += 1
                fleet.start(number=others.pop())
                found = fleet.until(goes_on, "the run to go on with two nodes")
            after = found["step"]
            assert after >= before, f"the run went back from step {before} to {after}"
            cuts.steps.append((before, after))
            for number in others:
                fleet.start(number=number)
            fleet.until(lambda found, after=after: _all_train(found, after), "all nodes")
        cuts.digests = fleet.conclude()
        ledger = fleet.ledger()
    cuts.problems, cuts.ids = ledger.problems, ledger.ids
    assert len(cuts.digests) == NODES
    assert len(set(cuts.digests.values())) == 1, cuts.digests
    assert not cuts.problems, cuts.problems
    return cuts


def _goes_on(epoch: int, found: dict[str, Any]) -> bool:
    """Whether the run trains in a later epoch."""
    return found["epoch"] > epoch and found["phase"] in ("round_train", "round_witness")


def _lacks_results(folder: Path, started: datetime) -> bool:
    """Whether the node has said for a while that it lacks results that the others decided."""
    status = json.loads((folder / "status.json").read_text())
    since = datetime.fromisoformat(status["since"])
    waits = since >= started and datetime.now().astimezone() - since > timedelta(seconds=20)
    return waits and "lacks results of round" in (status["waiting"] or "")


def _all_train(found: dict[str, Any], after: int) -> bool:
    """Whether each node has reported a result of a later step: so each holds the run's parameters."""
    return len(found["clients"]) == NODES and all((node["step"] or 0) > after + 5 for node in found["clients"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = cut_power(Path(place), given.times, given.seed)
    for number, (before, after) in enumerate(found.steps, 1):
        print(f"cut {number:2d}: at step {before}, went on with step {after}")
    digest = next(iter(found.digests.values()))
    print(f"{len(found.steps)} cuts, {found.ids} data ids trained once, one digest {digest[:16]}")
    print(f"the run went on with one node after {len(found.steps) - found.waited} of them, else with a second one")
