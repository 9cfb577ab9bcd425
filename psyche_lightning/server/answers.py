"""The shape of a server's answers to people: what commands read in them, checked before anything is shown.

Whatever answers at a URL may be another program, or another version of this one. Fields that no command reads are free.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

Shape = dict[str, Any] | list[Any] | tuple[type, ...] | Callable[[Any], bool]
"""An object with these fields, a list of one kind of entries, one of these types, or what a function accepts."""


def _date(value: Any) -> bool:
    """Seconds since 1970 that have a date."""
    return type(value) in (int, float) and 0 <= value < 1e11


def _named(value: Any) -> bool:
    """Numbers by name."""
    return isinstance(value, dict) and all(type(number) in (int, float) for number in value.values())


def _hex(value: Any) -> bool:
    """Bytes in hex."""
    return isinstance(value, str) and re.fullmatch(r"([0-9a-f]{2})*", value) is not None


def _change(value: Any) -> bool:
    """The next change of k and local steps, or None."""
    return value is None or not misfit(value, {"from_step": _COUNT, "k": _COUNT, "local_steps": _COUNT})


_NONE = type(None)
_TEXT, _COUNT, _MAYBE_COUNT, _MAYBE_NUMBER = (str,), (int,), (int, _NONE), (int, float, _NONE)
_LINE: dict[str, Any] = {
    "run_id": _TEXT,
    "phase": _TEXT,
    "epoch": _COUNT,
    "height": _MAYBE_COUNT,
    "step": _COUNT,
    "total_steps": _MAYBE_COUNT,
}
_MEMBER: dict[str, Any] = {
    "key": _TEXT,
    "signer": _hex,
    "address": _TEXT,
    "status": _TEXT,
    "step": _MAYBE_COUNT,
    "loss": _MAYBE_NUMBER,
    "tokens_per_second": _MAYBE_NUMBER,
    "bytes_up": _MAYBE_COUNT,
    "bytes_down": _MAYBE_COUNT,
}
RUNS: Shape = {"runs": [{**_LINE, "clients": _COUNT}]}
STATUS: Shape = {
    **_LINE,
    "incarnation": _hex,
    "waits_for": _TEXT,
    "problem": (str, _NONE),
    "manifest_digest": (str, _NONE),
    "config": {"total_steps": _MAYBE_COUNT, "global_batch_size_end": _MAYBE_COUNT, "init_min_clients": _COUNT},
    "settings": {"k": _MAYBE_COUNT, "local_steps": _MAYBE_COUNT, "next": _change},
    "clients": [_MEMBER],
    "exited": [_MEMBER],
    "pending": [_MEMBER],
    "points": [{"node": _TEXT, "earned": _COUNT, "slashed": _COUNT, "claimed": _COUNT}],
    "by_link": (bool,),
    "allowed": (list, _NONE),
    "evaluations": [{"task": _TEXT, "step": _COUNT, "documents": _MAYBE_COUNT, "measured": _COUNT, "figures": _named}],
    "events": [{"time": _date, "text": _TEXT}],
    "metrics": [{"step": _COUNT, "loss": _MAYBE_NUMBER, "figures": _named}],
}
PROBLEM: Shape = {"error": _TEXT}


def misfit(value: Any, shape: Shape, path: str = "it") -> str:
    """Where a JSON value has another shape, in words; empty if it fits."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{path} is no object"
        missing = next((name for name in shape if name not in value), None)
        if missing is not None:
            return f"{path} has no {missing!r}"
        return next(filter(None, (misfit(value[name], one, name) for name, one in shape.items())), "")
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{path} is no list"
        return next(filter(None, (misfit(one, shape[0], f"an entry of {path}") for one in value)), "")
    if isinstance(shape, tuple):
        fits = type(value) in shape and (type(value) is not float or math.isfinite(value))
    else:
        fits = shape(value)
    return "" if fits else f"{path} is {str(value)[:40]!r}"
