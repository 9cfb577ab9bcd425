"""Everything stops, and comes back: real processes, real sockets, real disks."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from chaos.power_cuts import cut_power
from support.fleet import Fleet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = [
    "total_steps=1000000",
    "init_min_clients=2",
    "min_clients=2",
    "global_batch_size_start=4",
    "global_batch_size_end=4",
    "warmup_time=15",
    "cooldown_time=15",
    "max_round_train_time=12",
    "waiting_for_members_extra_time=2",
]


def test_after_a_power_cut_one_node_and_the_coordinator_suffice(tmp_path: Path) -> None:
    cuts = cut_power(tmp_path, times=2, seed=3)
    assert len(cuts.steps) == 2


def test_everybody_stops_politely_and_nothing_is_lost(tmp_path: Path) -> None:
    with Fleet(tmp_path, SETTINGS) as fleet:
        fleet.start()
        fleet.start()
        fleet.until(lambda found: found["step"] > 40, "40 steps")
        for number in (0, 1):
            fleet.nodes[number].signal(signal.SIGTERM)
        codes = [fleet.ended(number) for number in (0, 1)]
        stopped = fleet.status()
        for number in (0, 1):
            fleet.start(number=number)
        fleet.until(lambda found: found["step"] > stopped["step"] + 5, "the run to go on")
        digests = fleet.conclude()
        ledger = fleet.ledger()
    assert codes == [128 + signal.SIGTERM] * 2
    assert stopped["step"] > 40
    assert len(digests) == 2
    assert len(set(digests.values())) == 1
    assert ledger.problems == []


def test_strangers_wait_for_a_holder(tmp_path: Path) -> None:
    with Fleet(tmp_path, SETTINGS) as fleet:
        fleet.start()
        fleet.start()
        before = fleet.until(lambda found: found["step"] > 40, "40 steps")["step"]
        for number in (0, 1):
            fleet.kill(number)
        fleet.start()
        fleet.start()  # two strangers, with empty folders
        waits = fleet.until(lambda found: "waiting for a holder" in found["waits_for"], "the run to wait")
        assert waits["step"] >= before
        assert "2 newcomers are here" in fleet.until(lambda found: "2 new" in found["waits_for"], "both")["waits_for"]
        fleet.start(number=0)  # power is back: the same folder
        fleet.until(lambda found: len(found["clients"]) == 3 and found["step"] > before + 10, "the run to go on")
        digests = fleet.conclude()
        ledger = fleet.ledger()
    assert len(digests) == 3
    assert len(set(digests.values())) == 1
    assert ledger.problems == []
