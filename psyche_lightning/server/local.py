"""A coordinator within the process: no sockets, no waiting, as fast as the node."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.requests import Answer, Request
from psyche_lightning.protocol.state import RunState
from psyche_lightning.server.live import LiveRun, states
from psyche_lightning.wire.identity import Identity


class LocalCoordinator:
    """A client of a run in the same process; implements :class:`~psyche_lightning.protocol.requests.Coordinator`.

    Several of them may share one host, also on the event loops of several threads.

    Args:
        host: the run.
        identity: the node's key.
        clock: seconds of a clock that never steps.
    """

    def __init__(self, host: RunHost, identity: Identity, clock: Callable[[], float] = time.monotonic) -> None:
        self._run = LiveRun.of(host, clock)
        self.signer = identity.public
        self.away: str | None = None
        self._timekeeper: asyncio.Task[None] | None = None
        self._closed = False

    async def request(self, request: Request[Answer]) -> Answer:
        """Send a request and return its answer."""
        self._start()
        return self._run.handle(self.signer, request)

    async def watch(self) -> AsyncIterator[RunState]:
        """Yields the state now and after each change, newest only."""
        self._start()
        async for state in states(self._run):
            yield state

    async def close(self) -> None:
        """Stop keeping the run's time on this loop."""
        self._closed = True
        if self._timekeeper is not None:
            self._timekeeper.cancel()
            await asyncio.gather(self._timekeeper, return_exceptions=True)

    def _start(self) -> None:
        if self._closed:
            raise CoordinatorError("this coordinator client was closed", code="Closed")
        if self._timekeeper is None:
            self._timekeeper = asyncio.get_running_loop().create_task(self._run.keep_time())
