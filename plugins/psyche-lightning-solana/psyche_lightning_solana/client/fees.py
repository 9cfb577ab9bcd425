"""What a transaction may cost: its compute limit and its priority fee, both within the user's bounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from solders.compute_budget import set_compute_unit_limit, set_compute_unit_price
from solders.instruction import Instruction
from solders.pubkey import Pubkey

from psyche_lightning_solana.client.cluster import Options
from psyche_lightning_solana.client.problems import RpcProblem
from psyche_lightning_solana.client.rpc import PoolProvider

LAMPORTS = 1_000_000_000
"""In one SOL."""
SIGNATURE_FEE = 5_000
"""Lamports for each signature of a transaction."""
PRICE_AGE = 15.0
PERCENTILE = 0.75
MOST_ACCOUNTS = 128
VARIANTS = 256


def sol(lamports: int) -> str:
    """An amount as people read it."""
    return f"{lamports / LAMPORTS:.9f}".rstrip("0").rstrip(".") + " SOL"


def budget(limit: int, price: int) -> list[Instruction]:
    """The instructions that give a transaction its compute limit and its price in micro-lamports for each unit."""
    return [set_compute_unit_limit(limit), set_compute_unit_price(price)]


class Fees:
    """Chooses limit and price of each transaction.

    Args:
        provider: the RPC services, which know what others pay.
        options: the user's bounds.
        clock: monotonic seconds.
    """

    def __init__(self, provider: PoolProvider, options: Options, clock: Callable[[], float] = time.monotonic) -> None:
        self._provider = provider
        self._options = options
        self._clock = clock
        self._prices: dict[tuple[Pubkey, ...], tuple[float, int]] = {}
        self._count = 0

    async def instructions(self, units: int, accounts: Sequence[Pubkey]) -> list[Instruction]:
        """The two instructions that stand before the others.

        Args:
            units: compute units that the transaction may need.
            accounts: those that it writes, whose price is looked up.
        """
        price = await self.price(accounts)
        # No two transactions of a wallet are the same bytes, even within one blockhash: a chain takes equal ones for
        # one. That is wanted for one that is sent again, and wrong for two ticks.
        self._count += 1
        limit = max(1, min(units, self._options.compute_limit - VARIANTS)) + self._count % VARIANTS
        return budget(min(limit, self._options.compute_limit), price)

    async def price(self, accounts: Sequence[Pubkey]) -> int:
        """Micro-lamports for each compute unit: what three quarters of the recent transactions paid at most."""
        low, high = self._options.priority_fee_min, self._options.priority_fee_max
        if low == high:
            return low
        key = tuple(accounts)[:MOST_ACCOUNTS]
        at, price = self._prices.get(key, (float("-inf"), low))
        if self._clock() - at < PRICE_AGE:
            return price
        try:
            answer = await self._provider.call("getRecentPrioritizationFees", [[str(account) for account in key]])
            paid = sorted(int(item["prioritizationFee"]) for item in answer)
        except (RpcProblem, TypeError, ValueError, LookupError):
            return price  # a service may not know; the transaction goes for what was paid last
        price = min(max(paid[int(len(paid) * PERCENTILE)] if paid else 0, low), high)
        self._prices[key] = (self._clock(), price)
        return price
