"""``strategy="psyche"`` works whichever import comes first, and the import costs next to nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from psyche_lightning.lightning.registration import register


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_import_loads_neither_torch_nor_lightning() -> None:
    code = "import psyche_lightning, sys; print([m for m in ('torch', 'lightning', 'aiohttp') if m in sys.modules])"
    assert python(code) == "[]"


def test_imported_before_lightning() -> None:
    code = """
import psyche_lightning
import lightning
options = dict(strategy="psyche", accelerator="cpu")
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
made = lightning.Trainer(**options, **quiet), lightning.Fabric(**options)
print(*(type(one.strategy).__name__ for one in made))
"""
    assert python(code).splitlines()[-1] == "PsycheStrategy PsycheFabricStrategy"


def test_imported_after_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.fabric.strategies import STRATEGY_REGISTRY
    from lightning.pytorch.strategies import StrategyRegistry

    finders = [finder for finder in sys.meta_path if type(finder).__module__ != register.__module__]
    monkeypatch.setattr(sys, "meta_path", finders)
    for registry in (STRATEGY_REGISTRY, StrategyRegistry):
        registry.pop("psyche", None)
    register()
    register()
    for registry in (STRATEGY_REGISTRY, StrategyRegistry):
        assert registry["psyche"]["description"].startswith("Train one model")
    assert [type(finder).__module__ for finder in sys.meta_path].count(register.__module__) == 1
