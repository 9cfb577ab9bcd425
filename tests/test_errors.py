"""A package that is installed only with an extra is missing: one text says how to install it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from psyche_lightning.cli.eval import evaluate
from psyche_lightning.errors import ConfigError
from psyche_lightning.plugins import load_plugins
from psyche_lightning.recipe.adapter import adapted


def provider(name: str, **options: Any) -> Callable[[Path], Any]:
    return lambda file: load_plugins().data_providers()[name]({"path": str(file), "seq_len": 4, **options}, seed=0)


@pytest.mark.parametrize(
    ("module", "use", "text"),
    [
        ("lm_eval", lambda file: evaluate(str(file), "any"), "psyche eval needs the package lm-eval: [eval]"),
        ("datasets", provider("datasets"), "The data provider 'datasets' needs the package datasets: [data]"),
        ("pyarrow", provider("parquet", vocab_size=9), "The data provider 'parquet' needs the package pyarrow: [data]"),
        (
            "peft",
            lambda _: adapted(torch.nn.Linear(1, 1), {}, "a", None),
            "model.adapter needs the package peft: [peft]",
        ),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    module: str, use: Callable[[Path], Any], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    wanted = text.replace("[", "pip install 'psyche-lightning[").replace("]", "]'.")
    with pytest.raises(ConfigError, match=re.escape(wanted)):
        use(tmp_path / "a.parquet")
