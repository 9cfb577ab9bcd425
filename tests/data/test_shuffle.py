"""Psyche's orders against the published vectors and against the plain algorithms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche_lightning.data.order import in_passes, make_order, psyche_seed
from psyche_lightning.data.shuffle import ChaCha8, psyche_shuffle, shuffle_from_top, weighted_order
from psyche_lightning.errors import ConfigError

SEED = bytes(range(1, 33))


def test_the_generator_s_words() -> None:
    generator = ChaCha8(SEED)
    assert [generator.u32() for _ in range(4)] == [0xAFA8183A, 0x01DC9C6F, 0xB1ED4149, 0x4E5009BE]


def test_words_are_the_same_however_they_are_taken() -> None:
    whole = ChaCha8(SEED).words(200_000).tolist()
    other = ChaCha8(SEED)
    parts: list[int] = []
    for size in (1, 70_000, 3, 65_536, 17, 0, 5_000):
        parts += other.words(size).tolist()
    assert parts == whole[: len(parts)]
    other.back(5_000)
    assert other.words(2).tolist() == whole[len(parts) - 5_000 : len(parts) - 4_998]


def test_the_shuffle_s_vector() -> None:
    expected = [18, 1, 17, 6, 15, 9, 8, 14, 16, 12, 19, 5, 0, 2, 4, 7, 11, 10, 3, 13]
    assert psyche_shuffle(20, SEED).tolist() == expected


def plain(length: int, seed: bytes) -> list[int]:
    """The algorithm, line by line."""
    generator, out = ChaCha8(seed), list(range(length))
    n, left, chunk = 0, 1, 0
    for i in range(length):
        m = n + 1
        if left == 0:
            bound, c = m, m + 1
            while bound * c < 2**32:
                bound, c = bound * c, c + 1
            chunk, left = generator.below(bound), c - m
        left -= 1
        j = chunk if left == 0 else chunk % m
        chunk = chunk if left == 0 else chunk // m
        n = m
        out[i], out[j] = out[j], out[i]
    return out


@pytest.mark.parametrize("length", [0, 1, 2, 13, 1000, 65_535, 65_536, 65_537, 80_000])
def test_the_shuffle_is_the_plain_algorithm(length: int) -> None:
    for seed in (SEED, bytes(32)):
        assert psyche_shuffle(length, seed).tolist() == plain(length, seed)


def test_the_weighted_index_s_vector() -> None:
    which, sample = weighted_order([0.7, 0.3], [5, 5])
    expected = [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 3), (0, 4), (1, 2), (0, 0), (0, 1)]
    assert list(zip(which.tolist(), sample.tolist(), strict=True)) == expected


def test_only_the_ratio_of_weights_counts_and_empty_sources_give_nothing() -> None:
    assert weighted_order([14.0, 6.0], [5, 5])[0].tolist() == weighted_order([0.7, 0.3], [5, 5])[0].tolist()
    which, sample = weighted_order([1.0, 5.0, 1.0], [3, 0, 2])
    assert set(which.tolist()) == {0, 2}
    assert len(sample) == 5


def test_a_mix_holds_its_weights_at_every_place() -> None:
    weights = [0.5, 0.3, 0.2]
    which, _ = weighted_order(weights, [300, 300, 300])
    drawn = [0, 0, 0]
    for place, source in enumerate(which.tolist()):
        drawn[source] += 1
        for share, count in zip(weights, drawn, strict=True):
            assert abs(share * (place + 1) - count) <= 2


@pytest.mark.parametrize("length", [0, 1, 2, 100, 70_000])
def test_the_index_is_shuffled_from_its_top(length: int) -> None:
    generator, expected = ChaCha8(SEED), list(range(length))
    for i in range(length - 1, 0, -1):
        j = generator.below(i + 1)
        expected[i], expected[j] = expected[j], expected[i]
    assert shuffle_from_top(length, SEED).tolist() == expected


@given(
    length=st.integers(1, 400), shuffle=st.sampled_from([True, "once", False, list(SEED)]), seed=st.integers(-5, 2**70)
)
def test_every_order_is_one_to_one(length: int, shuffle: object, seed: int) -> None:
    import numpy as np

    order = make_order(length, shuffle=shuffle, seed=seed)
    for epoch in (0, 1, 2**64):
        assert sorted(order(np.arange(length), epoch).tolist()) == list(range(length))


def test_each_pass_has_an_order_of_its_own_unless_it_is_to_be_the_first() -> None:
    passes = {
        str(shuffle): [
            in_passes(make_order(50, shuffle=shuffle, seed=3), 50, start, start + 50) for start in (0, 50, 100)
        ]
        for shuffle in (True, "once", False)
    }
    first, second, third = passes["True"]
    assert first != second != third != first
    assert passes["once"] == [first] * 3
    assert passes["False"] == [list(range(50))] * 3
    order = make_order(50, shuffle=True, seed=3)
    assert in_passes(order, 50, 45, 110) == [*first[45:], *second, *third[:10]]


@pytest.mark.parametrize("shuffle", [None, 1, "yes", [1, 2], [256] + [0] * 31, [True] * 32, [0.0] * 32])
def test_other_shuffles_are_refused(shuffle: object) -> None:
    with pytest.raises(ConfigError, match=r"expected true .*, 'once' .*, false, or a seed"):
        psyche_seed(shuffle)


def test_a_table_has_a_bound() -> None:
    with pytest.raises(ConfigError, match="at most 268,435,456 samples"):
        make_order((1 << 28) + 1, shuffle=list(SEED), seed=0)
    make_order(1 << 40, shuffle=True, seed=0)  # takes no memory
