"""Shares by weight: each sample once, the same everywhere, no later than any other division."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche_lightning.protocol.assignment import assign, divide
from psyche_lightning.protocol.committee import CommitteeSelection
from psyche_lightning.protocol.open_ids import batches, count
from psyche_lightning.protocol.state import MOST_WEIGHT

WEIGHTS = st.lists(st.integers(1, MOST_WEIGHT), min_size=1, max_size=12)


def one_by_one(total: int, weights: list[int]) -> list[int]:
    """The rule as it is said: the next sample goes to the place that would be done with it first."""
    sizes = [0] * len(weights)
    for _ in range(total):
        sizes[min(range(len(weights)), key=lambda place: (Fraction(sizes[place] + 1, weights[place]), place))] += 1
    return sizes


def done(sizes: list[int], weights: list[int]) -> Fraction:
    return max(Fraction(size, weight) for size, weight in zip(sizes, weights, strict=True))


@given(st.integers(0, 200), WEIGHTS)
def test_the_next_sample_goes_to_the_place_that_is_done_with_it_first(total: int, weights: list[int]) -> None:
    assert divide(total, weights) == one_by_one(total, weights)


@given(st.integers(0, 8), st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_no_other_division_is_done_earlier(total: int, weights: list[int]) -> None:
    every = [sizes for sizes in itertools.product(range(total + 1), repeat=len(weights)) if sum(sizes) == total]
    assert done(divide(total, weights), weights) == min(done(list(sizes), weights) for sizes in every)


@given(st.integers(0, 10**6), WEIGHTS)
def test_who_is_faster_gets_no_less(total: int, weights: list[int]) -> None:
    sizes = divide(total, weights)
    assert sum(sizes) == total
    pairs = sorted(zip(weights, sizes, strict=True))
    assert all(few <= many for (slow, few), (fast, many) in itertools.pairwise(pairs) if slow < fast)


@given(st.integers(0, 500), WEIGHTS, st.integers(0, 11), st.integers(1, 50))
def test_who_becomes_faster_gets_no_less(total: int, weights: list[int], place: int, more: int) -> None:
    place %= len(weights)
    faster = [weight + more * (at == place) for at, weight in enumerate(weights)]
    assert divide(total, faster)[place] >= divide(total, weights)[place]


@given(st.integers(0, 500), st.integers(1, 12), st.integers(1, MOST_WEIGHT))
def test_equal_weights_give_the_shares_of_psyche(total: int, places: int, weight: int) -> None:
    base, rest = divmod(total, places)
    assert divide(total, [weight] * places) == [base + (place < rest) for place in range(places)]


@given(st.integers(0, 60), WEIGHTS, st.integers(0, 2**64 - 1), st.integers(0, 10**9), st.integers(0, 60))
def test_weighted_shares_cover_the_round_once(
    total: int, weights: list[int], seed: int, index: int, open_ids: int
) -> None:
    selection = CommitteeSelection(0, 0, 0, len(weights), seed)
    shares = assign(seed, index, total, selection, weights)
    assert [i for _, start, stop in shares for i in range(start, stop)] == list(range(index, index + total))
    assert len({client for client, _, _ in shares}) == len(shares)
    assert all(start < stop for _, start, stop in shares)
    assert shares == assign(seed, index, total, CommitteeSelection(0, 0, 0, len(weights), seed), tuple(weights))
    if not total:
        return
    again = ((index - 100, index - 100 + open_ids),) if open_ids else ()
    found = batches(shares, again, weights)
    trained = sorted(i for intervals in found.values() for interval in intervals for i in range(*interval))
    assert trained == sorted(i for interval in (*again, (index, index + total)) for i in range(*interval))


def test_a_node_four_times_slower_than_three_others_holds_up_nobody() -> None:
    weights = [256, 256, 256, 64]
    shares = assign(7, 0, 96, CommitteeSelection(0, 0, 0, 4, 7), weights)
    sizes = {client: stop - start for client, start, stop in shares}
    assert sorted(sizes.values()) == [7, 29, 30, 30]
    assert sizes[3] == 7
    again = batches(shares, ((1000, 1026),), weights)
    assert {client: count(intervals[1:]) for client, intervals in again.items()} == {0: 8, 1: 8, 2: 8, 3: 2}


@pytest.mark.parametrize(("total", "expected"), [(3, [1, 1, 1, 0]), (8, [3, 3, 2, 0]), (13, [4, 4, 4, 1])])
def test_who_is_too_slow_for_a_whole_sample_gets_none(total: int, expected: list[int]) -> None:
    assert divide(total, [4, 4, 4, 1]) == expected
