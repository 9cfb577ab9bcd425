"""No rank of a node with ``inner="fsdp"`` ever holds the whole model, and its parts are as if one had."""

from __future__ import annotations

import pytest
from ranks import filling, run

pytestmark = pytest.mark.slow  # several processes


def test_parts_of_ranks_are_those_of_the_whole_model() -> None:
    for error in run(filling.same):
        assert "the model begins with values that are not finite" in error


def test_no_rank_holds_the_whole_model() -> None:
    for peak, parameters, largest in run(filling.peak, timeout=300.0):
        assert parameters > 100_000_000
        assert (
            peak < parameters + 16 * largest < 2 * parameters
        )  # its half in bfloat16, and one tensor as it is made and sent
