import hashlib
import itertools

import numpy as np
import pytest
import torch

from psyche_lightning.distro import DistroConfig, Layout, Votes, sign_update
from psyche_lightning.distro.aggregate import FLOAT32_VOTES, SPLIT_VOTES, Aggregator, split_bits
from psyche_lightning.distro.arithmetic import full_precision
from psyche_lightning.distro.transform import integer_basis, sandwich

SHAPES = [(100, 70), (5000,), (), (130,), (64, 128), (3, 5, 7, 11), (0,), (1, 1)]


def make_layout(chunk=64, shapes=SHAPES):
    meta = torch.device("meta")
    return Layout(
        [(f"p{n}", torch.nn.Parameter(torch.empty(shape, device=meta))) for n, shape in enumerate(shapes)], chunk
    )


def random_votes(chunks, config, seed):
    """Votes out of a hash, so that the same seed gives the same ones with every version of numpy."""
    count = chunks * config.area
    noise = np.frombuffer(hashlib.shake_256(str(seed).encode()).digest(3 * count), np.uint8).reshape(3, chunks, -1)
    order = np.argsort(noise[0].astype(np.int64) * 256 + noise[1], axis=1, kind="stable")
    signs = 1 - 2 * (noise[2, :, : config.k].astype(np.int8) & 1)
    signs[noise[2, :, -1] < 26] = 0
    return Votes(np.sort(order[:, : config.k], axis=1).astype(np.int16), signs)


def sums(votes, config):
    total = np.zeros((len(votes[0].positions), config.area), np.int64)
    for ballot in votes:
        np.add.at(total, (np.arange(len(total))[:, None], ballot.positions), ballot.signs)
    return total.reshape(-1, config.chunk, config.chunk)


def put_back(layout, batch, blocks, tensors):
    """Copy the chunks of a batch into contiguous tensors."""
    matrices = [layout.folded(number, tensor) for number, tensor in enumerate(tensors)]
    source = layout.blocks(batch, blocks[batch.start : batch.stop])
    for view, block in zip(layout.views(batch, matrices), source, strict=True):
        view.copy_(block)


def flat(tensors):
    return b"".join(tensor.cpu().numpy().tobytes() for tensor in tensors)


@pytest.fixture(scope="module")
def ballot():
    layout, config = make_layout(), DistroConfig()
    return layout, config, [random_votes(layout.chunk_count, config, seed) for seed in range(4)]


def test_the_update_equals_integer_arithmetic(ballot, device):
    layout, config, votes = ballot
    b = integer_basis(64)
    blocks = torch.from_numpy(np.sign(b @ sums(votes, config) @ b.T)).float()
    expected = [torch.full(entry.shape, torch.nan) for entry in layout.entries]
    for batch in layout.batches(1000):
        put_back(layout, batch, blocks, expected)
    found = list(sign_update(votes, layout, config, devices=[device] * len(layout.entries)))
    assert [tensor.shape for tensor in found] == [entry.shape for entry in layout.entries]
    assert {tensor.dtype for tensor in found} == {torch.float32}
    assert flat(found) == flat(expected)


def test_the_bytes_equal_the_recorded_ones(ballot, device):
    layout, config, votes = ballot
    found = flat(sign_update(votes, layout, config, devices=[device] * len(layout.entries)))
    assert hashlib.sha256(found).hexdigest() == "a4f63eefd322226c58a3cdc99757cb92f6266ae23f4ced162c60d1144f8bc9a7"


def test_order_threads_batches_and_format_do_not_matter(ballot):
    layout, config, votes = ballot
    expected = flat(sign_update(votes, layout, config))
    for order in itertools.permutations(votes):
        assert flat(sign_update(order, layout, config)) == expected
    for limit in (1, 2, 3, 7, 1000):
        assert flat(sign_update(votes, layout, config, limit=limit)) == expected
    assert flat(sign_update(votes, layout, config, dtype=torch.float64)) == expected
    torch.set_num_threads(2)
    assert flat(sign_update(votes, layout, config)) == expected


@pytest.mark.parametrize("chunk", [8, 16, 32, 64])
def test_float32_is_exact_up_to_its_limit_and_float64_beyond(chunk, device):
    generator = np.random.default_rng(chunk)
    b = integer_basis(chunk)
    row, column = np.argwhere(np.abs(b) == 127)[0][1], np.argwhere(np.abs(b) == 127)[-1][1]

    def exact(total, dtype):
        basis = torch.tensor(b, dtype=dtype, device=device)
        with full_precision(device):
            found = sandwich(basis, torch.tensor(total, dtype=dtype, device=device), basis.T)
        return np.array_equal(found.cpu().numpy().astype(np.int64), b @ total @ b.T)

    def total(votes):
        blocks = np.zeros((20, chunk, chunk), np.int64)
        blocks[0, row, column] = votes  # as large as it gets
        blocks[1, row, column] = -votes
        for block in blocks[2:]:  # spread over a few positions, with signs that lean to one side
            where = generator.integers(0, chunk, (2, 6))
            np.add.at(block, tuple(where[:, generator.integers(0, 6, votes)]), generator.choice([-1, 1, 1, 1], votes))
        assert np.abs(blocks).sum(axis=(1, 2)).max() == votes
        return blocks

    assert exact(total(FLOAT32_VOTES), torch.float32)
    assert exact(total(100 * FLOAT32_VOTES + 1), torch.float64)
    assert not exact(total(100 * FLOAT32_VOTES + 1), torch.float32)


@pytest.mark.parametrize("chunk", [8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outer_products_and_the_dense_inverse_give_the_same_signs(chunk, dtype, device):
    config = DistroConfig(chunk, k=8)
    peers = FLOAT32_VOTES // 8
    few = [random_votes(9, config, seed) for seed in range(4)]
    alike = [random_votes(9, config, 5)] * peers  # as large as float32 sums get
    for votes in (few, alike, [*alike, *few] if dtype == torch.float64 else few[:1]):
        b = integer_basis(chunk)
        expected = torch.from_numpy(np.sign(b @ sums(votes, config) @ b.T)).float()
        for outer in (False, True):
            aggregator = Aggregator(config, 8 * len(votes), device, dtype, outer)
            aggregator.load(votes)
            with full_precision(device):
                assert torch.equal(aggregator.signs(0, 9).cpu(), expected)
                assert torch.equal(aggregator.signs(2, 5).cpu(), expected[2:5])


@pytest.mark.parametrize("peers", [FLOAT32_VOTES // 16, FLOAT32_VOTES // 16 + 1, SPLIT_VOTES // 16 + 1])
def test_many_peers_are_summed_exactly(peers, device):
    config = DistroConfig(chunk=8, k=16)
    layout = make_layout(8, [(8, 24), (64,)])
    few = [random_votes(layout.chunk_count, config, seed) for seed in range(min(peers, 90))]
    votes = [few[number % len(few)] for number in range(peers)]
    repeats = np.bincount(np.arange(peers) % len(few))
    total = sum(int(times) * sums([one], config) for times, one in zip(repeats, few, strict=True))
    b = integer_basis(8)
    expected = [torch.empty(entry.shape) for entry in layout.entries]
    blocks = torch.from_numpy(np.sign(b @ total @ b.T)).float()
    for batch in layout.batches(100):
        put_back(layout, batch, blocks, expected)
    devices = [device] * len(layout.entries)
    assert flat(sign_update(votes, layout, config, devices=devices)) == flat(expected)
    if peers < 1000:
        one_by_one = sign_update(votes[::-1], layout, config, devices=devices, limit=1)
        assert flat(one_by_one) == flat(expected)
        assert flat(sign_update(votes, layout, config, dtype=torch.float64)) == flat(expected)


@pytest.mark.parametrize("chunk", [8, 64])
@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("votes", [FLOAT32_VOTES + 1, 5000, SPLIT_VOTES])
def test_float32_in_two_parts_gives_the_signs_of_integers(chunk, count, votes, device):
    """Also where the parts nearly cancel, and with one product for all chunks or one for each."""
    generator = np.random.default_rng([chunk, votes])
    b = integer_basis(chunk)
    row, column = np.argwhere(np.abs(b) == 127)[0][1], np.argwhere(np.abs(b) == 127)[-1][1]
    total = np.zeros((count, chunk, chunk), np.int64)
    for block in total:
        where = generator.integers(0, chunk, (2, 6))
        np.add.at(block, tuple(where), generator.multinomial(votes, np.ones(6) / 6) * generator.choice([-1, 1], 6))
    total[0] = 0
    total[0, row, column] = -votes  # as large as it gets
    exact = b @ total @ b.T
    assert np.abs(exact).max() == 127**2 * votes > 2**24
    basis = torch.tensor(b, dtype=torch.float32, device=device)
    blocks = torch.tensor(total, dtype=torch.float32, device=device)
    with full_precision(device):
        found = sandwich(basis, blocks, basis.T, split=split_bits(chunk))
    assert np.array_equal(found.sign().cpu(), np.sign(exact))


@pytest.fixture(params=["medium", "high", "mkldnn bf16", "autocast", "double", "defaults"])
def precision_settings(request, device):
    """Precision settings of a user's program, any of which would spoil the integers."""
    what = request.param
    if what in ("medium", "high"):
        torch.set_float32_matmul_precision(what)
    elif what == "mkldnn bf16" and hasattr(torch.backends.mkldnn, "matmul"):
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    elif what == "double":
        torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=what == "autocast"):
            yield what
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")


def test_a_programs_precision_settings_do_not_matter_and_stay(precision_settings, ballot, device):
    layout, config, votes = ballot
    # Aligned votes: sums that bfloat16 and TF32 would round.
    votes = votes + [random_votes(layout.chunk_count, config, 0)] * 100

    def current():
        try:
            legacy = torch.get_float32_matmul_precision()
        except RuntimeError:
            legacy = None
        newer = [getattr(torch.backends.cuda.matmul, "fp32_precision", None)]
        newer.append(getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None))
        return legacy, newer, torch.is_autocast_enabled(device.type), torch.get_default_dtype()

    before = current()
    b = integer_basis(64)
    blocks = torch.from_numpy(np.sign(b @ sums(votes, config) @ b.T)).float()
    expected = [torch.empty(entry.shape, dtype=torch.float32) for entry in layout.entries]
    for batch in layout.batches(1000):
        put_back(layout, batch, blocks, expected)
    assert flat(sign_update(votes, layout, config, devices=[device] * len(layout.entries))) == flat(expected)
    assert current() == before
    with full_precision(device):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.is_autocast_enabled(device.type)
    assert current() == before
    with pytest.raises(ZeroDivisionError), full_precision(device):
        raise ZeroDivisionError
    assert current() == before


def test_no_votes_give_plain_zeros():
    layout, config = make_layout(), DistroConfig()
    for votes in ([], [Votes.empty(layout.chunk_count, config.k)]):
        for tensor in sign_update(votes, layout, config):
            assert tensor.numpy().tobytes() == bytes(4 * tensor.numel())  # 0.0, not -0.0


def test_results_come_one_by_one():
    layout, config = make_layout(8, [(8, 80)] * 20), DistroConfig(chunk=8, k=1)
    votes = [random_votes(layout.chunk_count, config, 0)]
    updates = sign_update(votes, layout, config, limit=4)
    first = next(updates)
    assert first.shape == (8, 80)
    assert updates.gi_frame.f_locals["batch"].stop == 12  # the third batch of four completed the first ten chunks
