"""Trains a small model, then a large one, and prints the peak of memory that the second one took, with its estimate.

Arguments are two JSON lists of overrides of the recipe ``demo``.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from psyche_lightning import PsycheStrategy
from psyche_lightning.checkpoints.deferred import built
from psyche_lightning.checkpoints.model import ModelCopy
from psyche_lightning.plugins import load_plugins
from psyche_lightning.recipe import Recipe, load_recipe
from psyche_lightning.recipe.estimate import estimate, parameter_dtype
from psyche_lightning.train.module import CausalModule, ProviderDataset

STEPS = 3


def held(name: str) -> int:
    """Bytes of this process's memory: ``VmRSS`` now, ``VmHWM`` at the most since :func:`forget`."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def forget() -> int:
    """Begin to look for a new peak; returns the bytes now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return held("VmRSS")


def train(recipe: Recipe, provider: Any) -> torch.nn.Module:
    """Train alone, without writing a checkpoint; returns the model."""
    torch.manual_seed(0)
    plugins = load_plugins()
    factory = plugins.models()[recipe.model.name]
    model: Any = built(lambda: factory(recipe.model.options), parameter_dtype(recipe)).train()
    options = recipe.options(None, None, "node", {}, tokens_per_sample=recipe.data.seq_len)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        strategy=PsycheStrategy(**vars(options)), accelerator="cpu", devices=1, max_steps=STEPS, max_epochs=-1, **quiet
    )
    loader: DataLoader[Any] = DataLoader(ProviderDataset(provider), batch_size=recipe.trainer.micro_batch_size)
    trainer.fit(CausalModule(model, recipe.optimizer, recipe.schedule), loader)
    assert trainer.global_step == STEPS
    trained: torch.nn.Module = model
    return trained


if __name__ == "__main__":
    torch.set_num_threads(1)
    small, large = (load_recipe("demo", json.loads(overrides)) for overrides in sys.argv[1:])
    data = load_plugins().data_providers()[large.data.name](large.data.options, seed=0)
    train(small, data)  # so that what torch and the package load at first is there
    size = estimate(large)
    before = forget()
    trained = train(large, data)
    found = {"peak": held("VmHWM") - before, "memory": size.memory, "parameters": size.parameters}
    before = forget()
    ModelCopy(trained).save(Path("saved"))
    print(json.dumps({**found, "write": held("VmHWM") - before, "copied": size.copied}))
