"""Models are built and loaded in one thread of a process at a time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from psyche_lightning.builtin.models import hf
from psyche_lightning.checkpoints.deferred import built


def test_two_threads_do_not_load_at_the_same_time(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both would leave transformers as the other had it meanwhile: models would tie their weights no more."""
    from transformers import LlamaModel, PreTrainedModel

    tie_weights, make = PreTrainedModel.tie_weights, LlamaModel.__init__
    together, met = threading.Barrier(2), []

    def meet(model: Any, *given: Any) -> None:
        try:
            together.wait(0.2)
            met.append(model)
        except threading.BrokenBarrierError:
            pass
        make(model, *given)

    monkeypatch.setattr(LlamaModel, "__init__", meet)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: built(lambda: hf({"path": str(saved)}), torch.bfloat16), range(2)))
    assert not met
    assert PreTrainedModel.tie_weights is tie_weights
    assert torch.get_default_dtype() == torch.float32
