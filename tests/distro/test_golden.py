"""Twenty recorded rounds of three nodes: applying them gives the same parameters on every machine.

``python tests/distro/test_golden.py`` records them anew (training itself is reproducible on one machine only).
"""

import base64
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from psyche_lightning.distro import DisTrO, DistroConfig

FILE = Path(__file__).with_name("golden.json")
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


def optimizer_of(module, budget=1 << 20):
    return DisTrO(module.named_parameters(), lr=1e-2, weight_decay=0.1, config=CONFIG, budget=budget)


def digest(optimizer):
    state = hashlib.sha256()
    for _, tensor in optimizer.published():
        state.update(tensor.detach().cpu().numpy().astype("<f4").tobytes())
    return state.hexdigest()


def record():
    nodes = [model() for _ in range(3)]
    optimizers = [optimizer_of(node) for node in nodes]
    rounds = []
    for step in range(20):
        payloads = []
        for number, (node, optimizer) in enumerate(zip(nodes, optimizers, strict=True)):
            generator = torch.Generator().manual_seed(100 * step + number)
            for parameter in node.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            optimizer.param_groups[0]["lr"] = 1e-2 * 0.9**step
            payloads.append(optimizer.encode())
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
    FILE.write_text(json.dumps({"rounds": rounds, "digest": digest(optimizers[0])}, indent=1) + "\n")


@pytest.mark.parametrize("budget", [1, 1 << 30])
@pytest.mark.parametrize("backwards", [False, True])
def test_recorded_rounds_give_the_recorded_digest(device, budget, backwards):
    golden = json.loads(FILE.read_text())
    assert len(golden["rounds"]) == 20
    optimizer = optimizer_of(model().to(device), budget)
    for entry in golden["rounds"]:
        payloads = {name: base64.b85decode(text) for name, text in entry["payloads"].items()}
        assert all(hashlib.sha256(payload).hexdigest() == name for name, payload in payloads.items())
        agreed = [payloads[name] for name in entry["agreed"]]
        optimizer.apply(agreed[::-1] if backwards else agreed, entry["lrs"])
    assert digest(optimizer) == golden["digest"]


if __name__ == "__main__":
    record()
