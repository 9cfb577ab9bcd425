"""The dtype of every tensor of a model, as ``transformers`` chooses it when it loads a checkpoint."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from psyche_lightning.checkpoints.building import BUILDING


def cast(
    model: torch.nn.Module, dtype: torch.dtype, values: Mapping[str, Callable[[], torch.Tensor]] | None = None
) -> torch.nn.Module:
    """Cast a model in place, so that it computes like a checkpoint of it that ``transformers`` loads in ``dtype``.

    ``Module.to`` would also round what a model computes with in float32: the rotary frequencies of most models, routers
    of experts, decay rates.

    Args:
        model: has float32 parameters; may be on the meta device.
        dtype: see :func:`dtypes`.
        values: what gives the values of tensors on the meta device that shall have some, by name. They are made one
            after the other, so there is never more than one of them that is not cast yet.

    Returns:
        The same model.
    """
    wanted = dtypes(model, dtype)
    for name, tensor in list(tensors(model)):
        to = wanted.get(name, tensor.dtype)
        if values is not None and name in values:
            fill(tensor, values[name]().to(to))
        elif tensor.dtype != to:
            tensor.data = tensor.data.to(to)
    if _from_transformers(model):
        _note(model.config, dtype)
    return model


def fill(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Give a tensor on the meta device a value; it stays the same object, so tied ones stay tied."""
    fresh = value
    if isinstance(tensor, torch.nn.Parameter):
        fresh = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
    vars(fresh).update(vars(tensor))  # such as the marks of transformers on what is initialized
    torch.utils.swap_tensors(tensor, fresh)  # type: ignore[no-untyped-call]  # torch has no annotations for it


def dtypes(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of each floating-point tensor in a copy of a model that is said to be in ``dtype``, by name.

    For a model of ``transformers`` that is what ``from_pretrained(..., dtype=dtype)`` makes: some of its parameters and
    most of its buffers stay in float32. For another model it is ``dtype`` for all parameters; buffers stay as they are.
    """
    if dtype == torch.float32 or not _from_transformers(model):
        return {name: dtype for name, value in model.named_parameters() if value.is_floating_point()}
    kept = _kept_in_float32(model)
    found = {}
    for name, tensor in tensors(_outline(model, dtype)):
        if tensor.is_floating_point():
            found[name] = torch.float32 if kept is not None and kept.search(name) else tensor.dtype
    return found


def _from_transformers(model: torch.nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def _outline(model: Any, dtype: torch.dtype) -> torch.nn.Module:
    """The model on the meta device as ``from_pretrained`` begins with it: made under the default dtype ``dtype``."""
    config = copy.deepcopy(model.config)
    _note(config, dtype)  # some modules look there
    with BUILDING:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                outline: torch.nn.Module = type(model)(config)
        finally:
            torch.set_default_dtype(before)
    return outline


def _note(config: Any, dtype: torch.dtype) -> None:
    """Write the dtype into a model's configuration and those of its parts."""
    config.dtype = dtype
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            part.dtype = dtype


def _kept_in_float32(model: torch.nn.Module) -> re.Pattern[str] | None:
    """Matches the names of parameters that a model of ``transformers`` keeps in float32; None for no names.

    ``_keep_in_fp32_modules`` is another list, and only for float16.
    """
    globs = getattr(model, "_keep_in_fp32_modules_strict", None)
    return re.compile("|".join(glob.replace("*", ".*") for glob in sorted(globs))) if globs else None


def tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and buffers of a model by name; tied ones once."""
    yield from model.named_parameters()
    yield from model.named_buffers()
