"""Parameters with their own k, and gradients in float32."""

import numpy as np
import pytest
import torch

from psyche_lightning.distro import (
    DisTrO,
    DistroConfig,
    Layout,
    LocalSteps,
    PayloadCodec,
    Votes,
    codec,
    encode,
    magnitudes,
)
from psyche_lightning.distro import payload as distro_payload
from psyche_lightning.errors import ConfigError, PayloadError

SHAPES = {"embed": (40, 16), "layers.0": (16, 24), "layers.1": (24, 16), "norm": (70,)}
CONFIG = DistroConfig(chunk=8, k=3, k_for={"embed*": 1, "layers.1": 9})


def named(seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, shape in SHAPES.items():
        parameter = torch.nn.Parameter(torch.randn(shape, generator=generator))
        parameter.grad = torch.randn(shape, generator=generator)
        yield name, parameter


def test_each_parameter_sends_its_own_k_and_all_of_it_arrives():
    parameters = dict(named())
    optimizer = DisTrO(parameters.items(), lr=0.1, config=CONFIG)
    payload = optimizer.encode()
    assert len(payload) == optimizer.max_payload
    form, layout = PayloadCodec(optimizer.layout, CONFIG), optimizer.layout
    votes = form.decode(payload)
    cast = np.abs(votes.signs).sum(axis=1)
    for entry, k in zip(layout.entries, (1, 3, 9, 3), strict=True):
        assert (cast[entry.offset : entry.offset + entry.chunks] == k).all()
    assert form.encode(votes) == payload
    for start, stop in ((0, 1), (3, 17), (9, layout.chunk_count), (11, 11)):
        part = form.decode(payload, start, stop)
        assert (part.positions == votes.positions[start:stop]).all()
        assert (part.signs == votes.signs[start:stop]).all()


def test_the_update_equals_that_of_each_parameter_alone():
    together = dict(named())
    optimizer = DisTrO(together.items(), lr=0.1, config=CONFIG)
    optimizer.step()
    for (name, parameter), k in zip(named(), (1, 3, 9, 3), strict=True):
        DisTrO([(name, parameter)], lr=0.1, config=DistroConfig(chunk=8, k=k)).step()
        assert torch.equal(parameter, together[name])


@pytest.mark.parametrize("budget", [1, 20_000, 1 << 27])
def test_the_budget_does_not_change_the_update(budget):
    outcomes = []
    for size in (budget, 1 << 27):
        parameters = dict(named())
        optimizer = DisTrO(parameters.items(), lr=0.1, config=CONFIG, budget=size)
        payload = optimizer.encode()
        optimizer.apply([payload, optimizer.encode(), optimizer.abstention()], optimizer.lr_bits())
        outcomes.append([payload, *(parameter.detach().numpy().tobytes() for parameter in parameters.values())])
    assert outcomes[0] == outcomes[1]


def test_one_k_for_all_is_the_plain_code():
    layout = Layout(named(), 8)
    config = DistroConfig(chunk=8, k=5)
    votes = Votes.empty(layout.chunk_count, 5)
    assert PayloadCodec(layout, config).encode(votes) == encode(votes, config)
    assert layout.digest(config) != layout.digest(DistroConfig(chunk=8, k=5, k_for={"norm": 4}))


@pytest.mark.parametrize("spoil", [lambda p: p[:-1], lambda p: p + b"\0", lambda p: b"\3" + p[1:], lambda p: b""])
def test_other_bytes_are_refused(spoil):
    optimizer = DisTrO(named(), lr=0.1, config=CONFIG)
    with pytest.raises(PayloadError):
        optimizer.check(spoil(optimizer.encode()))


def test_patterns_that_match_nothing_or_ask_too_much_are_refused():
    with pytest.raises(ConfigError, match=r"matches no parameter; the names are embed"):
        DisTrO(named(), lr=0.1, config=DistroConfig(chunk=8, k=3, k_for={"embedding*": 1}))
    with pytest.raises(ConfigError, match=r"k_for of 'norm' is 17; .* from 1 to 16"):
        DistroConfig(chunk=8, k=3, k_for={"norm": 17})
    with pytest.raises(ConfigError, match="expected a mapping from patterns"):
        DistroConfig(chunk=8, k=3, k_for=4)


def test_gradients_of_micro_batches_add_up_in_float32():
    outcomes = {}
    for wide in (True, False):
        weight = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.bfloat16))
        optimizer = DisTrO([("w", weight)], lr=1.0, config=DistroConfig(8, 16, float32_gradients=wide))
        (weight.sum() * 256).backward()
        for _ in range(64):
            weight.sum().backward()  # 256 + 1 is 256 in bfloat16
        optimizer.encode()
        outcomes[wide] = float(weight.grad.float().mean())
    assert outcomes == {True: 320.0, False: 256.0}


@pytest.mark.parametrize("k_for", [{}, {"embed*": 1, "layers.1": 9}])
@pytest.mark.parametrize("kind", [DisTrO, LocalSteps])
def test_payloads_read_together_are_what_each_is_alone(kind, k_for, monkeypatch):
    config = DistroConfig(chunk=8, k=3, k_for=k_for)
    monkeypatch.setattr(magnitudes, "_BATCH", 8)
    for k in (1, 3, 9):
        monkeypatch.setattr(codec.code_of(64, k), "batch", 8)
    parameters = dict(named())
    sender, payloads = kind(parameters.items(), lr=0.1, config=config), []
    for seed in range(3):
        for (_, other), parameter in zip(named(seed), parameters.values(), strict=True):
            parameter.grad = other.grad
        if kind is LocalSteps:
            with sender.working(), torch.no_grad():
                for parameter in parameters.values():
                    parameter.sub_(parameter.grad, alpha=0.01)
        payloads.append(sender.encode())
    reader = PayloadCodec(sender.layout, config, kind.version)

    def outcome(given, span):
        try:
            found = reader.decode_each(given, *span)
        except PayloadError as error:
            return str(error)
        return [
            [None if part is None else part.tolist() for part in (one.positions, one.signs, one.exponents)]
            for one in found
        ]

    generator, refused = np.random.default_rng(0), 0
    for _ in range(150):
        damaged = bytearray(payloads[1])
        damaged[generator.integers(len(damaged))] ^= 1 << generator.integers(8)
        first = int(generator.integers(0, sender.layout.chunk_count))
        for span in ((), (first, min(first + 9, sender.layout.chunk_count))):
            alone = [outcome([one], span) for one in (payloads[0], bytes(damaged), payloads[2])]
            together = outcome([payloads[0], bytes(damaged), payloads[2]], span)
            refused += isinstance(together, str)
            assert together == (alone[1] if isinstance(alone[1], str) else [part for one in alone for part in one])
    assert 20 < refused < 280
    assert reader.decode_each([]) == []


def test_own_votes_are_those_that_others_read():
    optimizer = DisTrO(dict(named()).items(), lr=0.1, config=DistroConfig(chunk=8, k=3))
    payloads = [optimizer.encode() for _ in range(3)]  # the first is too old to be at hand
    for payload in (*payloads, optimizer.abstention()):
        for start, stop in ((0, None), (3, 17)):
            ours = optimizer._codec(None).decode(payload, start, stop)
            theirs = PayloadCodec(optimizer.layout, optimizer.config).decode(payload, start, stop)
            assert (ours.positions == theirs.positions).all()
            assert (ours.signs == theirs.signs).all()


@pytest.mark.parametrize("config", [CONFIG, DistroConfig(chunk=8, k=3)])
@pytest.mark.parametrize("kind", [DisTrO, LocalSteps])
def test_what_is_kept_of_written_payloads_is_counted(kind, config):
    optimizer = kind(dict(named()).items(), lr=0.1, config=config)
    for _ in range(3):
        if kind is LocalSteps:
            with optimizer.working():
                pass
        optimizer.encode()
    codec = optimizer._codec(None)
    kept = sum(votes.nbytes for _, votes in codec._written)
    assert codec.kept == kept
    assert (kept > 0) == (not config.k_for)


@pytest.mark.parametrize("config", [CONFIG, DistroConfig(chunk=8, k=3)])
def test_a_checked_payload_is_not_read_again(config, monkeypatch):
    peers = [DisTrO(dict(named(seed)).items(), lr=0.1, config=config) for seed in range(3)]
    payloads = [peer.encode() for peer in peers]
    unchecked, checked = (DisTrO(dict(named()).items(), lr=0.1, config=config) for _ in range(2))
    for payload in payloads:
        checked.check(payload)
    unchecked.apply(payloads, unchecked.lr_bits())
    monkeypatch.setattr(codec, "decode_each", None)
    checked.apply([bytes(bytearray(payload)) for payload in payloads], checked.lr_bits())  # as the store gives them
    for (name, ours), (_, theirs) in zip(checked.published(), unchecked.published(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_votes_of_the_last_checked_payloads_alone_are_kept(monkeypatch):
    peers = [DisTrO(dict(named(seed)).items(), lr=0.1, config=CONFIG) for seed in range(4)]
    payloads = [peer.encode() for peer in peers]
    form = PayloadCodec(peers[0].layout, CONFIG)
    monkeypatch.setattr(distro_payload, "KEPT", 2 * form.decode(payloads[0]).nbytes)
    for payload in payloads:
        form.check(payload)
    wanted = [form.decode(payload) for payload in payloads]
    monkeypatch.setattr(codec, "decode_each", None)
    for payload, votes in zip(payloads[2:], wanted[2:], strict=True):
        assert (form.decode(payload).signs == votes.signs).all()
    with pytest.raises(TypeError):
        form.decode(payloads[1])
    monkeypatch.undo()
    for wrong in (payloads[0][:-1], bytes([payloads[0][0] ^ 1]) + payloads[0][1:]):
        with pytest.raises(PayloadError):
            form.check(wrong)
        with pytest.raises(PayloadError):
            form.decode(wrong)
