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

__all__ = ["CoordinatorCallback", "PsycheStrategy", "__version__", "hookimpl"]

_register()


def __getattr__(name: str) -> Any:
    if name not in ("CoordinatorCallback", "PsycheStrategy"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from psyche_lightning import lightning

    return getattr(lightning, name)
