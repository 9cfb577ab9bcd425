"""Protects this package's arithmetic from the precision settings of the program around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(*devices: torch.device) -> Iterator[None]:
    """Run a block with IEEE float32 matrix products on devices: no autocast, no TF32, no bfloat16, no gradients.

    ``set_float32_matmul_precision`` alone does not undo what the newer ``torch.backends.*.fp32_precision`` settings
    hold, so those are saved and put back as well. The settings are the process's; they are back when the block ends.
    """
    candidates: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    backends = [backend for backend in candidates if hasattr(backend, "fp32_precision")]
    saved = [backend.fp32_precision for backend in backends]
    try:
        legacy: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to name it when only the newer settings were used
        legacy = None
    torch.set_float32_matmul_precision("highest")
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for kind in {device.type for device in devices}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for backend, value in zip(backends, saved, strict=True):
            backend.fp32_precision = value
