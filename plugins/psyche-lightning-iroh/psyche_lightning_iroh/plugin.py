"""The plugin: registers the transport ``iroh``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from psyche_lightning import hookimpl

if TYPE_CHECKING:
    from psyche_lightning_iroh.transport import IrohTransport


@hookimpl
def register_transports(register: Callable[[str, Callable[..., Any]], None]) -> None:
    """Register the transport."""
    register("iroh", iroh)


def iroh(options: Mapping[str, Any]) -> IrohTransport:
    """QUIC between nodes whose addresses are their keys, directly or through a relay.

    Args:
        options: arguments of :class:`psyche_lightning_iroh.IrohTransport`. If host, port, advertise, upload or download
            is missing, the environment gives it, as for the built-in transport.

    Raises:
        ConfigError: an option is unknown or wrong.
    """
    from psyche_lightning.plugins import build
    from psyche_lightning.transports.environment import with_environment
    from psyche_lightning_iroh.transport import IrohTransport

    return build("transport 'iroh'", IrohTransport, with_environment(options))
