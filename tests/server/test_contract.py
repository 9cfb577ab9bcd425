"""The built-in coordinators against the conformance kit."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import asdict

from psyche_lightning.builtin.coordinators import http
from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.protocol.state import CoordinatorConfig
from psyche_lightning.server.admin import CoordinatorAdmin
from psyche_lightning.server.local import LocalCoordinator
from psyche_lightning.server.server import CoordinatorServer
from psyche_lightning.server.store import MemoryStore
from psyche_lightning.testing.coordinators import Connect, CoordinatorContract


class TestEmbedded(CoordinatorContract):
    @contextlib.asynccontextmanager
    async def open_run(self, run_id: str, config: CoordinatorConfig) -> AsyncIterator[Connect]:
        host = RunHost(run_id, config, seed=1, incarnation=bytes(range(16)))
        yield lambda identity: LocalCoordinator(host, identity)


class TestHttp(CoordinatorContract):
    @contextlib.asynccontextmanager
    async def open_run(self, run_id: str, config: CoordinatorConfig) -> AsyncIterator[Connect]:
        server = CoordinatorServer(MemoryStore())
        url = await server.start("127.0.0.1", 0)
        try:
            await asyncio.to_thread(CoordinatorAdmin(url).create, run_id, asdict(config), seed=1)
            yield lambda identity: http(url, run_id, identity, {})
        finally:
            await server.stop()
