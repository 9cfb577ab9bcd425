"""The manifest sections that a module, its optimizer and its data determine."""

from __future__ import annotations

from typing import Any

import torch

from psyche_lightning.data.order import DataOrder
from psyche_lightning.distro import DisTrO
from psyche_lightning.distro.sharded import ShardedDisTrO
from psyche_lightning.lightning.optimizers import TakenStep
from psyche_lightning.node.parameters import named_parameters, persistent_buffers


def sections(step: TakenStep, order: DataOrder, clip: tuple[str, float] | None = None) -> dict[str, dict[str, Any]]:
    """The sections ``model``, ``optimizer`` and ``data``.

    Args:
        step: the module with its optimizer.
        order: the order of its data.
        clip: the gradient clipping: ``(algorithm, value)`` or None.
    """
    return {
        "model": _model(step.module, step.distro),
        "optimizer": _optimizer(step, clip),
        "data": {"length": order.length, "shuffle": order.shuffle},
    }


def _model(module: torch.nn.Module, optimizer: DisTrO | ShardedDisTrO) -> dict[str, Any]:
    """Name, shape, dtype of every parameter (and whether it is trained) and buffer, in order of their names."""
    trained = {entry.name for entry in optimizer.layout.entries}
    parameters = sorted(named_parameters(module).items(), key=lambda item: item[0].encode())
    buffers = sorted(persistent_buffers(module).items(), key=lambda item: item[0].encode())
    return {
        "parameters": [[*_describe(name, tensor), name in trained] for name, tensor in parameters],
        "buffers": [_describe(name, tensor) for name, tensor in buffers],
    }


def _optimizer(step: TakenStep, clip: tuple[str, float] | None) -> dict[str, Any]:
    """Weight decay and parameters of each group, the gradient clipping, and whose steps local steps are."""
    groups = [
        {"weight_decay": float(group["weight_decay"]), "parameters": sorted(group["param_names"])}
        for group in step.distro.param_groups
    ]
    own = {} if step.local is None else {"own": type(step.optimizer).__name__}
    return {"groups": groups, "clip": None if clip is None else [clip[0], float(clip[1])], **own}


def _describe(name: str, tensor: torch.Tensor) -> list[Any]:
    return [name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
