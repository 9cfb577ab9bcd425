"""A handful of the architectures of ``architectures.py``, and the table of all in the docs."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
from peer.architectures import ARCHITECTURES, BEGIN, DTYPES, END, Outcome, table, try_out

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.parametrize(
    ("model", "dtype"),
    [("llama", "bfloat16"), ("gpt2", "float32"), ("gemma", "bfloat16"), ("mamba", "bfloat16"), ("mla", "bfloat16")],
)
def test_it_trains_and_its_checkpoint_is_the_same_model_everywhere(model: str, dtype: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = try_out(model, dtype, tmp_path)
    assert outcome.good, outcome
    assert outcome.losses[-1] < outcome.losses[0]


def test_the_page_has_a_row_for_each_architecture() -> None:
    text = PAGE.read_text()
    part = text[text.index(BEGIN) : text.index(END)]
    assert re.findall(r"^\| `(\w+)`", part, re.M) == list(ARCHITECTURES)
    assert len(ARCHITECTURES) >= 45


def test_what_differs_is_in_the_table() -> None:
    found = {(model, dtype): Outcome(model, dtype) for model in ARCHITECTURES for dtype in DTYPES}
    found["gpt2", "bfloat16"] = Outcome("gpt2", "bfloat16", reload="logits differ by 1e-3")
    rows = table(found).splitlines()
    assert "| `gpt2` | ✓ | bfloat16: logits differ by 1e-3 | ✓ | ✓ |" in rows
    assert "| `llama` | ✓ | ✓ | ✓ | ✓ |" in rows
