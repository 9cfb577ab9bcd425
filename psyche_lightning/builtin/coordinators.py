"""The built-in coordinators: ``http`` and ``https`` for ``psyche coordinator``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from psyche_lightning.hookspecs import CoordinatorFactory, Register, hookimpl
from psyche_lightning.plugins import build

if TYPE_CHECKING:
    from psyche_lightning.coordinator.protocol import Coordinator
    from psyche_lightning.wire.identity import Identity


@hookimpl
def register_coordinators(register: Register[CoordinatorFactory]) -> None:
    """Offer the coordinators that every installation has."""
    register("http", http)
    register("https", http)


def http(url: str, run_id: str, identity: Identity, options: Mapping[str, Any]) -> Coordinator:
    """A coordinator that ``psyche coordinator`` runs somewhere."""
    from psyche_lightning.coordinator.client import HttpCoordinator

    return build(f"coordinator {url!r}", partial(HttpCoordinator, url, run_id, identity), options)
