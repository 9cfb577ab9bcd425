"""What ranks do in ``tests/recipe/test_peak.py``: they make steps of Muon, and look at their memory."""

import gc
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard

from psyche_lightning import MuonAdamW
from psyche_lightning.distro import DistroConfig, ShardedDisTrO
from psyche_lightning.recipe import load_recipe
from psyche_lightning.recipe.estimate import estimate

from .sharded import memory, mesh

DIVIDED = ("optimizer.name=muon", "trainer.devices=2", "trainer.inner=fsdp", "trainer.accelerator=cpu")
SIZE = 16, 1 << 17  # large, but little to compute


def peaks():
    """The estimate and the peak of a step of Muon: of votes, and of local steps in both dtypes."""
    return [_peak(local, dtype) for local in (0, 8) for dtype in ("float32", "bfloat16")]


def _peak(local, dtype):
    model = torch.nn.Sequential(*(torch.nn.Linear(*size, bias=False) for size in (SIZE, SIZE, (16, 16))))
    model.to(getattr(torch, dtype))
    recipe = load_recipe("demo", [*DIVIDED, f"distro.local_steps={local}", f"model.dtype={dtype}"], twin=True)
    parts = estimate(recipe, model).memory
    size = parts["Muon at work on a matrix"] + parts.get("directions of Muon, in float32", 0)
    fully_shard(model, mesh=mesh())
    if local:
        step = MuonAdamW(model).step
    else:
        matrices = {"params": list(model.named_parameters())[:-1], "muon": True}  # the last one is the head
        step = ShardedDisTrO([matrices], 1e-3, config=DistroConfig(16, 4), budget=1 << 20).encode
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) / 100
    step()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    step()
    return size, memory("VmHWM") - before
