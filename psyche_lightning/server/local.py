"""The coordinator within the process: no sockets, no waiting, the pace of the node."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.requests import Report, Terms
from psyche_lightning.protocol.state import Round, RunState, WitnessProof
from psyche_lightning.server.live import LiveRun, states
from psyche_lightning.wire.identity import Identity

T = TypeVar("T")


class LocalCoordinator:
    """A client of a run in the same process; implements :class:`~psyche_lightning.protocol.requests.Coordinator`.

    Several of them, also on the event loops of several threads, may share one host.

    Args:
        host: the run.
        identity: the node's key.
        clock: seconds.
    """

    def __init__(self, host: RunHost, identity: Identity, clock: Callable[[], float] = time.time) -> None:
        self._run = LiveRun.of(host, clock)
        self.signer = identity.public
        self._timekeeper: asyncio.Task[None] | None = None
        self._closed = False

    async def terms(self) -> Terms:
        """What the run has fixed."""
        host = self._run.host
        return Terms(host.state.config, tuple(host.unset), host.manifest)

    async def join(self, address: str, manifest: dict[str, Any]) -> None:
        """Join the run."""
        self._act(lambda host, now: host.join(self.signer, self.signer, address, manifest, now))

    async def withdraw(self) -> None:
        """Leave the run."""
        self._act(lambda host, now: host.withdraw(self.signer, now))

    async def warmup_witness(self, epoch: int, index: int, digest: bytes) -> None:
        """Say which parameters this client holds."""
        self._act(lambda host, now: host.warmup_witness(self.signer, epoch, index, digest, now))

    async def witness(
        self,
        epoch: int,
        height: int,
        proof: WitnessProof,
        merkle: bytes,
        participants: bytes,
        broadcasts: bytes,
        report: Report,
    ) -> None:
        """Report as a witness."""
        self._act(
            lambda host, now: host.witness(
                self.signer, epoch, height, proof, merkle, participants, broadcasts, report, now
            )
        )

    async def health_check(self, epoch: int, height: int, signers: list[bytes]) -> int:
        """Name silent clients."""
        return self._act(lambda host, now: host.health_check(self.signer, epoch, height, signers, now))

    async def checkpoint(self, epoch: int, step: int, digest: bytes) -> None:
        """Vote for the parameters at the end of an epoch."""
        self._act(lambda host, now: host.checkpoint(self.signer, epoch, step, digest, now))

    async def accuse(self, first: bytes, second: bytes) -> None:
        """Show two signed results of one trainer for one batch."""
        self._act(lambda host, now: host.accuse(self.signer, first, second, now))

    async def rounds(self, epoch: int, first: int) -> list[Round]:
        """The stored rounds of an epoch, from height ``first`` on."""
        self._start()
        return self._run.rounds(epoch, first)

    async def watch(self) -> AsyncIterator[RunState]:
        """The state now and after every change, newest only."""
        self._start()
        async for state in states(self._run):
            yield state

    async def close(self) -> None:
        """Stop keeping the run's time on this loop."""
        self._closed = True
        if self._timekeeper is not None:
            self._timekeeper.cancel()
            await asyncio.gather(self._timekeeper, return_exceptions=True)

    def _act(self, action: Callable[[RunHost, float], T]) -> T:
        self._start()
        return self._run.act(action)

    def _start(self) -> None:
        if self._closed:
            raise CoordinatorError("this coordinator client was closed", code="Closed")
        if self._timekeeper is None:
            self._timekeeper = asyncio.get_running_loop().create_task(self._run.keep_time())
