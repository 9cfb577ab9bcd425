"""The built-in coordinators: ``http`` and ``https`` for ``psyche coordinator``, ``embedded`` for one process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from psyche_lightning.hookspecs import CoordinatorKind, Register, hookimpl
from psyche_lightning.plugins import build
from psyche_lightning.protocol.state import INCARNATION_SIZE, CoordinatorConfig

if TYPE_CHECKING:
    from psyche_lightning.protocol.owner import ClockReading, RunAdmin
    from psyche_lightning.protocol.requests import Coordinator
    from psyche_lightning.wire.identity import Identity


@hookimpl
def register_coordinators(register: Register[CoordinatorKind]) -> None:
    """Register the coordinators that every installation has."""
    register("embedded", CoordinatorKind(embedded))
    register("http", SERVER)
    register("https", SERVER)


def embedded(url: str, run_id: str, identity: Identity, options: Mapping[str, Any]) -> Coordinator:
    """A new run that exists only within this process; the options are those of :class:`RunHost`."""
    from psyche_lightning.coordinator.host import RunHost
    from psyche_lightning.server.local import LocalCoordinator

    values = {
        "config": CoordinatorConfig(), "seed": 0, "incarnation": os.urandom(INCARNATION_SIZE), **options
    }  # fmt: skip
    return LocalCoordinator(build("coordinator 'embedded'", partial(RunHost, run_id), values), identity)


def _owner(url: str, run_id: str, token: str | None) -> RunAdmin:
    from psyche_lightning.server.admin import ServerRun

    return ServerRun(url, run_id, token)


def http(url: str, run_id: str, identity: Identity, options: Mapping[str, Any]) -> Coordinator:
    """A coordinator that ``psyche coordinator`` runs, here or elsewhere."""
    from psyche_lightning.protocol.link import JoinLink
    from psyche_lightning.server.client import HttpCoordinator

    return build(f"coordinator {JoinLink.parse(url).url!r}", partial(HttpCoordinator, url, run_id, identity), options)


def _clock(url: str) -> ClockReading:
    from psyche_lightning.server.clock import read_clock

    return read_clock(url)


def _runs(url: str) -> list[dict[str, Any]]:
    from psyche_lightning.server.admin import CoordinatorAdmin

    return CoordinatorAdmin(url).runs()


SERVER = CoordinatorKind(client=http, owner=_owner, clock=_clock, runs=_runs)
