"""Estimates what a recipe needs before any training: parameters, memory and bytes per round.

The model is built on the meta device, where parameters have shapes but no values, so every size works on every machine.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from psyche_lightning.checkpoints.folder import local_model
from psyche_lightning.errors import ConfigError
from psyche_lightning.plugins import load_plugins
from psyche_lightning.recipe.adapter import adapted
from psyche_lightning.recipe.config import Recipe, TrainerSection
from psyche_lightning.recipe.positions import check_positions

if TYPE_CHECKING:
    import torch

FLOAT32 = 4
DIRECTIONS, AT_WORK = "directions of Muon, in float32", "Muon at work on a matrix"


class Stage(NamedTuple):
    """A part of a run with one k and one number of steps in a round; the first begins with step 1.

    Attributes:
        first: its first step of the run.
        k: votes of each chunk.
        steps: steps of an optimizer in a round.
        payload: bytes that one node publishes in a round.
        rounds: how many there are.
    """

    first: int
    k: int
    steps: int
    payload: int
    rounds: int


@dataclass(frozen=True)
class Estimate:
    """The size of a run, in bytes unless stated otherwise.

    Attributes:
        parameters: number of parameters; tied ones count once.
        trainable: number of trainable parameters.
        memory: memory of one device of a node, by name, without activations and the framework.
        stored: bytes of all parameters, as they are saved.
        payload: bytes that one node publishes in a round: with a schedule, in those with the largest k.
        copied: bytes of main memory that a checkpoint's copy takes while it is written; on a node's first rank alone.
        steps: steps of an optimizer in a round, each of which an all-reduce would send gradients for.
        samples: samples of a round, of which each step of a node needs one.
        stages: those of the schedule; one without a schedule.
    """

    parameters: int
    trainable: int
    memory: dict[str, int]
    payload: int
    copied: int = 0
    stored: int = 0
    steps: int = 1
    samples: int = 1
    stages: tuple[Stage, ...] = ()

    def with_activations(self, active: int) -> int:
        """Memory of a device when it is fullest.

        Args:
            active: bytes of activations, which are gone when Muon computes.
        """
        muon = sum(self.memory.get(name, 0) for name in (DIRECTIONS, AT_WORK))
        return sum(self.memory.values()) - muon + max(muon, active)

    @property
    def published(self) -> int:
        """Bytes of the payloads that one node publishes in the whole run."""
        return sum(stage.payload * stage.rounds for stage in self.stages)

    def bytes_per_round(self, nodes: int) -> int:
        """Payload bytes that a node sends, and as many that it receives, if each fetches from each."""
        return (nodes - 1) * self.payload

    def allreduce_bytes_per_round(self, nodes: int) -> float:
        """Bytes that each node sends in a ring all-reduce of float32 gradients: ``2 (n - 1) / n x 4 x parameters``.

        With local steps, one for each of them that a node makes.
        """
        steps = min(self.steps, math.ceil(self.samples / nodes))
        return steps * 2 * (nodes - 1) / nodes * FLOAT32 * self.trainable


def parameter_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype in which a node keeps the parameters that it trains."""
    import torch

    dtype = torch.bfloat16 if recipe.trainer.precision == "bf16-true" else getattr(torch, recipe.model.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def saved_dtype(recipe: Recipe, options: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype of saved parameters; None for that of the parameters in memory.

    A checkpoint in bfloat16 stays one, although it is trained with more digits. An adapter is saved as it is trained.

    Args:
        recipe: the recipe.
        options: those of the model's factory.

    Raises:
        OSError: the source's configuration cannot be read.
    """
    import torch

    from psyche_lightning.checkpoints.pretrained import Source

    if recipe.model.adapter:
        return None
    path = options.get("path")
    named: str | None = recipe.checkpoint.save_dtype
    if named is None and path is not None and not options.get("fresh"):
        with contextlib.suppress(ConfigError):  # a plugin's own kind of path
            named = Source.of(str(path)).dtype
    return torch.bfloat16 if named == "bfloat16" else torch.float32 if recipe.checkpoint.save_dtype else None


def named_as_trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters with the names that they have in training, as the recipe's patterns know them."""
    return [(f"model.{name}", parameter) for name, parameter in model.named_parameters()]


def muon_matrices(recipe: Recipe, model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The trained parameters that go through Muon, if the recipe's optimizer is ``muon``.

    Raises:
        ConfigError: a pattern of ``optimizer.muon_for`` matches no parameter, or one that is no matrix.
    """
    import torch

    from psyche_lightning.muon import hidden_matrices

    whole = torch.nn.ModuleDict({"model": model})
    hidden = hidden_matrices(whole, recipe.optimizer.muon_for)
    return [one for name, one in named_as_trained(model) if one.requires_grad and hidden[name]]


def meta_model(recipe: Recipe) -> torch.nn.Module:
    """The recipe's model on the meta device, in the dtype in which this node trains, with its adapter if it has one.

    Raises:
        PluginError: no plugin has the model.
        ConfigError: its configuration is wrong, or its positions are too few for the data.
        CheckpointError: its path leads to nothing usable.
    """
    build = load_plugins().models()[recipe.model.name]
    import torch

    from psyche_lightning.checkpoints.dtypes import cast

    with torch.device("meta"):
        model = build(_options(recipe))
        check_positions(model, recipe.data.seq_len)
        model = cast(model, parameter_dtype(recipe))
        if recipe.model.adapter:
            model = adapted(model, recipe.model.adapter, recipe.model.path, None)
    return model


def _options(recipe: Recipe) -> dict[str, Any]:
    """Options of the model's factory that lead to its configuration, without its parameters."""
    options = recipe.model.options
    if recipe.model.path is not None:
        options["path"] = local_model(recipe.model.path, weights=False)
    return options


def _gradients(recipe: Recipe, trainable: list[torch.nn.Parameter]) -> dict[str, int]:
    """Bytes of the gradients that a node holds at a time."""
    wide = recipe.distro.float32_gradients
    sizes = [FLOAT32 * one.numel() if wide else one.nbytes for one in trainable]
    if recipe.trainer.gradients == "streamed":
        return {"the largest gradient": max(sizes, default=0)}
    return {"gradients": sum(sizes)}


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
    from psyche_lightning.distro.delta import Delta

    named = named_as_trained(model)
    trainable = [parameter for _, parameter in named if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trainable)
    trained = sum(parameter.nbytes for parameter in trainable)
    low = sum(parameter.numel() for parameter in trainable if parameter.element_size() < FLOAT32)
    layout = Layout(named, recipe.distro.chunk)
    nowhere = [torch.device("meta")] * len(layout.entries)
    memory = {
        "parameters": sum(parameter.nbytes for _, parameter in named),
        **_gradients(recipe, trainable),
        "delta (what is yet to be sent)": Delta(layout, nowhere, recipe.trainer.delta).held,
    }
    if low and recipe.trainer.masters == "split":
        memory["what parameters lack of their masters"] = FLOAT32 * low - sum(
            parameter.nbytes for parameter in trainable if parameter.element_size() < FLOAT32
        )
        if recipe.trainer.devices == 1 or recipe.trainer.inner == "ddp":  # with FSDP, each rank has a part of it
            memory["the largest one in float32, for digests"] = FLOAT32 * max(
                parameter.numel() for parameter in trainable if parameter.element_size() < FLOAT32
            )
    elif low:
        memory["float32 masters"] = FLOAT32 * low
    local = recipe.distro.local_steps > 0
    matrices = muon_matrices(recipe, model) if recipe.optimizer.name == "muon" else []
    if matrices:  # the node's own Muon keeps its momentum as the gradients are, and DisTrO's in float32
        memory["momentum of Muon"] = sum(one.nbytes if local else FLOAT32 * one.numel() for one in matrices)
        if not local and not recipe.distro.float32_gradients:
            memory[DIRECTIONS] = FLOAT32 * sum(one.numel() for one in matrices if one.element_size() < FLOAT32)
    if recipe.distro.lookahead:
        memory["look-ahead copy"] = trained
    if local:
        memory["averages of AdamW"] = 2 * (trained - sum(one.nbytes for one in matrices))
        memory["copy for local steps"] = trained
        if low:
            memory["where local steps led, in float32"] = FLOAT32 * low
    if recipe.evals.tasks:
        memory["copy for evaluations"] = trained
    distro = recipe.distro
    codecs = [PayloadCodec(layout, stage, stage.version) for _, stage in distro.stages]
    parts = zip(distro.stages, codecs, distro.rounds(recipe.run.total_steps), strict=True)
    stages = [
        Stage(first, stage.k, max(1, stage.local_steps), codec.size, rounds) for (first, stage), codec, rounds in parts
    ]
    densest = max(stages, key=lambda stage: stage.k)
    kept = max(codec.kept for codec in codecs)
    if kept:
        memory["votes of its last two payloads"] = kept
    return Estimate(
        parameters=sum(parameter.numel() for _, parameter in named),
        trainable=count,
        memory={**_of_device(memory, recipe.trainer, model), **_muon_at_work(recipe, matrices)},
        stored=memory["parameters"],
        payload=densest.payload,
        copied=_copied(recipe, model),
        steps=densest.steps,
        samples=recipe.run.global_batch_size_end,
        stages=tuple(stages),
    )


def _muon_at_work(recipe: Recipe, matrices: list[torch.nn.Parameter]) -> dict[str, int]:
    """Bytes of what Muon computes with at a time, for the matrix that takes the most.

    There are the average of gradient and momentum; what becomes of it, twice, and two products of that; and of a matrix
    that devices divide, the whole. Only with ``trainer.accelerator: cpu`` it is known that a CPU multiplies.
    """
    if not matrices:
        return {}
    import torch

    from psyche_lightning.muon import product_dtype

    product = product_dtype(torch.device("cpu" if recipe.trainer.accelerator == "cpu" else "cuda")).itemsize
    local, divided = recipe.distro.local_steps > 0, recipe.trainer.devices > 1 and recipe.trainer.inner == "fsdp"
    found = []
    for matrix in matrices:
        count, least = matrix.numel(), min(matrix.shape)
        width = matrix.element_size() if local else FLOAT32
        gathered = (3 if local else 2) * width * count  # gradient and momentum; the node's own Muon moves the parameter
        found.append(divided * gathered + (max(width, product) + 2 * product) * count + 2 * product * least**2)
    return {AT_WORK: max(found)}


def _copied(recipe: Recipe, model: torch.nn.Module) -> int:
    """Bytes of the copy that :class:`~psyche_lightning.checkpoints.model.ModelCopy` makes."""
    import torch

    from psyche_lightning.checkpoints.dtypes import dtypes, tensors
    from psyche_lightning.node.parameters import persistent_buffers

    kind = saved_dtype(recipe, _options(recipe))
    wanted = {} if kind is None else dtypes(model, kind)
    buffers = {id(one) for one in persistent_buffers(model).values()}
    return sum(
        tensor.numel() * wanted.get(name, tensor.dtype).itemsize
        for name, tensor in tensors(model)
        if isinstance(tensor, torch.nn.Parameter) or id(tensor) in buffers
    )


def _of_device(memory: dict[str, int], trainer: TrainerSection, model: torch.nn.Module) -> dict[str, int]:
    """What a device of a node holds of that memory; of several with DDP, the one that keeps delta, too.

    With FSDP, each holds its share of everything, and what is gathered for a while: the parameters outside of blocks,
    and those of a block that computes and of the next one, and the gradients of one block and of what is outside, until
    they are divided.
    """
    if trainer.devices == 1 or trainer.inner == "ddp":
        return memory
    shares = {name: -(-amount // trainer.devices) for name, amount in memory.items()}
    block, outside = _blocks(model)
    return {
        **shares,
        "parameters that are gathered for a while": 2 * block + outside,
        "gradients until they are divided": block + outside,
    }


def _blocks(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes of the parameters of the largest block, an item of a list of modules, and of what lies in no block."""
    import torch

    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    inner = {id(one) for outer in lists for one in outer.modules() if one is not outer}
    sizes = [
        sum(parameter.nbytes for parameter in block.parameters())
        for outer in lists
        if id(outer) not in inner
        for block in outer
    ]
    return max(sizes, default=0), sum(parameter.nbytes for parameter in model.parameters()) - sum(sizes)
