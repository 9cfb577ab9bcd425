"""Builds a model whose large tensors stay on the meta device, and gives their values later, one after the other.

A model in float32 may be too large for a process that could hold it in bfloat16, or a part of it. So what its code
writes into new tensors is noted instead of done. The notes are carried out for one tensor at a time, with exactly the
values that it would have had: random numbers come from the generator's state at that point.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode  # documented, and without a public place
from torch.utils._pytree import tree_leaves, tree_map_only

from psyche_lightning.checkpoints.building import BUILDING
from psyche_lightning.checkpoints.dtypes import cast, tensors
from psyche_lightning.checkpoints.pretrained import kept_in
from psyche_lightning.checkpoints.stored import Stored, read_later
from psyche_lightning.distro.internals import CAST, written_to
from psyche_lightning.errors import CheckpointError
from psyche_lightning.system import FILLING, return_memory

logger = logging.getLogger(__name__)

LEAST = 1 << 16
"""Tensors of fewer elements are built at once."""

_EMPTY = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty}
_REPLACING = {
    torch.ops.aten.copy_,
    torch.ops.aten.fill_,
    torch.ops.aten.normal_,
    torch.ops.aten.uniform_,
    torch.ops.aten.zero_,
}
"""Operations after which nothing is left of what a tensor held."""
_COPYING = {CAST, torch.ops.aten.cat, torch.ops.aten.clone, torch.ops.aten.stack}
"""What loading does with tensors of files, such as to put experts together."""


def built(make: Callable[[], torch.nn.Module], dtype: torch.dtype) -> torch.nn.Module:
    """A model in the dtype of training, of which at most one tensor at a time was in float32.

    It is equal to the bit to what ``make`` gives, cast to ``dtype``.

    Args:
        make: builds the model; see :class:`~psyche_lightning.hookspecs.ModelFactory`.
        dtype: see :func:`~psyche_lightning.checkpoints.dtypes.cast`.

    Raises:
        PsycheError: ``make`` does.
    """
    with BUILDING:
        model, values = _followed(make, dtype)
        return cast(model, dtype, values)


def outlined(make: Callable[[], torch.nn.Module], dtype: torch.dtype) -> tuple[torch.nn.Module, Values]:
    """A model in the dtype of training with its large tensors on the meta device, and what gives their values.

    Those of a checkpoint that ``transformers`` loads stay in its files. A model whose code cannot be followed has them.
    """
    return_memory(FILLING)  # tensors come and go: in pieces, those that are gone would take more than the model
    with BUILDING:
        model, values = _followed(make, dtype, stored=True)
        return cast(model, dtype), values


def _followed(
    make: Callable[[], torch.nn.Module], dtype: torch.dtype, *, stored: bool = False
) -> tuple[torch.nn.Module, Values]:
    state = torch.get_rng_state()
    try:
        with contextlib.ExitStack() as within:
            within.enter_context(kept_in(dtype))
            deferred = within.enter_context(Deferred())
            if stored:
                within.enter_context(read_later(deferred.promised, deferred.least))
            model = make()
        return model, deferred.values(model)
    except CheckpointError:
        raise
    except Exception as error:  # models do different things with new tensors
        torch.set_rng_state(state)
        with kept_in(dtype):
            model = make()  # if it was not for these, it fails again
        reason = error.__cause__ or error
        logger.info(
            "%s is built in float32 as a whole, as its code cannot be followed: %s", type(model).__name__, reason
        )
        return model, {}


class NotFollowedError(Exception):
    """A model's code does with a new tensor what cannot be noted."""


@dataclass(frozen=True)
class _Write:
    """One operation in place.

    Attributes:
        operation: the operation.
        place: size, stride and offset of the tensor in its memory.
        arguments: those after the tensor.
        options: its keywords.
        state: that of the generator before it; None if it draws no random numbers.
    """

    operation: Callable[..., Any]
    place: tuple[Any, ...]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    state: torch.Tensor | None

    def do(self, memory: torch.Tensor) -> None:
        target = memory.as_strided(*self.place)
        if self.state is None:
            self.operation(target, *self.arguments, **self.options)
            return
        generator = self.options.get("generator") or torch.default_generator
        now = generator.get_state()
        generator.set_state(self.state)
        try:
            self.operation(target, *self.arguments, **self.options)
        finally:
            generator.set_state(now)


@dataclass
class _Memory:
    """What shall be in the memory of a tensor, and of its views.

    Attributes:
        elements: their number.
        dtype: their dtype.
        writes: what is written, one after the other.
        begins: gives what is there before, contiguous; None if that does not matter.
        part: the same for an interval alone; None if that is no less work.
    """

    elements: int
    dtype: torch.dtype
    writes: list[_Write] = field(default_factory=list)
    begins: Callable[[], torch.Tensor] | None = None
    part: Callable[[int, int], torch.Tensor] | None = None

    def value(self, place: tuple[Any, ...]) -> torch.Tensor:
        memory = torch.empty(self.elements, dtype=self.dtype) if self.begins is None else self.begins().reshape(-1)
        for write in self.writes:
            write.do(memory)
        return memory.as_strided(*place)


@dataclass(frozen=True)
class Value:
    """A tensor of a model that has no memory yet."""

    _memory: _Memory
    _place: tuple[Any, ...]

    def __call__(self) -> torch.Tensor:
        """Makes it on the CPU as it was built, each time anew."""
        return self._memory.value(self._place)

    @property
    def part(self) -> Callable[[int, int], torch.Tensor] | None:
        """Makes the elements of an interval alone, flat; None if that is no less work."""
        size, stride, _ = self._place
        outline = torch.empty_strided(size, stride, device="meta")
        whole = outline.is_contiguous() and outline.numel() == self._memory.elements
        return self._memory.part if whole and not self._memory.writes else None


Values: TypeAlias = Mapping[str, Value]
"""What gives tensors, by name."""


class Deferred(TorchDispatchMode):
    """A context in which new floating-point tensors on the CPU, such as a layer's weights, get no memory yet.

    They are on the meta device. Writing to them advances the generator as usual. Code that reads such a tensor gets its
    value, so everything else in a model, such as rotary frequencies, is as it always is.

    Args:
        least: tensors of fewer elements are built at once; None for :data:`LEAST`.

    Attributes:
        least: as given.
    """

    def __init__(self, least: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotations for these
        self.least = LEAST if least is None else least
        self._looks = _Looks(self._memory)
        self._memories: weakref.WeakKeyDictionary[torch.UntypedStorage, _Memory] = weakref.WeakKeyDictionary()

    def __enter__(self) -> Deferred:
        self._looks.__enter__()  # type: ignore[no-untyped-call]  # torch has no annotations for these
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._looks.__exit__(*error)  # type: ignore[no-untyped-call]

    def promised(self, stored: Stored) -> torch.Tensor:
        """A tensor without memory for one in a file; copies of it get none, either."""
        outline = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        self._memories[outline.untyped_storage()] = _Memory(
            outline.numel(), outline.dtype, begins=stored, part=stored.part
        )
        return outline

    def values(self, model: torch.nn.Module) -> dict[str, Value]:
        """The values of a model's tensors that are on the meta device because of this context.

        Raises:
            NotFollowedError: two of them share their memory.
        """
        found: dict[str, Value] = {}
        seen: set[int] = set()
        for name, tensor in tensors(model):
            memory = self._memory(tensor)
            if memory is None:
                continue
            if id(memory) in seen:
                raise NotFollowedError(f"{name} shares its memory with another tensor")
            seen.add(id(memory))
            found[name] = Value(memory, _place(tensor))
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        asked = kwargs.get("device")
        if asked is not None and asked.type == "meta" and torch.get_default_device().type != "meta":
            kwargs["device"] = torch.device("cpu")  # such as a number's that goes into a new tensor
        if func.overloadpacket in _EMPTY:
            return self._allocated(func, args, kwargs)
        if not any(self._memory(one) is not None for one in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func.is_view or torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)
        if torch.Tag.inplace in func.tags and (memory := self._memory(args[0])) is not None:
            return self._written(memory, func, args, kwargs)
        if any(self._memory(one) is not None for one in tree_leaves(written_to(func, args, kwargs))):
            raise NotFollowedError(f"{func} writes to a new tensor")
        if func.overloadpacket in _COPYING and self._stored(args, kwargs):
            return self._copied_later(func, args, kwargs)
        return func(*self._real(args), **self._real(kwargs))

    def _memory(self, tensor: Any) -> _Memory | None:
        return self._memories.get(tensor.untyped_storage()) if isinstance(tensor, torch.Tensor) else None

    def _allocated(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        like = next((one for one in args if isinstance(one, torch.Tensor)), None)
        device = kwargs.get("device") or (
            torch.device("cpu") if like is None or self._memory(like) is not None else like.device
        )
        if device.type != "cpu":
            return func(*args, **kwargs)
        outline = func(*args, **{**kwargs, "device": torch.device("meta")})
        if outline.numel() < self.least or not outline.is_floating_point():
            return func(*args, **{**kwargs, "device": device})
        self._memories[outline.untyped_storage()] = _Memory(outline.numel(), outline.dtype)
        return outline

    def _stored(self, *found: Any) -> bool:
        """Whether all tensors come from files."""
        memories = [self._memory(one) for one in tree_leaves(found) if isinstance(one, torch.Tensor)]
        return all(one is not None and one.begins is not None for one in memories)

    def _copied_later(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A copy of tensors in files, which are read later."""
        outline = func(*args, **({**kwargs, "device": torch.device("meta")} if "device" in kwargs else kwargs))
        if not outline.is_floating_point() or not outline.is_contiguous():
            return func(*self._real(args), **self._real(kwargs))
        values = tree_map_only(torch.Tensor, self._as_now, (args, kwargs))

        def copied() -> torch.Tensor:
            given, options = tree_map_only(Value, lambda value: value(), values)
            result: torch.Tensor = func(*given, **options)
            return result

        part = values[0][0].part if func.overloadpacket is CAST else None
        self._memories[outline.untyped_storage()] = _Memory(
            outline.numel(),
            outline.dtype,
            begins=copied,
            part=None if part is None else lambda start, stop: part(start, stop).to(outline.dtype),
        )
        return outline

    def _as_now(self, tensor: torch.Tensor) -> Value:
        """A tensor's value, also if something is written to it later."""
        memory = self._memory(tensor)
        assert memory is not None
        return Value(replace(memory, writes=[*memory.writes]), _place(tensor))

    def _written(self, memory: _Memory, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target, *others = args
        if target.dtype != memory.dtype:
            raise NotFollowedError(f"{func} writes to a new tensor as {target.dtype}")
        state = None
        arguments, options = self._copied(tuple(others)), self._copied(kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            generator = kwargs.get("generator") or torch.default_generator
            state = generator.get_state()
            func(torch.empty_strided(target.shape, target.stride(), dtype=target.dtype), *arguments, **options)
        whole = target.is_contiguous() and target.numel() == memory.elements
        if whole and func.overloadpacket in _REPLACING:
            memory.writes.clear()
            memory.begins = memory.part = None
        memory.writes.append(_Write(func, _place(target), arguments, options, state))
        return target

    def _real(self, found: Any) -> Any:
        """Arguments with the values of tensors that have none yet."""

        def real(tensor: torch.Tensor) -> torch.Tensor:
            memory = self._memory(tensor)
            if memory is not None:
                return memory.value(_place(tensor))
            if tensor.is_meta:
                raise NotFollowedError("a new tensor is used together with one that has no values")
            return tensor

        return tree_map_only(torch.Tensor, real, found)

    def _copied(self, found: Any) -> Any:
        """Arguments that stay as they are now."""
        return tree_map_only(torch.Tensor, lambda one: self._real(one).clone(), found)


class _Looks(TorchFunctionMode):
    """Has new tensors say that they are on the CPU: code may leave out a tensor on the meta device, or go there."""

    def __init__(self, memory: Callable[[Any], _Memory | None]) -> None:
        super().__init__()
        self._memory = memory
        self._answers = {torch.Tensor.is_meta.__get__: False, torch.Tensor.device.__get__: torch.device("cpu")}  # type: ignore[attr-defined]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._answers and self._memory(args[0]) is not None:
            return self._answers[func]
        return func(*args, **(kwargs or {}))


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.size(), tensor.stride(), int(tensor.storage_offset())
