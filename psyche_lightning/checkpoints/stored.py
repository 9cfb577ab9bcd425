"""Has ``transformers`` load models whose large tensors stay in their files until somebody wants them, or a part."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_AT_ONCE = "HF_DEACTIVATE_ASYNC_LOAD"
"""Has ``transformers`` load on the thread that asks."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file of safetensors.

    Attributes:
        path: the file.
        name: the tensor's name there.
        shape: its shape.
        dtype: its dtype.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __call__(self) -> torch.Tensor:
        """Read it as a whole."""
        return self.part(0, math.prod(self.shape)).view(self.shape)

    def part(self, start: int, stop: int) -> torch.Tensor:
        """Read the elements of an interval, as a flat tensor, and no rows besides."""
        if start == stop:
            return torch.empty(0, dtype=self.dtype)
        row = math.prod(self.shape[1:])
        first = start // row
        with safe_open(self.path, "pt") as file:
            rows: torch.Tensor = file.get_slice(self.name)[first : -(-stop // row)]
        return rows.reshape(-1)[start - first * row : stop - first * row]


@contextlib.contextmanager
def read_later(promise: Callable[[Stored], torch.Tensor], least: int) -> Iterator[None]:
    """A context in which ``transformers`` gets other tensors in place of large ones when it reads safetensors files.

    Args:
        promise: gives a tensor on the meta device for a stored one.
        least: tensors of fewer elements are read as always.
    """
    from transformers import modeling_utils

    class Opened:
        """A file of which large tensors are not read."""

        def __init__(self, path: str, *arguments: Any, **options: Any) -> None:
            self._path = str(path)
            self._file: Any = safe_open(path, *arguments, **options)  # it has no annotations

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> Any:
            return self._file.__enter__()

        def __exit__(self, *error: object) -> None:
            self._file.__exit__(*error)

        def get_slice(self, name: str) -> Any:
            found = self._file.get_slice(name)
            shape, dtype = tuple(found.get_shape()), _DTYPES.get(found.get_dtype())
            if dtype is None or math.prod(shape) < least:
                return found
            return promise(Stored(self._path, name, shape, dtype))

    theirs, before = getattr(modeling_utils, "safe_open", None), os.environ.get(_AT_ONCE)
    if theirs is not safe_open:  # this version reads in another way: it reads at once
        yield
        return
    modeling_utils.safe_open = Opened  # type: ignore[assignment,attr-defined]  # their module's own name for it
    os.environ[_AT_ONCE] = "1"  # another thread would not be in our contexts
    try:
        yield
    finally:
        modeling_utils.safe_open = theirs  # type: ignore[attr-defined]
        if before is None:
            del os.environ[_AT_ONCE]
        else:
            os.environ[_AT_ONCE] = before
