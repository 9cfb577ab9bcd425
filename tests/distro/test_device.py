"""Payloads that a device writes and reads: the same bytes, votes and refusals as with numpy.

The torch operations run on the CPU as well here, where numpy serves otherwise.
"""

from functools import partial

import numpy as np
import pytest
import torch
from support.golden import FILES, digest, model, optimizer_of, recorded, replay

from psyche_lightning.distro import STEPS_VERSION, WIRE_VERSION, DisTrO, DistroConfig, LocalSteps, Votes, codec
from psyche_lightning.distro import device as there
from psyche_lightning.distro.aggregate import FLOAT32_VOTES
from psyche_lightning.distro.magnitudes import LARGEST
from psyche_lightning.distro.votes import VotesOn
from psyche_lightning.errors import PayloadError

CODES = [(8, 1), (8, 16), (16, 3), (16, 8), (32, 24), (32, 50), (64, 1), (64, 8), (64, 24)]


@pytest.fixture
def on_device(monkeypatch, device):
    """Every device counts as one that writes and reads payloads itself."""
    monkeypatch.setattr(there, "computes", lambda where: True)
    return device


def random_votes(chunks, config, version, generator):
    positions = np.sort(np.argsort(generator.random((chunks, config.area)), axis=1)[:, : config.k], axis=1)
    signs = generator.choice(np.array([-1, 1], np.int8), positions.shape)
    silent = generator.random(chunks) < 0.2
    exponents = None
    if version == STEPS_VERSION:
        signs[:, 1:] *= generator.integers(1, 3, signs[:, 1:].shape).astype(np.int8)
        exponents = generator.integers(0, LARGEST + 1, chunks).astype(np.int8)
        exponents[silent] = 0
    positions[silent], signs[silent] = np.arange(config.k), 0
    return Votes(positions.astype(np.int16), signs, exponents)


def assert_equal(found, expected):
    for name in ("positions", "signs", "exponents"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
        assert one is None or np.array_equal(one.cpu().numpy(), other)
        assert one is None or one.cpu().numpy().dtype == other.dtype


@pytest.mark.parametrize("version", [WIRE_VERSION, STEPS_VERSION])
@pytest.mark.parametrize(("chunk", "k"), CODES)
def test_bytes_and_votes_are_those_of_numpy(chunk, k, version, device, monkeypatch):
    monkeypatch.setattr(there, "_BATCH_BITS", 1 << 12)  # several batches
    config, generator = DistroConfig(chunk, k), np.random.default_rng([chunk, k])
    for chunks in (0, 1, 5, 61):
        votes = [random_votes(chunks, config, version, generator) for _ in range(2)]
        payloads = [codec.encode(one, config) for one in votes]
        assert [there.encode(VotesOn.of(one, device), config) for one in votes] == payloads
        for start, stop in ((0, chunks), (chunks // 3, chunks), (chunks // 2, chunks // 2 + 1)):
            if stop <= chunks:
                found = there.decode_each(payloads, chunks, config, device, start, stop, version)
                for one, expected in zip(found, votes, strict=True):
                    assert_equal(one, expected.part(start, stop))


def refusal(read):
    """What a call says when it refuses a payload; None if it takes it."""
    try:
        read()
    except PayloadError as error:
        return str(error)
    return None


@pytest.mark.parametrize("version", [WIRE_VERSION, STEPS_VERSION])
@pytest.mark.parametrize(("chunk", "k"), CODES)
def test_what_numpy_refuses_is_refused_with_the_same_words(chunk, k, version, device):
    config, generator = DistroConfig(chunk, k), np.random.default_rng([chunk, k, 1])
    good = codec.encode(random_votes(13, config, version, generator), config)
    refused = 0
    for at in generator.choice(np.arange(len(good)), 25).tolist():
        damaged = good[:at] + bytes([good[at] ^ 1 << int(generator.integers(8))]) + good[at + 1 :]
        words = refusal(lambda damaged=damaged: codec.decode(damaged, 13, config, version=version))
        read = partial(there.decode_each, [good, damaged], 13, config, device, 0, 13, version)
        assert refusal(read) == words
        refused += words is not None
        if words is None:
            assert_equal(read()[1], codec.decode(damaged, 13, config, version=version))
    with pytest.raises(PayloadError, match="bytes"):
        there.decode_each([good[:-1]], 13, config, device, 0, 13, version)
    assert refused or version == WIRE_VERSION


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("budget", [1 << 14, 1 << 30])
def test_recorded_rounds_give_the_recorded_digest(on_device, kind, budget):
    golden = recorded(kind)
    optimizer = optimizer_of(kind, model().to(on_device), budget)
    assert replay(optimizer, golden, apply=optimizer.apply) == golden["digest"]


def gradients(module, kind, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in module.parameters()]
    if kind is LocalSteps:
        with optimizer.working(), torch.no_grad():
            for parameter, some in zip(module.parameters(), noise, strict=True):
                parameter.sub_(some, alpha=1e-2)
    else:
        for parameter, some in zip(module.parameters(), noise, strict=True):
            parameter.grad = some


def some_model(dtype):
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(40, 33), torch.nn.Linear(33, 64), torch.nn.LayerNorm(64)).to(dtype)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k_for", [{}, {"0.*": 3}])
def test_a_training_is_the_same_to_the_bit(kind, dtype, k_for, monkeypatch):
    """Also with other k for some parameters, frozen silence in a chunk, and what the node wrote itself."""
    config = DistroConfig(chunk=16, k=5, k_for=k_for)
    digests, sent = [], []
    for here in (False, True):
        monkeypatch.setattr(there, "computes", lambda where, here=here: here)
        modules = [some_model(dtype) for _ in range(2)]
        optimizers = [kind(module.named_parameters(), lr=1e-2, config=config) for module in modules]
        for step in range(4):
            for number, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
                gradients(module, kind, optimizer, 10 * step + number)
                if kind is DisTrO and step == 0:
                    next(module.parameters()).grad = None  # chunks without votes
            payloads = [optimizer.encode() for optimizer in optimizers]
            sent.append(payloads)
            for optimizer in optimizers:
                optimizer.check(payloads[1])
                optimizer.apply(payloads, optimizer.lr_bits())
        digests += [digest(optimizer) for optimizer in optimizers]
    assert sent[:4] == sent[4:]
    assert len(set(digests)) == 1


@pytest.mark.parametrize("kind", FILES)
def test_so_many_votes_that_float32_sums_them_in_two_parts(kind, monkeypatch):
    config = DistroConfig(chunk=8, k=16)
    module = some_model(torch.float32)
    sender = kind(module.named_parameters(), lr=1e-2, config=config)
    payloads = []
    for peer in range(FLOAT32_VOTES // 16 + 5):
        gradients(module, kind, sender, peer % 3)  # alike, so that sums get large
        payloads.append(sender.encode())
    digests = set()
    for here in (False, True):
        monkeypatch.setattr(there, "computes", lambda where, here=here: here)
        optimizer = kind(some_model(torch.float32).named_parameters(), lr=1e-2, config=config)
        optimizer.apply(payloads, optimizer.lr_bits())
        digests.add(digest(optimizer))
    assert len(digests) == 1
