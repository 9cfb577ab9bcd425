"""Payloads of local steps: their bytes, their size, and the exact sum of what they say."""

import contextlib
import itertools
from math import comb, log2

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_lightning.distro import STEPS_VERSION, DistroConfig, Votes, decode, encode, payload_size
from psyche_lightning.distro.magnitudes import LARGEST, Sum, quantize
from psyche_lightning.errors import PayloadError


def random_votes(chunks, config, seed, *, silent=0.1):
    generator = np.random.default_rng(seed)
    order = np.sort(np.argsort(generator.random((chunks, config.area)), axis=1)[:, : config.k], axis=1)
    signs = generator.choice([-2, -1, 1, 2], (chunks, config.k)).astype(np.int8)
    exponents = generator.integers(0, LARGEST + 1, chunks).astype(np.int8)
    doubled = (np.abs(signs) == 2).all(axis=1) & (exponents < LARGEST)
    signs[doubled, 0] //= 2
    none = generator.random(chunks) < silent
    order[none], signs[none], exponents[none] = np.arange(config.k), 0, 0
    return Votes(order.astype(np.int16), signs, exponents)


def read(payload, chunks, config, *span):
    return decode(payload, chunks, config, *span, version=STEPS_VERSION)


def same(one, other):
    fields = ("positions", "signs", "exponents")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in fields)


@st.composite
def cases(draw):
    chunk = draw(st.sampled_from([8, 16, 32, 64]))
    config = DistroConfig(chunk, draw(st.one_of(st.sampled_from([1, 2, 8]), st.integers(1, chunk * chunk // 32))))
    chunks = draw(st.integers(0, 25))
    return config, chunks, random_votes(chunks, config, draw(st.integers(0, 2**32)))


def test_the_bytes_match_the_page():
    config = DistroConfig(chunk=8, k=2)
    votes = Votes(
        np.array([[3, 40], [0, 1]], np.int16), np.array([[2, -1], [0, 0]], np.int8), np.array([18, 0], np.int8)
    )
    # As in version 2: 1 + C(3, 1) + C(40, 2) = 784 in 11 bits, signs 01, and a chunk without votes. Then the exponent
    # 18, magnitudes 10, and a chunk without votes.
    bits = "01100010000 01 0000000000000 000000" + "10010 10 0000000 00"
    body = int(bits.replace(" ", ""), 2).to_bytes(6, "big")
    assert encode(votes, config) == bytes.fromhex("03030002 00000002") + body
    assert body.hex() == "620800009400"
    assert same(read(encode(votes, config), 2, config), votes)


@pytest.mark.parametrize(("chunk", "k"), [(32, 12), (32, 24), (32, 50), (32, 128), (64, 12), (64, 50), (64, 128)])
def test_bits_stay_within_three_percent_of_positions_signs_and_magnitudes(chunk, k):
    config, chunks = DistroConfig(chunk, k), 100_000_000 // chunk**2
    exponent = 5
    limit = log2(comb(config.area, k)) + 2 * k + exponent
    assert limit <= 8 * payload_size(chunks, config, STEPS_VERSION) / chunks <= 1.03 * limit


@settings(max_examples=150)
@given(cases(), st.data())
def test_votes_round_trip_whole_and_in_parts(case, data):
    config, chunks, votes = case
    payload = encode(votes, config)
    assert len(payload) == payload_size(chunks, config, STEPS_VERSION)
    again = read(payload, chunks, config)
    assert same(again, votes)
    assert encode(again, config) == payload
    start = data.draw(st.integers(0, chunks))
    stop = data.draw(st.integers(start, chunks))
    assert same(read(payload, chunks, config, start, stop), votes.part(start, stop))


def test_many_chunks_go_through_several_batches():
    config, chunks = DistroConfig(chunk=8, k=3), 50_003  # groups and chunks do not end at whole bytes
    votes = random_votes(chunks, config, 5)
    payload = encode(votes, config)
    assert same(read(payload, chunks, config), votes)
    assert same(read(payload, chunks, config, 9_001, 40_010), votes.part(9_001, 40_010))


@settings(max_examples=150)
@given(case=cases(), data=st.data())
def test_corrupted_bytes_are_refused_or_are_another_canonical_payload(case, data):
    config, chunks, votes = case
    payload = bytearray(encode(votes, config))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload) - 1))
        payload[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(PayloadError):
        assert encode(read(bytes(payload), chunks, config), config) == payload


def test_each_version_is_read_only_where_the_run_has_it():
    config = DistroConfig(chunk=8, k=2)
    steps, plain = encode(random_votes(3, config, 1), config), encode(Votes.empty(3, 2), config)
    with pytest.raises(PayloadError, match="version 3; this run's is 2"):
        decode(steps, 3, config)
    with pytest.raises(PayloadError, match="version 2; this run's is 3"):
        read(plain, 3, config)


@pytest.mark.parametrize(
    ("signs", "exponent", "reason"),
    [([2, -2], 7, "which is 1 with the next exponent"), ([0, 0], 7, "an exponent but no votes")],
)
def test_only_the_canonical_form_is_written(signs, exponent, reason):
    votes = Votes(np.array([[0, 1]], np.int16), np.array([signs], np.int8), np.array([exponent], np.int8))
    with pytest.raises(ValueError, match=reason):
        encode(votes, DistroConfig(chunk=8, k=2))


def test_values_become_one_or_two_times_a_power_of_two():
    values = torch.tensor(
        [[1.0, -1.0, 0.9, -2.0], [0.0, 0.0, 0.0, 0.0], [2.0**-40, 0.0, 0.0, 0.0], [1e9, -1e9, 1e9, 0]]
    )
    signs, exponents, sent = quantize(values)
    assert exponents.tolist() == [28, 0, 0, 31]  # the mean of the first is 1.225; 2^-28 and 2^3 are the ends
    assert signs.tolist() == [[1, -1, 1, -2], [0, 0, 0, 0], [1, 1, 1, 1], [2, -2, 2, 1]]
    assert sent.tolist() == [[1, -1, 1, -2], [0] * 4, [2.0**-28] * 4, [16, -16, 16, 8]]


def test_canonical_magnitudes_for_any_values():
    generator = torch.Generator().manual_seed(0)
    for k in (1, 2, 5):
        values = torch.randn(5000, k, generator=generator) * 10.0 ** (
            12 * torch.rand(5000, 1, generator=generator) - 10
        )
        signs, exponents, _ = quantize(values)
        votes = Votes(np.tile(np.arange(k, dtype=np.int16), (5000, 1)), signs.numpy(), exponents.numpy())
        config = DistroConfig(chunk=8, k=k)
        assert same(read(encode(votes, config), 5000, config), votes)


@pytest.mark.parametrize("count", [1, 2, 5, 31, 49, 50])
def test_zeros_that_are_chosen_add_less_than_the_others_take_away(count):
    """Fewer entries of a chunk than k are not zero: what is left is smaller than what there was, so it dies out."""
    generator, k = torch.Generator().manual_seed(count), 50
    values = torch.zeros(2000, k)
    sizes = 1 + torch.randn(2000, count, generator=generator).abs()
    values[:, :count] = sizes * 10.0 ** (7 * torch.rand(2000, 1, generator=generator) - 6)
    _, _, sent = quantize(values)
    before, after = values.double().square().sum(dim=1), (values - sent).double().square().sum(dim=1)
    gained = k * values.double().abs().mean(dim=1) ** 2
    assert (after <= before - 0.8 * gained).all()


def test_what_zeros_say_is_taken_back_and_never_grows():
    """Also where values are below the least that can be said: then each entry is off by no more than that."""
    for size in (1e-3, 1e-7, 2.0**-28, 2.0**-40):
        left = torch.zeros(1, 50)
        left[0, :3] = size
        most = float(left.norm())
        for _ in range(400):
            left -= quantize(left)[2]
            assert float(left.abs().max()) <= max(size, 2.0**-28)
            assert float(left.norm()) <= max(most, 50**0.5 * 2.0**-28)
        assert float(left.abs().max()) <= 2.0**-28


def added(votes, chunks, area, dtype, device="cpu"):
    out = torch.zeros(chunks, area, dtype=dtype, device=device)
    return Sum(votes, torch.device(device), dtype).sums(0, chunks, out), out


@pytest.mark.parametrize("threads", [1, 2])
def test_sums_are_the_same_in_any_order_with_any_threads_and_in_both_formats(threads, device):
    torch.set_num_threads(threads)
    config, chunks = DistroConfig(chunk=16, k=24), 300
    votes = [random_votes(chunks, config, seed) for seed in range(5)]
    for one in votes[1:]:
        one.exponents[:] = np.where(one.signs[:, 0] != 0, LARGEST, 0)  # the largest sums that there can be
    expected = np.zeros((chunks, config.area), object)
    for one in votes:
        limit = [_limit(votes, chunk) for chunk in range(chunks)]
        for chunk, column in itertools.product(range(chunks), range(config.k)):
            exponent = min(int(one.exponents[chunk]), limit[chunk])
            expected[chunk, one.positions[chunk, column]] += int(one.signs[chunk, column]) * 2**exponent
    found = set()
    for order in (votes, votes[::-1], votes[2:] + votes[:2]):
        for dtype in (torch.float64, torch.int64):
            rounded, exact = added(order, chunks, config.area, dtype, device)
            assert (exact.cpu().numpy().astype(object) == expected).all()
            found.add(rounded.cpu().numpy().tobytes())
    assert len(found) == 1


def _limit(votes, chunk):
    voting = sorted(int(one.exponents[chunk]) for one in votes if one.signs[chunk, 0])
    return voting[len(voting) // 2] + 2 if voting else 0


def test_one_node_of_three_cannot_outvote_the_others_by_size():
    def vote(position, exponent):
        signs = np.array([[1 if exponent else 0]], np.int8)
        return Votes(np.array([[position]], np.int16), signs, np.array([exponent], np.int8))

    loud = [vote(0, LARGEST), vote(1, 10), vote(2, 9)]
    sums, _ = added(loud, 1, 64, torch.float64)
    assert sums[0, :3].tolist() == [2.0**12, 2.0**10, 2.0**9]  # two above the median
    silent = [vote(0, LARGEST), vote(1, 10), vote(0, 0)]
    sums, _ = added(silent, 1, 64, torch.float64)
    assert sums[0, :3].tolist() == [2.0**LARGEST, 2.0**10, 0]  # nobody else decides between two
