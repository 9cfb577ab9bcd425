from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from psyche_lightning.protocol.open_ids import closed, count, half_open, merged, shown, take

INTERVALS = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 9)).map(lambda pair: (pair[0], sum(pair))))


@given(INTERVALS)
def test_the_wire_has_the_first_and_the_last_id(intervals: list[tuple[int, int]]) -> None:
    assert half_open(closed(intervals)) == tuple(intervals)
    assert all(first in range(*i) and last in range(*i) and last + 1 not in range(*i)
               for i, (first, last) in zip(intervals, closed(intervals), strict=True))  # fmt: skip
    assert count(intervals) == sum(len(range(*interval)) for interval in intervals)


@given(INTERVALS)
def test_merged_stretches_have_the_same_ids_and_do_not_touch(intervals: list[tuple[int, int]]) -> None:
    found = merged(intervals)
    assert [i for interval in found for i in range(*interval)] == sorted({i for one in intervals for i in range(*one)})
    assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(found))


def test_what_is_taken_is_cut_at_the_limit() -> None:
    assert take(((3, 10, 14), (4, 20, 22)), 4, 5) == (((10, 14), (20, 21)), ((4, 21, 22),))
    assert take(((3, 10, 14),), 2, 5) == ((), ((3, 10, 14),))
    assert take(((3, 10, 14),), 0, 5) == ((), ((3, 10, 14),)), "a round that drains takes nothing"


def test_people_see_the_last_id() -> None:
    assert shown([(3, 6), (9, 10)]) == "3-5, 9"
    assert shown([(n, n + 1) for n in range(5)]) == "0, 1, 2, 3, ..."
    assert shown([]) == "none"
