"""Divides a module among the ranks of a node by torch's ``fully_shard``, and puts it together for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from psyche_lightning.checkpoints.deferred import Values
from psyche_lightning.checkpoints.dtypes import fill, tensors
from psyche_lightning.distro.shards import Ranks, extents, held
from psyche_lightning.errors import CheckpointError, ConfigError, counted
from psyche_lightning.lightning.world import World

_LISTS = (torch.nn.ModuleList, torch.nn.Sequential)


def shard(module: torch.nn.Module, world: World, *, itself: bool = False, values: Values | None = None) -> None:
    """Give each rank its part of the parameters of a module's children, with rank 0's values; all ranks call it.

    The entries of lists and sequences in them, such as a model's layers, are gathered one at a time when they compute.
    Parameters of the module itself, and scalars, stay whole on each rank.

    Args:
        module: a LightningModule, whose ``training_step`` calls its children.
        world: the ranks of the node.
        itself: whether the module is called itself, so that its own parameters are divided as well.
        values: of tensors that are on the meta device, by name. Each rank reads its part of those that lie in files.
            Of the others rank 0 makes one after the other, and each rank keeps its part. So no rank ever holds the
            whole model.

    Raises:
        ConfigError: nothing in the module can be divided.
        CheckpointError: a value is not finite.
    """
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        return  # by an earlier fit
    values = values or {}
    for name, tensor in tensors(module):
        if name not in values:
            world.hand_on(tensor)
    mesh = init_device_mesh(world.device.type, (world.size,))
    whole = {parameter for parameter in module.parameters() if parameter.ndim == 0}
    for child in [module] if itself else module.children():
        if not any(parameter.ndim for parameter in child.parameters()):
            continue
        lists = [part for part in child.modules() if isinstance(part, _LISTS)]
        for layer in dict.fromkeys(layer for part in reversed(lists) for layer in part):
            if any(parameter.ndim for parameter in layer.parameters()) and not isinstance(layer, _LISTS):
                fully_shard(layer, mesh=mesh, ignored_params=whole)
        if not isinstance(child, torch.nn.ModuleList):
            fully_shard(child, mesh=mesh, ignored_params=whole)
    divided = [part for part in module.modules() if isinstance(part, FSDPModule)]
    if not divided:
        raise ConfigError(
            f"inner is 'fsdp', but {type(module).__name__} has no child with parameters that could be divided among "
            f"{world.size} ranks; make the model an attribute of the LightningModule, or choose inner='ddp'"
        )
    if values:
        _fill(module, values, Ranks(device=world.device), world.device)
    for part in divided:
        part.set_force_sum_reduction_for_comms(True)
        part.set_gradient_divide_factor(1.0)  # losses are weighted before


def _fill(module: torch.nn.Module, values: Values, ranks: Ranks, device: torch.device) -> None:
    """Give each rank its part of the tensors on the meta device."""
    bad = []
    for name, tensor in list(tensors(module)):
        if name not in values:
            continue
        part = values[name].part
        fill(tensor, torch.empty_like(tensor, device=device))
        if part is not None:  # all ranks can read the files
            held(tensor).copy_(part(*extents(tensor, ranks)[ranks.rank]))
        else:
            value = values[name]().to(tensor.dtype) if ranks.rank == 0 else None
            ranks.spread(value, tensor)
        if not bool(torch.isfinite(held(tensor)).all()):
            bad.append(name)
    problem = ranks.agree(f"{counted(len(bad), 'parameter')} such as {bad[0]!r}" if bad else None)
    if problem is not None:
        raise CheckpointError(
            f"the model begins with values that are not finite, in {problem}. Load another checkpoint "
            "(checkpoint.resume or model.path)."
        )
    module.to(device)  # has FSDP look at its parameters again


def shard_with_optimizer(module: torch.nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Divide a module that is called itself, as :func:`shard` does, and give its optimizer the new parameters.

    Raises:
        ConfigError: nothing in the module can be divided, or the optimizer has made steps with the old parameters.
    """
    if optimizer.state:
        raise ConfigError(
            f"{type(optimizer).__name__} has made steps already, but inner='fsdp' divides the parameters that it has "
            "state of. Call fabric.setup(module, optimizer) with a new optimizer."
        )
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    shard(module, world, itself=True)
    divided = dict(module.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [divided.get(names.get(id(parameter), ""), parameter) for parameter in group["params"]]


def whole_state(module: torch.nn.Module, ranks: Ranks) -> dict[str, Any]:
    """A module's ``state_dict`` with whole tensors on the CPU, on rank 0; empty on the others. All ranks call it."""
    ranks.reshard(module)
    found: dict[str, Any] = {}
    for name, value in module.state_dict().items():
        whole = ranks.whole(value) if isinstance(value, torch.Tensor) else value
        if ranks.rank == 0:
            found[name] = whole.cpu() if isinstance(whole, torch.Tensor) else whole
    return found


@torch.no_grad()
def load_whole_state(module: torch.nn.Module, state: Mapping[str, Any], ranks: Ranks, strict: bool) -> None:
    """Take this rank's part of a ``state_dict`` with whole tensors, or with parts."""
    ranks.reshard(module)
    parts = dict(state)
    for name, ours in module.state_dict().items():
        if isinstance(ours, DTensor) and name in parts and not isinstance(parts[name], DTensor):
            start, stop = extents(ours, ranks)[ranks.rank]
            held(ours).copy_(parts[name].reshape(-1)[start:stop])
            parts[name] = ours
    module.load_state_dict(parts, strict=strict)
