"""Other work within waits: when a piece begins, and how much it may delay rounds."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from psyche_lightning.node.spare import SHARE, SpareTime


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Pieces:
    """Pieces that take so many seconds each."""

    clock: Clock
    seconds: Iterator[float]
    done: int = 0
    seen: list[float] = field(default_factory=lambda: [0.0])
    guess: float | None = None

    def estimate(self) -> float | None:
        return max(self.seen[-8:]) if self.guess is None else self.guess

    def work(self) -> None:
        took = next(self.seconds)
        self.clock.now += took
        self.seen.append(took)
        self.done += 1


def run(spare: SpareTime, clock: Clock, waits: Sequence[float], computes: float) -> tuple[float, float]:
    """Rounds with these waits; returns the seconds that they took, and those that they would have without pieces."""
    began, alone = clock.now, 0.0
    for wait in waits:
        arrives = clock.now + wait
        spare.rest("Train")
        while clock.now < arrives:
            if not spare.use():
                clock.now = min(arrives, clock.now + 0.5)
        spare.resume(arrives)
        clock.now += computes
        alone += wait + computes
    return clock.now - began, alone


def spread(rng: random.Random, mean: float) -> Iterator[float]:
    while True:
        yield rng.uniform(0.5, 1.5) * mean


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("wait", "piece"), [(1.0, 0.02), (1.0, 0.3), (0.05, 0.04), (0.05, 2.0), (0.001, 0.01)])
def test_rounds_are_delayed_by_no_more_than_the_share_and_one_piece(wait: float, piece: float, seed: int) -> None:
    rng, clock = random.Random(seed), Clock()
    spare, pieces = SpareTime(clock), Pieces(clock, spread(rng, piece), guess=1.5 * piece)
    spare.give(pieces)
    took, alone = run(spare, clock, [next(spread(rng, wait)) for _ in range(1000)], 1.0)
    assert took - alone == pytest.approx(spare.late)
    assert took - alone <= SHARE * took + 1e-9
    assert spare.used == pytest.approx(sum(pieces.seen))
    assert pieces.done >= 2


def test_a_piece_that_takes_longer_than_ever_delays_a_single_round() -> None:
    clock = Clock()
    pieces = Pieces(clock, iter([*[0.01] * 3000, 5.0, *[0.01] * 100000]))
    spare = SpareTime(clock)
    spare.give(pieces)
    took, alone = run(spare, clock, [0.2] * 4000, 0.1)  # long enough to pay for it
    assert pieces.done > 3001
    assert 4.8 <= took - alone <= 5.0 + SHARE * took


def test_most_of_steady_waits_is_used_and_nothing_is_late() -> None:
    clock = Clock()
    pieces = Pieces(clock, iter([0.01] * 100000))
    spare = SpareTime(clock)
    spare.give(pieces)
    run(spare, clock, [1.0] * 50, 1.0)
    assert spare.used > 0.9 * 50
    assert spare.late <= 0.01 * 50


def test_a_node_that_never_waits_gives_the_share_of_its_time() -> None:
    clock = Clock()
    pieces = Pieces(clock, iter([0.02] * 100000))
    spare = SpareTime(clock)
    spare.give(pieces)
    for _ in range(1000):
        spare.rest("Train")
        arrived = clock.now
        spare.use(here=True)
        spare.resume(arrived)
        clock.now += 0.5
    assert spare.late == pytest.approx(spare.used)
    assert 0.9 * SHARE * clock.now <= spare.late <= SHARE * clock.now


def test_waits_of_different_kinds_are_judged_apart() -> None:
    clock = Clock()
    spare = SpareTime(clock)
    pieces = Pieces(clock, iter([0.1] * 1000), guess=0.1)
    for _ in range(4):
        for kind, wait in (("long", 1.0), ("short", 0.01)):
            spare.rest(kind)
            clock.now += wait
            spare.resume(clock.now)
    spare.give(pieces)
    spare.rest("short")
    assert not spare.use()
    spare.rest("long")
    assert spare.use()
    spare.withdraw(pieces)
    assert not spare.use()


def test_works_take_turns_and_small_pieces_do_not_take_the_share_of_large_ones() -> None:
    clock = Clock()
    spare = SpareTime(clock)
    small, large = Pieces(clock, iter([0.01] * 10000), guess=0.01), Pieces(clock, iter([0.5] * 1000), guess=0.5)
    spare.give(small)
    spare.give(large)
    run(spare, clock, [0.02] * 2000, 0.5)  # where the large ones never fit
    assert large.done >= 5
    assert small.done > 1000
    before = large.done
    spare.withdraw(large)
    run(spare, clock, [0.02] * 200, 0.5)
    assert large.done == before
    assert small.done > 1100


@pytest.mark.parametrize("overlap", [False, True])
def test_a_node_works_in_its_waits_alone_and_on_its_training_thread(
    make_run: Any, make_trainee: Any, overlap: bool
) -> None:
    class Work:
        pieces = 0
        threads: frozenset[int] = frozenset()

        def estimate(self) -> float | None:
            return 0.0 if needed.is_set() else None

        def work(self) -> None:
            assert not busy.is_set()
            self.pieces += 1
            self.threads |= {threading.get_ident()}
            needed.clear()
            done.set()

    busy, needed, done, thread = threading.Event(), threading.Event(), threading.Event(), []
    run = make_run(2, 10)
    quick, slow = (make_trainee(number, run, overlap=overlap) for number in range(2))

    def compute(node: Any, work: Any) -> None:
        thread.append(threading.get_ident())
        busy.set()
        busy.clear()

    def wait(node: Any, work: Any) -> None:  # until the quick one has done a piece meanwhile
        done.clear()
        needed.set()
        assert done.wait(120.0)

    quick.compute, slow.compute = compute, wait
    work = Work()
    quick.participant.spare.give(work)
    run.go(quick, slow)
    assert work.pieces == 10
    assert work.threads == {thread[0]}
    assert quick.bytes == slow.bytes
    assert quick.steps == list(range(1, 11))
