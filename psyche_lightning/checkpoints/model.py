"""Copies a model's parameters at one metadata, and saves the copy in Hugging Face format."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.distributed.tensor import DTensor

from psyche_lightning.checkpoints.dtypes import dtypes, tensors
from psyche_lightning.distro.shards import Ranks
from psyche_lightning.node.parameters import describe_tensors, named_parameters
from psyche_lightning.node.snapshot import encode_index
from psyche_lightning.wire.canonical import sha256

_Place: TypeAlias = tuple[Any, ...]
"""Tells tensors apart; equal for two that share their memory in the same way."""


class ModelCopy:
    """A copy of a model's state in main memory, made at once; the model may change afterwards.

    Args:
        model: has ``save_pretrained``. If that takes no ``state_dict``, the model cannot be copied (:attr:`copied` is
            false), and the caller writes it at once.
        prefix: comes before the names of its parameters in the run's digest.
        dtype: dtype to save it in, as :func:`~psyche_lightning.checkpoints.dtypes.dtypes` understands it; None for that
            of its parameters. A model that cannot be copied is written in that of its parameters.
        ranks: the ranks of which each has a part of the model; all of them make a copy at once, and only that of rank 0
            has something in it. None for a model that is whole.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        prefix: str = "",
        dtype: torch.dtype | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if ranks is not None:
            ranks.reshard(model)  # before anything looks at what is gathered for a while
        self._model: Any = model
        save_pretrained: Any = model.save_pretrained
        takes = inspect.signature(save_pretrained).parameters
        self.copied = "state_dict" in takes
        self._named = named_parameters(model)
        self._prefix = prefix
        self._state: dict[str, Any] | None = None
        self._dtype = dtype if self.copied else None
        if self.copied:
            wanted = {} if dtype is None else dtypes(model, dtype)
            # By place, so that tied parameters stay tied.
            to = {_place(value): wanted[name] for name, value in tensors(model) if name in wanted}
            clones: dict[_Place, torch.Tensor | None] = {}
            self._state = {name: _cloned(value, to, clones, ranks) for name, value in model.state_dict().items()}
            named = {name: _cloned(value, to, clones, ranks) for name, value in self._named.items()}
            self._named = {name: value for name, value in named.items() if value is not None}

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
        if self._dtype is not None:
            _say_dtype(folder / "config.json", self._dtype)


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The files that a tokenizer's ``save_pretrained`` writes, by name; none for None."""
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def _order(item: tuple[str, torch.Tensor]) -> bytes:
    return item[0].encode()


def _place(value: torch.Tensor) -> _Place:
    # FSDP gives each parameter a storage of its own, with some room even where this rank has no element of it.
    local = value.to_local().untyped_storage() if isinstance(value, DTensor) else value
    return local.data_ptr(), value.dtype, tuple(value.shape), value.stride(), str(value.device)


def _cloned(
    value: Any, to: Mapping[_Place, torch.dtype], clones: dict[_Place, torch.Tensor | None], ranks: Ranks | None
) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    place = _place(value)
    if place not in clones:
        whole = value if ranks is None else ranks.whole(value)
        clones[place] = None if whole is None else whole.to("cpu", to.get(place, value.dtype), copy=True)
    return clones[place]


def _say_dtype(path: Path, dtype: torch.dtype) -> None:
    """Write the saved dtype into ``config.json``; ``save_pretrained`` writes that of the model in memory."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
