from __future__ import annotations

import json
import math

import pytest

from psyche_lightning.json_text import json_text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_is_null(value: float) -> None:
    text = json_text({"loss": value, "rows": [(1, value), {"x": value}], "kept": [0.5, "NaN", True, None, 3]})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "loss": None,
        "rows": [[1, None], {"x": None}],
        "kept": [0.5, "NaN", True, None, 3],
    }
