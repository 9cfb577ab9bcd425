"""The model of the recorded rounds in tests/distro, and how they are replayed; needs torch and numpy alone."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from psyche_lightning.distro import DisTrO, DistroConfig, LocalSteps

FILES: dict[type[DisTrO], str] = {DisTrO: "golden.json", LocalSteps: "golden_steps.json"}
ROUNDS = 20
CONFIG = DistroConfig(chunk=16, k=4)
SHAPES: dict[str, tuple[int, ...]] = {
    "bias": (37,),
    "convolution": (5, 3, 3, 3),
    "empty": (0,),
    "rounded": (20, 30),
    "scale": (),
    "table": (50, 24),
}


def model() -> torch.nn.Module:
    """Parameters out of a hash: multiples of 2^-16, so that they are the same everywhere."""
    module = torch.nn.Module()
    for name, shape in SHAPES.items():
        count = int(np.prod(shape, dtype=np.int64))
        raw = np.frombuffer(hashlib.shake_256(name.encode()).digest(2 * count), "<i2")
        value = torch.from_numpy(raw.astype(np.float32) / 2**16).view(shape)
        module.register_parameter(name, torch.nn.Parameter(value.bfloat16() if name == "rounded" else value))
    return module


def optimizer_of(kind: type[DisTrO], module: torch.nn.Module, budget: int = 1 << 20) -> DisTrO:
    """The optimizer of the recorded rounds."""
    options: dict[str, Any] = {"weight_decay": 0.1} if kind is DisTrO else {"scale": 1.7}
    return kind(module.named_parameters(), lr=1e-2, config=CONFIG, budget=budget, **options)


def digest(optimizer: DisTrO) -> str:
    """SHA-256 of the published parameters."""
    state = hashlib.sha256()
    for _, tensor in optimizer.published():
        state.update(tensor.detach().cpu().numpy().astype("<f4").tobytes())
    return state.hexdigest()


def file_of(kind: type[DisTrO]) -> Path:
    """Where the rounds are recorded."""
    return Path(__file__).parents[1] / "distro" / FILES[kind]


def recorded(kind: type[DisTrO]) -> dict[str, Any]:
    """The recorded rounds, with the digest after them; the payloads' names are their hashes."""
    golden: dict[str, Any] = json.loads(file_of(kind).read_text())
    assert len(golden["rounds"]) == ROUNDS
    for entry in golden["rounds"]:
        entry["payloads"] = {name: base64.b85decode(text) for name, text in entry["payloads"].items()}
        assert all(hashlib.sha256(payload).hexdigest() == name for name, payload in entry["payloads"].items())
    return golden


def replay(optimizer: DisTrO, golden: dict[str, Any], *, backwards: bool = False, apply: Callable[..., Any]) -> str:
    """The digest after the recorded rounds.

    Args:
        optimizer: of a new :func:`model`.
        golden: :func:`recorded`.
        backwards: whether payloads come in the other order.
        apply: applies them: the optimizer's method, or a compiled form of it.
    """
    for entry in golden["rounds"]:
        agreed = [entry["payloads"][name] for name in entry["agreed"]]
        apply(agreed[::-1] if backwards else agreed, entry["lrs"])
    return digest(optimizer)
