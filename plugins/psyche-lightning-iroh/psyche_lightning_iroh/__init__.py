"""A transport over iroh: QUIC between nodes that know each other by their keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psyche_lightning_iroh.transport import IrohTransport

__all__ = ["IrohTransport"]


def __getattr__(name: str) -> Any:
    if name == "IrohTransport":
        from psyche_lightning_iroh.transport import IrohTransport

        return IrohTransport
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
