"""Copies a model's parameters at one metadata, and saves the copy in Hugging Face format."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path
from typing import Any

import torch

from psyche_lightning.node.parameters import describe_tensors
from psyche_lightning.node.snapshot import encode_index
from psyche_lightning.wire.canonical import sha256


class ModelCopy:
    """A copy of a model's state in main memory, made at once; the model may change afterwards.

    Args:
        model: has ``save_pretrained``. If that takes no ``state_dict``, the model cannot be copied (:attr:`copied` is
            false), and the caller writes it at once.
        prefix: comes before the names of its parameters in the run's digest.
    """

    def __init__(self, model: torch.nn.Module, prefix: str = "") -> None:
        self._model: Any = model
        save_pretrained: Any = model.save_pretrained
        takes = inspect.signature(save_pretrained).parameters
        self.copied = "state_dict" in takes
        self._named = dict(model.named_parameters())
        self._prefix = prefix
        self._state: dict[str, Any] | None = None
        if self.copied:
            clones: dict[tuple[Any, ...], torch.Tensor] = {}  # tied parameters stay tied
            self._state = {name: _cloned(value, clones) for name, value in model.state_dict().items()}
            self._named = {name: _cloned(value, clones) for name, value in self._named.items()}

    def digest(self) -> bytes:
        """Digest of the parameters, computed like a run's (:mod:`psyche_lightning.node.snapshot`)."""
        named = sorted(((self._prefix + name, value) for name, value in self._named.items()), key=_order)
        return sha256(encode_index(describe_tensors(named)))

    def save(self, folder: Path) -> None:
        """Write the copy in Hugging Face format.

        Raises:
            OSError: there is no space.
        """
        options = {} if self._state is None else {"state_dict": dict(self._state)}
        self._model.save_pretrained(folder, **options)


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The files that a tokenizer's ``save_pretrained`` writes, by name; none for None."""
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def _order(item: tuple[str, torch.Tensor]) -> bytes:
    return item[0].encode()


def _cloned(value: Any, clones: dict[tuple[Any, ...], torch.Tensor]) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), str(value.device))
    if key not in clones:
        clones[key] = value.to("cpu", copy=True)
    return clones[key]
