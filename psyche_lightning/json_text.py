"""JSON that every reader accepts: the standard has no NaN and no infinity, but Python writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def json_text(value: object, indent: int | None = None) -> str:
    """The value as standard JSON; a number that is not finite, such as the loss of a node without samples, is null."""
    return json.dumps(_standard(value), indent=indent, allow_nan=False)


def _standard(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _standard(item) for key, item in value.items()}
    return [_standard(item) for item in value] if isinstance(value, (list, tuple)) else value
