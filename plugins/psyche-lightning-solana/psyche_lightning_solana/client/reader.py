"""A client's reads from the chain: accounts at one slot, results of transactions, prices of storage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from solders.account_decoder import UiAccountEncoding
from solders.commitment_config import CommitmentLevel
from solders.hash import Hash
from solders.pubkey import Pubkey
from solders.rpc.config import (
    RpcAccountInfoConfig,
    RpcContextConfig,
    RpcSendTransactionConfig,
    RpcSignaturesForAddressConfig,
    RpcSignatureStatusConfig,
    RpcTransactionConfig,
)
from solders.rpc.requests import (
    Body,
    GetBalance,
    GetEpochInfo,
    GetGenesisHash,
    GetMinimumBalanceForRentExemption,
    GetMultipleAccounts,
    GetSignaturesForAddress,
    GetSignatureStatuses,
    GetTransaction,
    SendRawTransaction,
)
from solders.rpc.responses import (
    GetBalanceResp,
    GetEpochInfoResp,
    GetGenesisHashResp,
    GetMinimumBalanceForRentExemptionResp,
    GetMultipleAccountsResp,
)
from solders.signature import Signature
from solders.transaction_status import UiTransactionEncoding

from psyche_lightning_solana.client.rpc import PoolProvider, RpcProblem

LEVELS = {
    "processed": CommitmentLevel.Processed,
    "confirmed": CommitmentLevel.Confirmed,
    "finalized": CommitmentLevel.Finalized,
}
MOST_ACCOUNTS = 100
"""Accounts in one request (the limit of ``getMultipleAccounts``)."""
PAGE = 1000


@dataclass(frozen=True)
class Account:
    """An account's state.

    Attributes:
        owner: the program that may change it.
        data: its bytes.
        lamports: its balance.
        executable: whether it is a program.
    """

    owner: Pubkey
    data: bytes
    lamports: int
    executable: bool


@dataclass(frozen=True)
class Status:
    """A transaction's status.

    Attributes:
        slot: its slot.
        error: JSON of its ``TransactionError``; None when it succeeded.
        level: ``processed``, ``confirmed`` or ``finalized``.
    """

    slot: int
    error: Any
    level: str


class Reader:
    """Asks the RPC services.

    Args:
        provider: them.
        commitment: the commitment of reads.

    All methods raise :class:`~psyche_lightning_solana.client.rpc.RpcProblem`.
    """

    def __init__(self, provider: PoolProvider, commitment: str) -> None:
        self.provider = provider
        self.level = LEVELS[commitment]
        # Services keep no ledger history below this level.
        self._past = max(self.level, CommitmentLevel.Confirmed, key=int)

    async def accounts(self, keys: Sequence[Pubkey], min_slot: int | None = None) -> tuple[int, list[Account | None]]:
        """At most 100 accounts as of one slot, and that slot; None for a missing account."""
        config = RpcAccountInfoConfig(
            encoding=UiAccountEncoding.Base64Zstd, commitment=self.level, min_context_slot=min_slot
        )

        def check(answer: GetMultipleAccountsResp) -> None:
            if len(answer.value) != len(keys):
                raise RpcProblem("it answered with another number of accounts", retryable=True)
            if min_slot is not None and answer.context.slot < min_slot:
                raise RpcProblem(f"it is behind: at slot {answer.context.slot}, not {min_slot}", retryable=True)

        request = GetMultipleAccounts(list(keys), config)
        answer = await self.provider.make_request(request, GetMultipleAccountsResp, check)
        return answer.context.slot, [
            None if a is None else Account(a.owner, bytes(a.data), a.lamports, a.executable) for a in answer.value
        ]

    async def account(self, key: Pubkey) -> Account | None:
        """One account; None if it is missing."""
        return (await self.accounts([key]))[1][0]

    async def many(self, keys: Sequence[Pubkey]) -> list[Account | None]:
        """Any number of accounts, each hundred as of one slot."""
        found: list[Account | None] = []
        for at in range(0, len(keys), MOST_ACCOUNTS):
            found += (await self.accounts(keys[at : at + MOST_ACCOUNTS]))[1]
        return found

    async def balance(self, key: Pubkey) -> int:
        """Lamports of an account; 0 if it is missing."""
        request = GetBalance(key, RpcContextConfig(commitment=self.level))
        return (await self.provider.make_request(request, GetBalanceResp)).value

    async def rent(self, size: int) -> int:
        """Lamports that an account of this size must hold to stay."""
        request = GetMinimumBalanceForRentExemption(size)
        return (await self.provider.make_request(request, GetMinimumBalanceForRentExemptionResp)).value

    async def genesis(self) -> Hash:
        """Hash of the first block."""
        return (await self.provider.make_request(GetGenesisHash(), GetGenesisHashResp)).value

    async def height(self) -> tuple[int, int]:
        """The newest slot, and its block height, which limits a blockhash's lifetime."""
        request = GetEpochInfo(RpcContextConfig(commitment=self.level))
        info = (await self.provider.make_request(request, GetEpochInfoResp)).value
        return info.absolute_slot, info.block_height

    async def send(self, transaction: bytes, min_slot: int | None = None) -> str:
        """Send a signed transaction after a preflight; returns its signature. Resending is harmless."""
        config = RpcSendTransactionConfig(preflight_commitment=self.level, max_retries=0, min_context_slot=min_slot)
        return str(await self._json(SendRawTransaction(transaction, config)))

    async def status(self, signature: Signature, *, past: bool = False) -> tuple[int, Status | None]:
        """The newest slot, and a transaction's status; None if unknown.

        Args:
            signature: its first signature.
            past: whether to search older blocks, too.
        """
        request = GetSignatureStatuses([signature], RpcSignatureStatusConfig(search_transaction_history=past))
        answer = await self._json(request)
        try:
            slot, (found,) = int(answer["context"]["slot"]), answer["value"]
            if found is None:
                return slot, None
            level = str(found.get("confirmationStatus") or "processed")
            return slot, Status(int(found["slot"]), found.get("err"), level if level in LEVELS else "processed")
        except (TypeError, ValueError, LookupError, AttributeError):
            raise RpcProblem("it answered with malformed statuses", retryable=True) from None

    async def transaction(self, signature: Signature) -> dict[str, Any] | None:
        """A landed transaction with its result, in the JSON of ``getTransaction``; None if unknown."""
        config = RpcTransactionConfig(UiTransactionEncoding.Base64, self._past, 0)
        answer = await self._json(GetTransaction(signature, config))
        if answer is None:
            return None
        if not isinstance(answer, dict) or not isinstance(answer.get("meta"), dict):
            raise RpcProblem("it answered with a malformed transaction", retryable=True)
        return answer

    async def signatures(
        self, key: Pubkey, before: Signature | None = None, until: Signature | None = None
    ) -> list[dict[str, Any]]:
        """Transactions that name the account, newest first, at most 1000: ``signature``, ``slot``, ``err`` and more."""
        config = RpcSignaturesForAddressConfig(before, until, PAGE, self._past)
        answer = await self._json(GetSignaturesForAddress(key, config))
        if not isinstance(answer, list) or not all(isinstance(row, dict) and "signature" in row for row in answer):
            raise RpcProblem("it answered with a malformed list of signatures", retryable=True)
        return answer

    async def _json(self, request: Body) -> Any:
        return json.loads(await self.provider.make_request_unparsed(request))["result"]
