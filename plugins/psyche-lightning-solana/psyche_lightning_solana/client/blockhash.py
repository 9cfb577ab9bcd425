"""The newest blockhash, asked for rarely: one serves for 150 blocks, about a minute."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from solders.commitment_config import CommitmentLevel
from solders.hash import Hash
from solders.rpc.config import RpcContextConfig
from solders.rpc.requests import GetLatestBlockhash
from solders.rpc.responses import GetLatestBlockhashResp

from psyche_lightning_solana.client.rpc import PoolProvider

MAX_AGE = 10.0
"""Seconds after which a newer one is asked for: a transaction should have most of its life before it."""


@dataclass(frozen=True)
class Blockhash:
    """What gives a transaction its bounded life.

    Attributes:
        value: the hash.
        last_valid: height of the last block that takes a transaction with it.
    """

    value: Hash
    last_valid: int


class Blockhashes:
    """A cache of one.

    Args:
        provider: the RPC services.
        commitment: how settled its block must be.
        clock: monotonic seconds.
    """

    def __init__(
        self, provider: PoolProvider, commitment: CommitmentLevel, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._provider = provider
        self._commitment = commitment
        self._clock = clock
        self._known: Blockhash | None = None
        self._at = float("-inf")
        self._lock = asyncio.Lock()

    async def get(self) -> Blockhash:
        """A fresh one.

        Raises:
            RpcProblem: no service gives one.
        """
        async with self._lock:
            if self._known is None or self._clock() - self._at > MAX_AGE:
                answer = await self._provider.make_request(
                    GetLatestBlockhash(RpcContextConfig(commitment=self._commitment)), GetLatestBlockhashResp
                )
                self._known = Blockhash(answer.value.blockhash, answer.value.last_valid_block_height)
                self._at = self._clock()
            return self._known

    def forget(self, stale: Blockhash) -> None:
        """Do not give out this one again."""
        if self._known == stale:
            self._known = None
