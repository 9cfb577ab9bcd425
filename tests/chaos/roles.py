"""Seven nodes, two of which break the rules: the others must go on, almost as fast as with two that keep them.

    python tests/chaos/roles.py --rounds 300 withhold lone

Real nodes train the demo's twin, first seven that keep the rules, then five and the two. At the end the five must have
equal digests and complete ledgers. It prints how fast both runs were, and how many rounds of the second lack a result
of each of the five.
"""

from __future__ import annotations

import argparse
import base64
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from psyche_lightning.cli.demo.processes import PSYCHE
from psyche_lightning.node.audit import audit
from psyche_lightning.node.ledger import read_ledger
from psyche_lightning.simulation.roles import ROLES
from psyche_lightning.wire.identity import KEY_SIZE

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.fleet import Fleet

ODD = Path(__file__).with_name("odd_node.py")
HONEST = 5
PLAYED = [role for role in ROLES if role != "false bytes"]  # the simulator plays it; here `odd_node.py corrupt` does
WARM_UP = 10  # rounds until all are at full speed


@dataclass(frozen=True)
class Outcome:
    """How a run with roles went.

    Attributes:
        rate: rounds a second.
        lost: for each node that keeps the rules, the decided rounds without its result.
        digests: with which those nodes ended.
        problems: of their ledgers.
    """

    rate: float
    lost: list[int]
    digests: list[str]
    problems: list[str]


def play(folder: Path, rounds: int, roles: Sequence[str]) -> Outcome:
    """Train so many rounds with these roles, empty for one that keeps the rules, beside the nodes that keep the rules.

    Raises:
        FleetError: the run did not go on, or did not end.
    """
    nodes = HONEST + len(roles)
    settings = [
        f"total_steps={rounds + WARM_UP}",
        f"init_min_clients={nodes}",
        "min_clients=2",
        f"global_batch_size_start={nodes}",
        f"global_batch_size_end={nodes}",
        "warmup_time=60",
    ]
    with Fleet(folder, settings) as fleet:
        for _ in range(HONEST):
            fleet.start()
        for seed, role in enumerate(roles):
            odd = fleet.start(number=HONEST + seed, program=[str(ODD), role, str(seed)] if role else PSYCHE)
            fleet.nodes.pop(odd)  # whatever becomes of it
        honest = range(HONEST)
        began = fleet.until(lambda found: found["step"] > WARM_UP, "the first rounds", 400)["step"]
        start = time.monotonic()
        ended = fleet.until(lambda found: found["step"] > rounds, "the rounds", 60 + 10.0 * rounds)["step"]
        rate = (ended - began) / (time.monotonic() - start)
        keys = [fleet.key(number) for number in honest]
        digests = fleet.finish()
        rows = [row for number in honest for row in read_ledger(fleet.place(number) / "ledger.jsonl")]
    found = {(row["epoch"], row["height"]): row for row in rows if row["step"]}
    there = Counter(base64.b64decode(text)[:KEY_SIZE] for row in found.values() for text in row["results"])
    lost = [len(found) - there[key] for key in keys]
    return Outcome(rate, lost, [digests[number] for number in honest], audit(rows).problems)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("roles", nargs="+", choices=PLAYED)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        without = play(Path(place) / "without", given.rounds, [""] * len(given.roles))
        with_them = play(Path(place) / "with", given.rounds, given.roles)
    names = " and ".join(given.roles)
    print(f"all keep the rules: {without.rate:.2f} rounds/s; with {names}: {with_them.rate:.2f} rounds/s")
    print(f"ratio {with_them.rate / without.rate:.2f}; rounds without a result of each of the five: {with_them.lost}")
    print(f"digests {set(with_them.digests)}; problems of the ledgers: {with_them.problems or 'none'}")
    sys.exit(len(set(with_them.digests)) > 1 or bool(with_them.problems))
