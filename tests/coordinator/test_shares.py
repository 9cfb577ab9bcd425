"""Speeds as members say them, and the weights that follow."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche_lightning.coordinator.shares import DRIFT, MEMBERS, UNEQUAL, Speeds, weigh
from psyche_lightning.protocol.state import MOST_WEIGHT, Round

CLIENTS = tuple(bytes([i]) * 32 for i in range(4))
MIXED = dict(zip(CLIENTS, (100.0, 100.0, 100.0, 25.0), strict=True))
WEIGHED = Round(clients=CLIENTS, weights=(256, 256, 256, 64))
EQUAL = Round(clients=CLIENTS)


def cost(weights: tuple[int, ...], speeds: list[float]) -> float:
    """The time of a round, in that of one in which nobody waits."""
    given = weights or (1,) * len(speeds)
    return max(w / s for w, s in zip(given, speeds, strict=True)) * sum(speeds) / sum(given)


def test_a_slower_client_gets_a_smaller_weight() -> None:
    assert weigh(CLIENTS, MIXED, None) == weigh(CLIENTS, MIXED, EQUAL) == WEIGHED.weights


@given(st.lists(st.floats(0.85, 1.15), min_size=2, max_size=8))
def test_clients_of_about_the_same_speed_keep_equal_shares(speeds: list[float]) -> None:
    clients = [bytes([i]) for i in range(len(speeds))]
    assert weigh(clients, dict(zip(clients, speeds, strict=True)), None) == () or cost((), speeds) > UNEQUAL


def test_small_changes_keep_weights_and_large_ones_do_not() -> None:
    assert weigh(CLIENTS, {**MIXED, CLIENTS[3]: 24.5}, WEIGHED) == WEIGHED.weights
    assert weigh(CLIENTS, {**MIXED, CLIENTS[3]: 50.0}, WEIGHED) == (256, 256, 256, 128)
    assert weigh(CLIENTS, dict.fromkeys(CLIENTS, 100.0), WEIGHED) == ()
    assert weigh(CLIENTS, {**MIXED, CLIENTS[3]: 84.0}, WEIGHED) != ()  # not equal enough to go back
    assert weigh(CLIENTS, {**MIXED, CLIENTS[3]: 84.0}, EQUAL) == ()  # not unequal enough to begin


def test_rounds_that_take_no_time_keep_equal_shares() -> None:
    lost = 1 / 25 - 4 / 325  # seconds a sample of each client, as the slowest has as many as the others
    assert weigh(CLIENTS, MIXED, None, 4 * 0.24 / lost) == weigh(CLIENTS, MIXED, WEIGHED, 4 * 0.24 / lost) == ()
    assert weigh(CLIENTS, MIXED, None, 4 * 0.26 / lost) == WEIGHED.weights


def test_other_clients_get_new_weights() -> None:
    assert weigh(CLIENTS[:3], MIXED, WEIGHED) == ()
    assert weigh(CLIENTS[1:], MIXED, WEIGHED) == (256, 256, 64)


def test_a_client_of_unknown_speed_is_as_fast_as_the_median() -> None:
    assert weigh(CLIENTS, {CLIENTS[0]: 100.0, CLIENTS[1]: 25.0, CLIENTS[2]: 100.0}, None) == (256, 64, 256, 256)
    assert weigh(CLIENTS, {CLIENTS[1]: 25.0}, None) == weigh(CLIENTS, {}, None) == ()


def test_nobody_is_more_than_sixteen_times_slower_or_faster() -> None:
    assert weigh(CLIENTS, {**MIXED, CLIENTS[3]: 1e-9}, None) == (256, 256, 256, 16)
    assert weigh(CLIENTS, {**MIXED, CLIENTS[0]: 1e300}, None) == (256, 16, 16, 16)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12))
def test_weights_are_small_whole_numbers_that_cost_little(before: list[float], after: list[float]) -> None:
    many = min(len(before), len(after))
    clients = tuple(bytes([i]) for i in range(many))
    first = weigh(clients, dict(zip(clients, before, strict=False)), None)
    second = weigh(clients, dict(zip(clients, after, strict=False)), Round(clients=clients, weights=first))
    for weights, speeds in ((first, before[:many]), (second, after[:many])):
        assert len(weights) in (0, many)
        assert all(1 <= weight <= MOST_WEIGHT for weight in weights)
        fair = max(speeds) <= 16 * min(speeds)
        if fair:
            assert cost(weights, speeds) < (max(DRIFT, 1.04) if weights else UNEQUAL) + 1e-9


def measured(*rates: float) -> Speeds:
    speeds = Speeds()
    for step, rate in enumerate(rates, 1):
        speeds.measured(b"a", step, rate)
    return speeds


def test_a_speed_is_the_median_of_the_newest_measurements() -> None:
    assert measured(10.0).known == {}
    assert measured(2.0, 10.0).known == {b"a": 10.0}  # the first round also loads and compiles
    assert measured(10.0, 11.0, 1.0, 12.0, 10.5).known == {b"a": 10.5}
    assert measured(*[10.0] * 5, *[5.0] * 3).known == {b"a": 5.0}


def test_a_first_measurement_counts_if_it_is_very_slow() -> None:
    speeds = Speeds()
    for client in CLIENTS[:3]:
        speeds.measured(client, 1, 100.0)
    assert speeds.known == {}
    speeds.measured(CLIENTS[3], 1, 51.0)
    assert weigh(CLIENTS, speeds.known, None) == ()
    speeds = Speeds()
    for client in CLIENTS:
        speeds.measured(client, 1, MIXED[client])
    assert weigh(CLIENTS, speeds.known, None) == WEIGHED.weights
    assert Speeds.load(json.loads(json.dumps(speeds.dump()))).known == speeds.known


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_speed_says_nothing(rate: float) -> None:
    assert measured(10.0, rate, 10.0).known == {b"a": 10.0}


def test_a_step_counts_once() -> None:
    speeds = measured(10.0, 10.0)
    for _ in range(9):
        speeds.measured(b"a", 2, 1.0)
    assert speeds.known == {b"a": 10.0}
    speeds.undo(1)
    for step in (2, 3, 4, 5):
        speeds.measured(b"a", step, 5.0)
    assert speeds.known == {b"a": 5.0}


def test_a_claim_counts_as_long_as_it_is_kept() -> None:
    speeds = Speeds()
    for step in (1, 2):
        for client in CLIENTS:
            speeds.measured(client, step, 1e9 if client == CLIENTS[0] else 100.0)
    assert weigh(CLIENTS, speeds.known, None) == (256, 16, 16, 16)
    speeds.missed(CLIENTS[0])
    assert weigh(CLIENTS, speeds.known, None) == ()
    shares = []
    for step in range(3, 30):  # it boasts on, and delivers what three others would
        speeds.measured(CLIENTS[0], step, 1e9)
        weights = weigh(CLIENTS, speeds.known, None) or (1,) * 4
        shares.append(weights[0] / sum(weights))
        if shares[-1] > 0.5:
            speeds.missed(CLIENTS[0])
    assert max(shares) < 0.6
    assert sum(share > 0.5 for share in shares) < 10


def test_a_client_without_a_share_is_tried_again() -> None:
    speeds = measured(10.0, 10.0, 10.0)
    for _ in range(23):
        speeds.rested(b"a")
    assert 20.0 < speeds.known[b"a"] < 21.0


def test_only_so_many_members_are_remembered() -> None:
    speeds = Speeds()
    for number in range(MEMBERS + 5):
        for step in (1, 2):
            speeds.measured(number.to_bytes(2, "big"), step, 10.0)
    assert len(speeds.known) == len(speeds.dump()) == MEMBERS
    assert (MEMBERS + 4).to_bytes(2, "big") in speeds.known
