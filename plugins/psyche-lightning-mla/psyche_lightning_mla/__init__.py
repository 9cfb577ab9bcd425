"""A causal language model with Multi-head Latent Attention, as a psyche_lightning plugin.

`MLAConfig` and `MLAForCausalLM` are ordinary `transformers` classes. Using either registers both with ``AutoConfig``
and ``AutoModelForCausalLM`` under the model type ``psyche_mla``. They load at first use, because listing plugins
imports this package and must not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from psyche_lightning_mla.configuration import MLAConfig
    from psyche_lightning_mla.modeling import MLAForCausalLM, MLAModel

__all__ = ["MLAConfig", "MLAForCausalLM", "MLAModel"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(importlib.import_module("psyche_lightning_mla.modeling"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
