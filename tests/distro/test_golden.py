"""Recorded rounds of three nodes: applying them gives the same parameters on every machine.

``python tests/distro/test_golden.py`` records them anew (training itself is reproducible on one machine only).
"""

import base64
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from psyche_lightning.distro import DisTrO, DistroConfig, LocalSteps
from psyche_lightning.errors import PayloadError

FILES = {DisTrO: "golden.json", LocalSteps: "golden_steps.json"}
ROUNDS = 20
CONFIG = DistroConfig(chunk=16, k=4)
SHAPES = {
    "bias": (37,),
    "convolution": (5, 3, 3, 3),
    "empty": (0,),
    "rounded": (20, 30),
    "scale": (),
    "table": (50, 24),
}


def model():
    """Parameters out of a hash: multiples of 2^-16, so that they are the same everywhere."""
    module = torch.nn.Module()
    for name, shape in SHAPES.items():
        count = int(np.prod(shape, dtype=np.int64))
        raw = np.frombuffer(hashlib.shake_256(name.encode()).digest(2 * count), "<i2")
        value = torch.from_numpy(raw.astype(np.float32) / 2**16).view(shape)
        module.register_parameter(name, torch.nn.Parameter(value.bfloat16() if name == "rounded" else value))
    return module


def optimizer_of(kind, module, budget=1 << 20):
    options = {"weight_decay": 0.1} if kind is DisTrO else {"scale": 1.7}
    return kind(module.named_parameters(), lr=1e-2, config=CONFIG, budget=budget, **options)


def digest(optimizer):
    state = hashlib.sha256()
    for _, tensor in optimizer.published():
        state.update(tensor.detach().cpu().numpy().astype("<f4").tobytes())
    return state.hexdigest()


def file_of(kind):
    return Path(__file__).with_name(FILES[kind])


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
    golden = json.loads(file_of(kind).read_text())
    assert len(golden["rounds"]) == ROUNDS
    optimizer = optimizer_of(kind, model().to(device), budget)
    for entry in golden["rounds"]:
        payloads = {name: base64.b85decode(text) for name, text in entry["payloads"].items()}
        assert all(hashlib.sha256(payload).hexdigest() == name for name, payload in payloads.items())
        agreed = [payloads[name] for name in entry["agreed"]]
        optimizer.apply(agreed[::-1] if backwards else agreed, entry["lrs"])
    assert digest(optimizer) == golden["digest"]


def passes(optimizer, payload, *chunks):
    try:
        optimizer._codec(None).decode(payload, *chunks)
    except PayloadError:
        return False
    return True


@pytest.mark.parametrize("kind", FILES)
def test_damage_that_only_a_later_part_shows_changes_nothing(kind):
    optimizer = optimizer_of(kind, model(), budget=1)
    entry = json.loads(file_of(kind).read_text())["rounds"][0]
    good = [base64.b85decode(text) for text in entry["payloads"].values()]
    damaged = (good[0][:at] + bytes([good[0][at] ^ 255]) + good[0][at + 1 :] for at in reversed(range(8, len(good[0]))))
    wrong = next(one for one in damaged if passes(optimizer, one, 0, 1) and not passes(optimizer, one))
    before = digest(optimizer)
    with pytest.raises(PayloadError):
        optimizer.apply([*good[1:], wrong], entry["lrs"])
    assert digest(optimizer) == before


if __name__ == "__main__":
    for each in FILES:
        record(each)
