"""Shields this package's arithmetic from the precision settings of the surrounding program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch

PLAIN = ("none", "ieee")
"""Settings of a backend's matrix products with which these are those of IEEE float32: its own, or torch's default."""


@cache
def _backends() -> tuple[Any, ...]:
    candidates: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return tuple(backend for backend in candidates if hasattr(backend, "fp32_precision"))


@contextmanager
def full_precision(*devices: torch.device) -> Iterator[None]:
    """Run a block with IEEE float32 matrix products: no autocast, no TF32, no bfloat16, no gradients.

    ``set_float32_matmul_precision`` alone does not override the newer ``torch.backends.*.fp32_precision`` settings, so
    these are saved and restored as well. The settings belong to the whole process; the end of the block restores them.
    """
    backends = _backends()
    saved = [backend.fp32_precision for backend in backends]
    try:
        legacy: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to say it if only the newer settings were used
        legacy = None
    kinds = {device.type for device in devices}
    if (
        legacy == "highest"
        and all(value in PLAIN for value in saved)
        and not any(map(torch.is_autocast_enabled, kinds))
    ):
        with torch.no_grad():  # nothing to shield from, as in most programs; small models notice the rest
            yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for backend, value in zip(backends, saved, strict=True):
            backend.fp32_precision = value
