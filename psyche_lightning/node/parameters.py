"""The replica of a torch module that a DisTrO optimizer trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import torch

from psyche_lightning.distro import DisTrO
from psyche_lightning.errors import ConfigError, WireError
from psyche_lightning.node.snapshot import (
    DTYPE_SIZES,
    PIECE_SIZE,
    Get,
    Index,
    Put,
    TensorEntry,
    decode_index,
    encode_index,
    entry_of,
)
from psyche_lightning.protocol.open_ids import OpenIds

if TYPE_CHECKING:
    from psyche_lightning.distro import ShardedDisTrO

Form = tuple[str, tuple[int, ...]]
"""The name of a tensor's dtype, and its shape."""
Found = TypeVar("Found")

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What ``torch.compile`` and torch's checkpoint wrapper put into the names of the parameters inside them."""


class ParameterReplica:
    """Published parameters of a module; implements :class:`~psyche_lightning.node.replica.Replica`.

    The digest covers the trained parameters (float32 masters if the optimizer has any) and the frozen ones. Tensors
    are read and written one at a time, so memory never holds a second copy of the model.

    If the optimizer is that of several ranks, each rank has a replica, and all call the same methods in the same order,
    but for ``check``, ``check_index`` and ``payload_size``. Blobs are stored and read on rank 0, which alone has
    results that mean something; the ``put`` of the others gets an empty index.

    Args:
        optimizer: trains some of the module's parameters, under the names of :func:`named_parameters`.
        module: the model; its persistent buffers are copied at the start of an epoch.

    Raises:
        ConfigError: a snapshot cannot hold the dtype of a parameter or buffer.
    """

    def __init__(self, optimizer: DisTrO | ShardedDisTrO, module: torch.nn.Module) -> None:
        self.layout = optimizer.layout_digest
        self.groups = len(optimizer.param_groups)
        self._optimizer = optimizer
        self._ranks = self.ranks = optimizer.ranks
        self._module = module
        self._reshard()
        self._trained = {entry.name: ("float32", entry.shape) for entry in optimizer.layout.entries}
        self._frozen = {name: value for name, value in named_parameters(module).items() if name not in self._trained}
        self._frozen_entries: list[TensorEntry] | None = None
        self.has_buffers = bool(persistent_buffers(module))
        self.tensors = tuple(sorted(self._trained))
        self.size = sum(DTYPE_SIZES["float32"] * math.prod(shape) for _, shape in self._trained.values())
        self.size += sum(t.numel() * t.element_size() for t in self._frozen.values())
        for name, tensor in {**self._frozen, **persistent_buffers(module)}.items():
            if _dtype_name(tensor) not in DTYPE_SIZES:
                raise ConfigError(
                    f"{name!r} is {tensor.dtype}, which cannot be sent to other nodes; use one of "
                    f"{', '.join(DTYPE_SIZES)}"
                )

    def payload_size(self, step: int) -> int:
        """The size of every payload of a step of the run, in bytes."""
        return self._optimizer.payload_size(step)

    def check(self, payload: bytes, step: int) -> None:
        """Refuse a malformed payload; called from other threads.

        Raises:
            PayloadError: it is not canonical or does not fit the layout and the step.
        """
        self._optimizer.check(payload, step)

    def apply(self, payloads: Sequence[bytes], lrs: tuple[int, ...], step: int) -> None:
        """Apply an agreed set of payloads of a step."""
        self._reshard()
        self._optimizer.apply(payloads, lrs, step)

    def digest(self, put: Put, open_ids: OpenIds = ()) -> bytes:
        """Digest of the parameters and the open ids that go with them; stores the index blob but no tensors."""
        return put(encode_index(self._entries(None), open_ids))

    def snapshot(self, put: Put, open_ids: OpenIds = ()) -> bytes:
        """Store all parameters as blobs and return their digest."""
        return put(encode_index(self._entries(put), open_ids))

    def prints(self) -> bytes:
        """The sum of each trained parameter's bits as little-endian int64, modulo 2^64; reads the memory once."""
        self._reshard()
        return self._optimizer.prints().numpy().astype("<i8").tobytes()

    def check_index(self, index: Index, *, buffers: bool) -> None:
        """Refuse an index of other parameters, or buffers, than this model's; called from other threads.

        Raises:
            WireError: names, shapes or dtypes are not this model's.
        """
        if buffers:
            _matching("buffer", index.tensors, _forms(persistent_buffers(self._module)))
        else:
            _matching("parameter", index.tensors, self._forms)

    def load(self, digest: bytes, get: Get) -> None:
        """Replace the parameters by those of that digest.

        Raises:
            WireError: names, shapes or dtypes are not this model's, or a value is not finite.
        """

        def entries() -> dict[str, TensorEntry]:
            found = _matching("parameter", decode_index(get(digest)).tensors, self._forms)
            for entry in found:  # all of them, before any is replaced
                tensor = _read(entry, get)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise WireError(f"the parameter {entry.name!r} of the snapshot has values that are not finite")
            return {entry.name: entry for entry in found}

        self._reshard()
        found = self._on_first(entries)
        for name in sorted(self._forms, key=str.encode):
            tensor = None if found is None else _read(found[name], get)
            if name in self._trained:
                self._optimizer.load_published(name, cast(torch.Tensor, tensor))  # None only where that is expected
            else:
                self._fill(self._frozen[name], tensor)
        self._frozen_entries = None

    def snapshot_buffers(self, put: Put) -> bytes:
        """Store the buffers as blobs and return the hash of their index."""
        return put(encode_index(describe_tensors(persistent_buffers(self._module).items(), put)))

    def load_buffers(self, index: bytes, get: Get) -> None:
        """Replace the buffers by those of that index.

        Raises:
            WireError: names, shapes or dtypes are not this model's, or a value is no number; a mask may be infinite.
        """
        buffers = persistent_buffers(self._module)

        def values() -> dict[str, torch.Tensor]:
            entries = _matching("buffer", decode_index(get(index)).tensors, _forms(buffers))
            read = {entry.name: _read(entry, get) for entry in entries}
            for name, tensor in read.items():
                if tensor.is_floating_point() and torch.isnan(tensor).any():
                    raise WireError(f"the buffer {name!r} has values that are no numbers")
            return read

        read = self._on_first(values)
        for name in sorted(buffers):
            self._fill(buffers[name], None if read is None else read[name])

    @property
    def _forms(self) -> dict[str, Form]:
        """Dtypes and shapes of all parameters."""
        return {**self._trained, **_forms(self._frozen)}

    def _entries(self, put: Put | None) -> list[TensorEntry]:
        self._reshard()
        if self._frozen_entries is None or put is not None:
            self._frozen_entries = list(describe_tensors(self._whole_frozen(), put))
        return [*describe_tensors(self._optimizer.published(), put), *self._frozen_entries]

    def _whole_frozen(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The frozen parameters, of several ranks on the first."""
        for name, tensor in self._frozen.items():
            whole = tensor if self._ranks is None else self._ranks.whole(tensor)
            if whole is not None:
                yield name, whole

    def _fill(self, tensor: torch.Tensor, value: torch.Tensor | None) -> None:
        """Replace a tensor's values, which the first of several ranks has."""
        if self._ranks is not None:
            self._ranks.spread(value, tensor)
        elif value is not None:
            with torch.no_grad():
                tensor.copy_(value)

    def _on_first(self, read: Callable[[], Found]) -> Found | None:
        """What ``read`` gives on the first of several ranks; None on the others, which fail if it does.

        Raises:
            WireError: it failed on the first rank.
        """
        if self._ranks is None:
            return read()
        found, error = None, None
        if self._ranks.rank == 0:
            try:
                found = read()
            except Exception as caught:
                error = caught
        problem = self._ranks.agree(None if error is None else str(error))
        if error is not None:
            raise error
        if problem is not None:
            raise WireError(problem)
        return found

    def _reshard(self) -> None:
        """Have no parameter gathered from its shards: FSDP keeps some so, and would go on with their old values."""
        if self._ranks is not None:
            self._ranks.reshard(self._module)


def named_parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a module by the names that all nodes use, whether or not a node compiles parts of it."""
    return {plain_name(name): parameter for name, parameter in module.named_parameters()}


def persistent_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a module's ``state_dict`` has, by the names that all nodes use."""
    saved = module.state_dict().keys()
    found: dict[str, torch.Tensor] = {}
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(prefix, recurse=False):
            if name in saved:
                found[plain_name(name)] = buffer
    return found


def plain_name(name: str) -> str:
    """The name of a parameter or buffer without the marks of wrappers that change nothing but how it is computed."""
    for mark in WRAPPERS:
        name = name.replace(mark, "")
    return name


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def describe_tensors(tensors: Iterable[tuple[str, torch.Tensor]], put: Put | None = None) -> Iterator[TensorEntry]:
    """The index entries of named tensors, one after the other."""
    for name, tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        entry = entry_of(name, _dtype_name(tensor), tuple(tensor.shape), _bytes(plain), put)
        del plain, tensor  # before there is another copy
        yield entry


def _forms(tensors: Mapping[str, torch.Tensor]) -> dict[str, Form]:
    return {name: (_dtype_name(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}


def _matching(what: str, entries: Sequence[TensorEntry], ours: Mapping[str, Form]) -> Sequence[TensorEntry]:
    """The entries, if they match our tensors' dtypes and shapes.

    Raises:
        WireError: a name is missing or unknown, or a shape or dtype differs.
    """
    theirs = {entry.name for entry in entries}
    for complaint, names in (("lacks", ours.keys() - theirs), ("has unknown", theirs - ours.keys())):
        if names:
            shown = ", ".join(sorted(names)[:5])
            raise WireError(f"the snapshot {complaint} {len(names)} {what}s of this model, such as {shown}")
    for entry in entries:
        mine = ours[entry.name]
        if (entry.dtype, entry.shape) != mine:
            raise WireError(
                f"the {what} {entry.name!r} of the snapshot is {entry.dtype} {list(entry.shape)}; this model has "
                f"{mine[0]} {list(mine[1])}"
            )
    return entries


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read(entry: TensorEntry, get: Get) -> torch.Tensor:
    """A tensor of an index on the CPU.

    Raises:
        WireError: its pieces do not have the sizes in the index.
    """
    tensor = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
    view = _bytes(tensor)
    done = 0
    for piece in entry.pieces:
        data = get(piece)
        expected = min(PIECE_SIZE, entry.size - done)
        if len(data) != expected:
            raise WireError(f"a piece of {entry.name!r} has {len(data)} bytes; {expected} are expected")
        view[done : done + len(data)] = data
        done += len(data)
    return tensor
