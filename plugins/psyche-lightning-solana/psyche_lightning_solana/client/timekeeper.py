"""Sends ticks at a run's deadlines, when it is this node's turn and the chain's own clock says that time has come."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from psyche_lightning.errors import CoordinatorError
from psyche_lightning_solana.account import RunAccounts
from psyche_lightning_solana.client import turns, waiting
from psyche_lightning_solana.client.feed import Feed, Snapshot
from psyche_lightning_solana.client.problems import RpcProblem

logger = logging.getLogger("psyche_lightning")

AFTERWARDS = 0.2
"""Seconds after a tick in which its effect is waited for."""


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
                await waiting.news(news, wait)
        finally:
            feed.forget(news)

    async def look(self, snapshot: Snapshot) -> float | None:
        """Send a tick if one is due; returns the seconds until the next look, None for until something happens."""
        feed = self._feed
        try:
            run = self._decode(snapshot)
            due = turns.due(run)
            if due is None:
                return None
            if not self._may():
                return turns.STAGGER
            early = due + turns.STAGGER * turns.turn(run, self._signer) - feed.chain_time()
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
            return turns.STAGGER
        except CoordinatorError as error:
            logger.debug("tick: %s", error)
            return turns.STAGGER
        return AFTERWARDS
