"""Estimates what a recipe needs before any training: parameters, memory and bytes per round.

The model is built on the meta device, where parameters have shapes but no values, so every size works on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from psyche_lightning.checkpoints.folder import local_model
from psyche_lightning.plugins import load_plugins
from psyche_lightning.recipe.adapter import adapted
from psyche_lightning.recipe.config import Recipe
from psyche_lightning.recipe.positions import check_positions

if TYPE_CHECKING:
    import torch

FLOAT32 = 4


@dataclass(frozen=True)
class Estimate:
    """The size of a run, in bytes unless stated otherwise.

    Attributes:
        parameters: number of parameters; tied ones count once.
        trainable: number of trainable parameters.
        memory: memory of one node, by name, without activations and the framework.
        payload: bytes that one node publishes in a round.
        steps: steps of an optimizer in a round, each of which an all-reduce would send gradients for.
    """

    parameters: int
    trainable: int
    memory: dict[str, int]
    payload: int
    steps: int = 1

    def bytes_per_round(self, nodes: int) -> int:
        """Payload bytes that a node sends, and as many that it receives, if each fetches from each."""
        return (nodes - 1) * self.payload

    def allreduce_bytes_per_round(self, nodes: int) -> float:
        """Bytes that each node sends in a ring all-reduce of float32 gradients: ``2 (n - 1) / n x 4 x parameters``.

        With local steps, one for each of them.
        """
        return self.steps * 2 * (nodes - 1) / nodes * FLOAT32 * self.trainable


def meta_model(recipe: Recipe) -> torch.nn.Module:
    """The recipe's model on the meta device, in the recipe's dtype, with its adapter if it has one.

    Raises:
        PluginError: no plugin has the model.
        ConfigError: its configuration is wrong, or its positions are too few for the data.
        CheckpointError: its path leads to nothing usable.
    """
    build = load_plugins().models()[recipe.model.name]
    import torch

    from psyche_lightning.checkpoints.dtypes import cast

    options = recipe.model.options
    if recipe.model.path is not None:
        options["path"] = local_model(recipe.model.path, weights=False)
    with torch.device("meta"):
        model = build(options)
        check_positions(model, recipe.data.seq_len)
        model = cast(model, getattr(torch, recipe.model.dtype))
        if recipe.model.adapter:
            model = adapted(model, recipe.model.adapter, recipe.model.path, None)
    return model


def estimate(recipe: Recipe, model: torch.nn.Module | None = None) -> Estimate:
    """Compute the size of a run.

    Args:
        recipe: the run.
        model: its model, if it already exists; None builds it on the meta device.

    Raises:
        PluginError: no plugin has the model.
        ConfigError: its configuration is wrong, or it has no trainable parameters.
    """
    model = meta_model(recipe) if model is None else model
    import torch

    from psyche_lightning.distro import Layout, PayloadCodec
    from psyche_lightning.muon import hidden_matrices

    named = list(model.named_parameters())
    trainable = [parameter for _, parameter in named if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trainable)
    trained = sum(parameter.nbytes for parameter in trainable)
    memory = {
        "parameters": sum(parameter.nbytes for _, parameter in named),
        "gradients": trained,
        "delta (what is yet to be sent)": FLOAT32 * count,
    }
    masters = sum(parameter.numel() for parameter in trainable if parameter.element_size() < FLOAT32)
    if masters:
        memory["float32 masters"] = FLOAT32 * masters
    if recipe.optimizer.name == "muon":
        of_a_node = torch.nn.ModuleDict({"model": model})  # names as the recipe's patterns know them
        hidden = hidden_matrices(of_a_node, recipe.optimizer.muon_for)
        sizes = {f"model.{name}": parameter.numel() for name, parameter in named if parameter.requires_grad}
        memory["momentum of Muon"] = FLOAT32 * sum(size for name, size in sizes.items() if hidden[name])
    if recipe.distro.lookahead:
        memory["look-ahead copy"] = trained
    if recipe.distro.local_steps:
        memory["copy for local steps"] = trained
        memory["averages of AdamW"] = 2 * (FLOAT32 * count - memory.get("momentum of Muon", 0))
    if recipe.evals.tasks:
        memory["copy for evaluations"] = trained
    layout = Layout(named, recipe.distro.chunk)
    return Estimate(
        parameters=sum(parameter.numel() for _, parameter in named),
        trainable=count,
        memory=memory,
        payload=PayloadCodec(layout, recipe.distro, recipe.distro.version).size,
        steps=max(1, recipe.distro.local_steps),
    )
