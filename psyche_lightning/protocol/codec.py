"""Exact JSON forms of run states, and small changes between them.

The JSON form follows the dataclasses: objects have the fields' names in their order, bytes are lower-case hex, phases
and statuses are numbers. Fields that are None, empty Bloom filters and the weights of equal shares are left out.

A change is a JSON object like a JSON merge patch (RFC 7386): it holds the differences, and null for a key that is
removed. Unlike there, lists can be patched, too: ``{"at": {"2": change}}`` changes elements in place (so a round is
addressed by its slot), and ``{"splice": [first, removed, [new, ...]]}`` replaces a section; a change may have both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from functools import cache
from typing import Any, TypeVar

from psyche_lightning.errors import WireError
from psyche_lightning.protocol.bloom import BLOOM_SIZE
from psyche_lightning.protocol.state import INCARNATION_SIZE, MOST_WEIGHT, STORED_ROUNDS, Round, RunState
from psyche_lightning.wire.canonical import HASH_SIZE
from psyche_lightning.wire.identity import KEY_SIZE

MAX_ITEMS = 65536
MAX_TEXT = 4096
_BLOOMS = {"participants", "broadcasts"}
_LEFT_OUT = {*_BLOOMS, "weights"}
"""Fields that are left out where they are empty."""
_SIZES = {
    "signer": (KEY_SIZE,),
    "node": (KEY_SIZE,),
    "merkle": (HASH_SIZE,),
    "digest": (0, HASH_SIZE),
    "epoch_digest": (0, HASH_SIZE),
    "clients": (KEY_SIZE,),
    "holders": (KEY_SIZE,),
    "checkpoint_votes": (KEY_SIZE, HASH_SIZE),
    "participants": (0, BLOOM_SIZE),
    "broadcasts": (0, BLOOM_SIZE),
    "incarnation": (0, INCARNATION_SIZE),
}
_PLAIN = frozenset({int, float, str, bool, type(None)})
"""Types of values that JSON has."""
_T = TypeVar("_T")


def to_json(value: Any, *, blooms: bool = True) -> Any:
    """Convert a dataclass of :mod:`~psyche_lightning.protocol.state` to JSON values."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is bytes:
        return value.hex()
    if isinstance(value, tuple):
        return [to_json(item, blooms=blooms) for item in value]
    if not dataclasses.is_dataclass(kind):
        return int(value) if isinstance(value, IntEnum) else value
    out = {}
    for name, is_float in _written(kind):
        item = getattr(value, name)
        if item is None or (name in _LEFT_OUT and not item) or (name in _BLOOMS and not blooms):
            continue
        # A whole number in a float field is read as a float, so it is written as one.
        out[name] = float(item) if is_float else to_json(item, blooms=blooms)
    return out


def from_json(cls: type[_T], data: Any) -> _T:
    """Read what :func:`to_json` wrote for a ``cls``, and nothing else.

    Raises:
        WireError: a value is wrong; the text says which one and what was expected.
    """
    kind: Any = cls
    try:
        value: _T = _reader(kind)(data)
    except _MisfitError as error:
        raise WireError(f"{cls.__name__}{error}") from None
    return value


def state_to_json(state: RunState, *, blooms: bool = False) -> dict[str, Any]:
    """Convert a run state. ``blooms`` says whether to keep the witnesses' Bloom filters, which nodes do not need."""
    out: dict[str, Any] = to_json(state, blooms=blooms)
    return out


def state_from_json(data: Any) -> RunState:
    """Read what :func:`state_to_json` wrote.

    Raises:
        WireError: a value is wrong; the text says which one and what was expected.
    """
    state = from_json(RunState, data)
    if len(state.rounds) > STORED_ROUNDS or state.head >= max(1, len(state.rounds)):
        raise WireError(
            f"RunState.head is {state.head} of {len(state.rounds)} rounds; at most {STORED_ROUNDS} are kept"
        )
    for slot, round_ in enumerate(state.rounds):
        if round_.height % STORED_ROUNDS != slot:
            raise WireError(f"RunState.rounds[{slot}] has height {round_.height}, which belongs in another slot")
        check_weights(round_.weights, len(round_.clients))
    return state


def round_to_json(round_: Round, *, blooms: bool = False) -> dict[str, Any]:
    """Convert one round, as :func:`state_to_json` does."""
    out: dict[str, Any] = to_json(round_, blooms=blooms)
    return out


def round_from_json(data: Any) -> Round:
    """Read what :func:`round_to_json` wrote.

    Raises:
        WireError: a value is wrong; the text says which one and what was expected.
    """
    round_ = from_json(Round, data)
    check_weights(round_.weights, len(round_.clients))
    return round_


def check_weights(weights: Sequence[int], clients: int) -> None:
    """Check the weights of a round with so many clients.

    Raises:
        WireError: they are wrong.
    """
    if len(weights) not in (0, clients) or not all(type(one) is int and 0 < one <= MOST_WEIGHT for one in weights):
        raise WireError(f"a round has no weights, or one of 1 to {MOST_WEIGHT} for each of its clients")


@cache
def _hints(cls: type) -> dict[str, Any]:
    resolved = typing.get_type_hints(cls)
    return {field.name: resolved[field.name] for field in dataclasses.fields(cls)}


@cache
def _written(cls: type) -> tuple[tuple[str, bool], ...]:
    """The names of the fields, each with whether it is written as a float."""
    return tuple((name, float in (hint, *typing.get_args(hint))) for name, hint in _hints(cls).items())


class _MisfitError(Exception):
    """A value is not what a reader reads; the readers of what it is in say where it is, from the inside out.

    Args:
        got: the value.
        expected: what belongs there.
    """

    def __init__(self, got: Any, expected: str) -> None:
        super().__init__()
        self._path: list[str] = []
        self._what = f" is {str(got)[:60]!r}; expected {expected}"

    def within(self, place: str) -> _MisfitError:
        """The same error, of what is at this place of a larger value."""
        self._path.append(place)
        return self

    def __str__(self) -> str:
        return "".join(reversed(self._path)) + self._what


_Reader = Callable[[Any], Any]


@cache
def _reader(hint: Any, sizes: tuple[int, ...] = ()) -> _Reader:
    """What reads values of a type; bytes have one of these sizes."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):  # only "or None", and to_json leaves out None
        return _reader(arguments[0], sizes)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _object_reader(hint)
    if typing.get_origin(hint) is tuple:
        if arguments[-1] is Ellipsis:
            return _list_reader(_reader(arguments[0], sizes))
        return _tuple_reader([_reader(each, sizes) for each in arguments])
    if isinstance(hint, type) and issubclass(hint, IntEnum):
        return _number_reader(hint)
    return _bytes_reader(sizes) if hint is bytes else _SCALARS[hint]


def _object_reader(cls: type) -> _Reader:
    hints = _hints(cls)
    readers = [
        (name, _reader(hint, _SIZES.get(name, ())), name in _LEFT_OUT or type(None) in typing.get_args(hint))
        for name, hint in hints.items()
    ]

    def read(data: Any) -> Any:
        if not isinstance(data, dict):
            raise _MisfitError(data, "an object")
        if not data.keys() <= hints.keys():
            unknown = ", ".join(str(name) for name in data if name not in hints)
            raise _MisfitError(unknown, f"only {', '.join(hints)}")
        values, name = {}, ""
        try:
            for name, reader, optional in readers:
                if name in data:
                    values[name] = reader(data[name])
                elif not optional:
                    raise _MisfitError("missing", "a value")
        except _MisfitError as error:
            raise error.within(f".{name}") from None
        return cls(**values)

    return read


def _list_reader(reader: _Reader) -> _Reader:
    def read(data: Any) -> Any:
        if not (isinstance(data, list) and len(data) <= MAX_ITEMS):
            raise _MisfitError(data, f"a list of at most {MAX_ITEMS}")
        return _read_each(data, itertools.repeat(reader))

    return read


def _tuple_reader(readers: Sequence[_Reader]) -> _Reader:
    def read(data: Any) -> Any:
        if not (isinstance(data, list) and len(data) == len(readers)):
            raise _MisfitError(data, f"a list of {len(readers)} values")
        return _read_each(data, readers)

    return read


def _read_each(data: list[Any], readers: Iterable[_Reader]) -> tuple[Any, ...]:
    values: list[Any] = []
    try:
        for item, reader in zip(data, readers, strict=False):
            values.append(reader(item))
    except _MisfitError as error:
        raise error.within(f"[{len(values)}]") from None
    return tuple(values)


def _number_reader(kind: type[IntEnum]) -> _Reader:
    known = {int(member): member for member in kind}

    def read(data: Any) -> Any:
        if type(data) is not int or data not in known:
            raise _MisfitError(data, f"one of {sorted(known)}")
        return known[data]

    return read


def _bytes_reader(sizes: tuple[int, ...]) -> _Reader:
    digits = {2 * size for size in sizes}
    expected = f"lower-case hex of {' or '.join(map(str, sizes))} bytes"

    def read(data: Any) -> bytes:
        if isinstance(data, str) and len(data) in digits:
            with contextlib.suppress(ValueError):
                value = bytes.fromhex(data)
                if value.hex() == data:
                    return value
        raise _MisfitError(data, expected)

    return read


def _int(data: Any) -> int:
    if not (type(data) is int and 0 <= data < 1 << 64):
        raise _MisfitError(data, "a whole number from 0 to 2^64 - 1")
    return data


def _float(data: Any) -> float:
    if not (math.isfinite(data) if type(data) is float else type(data) is int and abs(data) <= 1 << 53):
        raise _MisfitError(data, "a finite number")
    return float(data)


def _bool(data: Any) -> bool:
    if not isinstance(data, bool):
        raise _MisfitError(data, "true or false")
    return data


def _str(data: Any) -> str:
    if not (isinstance(data, str) and len(data) <= MAX_TEXT):
        raise _MisfitError(data, f"text of at most {MAX_TEXT} characters")
    return data


_SCALARS: dict[Any, _Reader] = {int: _int, float: _float, bool: _bool, str: _str}


def diff(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The change with which :func:`patch` turns ``old`` into ``new``; empty if they are equal.

    Args:
        old: a JSON object without nulls.
        new: another JSON object; where ``old`` has a list, it has a list, a scalar or nothing.
    """
    change: dict[str, Any] = {name: None for name in old if name not in new}
    for name, value in new.items():
        if name not in old:
            change[name] = value
        elif not _same(old[name], value):
            change[name] = _difference(old[name], value)
    return change


def _same(a: Any, b: Any) -> bool:
    """Whether two JSON values are written in the same way; 1, 1.0 and true are different."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    # 0.0 and -0.0 differ, too.
    return repr(a) == repr(b) if isinstance(a, float) else bool(a == b)


def _difference(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return diff(old, new)
    if isinstance(old, list) and isinstance(new, list):
        first = 0
        while first < min(len(old), len(new)) and _same(old[first], new[first]):
            first += 1
        last = 0
        while last < min(len(old), len(new)) - first and _same(old[-1 - last], new[-1 - last]):
            last += 1
        ends = len(old) - last, len(new) - last
        both = min(ends)
        change: dict[str, Any] = {}
        places = [i for i in range(first, both) if not _same(old[i], new[i])]
        if places:
            change["at"] = {str(i): _difference(old[i], new[i]) for i in places}
        if len(old) != len(new):
            change["splice"] = [both, ends[0] - both, new[both : ends[1]]]
        return change
    return new


def patch(old: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Apply a change that :func:`diff` made; does not modify ``old``.

    Raises:
        WireError: the change does not fit ``old``.
    """
    if not isinstance(change, dict):
        raise WireError("a change is a JSON object")
    new = dict(old)
    for name, value in change.items():
        if value is not None:
            new[name] = _patched(old[name], value) if name in old else value
        elif new.pop(name, None) is None:
            raise WireError(f"a change removes {name[:60]!r}, which does not exist")
    return new


def _patched(old: Any, change: Any) -> Any:
    if isinstance(old, dict) and isinstance(change, dict):
        return patch(old, change)
    if not (isinstance(old, list) and isinstance(change, dict)):
        return change
    new = list(old)
    places, splice = change.get("at", {}), change.get("splice", [0, 0, []])
    if not (change and change.keys() <= {"at", "splice"} and isinstance(places, dict) and isinstance(splice, list)):
        raise WireError("a change of a list is an 'at', a 'splice' or both")
    for place, value in places.items():
        if not (place.isascii() and place.isdecimal() and len(place) < 9 and int(place) < len(new)):
            raise WireError(f"a change of element {place[:60]!r} in a list of {len(new)}")
        new[int(place)] = _patched(new[int(place)], value)
    if [type(part) for part in splice] != [int, int, list] or not 0 <= splice[0] <= sum(splice[:2]) <= len(new):
        raise WireError(f"a splice that does not fit a list of {len(new)}")
    first, removed, items = splice
    new[first : first + removed] = items
    return new
