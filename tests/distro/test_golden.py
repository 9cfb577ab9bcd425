"""Recorded rounds of three nodes: applying them gives the same parameters on every machine.

``PYTHONPATH=tests python tests/distro/test_golden.py`` records them anew; training itself is reproducible on one
machine only.
"""

import base64
import hashlib
import json

import pytest
import torch
from ranks import run, sharded
from support.golden import FILES, ROUNDS, digest, file_of, model, optimizer_of, recorded, replay

from psyche_lightning.distro import LocalSteps
from psyche_lightning.errors import PayloadError


def payload_of(optimizer, node, lr, noise):
    optimizer.param_groups[0]["lr"] = lr
    if isinstance(optimizer, LocalSteps):
        with optimizer.working(), torch.no_grad():
            for parameter, some in zip(node.parameters(), noise, strict=True):
                parameter.add_(some, alpha=lr)
    else:
        for parameter, some in zip(node.parameters(), noise, strict=True):
            parameter.grad = some
    return optimizer.encode()


def record(kind):
    nodes = [model() for _ in range(3)]
    optimizers = [optimizer_of(kind, node) for node in nodes]
    rounds = []
    for step in range(ROUNDS):
        payloads = []
        for number, (node, optimizer) in enumerate(zip(nodes, optimizers, strict=True)):
            generator = torch.Generator().manual_seed(100 * step + number)
            noise = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in node.parameters()]
            payloads.append(payload_of(optimizer, node, 1e-2 * 0.9**step, noise))
        agreed = [number for number in range(3) if (step + number) % 4]  # sometimes one is late
        lrs = optimizers[0].lr_bits()
        for optimizer in optimizers:
            optimizer.apply([payloads[number] for number in agreed], lrs)
        names = [hashlib.sha256(payload).hexdigest() for payload in payloads]
        rounds.append(
            {
                "payloads": {
                    name: base64.b85encode(payload).decode() for name, payload in zip(names, payloads, strict=True)
                },
                "agreed": sorted(names[number] for number in agreed),
                "lrs": list(lrs),
            }
        )
    assert len({digest(optimizer) for optimizer in optimizers}) == 1
    file_of(kind).write_text(json.dumps({"rounds": rounds, "digest": digest(optimizers[0])}, indent=1) + "\n")


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("budget", [1, 1 << 30])
@pytest.mark.parametrize("backwards", [False, True])
def test_recorded_rounds_give_the_recorded_digest(device, kind, budget, backwards):
    optimizer = optimizer_of(kind, model().to(device), budget)
    golden = recorded(kind)
    assert replay(optimizer, golden, backwards=backwards, apply=optimizer.apply) == golden["digest"]


@pytest.mark.slow
def test_two_ranks_give_the_recorded_digests():
    assert run(sharded.golden)[0] == [recorded(kind)["digest"] for kind in FILES]


def passes(optimizer, payload, *chunks):
    try:
        optimizer._codec(None).decode(payload, *chunks)
    except PayloadError:
        return False
    return True


@pytest.mark.parametrize("kind", FILES)
def test_damage_that_only_a_later_part_shows_changes_nothing(kind):
    optimizer = optimizer_of(kind, model(), budget=1)
    entry = recorded(kind)["rounds"][0]
    good = list(entry["payloads"].values())
    damaged = (good[0][:at] + bytes([good[0][at] ^ 255]) + good[0][at + 1 :] for at in reversed(range(8, len(good[0]))))
    wrong = next(one for one in damaged if passes(optimizer, one, 0, 1) and not passes(optimizer, one))
    before = digest(optimizer)
    with pytest.raises(PayloadError):
        optimizer.apply([*good[1:], wrong], entry["lrs"])
    assert digest(optimizer) == before


if __name__ == "__main__":
    for each in FILES:
        record(each)
