"""Sends ticks at a run's deadlines, when it is this node's turn and the chain's own clock says that time has come.

Every instruction moves the run on as far as it goes; a tick is only needed where the clock alone does. The clients
stand in an order that the state gives; the first sends when time has come, each next one only if by then nothing
happened, so that a deadline costs one transaction and not one of every node. Whoever is not in the list comes after it,
so a run whose clients are all gone does not stand still.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from psyche_lightning import aio
from psyche_lightning.coordinator.machine import deadline, healthy
from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.state import Phase, RunState
from psyche_lightning.wire.canonical import sha256
from psyche_lightning_solana.account import RunAccounts
from psyche_lightning_solana.client.feed import Feed, Snapshot
from psyche_lightning_solana.client.rpc import RpcProblem

logger = logging.getLogger(__name__)

STAGGER = 2.0
"""Seconds between two turns: a transaction of the one before should show by then."""
MOST_TURNS = 30
"""Nobody waits for more than so many others."""
AFTERWARDS = 0.2
"""Seconds after a tick in which its effect is waited for."""


def deadline_of(run: RunAccounts) -> float | None:
    """When the clock alone moves the run on, in the chain's seconds; None when only an input can."""
    return None if run.state.phase.halted else deadline(run.state)


def turn(run: RunAccounts, signer: bytes) -> int:
    """How many others go first at this state's deadline."""
    state = run.state
    waiting = state.phase is Phase.WAITING_FOR_MEMBERS
    those = [client.signer for client in (run.pending if waiting else healthy(state))]
    if signer not in those:
        return min(len(those), MOST_TURNS) + _number(state, signer) % MOST_TURNS
    return min(sorted(those, key=lambda other: _number(state, other)).index(signer), MOST_TURNS)


def _number(state: RunState, signer: bytes) -> int:
    place = state.nonce.to_bytes(8, "little") + state.epoch.to_bytes(2, "little")
    return int.from_bytes(sha256(place, signer)[:8], "little")


class Timekeeper:
    """One node's share in keeping a run's time.

    Args:
        feed: the run's accounts.
        decode: reads a snapshot of them.
        signer: the node's wallet.
        may: whether this node takes part yet.
        tick: sends a tick for the state with that nonce.
    """

    def __init__(
        self,
        feed: Feed,
        decode: Callable[[Snapshot], RunAccounts],
        signer: bytes,
        may: Callable[[], bool],
        tick: Callable[[int], Awaitable[None]],
    ) -> None:
        self._feed = feed
        self._decode = decode
        self._signer = signer
        self._may = may
        self._tick = tick

    async def run(self) -> None:
        """Tick whenever it is due, until cancelled or until the feed fails."""
        feed = self._feed
        news = feed.news()
        try:
            while feed.failure is None:
                news.clear()
                wait = await self.look(feed.latest) if feed.latest is not None else None
                await aio.wait_or_set(news, wait)
        finally:
            feed.forget(news)

    async def look(self, snapshot: Snapshot) -> float | None:
        """Send a tick if one is due; returns the seconds until the next look, None for until something happens."""
        feed = self._feed
        try:
            run = self._decode(snapshot)
            due = deadline_of(run)
            if due is None:
                return None
            if not self._may():
                return STAGGER
            early = due + STAGGER * turn(run, self._signer) - feed.chain_time()
            if early > 0:
                return early
            # What was seen may be old, and the clock is only guessed in between: see how it really is.
            snapshot = await feed.refresh()
            if snapshot.nonce != run.state.nonce:
                return 0.0
            if feed.chain_time() < due:
                return due - feed.chain_time()
            await self._tick(snapshot.nonce)
            await feed.refresh()
        except RpcProblem:
            return STAGGER
        except CoordinatorError as error:
            logger.debug("tick: %s", error)
            return STAGGER
        return AFTERWARDS
