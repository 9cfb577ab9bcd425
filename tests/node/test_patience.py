"""How long a witness waits for late results."""

from __future__ import annotations

import pytest

from psyche_lightning.node.patience import LEAST, MOST_LATE, Patience
from psyche_lightning.node.rounds import RoundLog
from psyche_lightning.protocol.state import CoordinatorConfig, Round

NODES = tuple(bytes([number]) * 32 for number in range(8))
TAKEN = 20.0
"""Seconds that the quick trainers take."""


def make_round(nodes: int = 4, *missing: int) -> RoundLog:
    keys = NODES[:nodes]
    log = RoundLog.open(Round(3, 4, 11, 0, 2 * nodes, keys), keys, CoordinatorConfig(), 1, "run", b"L" * 32, 64)
    log.assign(())
    log.missing = set(missing)
    return log


class Rounds:
    """Rounds of some nodes, each with a key of its own, as one witness lives them."""

    def __init__(self, nodes: int = 4) -> None:
        self.nodes = nodes
        self.patience = Patience()
        self.now = 1000.0
        self.height = 0

    def over(self, seconds: float, *missing: int) -> bool:
        """Whether not to wait any more for these so many seconds later."""
        self.now += seconds
        return self.patience.over(self.height, make_round(self.nodes, *missing), set(missing), self.now)

    def begin(self, taken: float = TAKEN, *missing: int) -> None:
        """A round begins; after ``taken`` seconds all results are here but these."""
        self.height += 1
        assert not self.over(0.0, *range(self.nodes))
        assert not self.over(taken, *missing) or not missing

    def waits(self, *missing: int, step: float = 0.25) -> float:
        """Seconds until it does not wait any more."""
        waited = 0.0
        while not self.over(step, *missing):
            waited += step
        return waited + step

    def late(self, node: int, times: int) -> None:
        """A trainer is late so often, and comes in the end."""
        for _ in range(times):
            self.begin(TAKEN, node)
            self.over(TAKEN * 0.75, node)
            assert self.over(0.0)


def test_nobody_waits_when_all_results_are_here() -> None:
    rounds = Rounds()
    rounds.begin()
    assert rounds.over(0.0)


def test_who_is_not_held_up_does_not_begin_to_wait() -> None:
    rounds = Rounds()
    about = make_round(4, 3)
    for busy in (0.0, TAKEN, 10 * TAKEN):
        assert not rounds.patience.over(0, about, {3}, rounds.now + busy, held=False)
    rounds.now += 10 * TAKEN
    assert not rounds.over(0.0, 3)
    assert rounds.over(10 * TAKEN, 3)
    assert rounds.patience.over(1, make_round(), set(), rounds.now, held=False)  # nothing is missing


def test_without_a_quorum_of_the_results_there_is_no_end() -> None:
    rounds = Rounds()
    rounds.begin(TAKEN, 2, 3)
    assert not rounds.over(1e6, 2, 3)


@pytest.mark.parametrize(
    ("taken", "waited"),
    [
        pytest.param(20.0, 20.0, id="as long again as the quorum took"),
        pytest.param(1.0, LEAST, id="at least a few seconds"),
    ],
)
def test_how_long_a_result_is_waited_for(taken: float, waited: float) -> None:
    rounds = Rounds()
    rounds.begin(taken, 3)
    assert rounds.waits(3) == waited


def test_each_time_that_a_trainer_is_late_it_gets_half_of_that_until_others_hardly_wait() -> None:
    rounds = Rounds()
    found = []
    for _ in range(4):
        rounds.begin(TAKEN, 3)
        found.append(rounds.waits(3))
    assert found == [TAKEN, TAKEN / 2, TAKEN / 4, TAKEN / 4]


def test_the_most_patient_wait_counts() -> None:
    rounds = Rounds(8)
    rounds.late(7, 2)
    rounds.begin(TAKEN, 6, 7)
    assert rounds.waits(6, 7) == TAKEN
    rounds.begin(TAKEN, 7)
    assert rounds.waits(7) <= TAKEN / 4


def test_who_is_quick_gets_its_time_back() -> None:
    rounds = Rounds()
    rounds.late(3, 2)
    rounds.begin()  # it was quick
    rounds.begin(TAKEN, 3)
    assert rounds.waits(3) == TAKEN / 2
    rounds = Rounds()
    rounds.late(3, 2)
    for _ in range(2):
        rounds.begin()
    rounds.begin(TAKEN, 3)
    assert rounds.waits(3) == TAKEN


def test_a_little_later_than_others_is_not_late() -> None:
    rounds = Rounds()
    for _ in range(5):
        rounds.begin(TAKEN, 3)
        assert not rounds.over(TAKEN * 0.4, 3)
        assert rounds.over(0.0)
    rounds.begin(TAKEN, 3)
    assert rounds.waits(3) == TAKEN


def test_there_is_always_some_patience() -> None:
    rounds = Rounds()
    rounds.late(3, MOST_LATE + 5)
    for _ in range(4):  # each time half of it is forgotten
        rounds.begin()
    rounds.begin(TAKEN, 3)
    assert rounds.waits(3) == TAKEN


def test_of_two_trainers_none_is_cut() -> None:
    rounds = Rounds(2)
    rounds.begin(TAKEN, 1)
    assert not rounds.over(1e6, 1)


def test_who_cannot_deliver_any_more_is_not_waited_for_even_without_a_quorum() -> None:
    patience = Patience()
    log = make_round(4, 2, 3)
    assert not patience.over(0, log, {2}, 0.0)
    assert patience.over(0, log, set(), 1.0)
