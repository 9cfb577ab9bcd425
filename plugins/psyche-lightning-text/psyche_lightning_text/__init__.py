"""Training samples from local text and source files, as a psyche_lightning plugin.

`TextData` is the data provider, `byte_tokenizer` the tokenizer of byte-level runs. Both load when they are first used:
the package itself is imported whenever plugins are listed, and must not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from psyche_lightning.data.tokenizer import byte_tokenizer
    from psyche_lightning_text.provider import TextData

__all__ = ["TextData", "byte_tokenizer"]
__version__ = "0.1.0"

_HOMES = {"TextData": "psyche_lightning_text.provider", "byte_tokenizer": "psyche_lightning.data.tokenizer"}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
