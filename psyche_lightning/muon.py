"""Muon for the hidden matrices of a model and AdamW for the rest, as one optimizer."""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch.overrides import TorchFunctionMode

from psyche_lightning.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

ADJUSTED = "match_rms_adamw"
"""torch's name for steps of Muon as long as those of AdamW, so that one learning rate serves both."""
MOMENTUM = "momentum_buffer"
"""torch's name for a matrix's momentum in Muon's state."""
_HEAD = re.compile(r"(.*_)?heads?")


def hidden_matrices(module: torch.nn.Module, muon_for: Mapping[str, bool] | None = None) -> dict[str, bool]:
    """Which parameters of a module are hidden matrices, for which Muon is made.

    They have two dimensions, and are neither an embedding nor the head:

    - An embedding is the weight of a ``torch.nn.Embedding`` or ``EmbeddingBag``, or a parameter with ``embed`` in its
      own name or in that of the module that holds it.
    - The head is what ``get_output_embeddings`` of a model of transformers names, and what lies in a module named
      ``head`` or ``..._head`` (outside numbered lists such as layers). If there is neither, it is the last
      ``torch.nn.Linear``.

    A head that is tied to an embedding is one parameter with it. Vectors, kernels of convolutions, and experts in one
    tensor of three dimensions are no matrices.

    Args:
        module: the model, or a LightningModule with it.
        muon_for: overrides this for the parameters whose names match a pattern (``{"*router*": False}``); the first
            match counts.

    Returns:
        For each name of ``module.named_parameters()`` whether Muon trains it.

    Raises:
        ConfigError: a pattern matches no parameter, or gives Muon a parameter that is no matrix.
    """
    apart = {id(parameter) for parameter in (*_embeddings(module), *_head(module))}
    unused = set(muon_for or {})
    found: dict[str, bool] = {}
    for name, parameter in module.named_parameters():
        matching = [pattern for pattern in muon_for or {} if fnmatch.fnmatchcase(name, pattern)]
        unused -= set(matching)
        if muon_for and matching:
            found[name] = muon_for[matching[0]]
            if found[name]:
                check_matrix(parameter, f"muon_for of {matching[0]!r} gives {name!r} to Muon")
        else:
            found[name] = parameter.ndim == 2 and id(parameter) not in apart
    if unused:
        raise ConfigError(f"muon_for has {min(unused)!r}, which matches no parameter of {type(module).__name__}.")
    return found


class MuonAdamW(torch.optim.Optimizer):
    """Muon for hidden matrices, AdamW for all other parameters: torch's own rules, as one optimizer.

    Steps of Muon are scaled to the length of those of AdamW, so both take the same learning rate and weight decay.
    Each group has ``muon``, which says whose rule moves it, besides ``lr``, ``weight_decay``, ``momentum`` (Muon's) and
    ``betas`` (AdamW's), which schedulers may change.

    Matrices may be DTensors. Of those that ``fully_shard`` has divided over a mesh of one dimension, each rank has at
    most one as a whole at a time, makes its step, and gives every rank its part back; any others every rank gathers.
    What comes out is equal to the bit to the steps of one device.

    Args:
        params: the module to train, whose :func:`hidden_matrices` Muon trains; or groups of your own, dictionaries with
            ``params``, ``muon`` (False by default), and further values of theirs.
        lr: the learning rate of both.
        weight_decay: decoupled: ``p *= 1 - lr * weight_decay`` before each step.
        momentum: Muon's, which is Nesterov's.
        betas: AdamW's.
        muon_for: see :func:`hidden_matrices`; only with a module.

    Raises:
        ConfigError: the module has no hidden matrix, or Muon would get a parameter that is no matrix.
    """

    def __init__(
        self,
        params: torch.nn.Module | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        muon_for: Mapping[str, bool] | None = None,
    ) -> None:
        groups = _groups(params, muon_for)
        if not any(group.get("muon") for group in groups):
            raise ConfigError(
                "MuonAdamW has no hidden matrix to train. Give it the module (MuonAdamW(self)), mark groups of your "
                'own with "muon": True, or name matrices with muon_for. If there are none, use torch.optim.AdamW.'
            )
        hyperparameters = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "muon": False}
        super().__init__(groups, hyperparameters)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; AdamW trains it unless it says ``"muon": True``.

        Raises:
            ConfigError: Muon would get a parameter that is no matrix.
        """
        rule = self._rules[not param_group.get("muon", False)]
        super().add_param_group({**rule.defaults, **param_group})
        if self.param_groups[-1]["muon"]:
            for parameter in self.param_groups[-1]["params"]:
                check_matrix(parameter, 'a group with "muon": True has a parameter')

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step, and return what the closure returns."""
        from torch.distributed.tensor import DTensor  # slow to import

        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        muon, adamw = self._rules
        divided = [
            (group, parameter)
            for group in self.param_groups
            for parameter in group["params"]
            if group["muon"] and isinstance(parameter, DTensor)
        ]
        apart = {id(parameter) for _, parameter in divided}
        matrices = [group for group in self.param_groups if group["muon"]]
        muon.param_groups = [{**one, "params": [p for p in one["params"] if id(p) not in apart]} for one in matrices]
        adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        for rule in self._rules:
            rule.state = self.state
            rule.step()
        self._step_divided(divided)
        return result

    def _step_divided(self, divided: Iterable[tuple[dict[str, Any], DTensor]]) -> None:
        """Make Muon's step with matrices of which this rank has a part."""
        from torch.distributed.tensor import Shard, distribute_tensor

        in_rows: dict[Hashable, list[_Divided]] = {}
        for group, parameter in divided:
            if parameter.grad is None:
                continue
            gradient = cast("DTensor", parameter.grad)
            momentum = self.state[parameter].setdefault(MOMENTUM, torch.zeros_like(gradient))
            values, mesh = (parameter, gradient, momentum), parameter.device_mesh
            if mesh.ndim == 1 and all(one.placements == (Shard(0),) for one in values):
                kind = (mesh, *(one.dtype for one in values))
                in_rows.setdefault(kind, []).append(_Divided(group, *values))
                continue
            whole, whole_gradient, whole_momentum = (one.full_tensor() for one in values)
            self._step_whole(group, whole, whole_gradient, whole_momentum)
            for part, found in ((parameter, whole), (momentum, whole_momentum)):
                part.copy_(distribute_tensor(found, mesh, part.placements, src_data_rank=None))
        for matrices in in_rows.values():
            matrices.sort(key=_Divided.work)  # those of a turn shall take equally long
            ranks = matrices[0].parameter.device_mesh.size()
            for first in range(0, len(matrices), ranks):
                self._step_turn(matrices[first : first + ranks])

    def _step_turn(self, matrices: Sequence[_Divided]) -> None:
        """Make the step with one matrix for each rank, or for the first ones."""
        mesh = matrices[0].parameter.device_mesh
        mine = dict(enumerate(matrices)).get(mesh.get_local_rank())
        rows, columns = (0, 0) if mine is None else mine.parameter.shape
        each = -(-rows // mesh.size())
        theirs = [columns * max(0, min(each, rows - each * rank)) for rank in range(mesh.size())]  # parts of my matrix
        ours = [matrix.parameter.to_local().numel() for matrix in matrices]  # my parts of all
        ours += [0] * (mesh.size() - len(matrices))

        def gathered(parts: Iterable[DTensor]) -> torch.Tensor:
            flat = torch.cat([part.to_local().reshape(-1) for part in parts])
            return _exchanged(flat, ours, theirs, mesh).view(rows, columns)

        def returned(whole: torch.Tensor, parts: Iterable[DTensor]) -> None:
            flat = _exchanged(whole.view(-1), theirs, ours, mesh)
            for part, values in zip(parts, torch.split(flat, ours), strict=False):
                part.to_local().copy_(values.view_as(part.to_local()))

        whole = gathered(matrix.parameter for matrix in matrices)
        gradient = gathered(matrix.gradient for matrix in matrices)
        momentum = gathered(matrix.momentum for matrix in matrices)
        if mine is not None:
            self._step_whole(mine.group, whole, gradient, momentum)
        returned(whole, (matrix.parameter for matrix in matrices))
        returned(momentum, (matrix.momentum for matrix in matrices))

    def _step_whole(
        self, group: dict[str, Any], matrix: torch.Tensor, gradient: torch.Tensor, momentum: torch.Tensor
    ) -> None:
        matrix.grad = gradient
        rule = self._rules[0]
        rule.param_groups = [{**group, "params": [matrix]}]
        rule.state = defaultdict(dict, {matrix: {MOMENTUM: momentum}})
        rule.step()
        rule.param_groups, rule.state = [], self.state  # or the matrix would stay until the next step

    @cached_property
    def _rules(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        """Muon and AdamW of torch, which lend their steps and own nothing: groups and state are this optimizer's."""
        some = [torch.empty(1, 1)]
        own = self.defaults
        shared = {"lr": own["lr"], "weight_decay": own["weight_decay"]}
        return (
            _Muon(some, **shared, momentum=own["momentum"], adjust_lr_fn=ADJUSTED),
            torch.optim.AdamW(some, **shared, betas=own["betas"]),
        )


def product_dtype(device: torch.device) -> torch.dtype:
    """In which dtype Muon multiplies matrices: torch's in bfloat16, but a CPU without instructions for that in float32.

    Such a CPU takes some 30 times as long in bfloat16.
    """
    # A Mac's or another CPU is taken for one without.
    capable = device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.bfloat16 if capable else torch.float32


class _Muon(torch.optim.Muon):
    """torch's Muon, with products in :func:`product_dtype`."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        first = next((parameter for group in self.param_groups for parameter in group["params"]), torch.empty(0))
        with products_on(first.device):
            return super().step(closure)  # type: ignore[no-untyped-call] # torch leaves it without types


def products_on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within this block torch's Muon multiplies in :func:`product_dtype`."""
    return InFloat32() if product_dtype(device) is torch.float32 else contextlib.nullcontext()


class InFloat32(TorchFunctionMode):
    """Within a block, what torch's Muon would multiply in bfloat16 is in float32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Called in place of each function of torch."""
        if func is torch.Tensor.bfloat16:  # it gives a copy, in which Muon then writes
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))


class _Divided(NamedTuple):
    """A matrix in rows of which each rank has some, and its group."""

    group: dict[str, Any]
    parameter: DTensor
    gradient: DTensor
    momentum: DTensor

    def work(self) -> int:
        """What its products with its transpose take, in multiplications."""
        return self.parameter.numel() * min(self.parameter.shape)


def _exchanged(sent: torch.Tensor, sizes: list[int], expected: list[int], mesh: DeviceMesh) -> torch.Tensor:
    """What the ranks have for this one, by rank, as it has a part of a flat tensor for each of them."""
    found, width = sent.new_empty(sum(expected)), sent.element_size()
    torch.distributed.all_to_all_single(
        found.view(torch.uint8),  # since not every backend knows every dtype
        sent.view(torch.uint8),
        [width * size for size in expected],
        [width * size for size in sizes],
        group=mesh.get_group(),
    )
    return found


@torch.no_grad()
def to_directions(
    gradients: Sequence[torch.Tensor], states: Sequence[dict[str, Any]], momentum: float
) -> list[torch.Tensor]:
    """What Muon would subtract at a learning rate of 1 and without weight decay.

    Args:
        gradients: float, [rows, columns] each; those in float32 are overwritten, which saves their memory.
        states: Muon's state of each matrix; gets its momentum.
        momentum: Muon's.

    Returns:
        The direction for each gradient, float32.
    """
    matrices = [gradient.detach().to(torch.float32) for gradient in gradients]
    for matrix in matrices:
        matrix.grad = matrix.detach()  # the same memory
    # With such a rate and decay a step of torch's Muon leaves nothing of the matrix but the direction, negative.
    rule: torch.optim.Optimizer = _Muon(matrices, 1.0, 1.0, momentum, adjust_lr_fn=ADJUSTED)
    for matrix, state in zip(matrices, states, strict=True):
        rule.state[matrix] = state
    rule.step()
    for matrix in matrices:
        matrix.grad = None
        matrix.neg_()
    return matrices


def _groups(
    params: torch.nn.Module | Iterable[dict[str, Any]], muon_for: Mapping[str, bool] | None
) -> list[dict[str, Any]]:
    if not isinstance(params, torch.nn.Module):
        groups = list(params)
        if muon_for is not None or not all(isinstance(group, dict) for group in groups):
            raise ConfigError(
                "MuonAdamW must know which parameters are embeddings and which the head. Give it the module in place "
                'of its parameters (MuonAdamW(self), with muon_for if wanted), or groups that say it: {"params": '
                'matrices, "muon": True}, {"params": others}.'
            )
        return groups
    hidden = hidden_matrices(params, muon_for)
    split: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in params.named_parameters():
        split[hidden[name]].append(parameter)
    return [{"params": group, "muon": muon} for muon, group in split.items() if group]


def check_matrix(parameter: torch.Tensor, what: str) -> None:
    """Refuse a parameter that is no matrix.

    Raises:
        ConfigError: it has not two dimensions; the text begins with ``what``.
    """
    if parameter.ndim != 2:
        raise ConfigError(f"{what} of shape {list(parameter.shape)}, but Muon trains matrices; leave it to AdamW.")


def _embeddings(module: torch.nn.Module) -> Iterable[torch.nn.Parameter]:
    for part in module.modules():
        if isinstance(part, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
            yield from part.parameters(recurse=False)
    for name, parameter in module.named_parameters():
        if any("embed" in one.lower() for one in name.split(".")[-2:]):
            yield parameter


def _head(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    found: list[torch.nn.Parameter] = []
    for part in module.modules():
        named = getattr(part, "get_output_embeddings", None)
        head = named() if callable(named) else None
        if isinstance(head, torch.nn.Module):
            found += head.parameters()
    for name, parameter in module.named_parameters():
        outside_lists = takewhile(lambda one: not one.isdecimal(), name.split("."))
        if any(_HEAD.fullmatch(one) for one in outside_lists):
            found.append(parameter)
    linear = [part for part in module.modules() if isinstance(part, torch.nn.Linear)]
    return found or list(linear[-1].parameters() if linear else ())
