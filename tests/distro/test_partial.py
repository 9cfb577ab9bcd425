import contextlib
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_lightning.distro import (
    DistroConfig,
    Layout,
    Tally,
    Votes,
    decode_tally,
    encode_tally,
    merge,
    sign_update,
)
from psyche_lightning.errors import PayloadError

CONFIG = DistroConfig(chunk=8, k=4)


def ballots(peers, chunks, seed=0, spread=64):
    """Votes that often fall on the same few positions."""
    generator = np.random.default_rng(seed)
    for _ in range(peers):
        order = np.argsort(generator.random((chunks, spread)), axis=1)[:, : CONFIG.k]
        signs = generator.choice([-1, 1], (chunks, CONFIG.k)).astype(np.int8)
        signs[generator.random(chunks) < 0.2] = 0
        yield Votes(np.sort(order, axis=1).astype(np.int16), signs)


def tallies(*args, **kwargs):
    return [Tally.of(votes, CONFIG) for votes in ballots(*args, **kwargs)]


def equal(one, other):
    return np.array_equal(one.keys, other.keys) and np.array_equal(one.sums, other.sums)


@settings(max_examples=60)
@given(st.integers(0, 30), st.integers(0, 2**32), st.sampled_from([8, 20, 64]))
def test_merging_is_associative_and_commutative_and_sums(chunks, seed, spread):
    a, b, c = tallies(3, chunks, seed, spread)
    assert equal(merge(a, merge(b, c)), merge(merge(a, b), c))
    assert equal(merge(a, b), merge(b, a))
    dense = np.zeros(chunks * 64, np.int64)
    for tally in (a, b, c):
        dense[tally.keys] += tally.sums
    total = merge(merge(a, b), c)
    assert np.array_equal(np.flatnonzero(dense), total.keys)
    assert np.array_equal(dense[total.keys], total.sums)
    payload = encode_tally(total)
    again = decode_tally(payload, chunks, CONFIG, 3)
    assert equal(again, total)
    assert encode_tally(again) == payload


@pytest.mark.parametrize("peers", [1, 2, 7, 40])
def test_a_tally_gives_the_update_of_its_payloads(peers):
    layout = Layout([("a", torch.nn.Parameter(torch.zeros(30, 50))), ("b", torch.nn.Parameter(torch.zeros(100)))], 8)
    votes = list(ballots(peers, layout.chunk_count, peers, 20))
    total = functools.reduce(merge, [Tally.of(one, CONFIG) for one in votes])
    expected = [tensor.numpy().tobytes() for tensor in sign_update(votes, layout, CONFIG)]
    received = decode_tally(encode_tally(total), layout.chunk_count, CONFIG, peers)
    assert [tensor.numpy().tobytes() for tensor in sign_update([received.votes()], layout, CONFIG)] == expected


def test_tallies_of_other_layouts_are_not_merged():
    with pytest.raises(ValueError, match="5 x 64 and 6 x 64"):
        merge(*tallies(1, 5), *tallies(1, 6))


@settings(max_examples=300)
@given(st.integers(0, 6), st.integers(0, 99), st.data())
def test_corrupted_tallies_are_refused_or_canonical(chunks, seed, data):
    payload = bytearray(encode_tally(functools.reduce(merge, tallies(3, chunks, seed, 8))))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload) - 1))
        payload[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(PayloadError):
        assert encode_tally(decode_tally(bytes(payload), chunks, CONFIG, 3)) == bytes(payload)
