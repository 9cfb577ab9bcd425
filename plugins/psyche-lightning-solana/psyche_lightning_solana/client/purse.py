"""What a node's wallet can still pay for, so that it leaves in time: a node that falls silent costs everybody."""

from __future__ import annotations

import logging

from psyche_lightning_solana.client.fees import sol
from psyche_lightning_solana.client.reader import Reader
from psyche_lightning_solana.client.rpc import RpcProblem
from psyche_lightning_solana.client.sender import Sender

logger = logging.getLogger(__name__)

FEW = 100
"""With fewer transactions left, the node says so."""
LAST = 10
"""With so few left, the node leaves the run while it can."""
LOOK_EVERY = 8
"""Transactions after which it reads the balance again."""


class Purse:
    """The number of transactions that a wallet can pay for.

    Args:
        reader: the RPC services.
        sender: sends the wallet's transactions.
        cluster: the chain's name, for messages.
    """

    def __init__(self, reader: Reader, sender: Sender, cluster: str) -> None:
        self._reader = reader
        self._sender = sender
        self._cluster = cluster
        self._left: int | None = None
        self._sent = 0
        self._warned = False

    async def look(self) -> int:
        """Transactions that the balance pays, besides what the account itself must hold.

        Raises:
            RpcProblem: no service answers.
        """
        balance = await self._reader.balance(self._sender.wallet.public)
        spare = balance - await self._reader.rent(0)
        self._left, self._sent = max(0, spare) // self._sender.price, 0
        if self._left >= FEW:
            self._warned = False
        return self._left

    async def foresee(self, steps: int) -> None:
        """Say at a join whether the wallet lasts for the steps that the run has left; a node sends about one in each.

        Raises:
            RpcProblem: no service answers.
        """
        left = await self.look()
        if left >= steps + LAST:
            return
        self._warned = True
        logger.warning(
            "the wallet %s pays for about %d more transactions on %s, and the run has %d steps left, with up to one "
            "transaction in each. Send it %s; the node leaves the run when %d are left.",
            self._sender.wallet.public,
            left,
            self._cluster,
            steps,
            sol((steps + LAST - left) * self._sender.price),
            LAST,
        )

    async def sent(self) -> bool:
        """Count a transaction; returns whether the wallet runs dry, so that the node should leave now."""
        self._sent += 1
        if self._left is None or self._sent >= LOOK_EVERY or self._left - self._sent <= 2 * LAST:
            try:
                await self.look()
            except RpcProblem:
                return False  # the next one looks again
        assert self._left is not None
        left = self._left - self._sent
        if left < FEW and not self._warned:
            self._warned = True
            logger.warning(
                "the wallet %s pays for about %d more transactions on %s; the node leaves the run when %d are left",
                self._sender.wallet.public,
                left,
                self._cluster,
                LAST,
            )
        return left <= LAST
