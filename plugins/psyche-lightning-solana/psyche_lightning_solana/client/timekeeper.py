"""Sends ticks at a run's deadlines, if it is this node's turn and the chain's own clock has reached the deadline.

Every instruction advances the run as far as possible; a tick is needed only if time alone advances it. The state gives
the clients an order: the first one sends at the deadline, and each next one only if nothing happened by its turn. So a
deadline costs one transaction, not one per node. Nodes outside the list come last, so a run advances even if all its
clients are gone.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from psyche_lightning import aio
from psyche_lightning.coordinator.machine import deadline
from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.state import Phase, RunState
from psyche_lightning.wire.canonical import sha256
from psyche_lightning_solana.account import RunAccounts
from psyche_lightning_solana.client.feed import Feed, Snapshot
from psyche_lightning_solana.client.rpc import RpcProblem

logger = logging.getLogger(__name__)

STAGGER = 2.0
"""Seconds between two turns: the previous node's transaction should show by then."""
MOST_TURNS = 30
"""A node waits for at most this many."""
AFTERWARDS = 0.2
"""Seconds to wait for a tick's effect."""


def deadline_of(run: RunAccounts) -> float | None:
    """The chain's time (seconds) at which the run advances by itself; None if it needs an input."""
    return None if run.state.phase.halted else deadline(run.state)


def turn(run: RunAccounts, signer: bytes) -> int:
    """Number of nodes before it at this state's deadline."""
    state = run.state
    waiting = state.phase is Phase.WAITING_FOR_MEMBERS
    those = [client.signer for client in (run.pending if waiting else state.healthy)]
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
        may: whether this node takes part now.
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
        """Send due ticks until cancelled or until the feed fails."""
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
        """Send a due tick; returns the seconds until the next check, or None to wait for a change."""
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
            # The snapshot may be old, and the clock is an estimate: read both again.
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
