"""A coordinator of this process, and a browser that looks at its page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from support.stages import Stage, StagedStore, still

from psyche_lightning.server.server import CoordinatorServer
from psyche_lightning.server.store import MemoryStore


@pytest.fixture
def served() -> Callable[..., Any]:
    """A server of this process: ``async with served(...) as (server, url)``."""

    @asynccontextmanager
    async def serve(port: int = 0, store: MemoryStore | None = None, **options: Any) -> AsyncIterator[Any]:
        server = CoordinatorServer(store or MemoryStore(), grace=0.2, **options)
        url = await server.start("127.0.0.1", port)
        try:
            yield server, url
        finally:
            await server.stop()

    return serve


@pytest.fixture
def staged() -> Callable[..., Any]:
    """A server of staged runs, which stand still: ``async with staged(training()) as url``."""

    @asynccontextmanager
    async def serve(*stages: Stage, closed: Collection[Stage] = ()) -> AsyncIterator[str]:
        async with still(StagedStore(stages, closed)) as (_, url):
            yield url

    return serve


@pytest.fixture
def run() -> Callable[..., None]:
    """Run a coroutine with a bound that turns a hang into a failure."""

    def bounded(coroutine: Coroutine[Any, Any, None], timeout: float = 120.0) -> None:
        async def inner() -> None:
            await asyncio.wait_for(coroutine, timeout)

        asyncio.run(inner())

    return bounded


@pytest.fixture
def quick() -> dict[str, float]:
    """Settings with which a run of willing nodes never waits long."""
    return {"waiting_for_members_extra_time": 0.05, "warmup_time": 20, "cooldown_time": 5, "max_round_train_time": 20}
