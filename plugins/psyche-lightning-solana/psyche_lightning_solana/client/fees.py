"""A transaction's compute limit and priority fee, both within the user's bounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from solders.compute_budget import set_compute_unit_limit, set_compute_unit_price
from solders.instruction import Instruction
from solders.pubkey import Pubkey

from psyche_lightning_solana.client.cluster import MAX_COMPUTE_UNITS, Options
from psyche_lightning_solana.client.rpc import PoolProvider, RpcProblem

LAMPORTS = 1_000_000_000
"""In one SOL."""
SIGNATURE_FEE = 5_000
"""Lamports for each signature of a transaction."""
PRICE_AGE = 15.0
PERCENTILE = 0.75
MOST_ACCOUNTS = 128
VARIANTS = 256


def sol(lamports: int) -> str:
    """An amount in readable form."""
    return f"{lamports / LAMPORTS:.9f}".rstrip("0").rstrip(".") + " SOL"


def budget(limit: int, price: int) -> list[Instruction]:
    """The instructions that give a transaction its compute limit and its price in micro-lamports for each unit."""
    return [set_compute_unit_limit(limit), set_compute_unit_price(price)]


class Fees:
    """Chooses limit and price of each transaction.

    Args:
        provider: the RPC services, which report prices.
        options: the user's bounds.
        clock: monotonic seconds.

    Attributes:
        highest: lamports that the most expensive transaction with one signature cost at most.
    """

    def __init__(self, provider: PoolProvider, options: Options, clock: Callable[[], float] = time.monotonic) -> None:
        self._provider = provider
        self._options = options
        self._clock = clock
        self._prices: dict[tuple[Pubkey, ...], tuple[float, int]] = {}
        self._count = 0
        self.highest = SIGNATURE_FEE

    async def instructions(self, units: int, accounts: Sequence[Pubkey]) -> list[Instruction]:
        """The two instructions that precede the others.

        Args:
            units: compute units that the transaction may need.
            accounts: the written accounts, which set the price.
        """
        price = await self.price(accounts)
        # Two transactions of a wallet always differ, even within one blockhash: a chain treats equal bytes as one
        # transaction. That is right for a resent one, but wrong for two ticks.
        self._count += 1
        limit = max(1, min(units, self._options.compute_limit - VARIANTS)) + self._count % VARIANTS
        limit = min(limit, self._options.compute_limit)
        self.highest = max(self.highest, SIGNATURE_FEE + -(-limit * price // 1_000_000))
        return budget(limit, price)

    async def price(self, accounts: Sequence[Pubkey]) -> int:
        """Micro-lamports for each compute unit: the third quartile of the recent transactions' prices."""
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
            return price  # no service knows it: the transaction pays the last price
        price = min(max(paid[int(len(paid) * PERCENTILE)] if paid else 0, low), high)
        self._prices[key] = (self._clock(), price)
        return price


UNITS = {
    # The end of a round or an epoch takes the most. These values are about twice those measured with 256 clients (the
    # table in docs/solana-programs.md).
    "witness": 150_000,
    "tick": 150_000,
    "health_check": 500_000,
    "withdraw": 150_000,
    "kick": 150_000,
    "checkpoint": 150_000,
    "warmup_witness": 150_000,
    "join_run": 150_000,
    "set_address": 60_000,
    "init_coordinator": 100_000,
    "update": 60_000,
    "update_client_version": 30_000,
    "set_future_epoch_rates": 30_000,
    "set_manifest": 30_000,
    "set_paused": 60_000,
    "restart_from": 60_000,
    "free_coordinator": 30_000,
    # The authorizer and the treasurer; an address may take several tries to be found.
    "authorization_create": 60_000,
    "authorization_grantor_update": 30_000,
    "authorization_close": 30_000,
    "create manifest": 20_000,
    "write manifest": 20_000,
    "run_create": 250_000,
    "create_token_account": 60_000,
    "transfer": 20_000,
    "participant_create": 60_000,
    "participant_claim": 60_000,
}
"""Compute units that an instruction may need, by its name."""
FORWARDED = "treasurer:"
"""The name of a coordinator command that the treasurer forwards."""
FORWARDING = 60_000


def units(names: str) -> int:
    """The limit for a transaction.

    Args:
        names: its instructions, separated by ``+``; an unknown one gets a transaction's largest limit.
    """
    total = 0
    for name in names.split("+"):
        total += FORWARDING if name.startswith(FORWARDED) else 0
        total += UNITS.get(name.removeprefix(FORWARDED), MAX_COMPUTE_UNITS)
    return min(total, MAX_COMPUTE_UNITS)
