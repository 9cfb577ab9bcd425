"""The replica of a torch module that a DisTrO optimizer trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

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

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What ``torch.compile`` and torch's checkpoint wrapper put into the names of the parameters inside them."""


class ParameterReplica:
    """Published parameters of a module; implements :class:`~psyche_lightning.node.replica.Replica`.

    The digest covers the trained parameters (float32 masters if the optimizer has any) and the frozen ones. Tensors
    are read and written one at a time, so memory never holds a second copy of the model.

    Args:
        optimizer: trains some of the module's parameters, under the names of :func:`named_parameters`.
        module: the model; its persistent buffers are copied at the start of an epoch.

    Raises:
        ConfigError: a snapshot cannot hold the dtype of a parameter or buffer.
    """

    def __init__(self, optimizer: DisTrO, module: torch.nn.Module) -> None:
        self.layout = optimizer.layout_digest
        self.groups = len(optimizer.param_groups)
        self._optimizer = optimizer
        trained = {entry.name for entry in optimizer.layout.entries}
        self._frozen = {name: value for name, value in named_parameters(module).items() if name not in trained}
        self._frozen_entries: list[TensorEntry] | None = None
        self._module = module
        self.has_buffers = bool(persistent_buffers(module))
        published = dict(self._optimizer.published())
        self.tensors = tuple(sorted(published))
        self.size = sum(t.numel() * t.element_size() for t in (*published.values(), *self._frozen.values()))
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
        self._optimizer.apply(payloads, lrs, step)

    def digest(self, put: Put, open_ids: OpenIds = ()) -> bytes:
        """Digest of the parameters and the open ids that go with them; stores the index blob but no tensors."""
        return put(encode_index(self._entries(None), open_ids))

    def snapshot(self, put: Put, open_ids: OpenIds = ()) -> bytes:
        """Store all parameters as blobs and return their digest."""
        return put(encode_index(self._entries(put), open_ids))

    def prints(self) -> bytes:
        """The sum of each trained parameter's bits as little-endian int64, modulo 2^64; reads the memory once."""
        sums = [_print(tensor.detach()).cpu() for _, tensor in sorted(self._optimizer.published())]
        return torch.stack(sums).numpy().astype("<i8").tobytes() if sums else b""

    def check_index(self, index: Index, *, buffers: bool) -> None:
        """Refuse an index of other parameters, or buffers, than this model's; called from other threads.

        Raises:
            WireError: names, shapes or dtypes are not this model's.
        """
        if buffers:
            _matching("buffer", index.tensors, persistent_buffers(self._module))
        else:
            _matching("parameter", index.tensors, {**dict(self._optimizer.published()), **self._frozen})

    def load(self, digest: bytes, get: Get) -> None:
        """Replace the parameters by those of that digest.

        Raises:
            WireError: names, shapes or dtypes are not this model's, or a value is not finite.
        """
        trained = dict(self._optimizer.published())
        entries = _matching("parameter", decode_index(get(digest)).tensors, {**trained, **self._frozen})
        for entry in entries:  # all of them, before any is replaced
            tensor = _read(entry, get)
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise WireError(f"the parameter {entry.name!r} of the snapshot has values that are not finite")
        for entry in entries:
            tensor = _read(entry, get)
            if entry.name in trained:
                self._optimizer.load_published(entry.name, tensor)
            else:
                with torch.no_grad():
                    self._frozen[entry.name].copy_(tensor)
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
        entries = _matching("buffer", decode_index(get(index)).tensors, buffers)
        read = {entry.name: _read(entry, get) for entry in entries}
        for name, tensor in read.items():
            if tensor.is_floating_point() and torch.isnan(tensor).any():
                raise WireError(f"the buffer {name!r} has values that are no numbers")
        for name, tensor in read.items():
            with torch.no_grad():
                buffers[name].copy_(tensor)

    def _entries(self, put: Put | None) -> list[TensorEntry]:
        if self._frozen_entries is None or put is not None:
            self._frozen_entries = list(describe_tensors(self._frozen.items(), put))
        return [*describe_tensors(self._optimizer.published(), put), *self._frozen_entries]


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
        yield entry_of(name, _dtype_name(tensor), tuple(tensor.shape), _bytes(plain), put)


def _matching(what: str, entries: Sequence[TensorEntry], ours: Mapping[str, torch.Tensor]) -> Sequence[TensorEntry]:
    """The entries, if they match our tensors.

    Raises:
        WireError: a name is missing or unknown, or a shape or dtype differs.
    """
    theirs = {entry.name for entry in entries}
    for complaint, names in (("lacks", ours.keys() - theirs), ("has unknown", theirs - ours.keys())):
        if names:
            shown = ", ".join(sorted(names)[:5])
            raise WireError(f"the snapshot {complaint} {len(names)} {what}s of this model, such as {shown}")
    for entry in entries:
        tensor = ours[entry.name]
        mine = (_dtype_name(tensor), tuple(tensor.shape))
        if (entry.dtype, entry.shape) != mine:
            raise WireError(
                f"the {what} {entry.name!r} of the snapshot is {entry.dtype} {list(entry.shape)}; this model has "
                f"{mine[0]} {list(mine[1])}"
            )
    return entries


def _print(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's words (int64); any single change alters it."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    if flat.numel() % 8 == flat.storage_offset() % 8 == 0:
        return flat.view(torch.int64).sum()
    return (flat if flat.numel() % 4 or flat.storage_offset() % 4 else flat.view(torch.int32)).sum(dtype=torch.int64)


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
