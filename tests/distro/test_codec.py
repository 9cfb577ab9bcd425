import contextlib
import struct
from math import comb, log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_lightning.distro import DistroConfig, Votes, codec, decode, encode, payload_size
from psyche_lightning.distro.sets import Plan, Ranks, plan, to_limbs
from psyche_lightning.errors import PayloadError

HEADER = struct.Struct(">BBHI")


def random_votes(chunks, config, seed, *, silent=0.1):
    generator = np.random.default_rng(seed)
    order = np.argsort(generator.random((chunks, config.area)), axis=1)[:, : config.k]
    votes = Votes(
        np.sort(order, axis=1).astype(np.int16), generator.choice([-1, 1], (chunks, config.k)).astype(np.int8)
    )
    none = generator.random(chunks) < silent
    votes.positions[none], votes.signs[none] = np.arange(config.k), 0
    return votes


def same(one, other):
    return np.array_equal(one.positions, other.positions) and np.array_equal(one.signs, other.signs)


@st.composite
def cases(draw):
    chunk = draw(st.sampled_from([8, 16, 32, 64]))
    k = draw(st.one_of(st.sampled_from([1, 2, 3, 4, 8, 16]), st.integers(1, DistroConfig(chunk).k_limit)))
    config = DistroConfig(chunk=chunk, k=k)
    chunks = draw(st.integers(0, 25))
    return config, chunks, random_votes(chunks, config, draw(st.integers(0, 2**32)))


def test_the_bytes_match_the_docstring():
    config = DistroConfig(chunk=8, k=2)
    assert plan(64, 2) == Plan(low=0, group=1, word=11, universe=64, states=comb(64, 2) + 1)
    votes = Votes(np.array([[3, 40], [0, 1]], np.int16), np.array([[1, -1], [0, 0]], np.int8))
    # 1 + C(3, 1) + C(40, 2) = 784 in 11 bits, signs 01; then a chunk without votes
    assert encode(votes, config) == HEADER.pack(2, 3, 2, 2) + int(
        "01100010000 01 0000000000000 000000".replace(" ", ""), 2
    ).to_bytes(4, "big")
    assert same(decode(encode(votes, config), 2, config), votes)


def test_low_bits_and_groups_match_the_format():
    config = DistroConfig(chunk=32, k=4)
    assert plan(1024, 4) == Plan(low=3, group=2, word=47, universe=131, states=comb(131, 4) + 1)
    votes = Votes(np.array([[0, 7, 9, 1023], [5, 6, 700, 701], [0, 1, 2, 3]], np.int16), np.ones((3, 4), np.int8))
    votes.signs[0, 1] = votes.signs[1, 3] = -1
    votes.signs[2] = 0
    # high parts 0 0 1 127 and 0 0 87 87, made distinct by adding 0 1 2 3
    digits = [1 + 0 + comb(1, 2) + comb(3, 3) + comb(130, 4), 1 + 0 + comb(1, 2) + comb(89, 3) + comb(90, 4)]
    word = f"{digits[0] + digits[1] * (comb(131, 4) + 1):047b}"
    fields = "000 0 111 1 001 0 111 0" + "101 0 110 0 100 0 101 1"
    bits = (word + fields).replace(" ", "") + "0" * (47 + 32)
    expected = int(bits + "0" * (-len(bits) % 8), 2).to_bytes(-(-len(bits) // 8), "big")
    assert encode(votes, config) == HEADER.pack(2, 5, 4, 3) + expected
    assert same(decode(encode(votes, config), 3, config), votes)


@pytest.mark.parametrize("chunk", [64, 32])
@pytest.mark.parametrize("k", [1, 2, 4, 8, 16, 32, 64, 128])
def test_bits_per_vote_stay_within_three_percent_of_the_limit(chunk, k):
    config, chunks = DistroConfig(chunk, k), 100_000_000 // chunk**2
    limit = log2(comb(config.area, k)) / k + 1
    assert limit <= 8 * payload_size(chunks, config) / chunks / k <= 1.03 * limit


def test_a_round_of_the_40_b_recipe_takes_58_mb():
    assert payload_size(40_000_000_000 // 4096, DistroConfig(k=4)) < 58_000_000


@pytest.mark.parametrize(("area", "k"), [(64, 16), (256, 3), (1024, 64), (4096, 8), (4096, 32), (4096, 128)])
def test_ranks_follow_the_combinatorial_number_system(area, k):
    shape = plan(area, k)
    ranks = Ranks(shape.universe, k, shape.limbs)
    generator = np.random.default_rng(k)
    sets = np.sort(np.stack([generator.permutation(shape.universe)[:k] for _ in range(200)]))
    sets[0], sets[1] = np.arange(k), np.arange(shape.universe - k, shape.universe)
    sets[2:40, : k - 1] = np.arange(k - 1)  # their last position alone, where guesses are at the very edge
    sets = np.sort(sets, axis=1)
    sets = sets[(np.diff(sets, axis=1) > 0).all(axis=1)]
    found = ranks.rank(sets.T)
    expected = [sum(comb(int(q), size + 1) for size, q in enumerate(row)) for row in sets]
    assert [sum(int(limb) << (56 * place) for place, limb in enumerate(column[::-1])) for column in found.T] == expected
    assert np.array_equal(ranks.unrank(found).T, sets)
    below = to_limbs([max(0, rank - 1) for rank in expected], shape.limbs)
    assert np.array_equal(ranks.rank(ranks.unrank(below)), below)


@settings(max_examples=150)
@given(cases())
def test_votes_round_trip(case):
    config, chunks, votes = case
    payload = encode(votes, config)
    assert len(payload) == payload_size(chunks, config)
    again = decode(payload, chunks, config)
    assert same(again, votes)
    assert encode(again, config) == payload


@settings(max_examples=150)
@given(cases())
def test_few_chunks_are_written_singly_to_the_same_bytes(case):
    config, _, votes = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "FEW", 0)
        together = encode(votes, config)
        patch.setattr(codec, "FEW", len(votes.signs))
        assert encode(votes, config) == together


def test_extreme_positions_round_trip():
    for k in (1, 3, 8, 128):
        config = DistroConfig(k=k)
        first, last = np.arange(k), np.arange(4096 - k, 4096)
        votes = Votes(np.stack([first, last]).astype(np.int16), np.ones((2, k), np.int8))
        assert same(decode(encode(votes, config), 2, config), votes)


def test_many_chunks_go_through_several_batches():
    config = DistroConfig(chunk=8, k=3)  # groups do not end at whole bytes
    chunks = 200_003
    votes = random_votes(chunks, config, 5)
    assert same(decode(encode(votes, config), chunks, config), votes)


@settings(max_examples=400)
@given(case=cases(), data=st.data())
def test_corrupted_bytes_are_refused_or_are_another_canonical_payload(case, data):
    config, chunks, votes = case
    payload = bytearray(encode(votes, config))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload) - 1))
        payload[at] ^= data.draw(st.integers(1, 255))
    try:
        again = decode(bytes(payload), chunks, config)
    except PayloadError:
        return
    assert encode(again, config) == payload


@settings(max_examples=200)
@given(st.binary(max_size=40), st.integers(0, 12))
def test_any_bytes_are_refused_or_canonical(data, chunks):
    config = DistroConfig(chunk=8, k=2)
    for payload in (data, b"\x02\x03\x00\x02" + chunks.to_bytes(4, "big") + data):
        with contextlib.suppress(PayloadError):
            assert encode(decode(payload, chunks, config), config) == payload


@settings(max_examples=100)
@given(cases(), st.data())
def test_a_part_can_be_read_by_itself(case, data):
    config, chunks, votes = case
    start = data.draw(st.integers(0, chunks))
    stop = data.draw(st.integers(start, chunks))
    part = decode(encode(votes, config), chunks, config, start, stop)
    assert same(part, Votes(votes.positions[start:stop], votes.signs[start:stop]))


def test_votes_of_another_k_are_not_encoded():
    with pytest.raises(ValueError, match="k is 3"):
        encode(Votes.empty(4, 2), DistroConfig(k=3))
