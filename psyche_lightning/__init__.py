"""Train one model on many machines that share only the internet.

``import psyche_lightning`` registers the strategy ``"psyche"`` with Lightning's Trainer and Fabric; everything heavy
is imported when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psyche_lightning.hookspecs import hookimpl
from psyche_lightning.lightning.registration import register as _register
from psyche_lightning.version import __version__

if TYPE_CHECKING:
    from psyche_lightning.lightning import CoordinatorCallback, PsycheStrategy
    from psyche_lightning.lightning.prometheus import PrometheusLogger
    from psyche_lightning.muon import MuonAdamW

__all__ = ["CoordinatorCallback", "MuonAdamW", "PrometheusLogger", "PsycheStrategy", "__version__", "hookimpl"]

_PLACES = {
    "CoordinatorCallback": "lightning",
    "MuonAdamW": "muon",
    "PrometheusLogger": "lightning.prometheus",
    "PsycheStrategy": "lightning",
}

_register()


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
