"""The built-in transports: ``tcp`` and ``memory``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from psyche_lightning.hookspecs import Register, TransportFactory, hookimpl
from psyche_lightning.plugins import build

if TYPE_CHECKING:
    from psyche_lightning.transports.base import Transport


@hookimpl
def register_transports(register: Register[TransportFactory]) -> None:
    """Register the transports that every installation has."""
    register("tcp", tcp)
    register("memory", memory)


def tcp(options: Mapping[str, Any]) -> Transport:
    """TCP with TLS that is bound to the nodes' keys."""
    from psyche_lightning.transports.environment import with_environment
    from psyche_lightning.transports.tcp import TcpTransport

    return build("transport 'tcp'", TcpTransport, with_environment(options))


def memory(options: Mapping[str, Any]) -> Transport:
    """Queues between the nodes of one process."""
    from psyche_lightning.transports.memory import MemoryTransport

    return build("transport 'memory'", MemoryTransport, options)
