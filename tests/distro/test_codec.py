import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_lightning.distro import DistroConfig, Votes, decode, encode, payload_size
from psyche_lightning.errors import PayloadError


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
    k = draw(st.one_of(st.sampled_from([1, 2, 4, 8]), st.integers(1, chunk * chunk // 4)))
    config = DistroConfig(chunk=chunk, k=k)
    chunks = draw(st.integers(0, 25))
    return config, chunks, random_votes(chunks, config, draw(st.integers(0, 2**32)))


def test_the_bytes_are_those_of_the_docstring():
    config = DistroConfig(chunk=8, k=2)
    votes = Votes(np.array([[3, 40], [0, 1]], np.int16), np.array([[1, -1], [0, 0]], np.int8))
    # low bits 00011 01000, high bits 0 and 1 in unary 1010, signs 01; then a chunk without votes
    assert encode(votes, config).hex() == "01030002000000021a290000"
    assert same(decode(encode(votes, config), 2, config), votes)


@pytest.mark.parametrize(("k", "bits"), [(2, 14), (4, 13), (8, 12), (32, 10)])
def test_bits_per_vote_at_chunk_64(k, bits):
    assert payload_size(8000, DistroConfig(k=k)) == 8 + 8000 * k * bits // 8


@settings(max_examples=150, deadline=None)
@given(cases())
def test_votes_come_back(case):
    config, chunks, votes = case
    payload = encode(votes, config)
    assert len(payload) == payload_size(chunks, config)
    again = decode(payload, chunks, config)
    assert same(again, votes)
    assert encode(again, config) == payload


def test_the_extreme_positions_come_back():
    for k in (1, 3, 8, 1024):
        config = DistroConfig(k=k)
        first, last = np.arange(k), np.arange(4096 - k, 4096)
        votes = Votes(np.stack([first, last]).astype(np.int16), np.ones((2, k), np.int8))
        assert same(decode(encode(votes, config), 2, config), votes)


def test_many_chunks_go_through_several_batches():
    config = DistroConfig(chunk=8, k=3)  # 15 + 3 + 2 + 3 bits: chunks do not end at whole bytes
    chunks = 200_003
    votes = random_votes(chunks, config, 5)
    assert same(decode(encode(votes, config), chunks, config), votes)


@settings(max_examples=400, deadline=None)
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


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 12))
def test_any_bytes_are_refused_or_canonical(data, chunks):
    config = DistroConfig(chunk=8, k=2)
    for payload in (data, b"\x01\x03\x00\x02" + chunks.to_bytes(4, "big") + data):
        with contextlib.suppress(PayloadError):
            assert encode(decode(payload, chunks, config), config) == payload


def test_votes_of_another_k_are_not_encoded():
    with pytest.raises(ValueError, match="k is 3"):
        encode(Votes.empty(4, 2), DistroConfig(k=3))
