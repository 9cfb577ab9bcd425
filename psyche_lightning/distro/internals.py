"""The private names of torch that this room uses. All were checked with torch 2.13; tests use every one."""

from __future__ import annotations

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


def norms_of_each(tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The L2 norm of each tensor, computed and given in this dtype."""
    return list(torch._foreach_norm(tensors, 2, dtype=dtype))


def note_step(optimizer: torch.optim.Optimizer) -> None:
    """Say that the optimizer made a step: torch's schedulers look at this mark, and warn where it is missing."""
    optimizer._opt_called = True  # type: ignore[attr-defined]
