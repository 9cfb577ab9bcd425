"""The private names of torch that this room uses. All were checked with torch 2.13; tests use every one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch._compile import _disable_dynamo

# torch has no public name for one kernel over many tensors, which is several times as quick as one for each. Its own
# optimizers use these.


def add_to_each(ours: list[torch.Tensor], theirs: list[torch.Tensor], factor: float) -> None:
    """``ours += factor * theirs``, tensor by tensor, in place."""
    torch._foreach_add_(ours, theirs, alpha=factor)


def subtract_from_each(ours: list[torch.Tensor], theirs: list[torch.Tensor], factor: float) -> None:
    """``ours -= factor * theirs``, tensor by tensor, in place."""
    torch._foreach_sub_(ours, theirs, alpha=factor)


def multiply_each(ours: list[torch.Tensor], factor: float) -> None:
    """``ours *= factor``, tensor by tensor, in place."""
    torch._foreach_mul_(ours, factor)


def clear_each(ours: list[torch.Tensor]) -> None:
    """Zeros in each tensor, in place."""
    torch._foreach_zero_(ours)


untraced = _disable_dynamo
"""Keeps a function out of what ``torch.compile`` traces, and so out of fused kernels, which round otherwise.

The public decorator imports the compiler at once; this one does when the function is called."""


CAST = torch.ops.aten._to_copy
"""The operation that copies a tensor in another dtype or to another device, as dispatch modes see it."""


def written_to(operation: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> list[Any]:
    """Those of the arguments of an operation of ``torch.ops`` that it writes to."""
    known = operation._schema.arguments
    named = dict(zip((one.name for one in known), arguments, strict=False)) | dict(options)
    return [named.get(one.name) for one in known if one.is_write]


def norms_of_each(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The L2 norm of each tensor, computed and given in this dtype."""
    return list(torch._foreach_norm(tensors, 2, dtype=dtype))


def note_step(optimizer: torch.optim.Optimizer) -> None:
    """Say that the optimizer made a step: torch's schedulers look at this mark, and warn where it is missing."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def quick_product(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``matrix @ right`` of float32 on the CPU, by oneDNN; only if :func:`has_quick_product`."""
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(matrix, right.T, None, "none", [], "")
    return found


@cache
def has_quick_product() -> bool:
    """Whether :func:`quick_product` exists here and is exact where float32 is.

    ``torch.mm`` of float32 is MKL's, which on some processors has half the speed of oneDNN.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        left = torch.randint(-(2**11), 2**11, (96, 64), generator=generator).to(torch.float32)
        right = torch.randint(-63, 64, (64, 64), generator=generator).to(torch.float32)
        wanted = left.to(torch.float64) @ right.to(torch.float64)
        try:
            exact = [
                torch.equal(quick_product(left, side).to(torch.float64), wanted)
                for side in (right, right.T.contiguous().T)
            ]
        except (AttributeError, RuntimeError):  # torch was built without it, or this processor has it not
            return False
    return all(exact)
