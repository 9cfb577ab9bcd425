"""Nodes that come late, and what is fetched from peers that die or lie: real processes, real sockets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fleet import Fleet

from psyche_lightning.wire.identity import short

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ODD = Path(__file__).with_name("odd_node.py")
SETTINGS = [
    "total_steps=1000000",
    "init_min_clients=3",
    "min_clients=2",
    "global_batch_size_start=8",
    "global_batch_size_end=8",
    "epoch_time=13",
    "cooldown_time=15",
    "warmup_time=12",
    "waiting_for_members_extra_time=1",
    "max_round_train_time=12",
]


def odd(kind: str, seed: int = 0) -> list[str]:
    return [str(ODD), kind, str(seed)]


def trained_with(fleet: Fleet, number: int, clients: int) -> Callable[[dict[str, Any]], bool]:
    """Whether a node trains in an epoch of that many clients."""
    key = short(fleet.key(number))

    def holds(found: dict[str, Any]) -> bool:
        mine = [node for node in found["clients"] if node["key"] == key and node["step"]]
        return bool(mine) and len(found["clients"]) == clients

    return holds


def test_a_fourth_node_joins_at_round_40_and_computes_with_the_others_from_the_next_epoch_on(tmp_path: Path) -> None:
    with Fleet(tmp_path, SETTINGS) as fleet:
        for _ in range(3):
            fleet.start()
        fleet.until(lambda found: found["step"] > 40, "round 40")
        late = fleet.start()
        key = short(fleet.key(late))
        seen = lambda found, where: any(node["key"] == key for name in where for node in found[name])  # noqa: E731
        before = fleet.until(lambda found: seen(found, ("pending", "clients")), "the newcomer")
        joined = fleet.until(lambda found: seen(found, ("clients",)), "the epoch after that")
        then = fleet.until(trained_with(fleet, late, 4), "the newcomer's first rounds")
        fleet.until(lambda found: found["epoch"] > then["epoch"], "the end of that epoch")
        digests = fleet.conclude()
        ledger = fleet.ledger()
    assert joined["epoch"] <= before["epoch"] + 1
    assert len(joined["clients"]) == 4
    assert len(digests) == 4
    assert len(set(digests.values())) == 1
    assert not ledger.problems
    by_epoch = {line.epoch for line in ledger.lines if line.trainer == fleet.key(late)}
    assert min(by_epoch) >= joined["epoch"]


def test_a_source_that_is_killed_while_it_serves_the_model_is_replaced(tmp_path: Path) -> None:
    with Fleet(tmp_path, SETTINGS) as fleet:
        source = fleet.start(program=odd("slow"))
        for _ in range(2):
            fleet.start()
        fleet.until(lambda found: found["epoch"] >= 1, "the second epoch")
        late = fleet.start()
        fleet.until(lambda found: "serving" in fleet.log(source), "the source to serve")
        fleet.kill(source)
        fleet.until(trained_with(fleet, late, 3), "the newcomer's first rounds")
        digests = fleet.conclude()
        ledger = fleet.ledger()
    assert set(digests) == {1, 2, late}
    assert len(set(digests.values())) == 1
    assert not ledger.problems


def test_a_peer_that_serves_one_wrong_byte_is_refused_and_named(tmp_path: Path) -> None:
    with Fleet(tmp_path, SETTINGS) as fleet:
        culprit = fleet.start(program=odd("corrupt"))
        for _ in range(2):
            fleet.start()
        fleet.until(lambda found: found["epoch"] >= 1, "the second epoch")
        late = fleet.start()
        fleet.until(trained_with(fleet, late, 4), "the newcomer's first rounds")
        digests = fleet.conclude()
    assert len(set(digests.values())) == 1
    assert set(digests) == {0, 1, 2, late}
    named = [line for line in fleet.log(late).splitlines() if "taking it from another peer" in line]
    assert named
    assert all(short(fleet.key(culprit)) in line for line in named)


@pytest.mark.parametrize("overlap", ["false", "true"])
def test_a_tenth_of_all_payload_deliveries_is_dropped_and_nothing_is_lost(tmp_path: Path, overlap: str) -> None:
    with Fleet(tmp_path, [*SETTINGS[1:], "total_steps=60", f"overlap={overlap}"]) as fleet:
        for seed in range(3):
            fleet.start(program=odd("lossy", seed))
        digests = fleet.finish()
        ledger = fleet.ledger()
    assert sum(fleet.log(number).count("lost ") for number in range(3)) > 10
    assert set(digests) == {0, 1, 2}
    assert len(set(digests.values())) == 1
    assert ledger.rounds == 60
    assert not ledger.problems
    last = 60 * 8 - 3 * 8
    assert all(start >= last for start, _ in ledger.untrained)
