"""Histories of real node cores and the real coordinator machine under seeded faults; CI plays two thousand more."""

from __future__ import annotations

import os
import signal
from itertools import product

import pytest

from psyche_lightning.chronicle.entry import Entry
from psyche_lightning.node.notices import Notice
from psyche_lightning.simulation import simulator
from psyche_lightning.simulation.roles import ROLES
from psyche_lightning.simulation.scenario import History, Scenario, SimulationError
from psyche_lightning.simulation.simulator import Simulation, simulate, simulate_all

FIRST, HISTORIES = 1000, 120


@pytest.fixture(scope="module")
def outcomes() -> list[History | SimulationError]:
    return list(simulate_all(range(FIRST, FIRST + HISTORIES), workers=min(os.cpu_count() or 1, 8)))


@pytest.mark.timeout(600)  # in the first test the histories are played
def test_survivors_are_identical_at_every_round_and_no_history_hangs(outcomes: list[History | SimulationError]) -> None:
    failures = [outcome for outcome in outcomes if isinstance(outcome, SimulationError)]
    assert not failures, "\n".join(map(str, failures[:5]))


def test_the_histories_cover_what_they_are_for(outcomes: list[History | SimulationError]) -> None:
    played = [outcome for outcome in outcomes if isinstance(outcome, History)]
    scenarios = [outcome.scenario for outcome in played]
    assert {scenario.overlap for scenario in scenarios} == {True, False}
    assert {scenario.nodes for scenario in scenarios} >= {4, 5, 6, 7, 8}
    assert max(scenario.nodes for scenario in scenarios) > 8
    assert any(scenario.cheats for scenario in scenarios)
    assert any(scenario.coordinator_kills for scenario in scenarios)
    assert any(scenario.pauses for scenario in scenarios)
    assert any(scenario.power_cuts for scenario in scenarios)
    assert any(scenario.stops for scenario in scenarios)
    assert any(scenario.outages for scenario in scenarios)
    assert any(scenario.one_way for scenario in scenarios)
    assert any(scenario.full_disks for scenario in scenarios)
    assert any(scenario.leaps for scenario in scenarios)
    assert any(scenario.journals for scenario in scenarios)
    assert any(scenario.blobs for scenario in scenarios)
    assert any(scenario.copies for scenario in scenarios)
    assert any(scenario.copies and scenario.speeds for scenario in scenarios)
    assert {scenario.changes for scenario in scenarios} == {0, 1, 3}
    assert {scenario.schedule for scenario in scenarios} == {True, False}
    assert {(scenario.speeds, bool(scenario.cheats)) for scenario in scenarios} == set(product((True, False), repeat=2))
    assert sum(scenario.kills for scenario in scenarios) > 80
    assert any(outcome.epochs > 1 for outcome in played)
    assert sum(outcome.faults for outcome in played) > 4_000


@pytest.mark.parametrize("overlap", [False, True])
def test_nodes_of_different_speed_get_shares_by_which_nobody_waits(overlap: bool) -> None:
    given = Scenario(12, 6, overlap, 30, 0.0, 0.01, 0.0, 0, 0, 0, 0, 0, 150.0, speeds=True)
    simulation = Simulation(given)
    assert simulation.host is not None
    outcome = simulation.run()
    rows = {(row["epoch"], row["height"]): row for node in simulation.nodes for row in node.ledger}
    assert sum("weights" in row for row in rows.values()) > 20
    assert not [event for event in simulation.host.history.events.since(0) if event.kind == "dropped"]
    # 12 samples a round; 17 samples a second in sum, when each share is a whole number of samples.
    assert outcome.seconds < 45


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
def test_payloads_have_the_k_of_their_own_step(overlap: bool) -> None:
    """With overlap, results of two steps are under way at once; the simulation itself fails where one has another k."""
    given = Scenario(9, 6, overlap, 12, 0.1, 0.5, 0.0, 2, 1, 0, 0, 1, 150.0, changes=3)
    simulation = Simulation(given)
    assert len({node.payload_size(step) for node in simulation.nodes for step in range(1, 13)}) > 2
    simulation.nodes[0].role = "other k"
    assert simulation.run().rounds >= 12


def test_a_seed_replays_exactly() -> None:
    traces: list[list[Entry]] = [[], []]
    outcomes = [simulate(7, trace.append) for trace in traces]
    assert outcomes[0] == outcomes[1]
    assert traces[0] == traces[1]


@pytest.mark.parametrize("seed", [1, 2, 3, 6, 9, 13, 15, 18, 24, 27, 32, 40])
def test_nothing_is_decided_by_what_a_notice_says(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each of these histories a node decides without a list, repairs itself or leaves without the parameters."""
    told: list[Entry] = []
    as_shipped = simulate(seed, told.append)
    for kind in Notice.__subclasses__():
        monkeypatch.setattr(kind, "__str__", lambda notice: "other words")
    reworded: list[Entry] = []
    assert simulate(seed, reworded.append) == as_shipped
    assert [entry.time for entry in reworded] == [entry.time for entry in told]
    assert reworded != told


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
def test_without_faults_ids_are_trained_in_their_own_round(overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With overlap a round does not wait for a batch of which all others are through; here that is a few."""
    monkeypatch.setattr("psyche_lightning.simulation.node.ABSTENTIONS", 0.0)
    outcome = Simulation(Scenario(2, 4, overlap, 12, 0.0, 0.1, 0.0, 0, 0, 0, 0, 0, 150.0)).run()
    assert (outcome.rounds, outcome.faults) == (12, 0)
    assert outcome.again + outcome.untrained <= 8 * overlap


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize("role", ROLES)
def test_two_of_seven_that_break_the_rules_in_one_way_stop_nobody(role: str, overlap: bool) -> None:
    simulation = Simulation(Scenario(3, 7, overlap, 6, 0.02, 0.1, 0.0, 1, 0, 0, 0, 2, 150.0, schedule=overlap))
    for node in simulation.nodes[:2]:
        node.role = role
    assert simulation.run().rounds >= 6


def test_a_node_that_applies_something_else_is_seen_and_the_error_says_how_to_replay() -> None:
    simulation = Simulation(Scenario(5, 4, False, 6, 0.0, 0.1, 0.0, 0, 0, 0, 0, 0, 150.0))

    def spoil() -> None:
        simulation.nodes[0].head = b"something else"

    simulation.at(12.0, spoil)
    with pytest.raises(SimulationError, match=r"psyche sim --seed 5 --trace"):
        simulation.run()


def test_a_tenth_of_all_payload_deliveries_is_dropped_and_no_data_id_is_lost() -> None:
    """The simulation itself fails where a node stops, digests differ or the ledger has a gap."""
    lost = 0
    for seed in range(20):
        nodes, overlap, steps = 4 + seed % 4, bool(seed % 2), 12
        outcome = Simulation(
            Scenario(seed, nodes, overlap, steps, 0.0, 0.2, 0.0, 0, 0, 0, 0, 0, 150.0, payload_loss=0.1)
        ).run()
        assert outcome.rounds >= steps
        assert outcome.untrained <= 3 * 2 * nodes
        lost += outcome.faults
    assert lost > 400


def test_ctrl_c_is_left_to_the_process_that_began_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "_attempt", signal.getsignal)  # what each process does with a seed
    found: list[object] = [*simulate_all([signal.SIGINT], workers=2)]
    assert found == [signal.SIG_IGN]
