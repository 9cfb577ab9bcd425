"""Lightning's Trainer and Fabric as nodes of a run; everything here is imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psyche_lightning.lightning.callback import CoordinatorCallback
    from psyche_lightning.lightning.fabric import PsycheFabricStrategy
    from psyche_lightning.lightning.strategy import PsycheStrategy

__all__ = ["CoordinatorCallback", "PsycheFabricStrategy", "PsycheStrategy"]

_PLACES = {
    "CoordinatorCallback": "callback",
    "PsycheFabricStrategy": "fabric",
    "PsycheStrategy": "strategy",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
