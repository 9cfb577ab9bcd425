"""A client's reads from the chain: accounts at one slot, results of transactions, prices of storage."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import based58
import zstandard
from solders.account_decoder import UiAccountEncoding, UiDataSliceConfig
from solders.commitment_config import CommitmentLevel
from solders.hash import Hash
from solders.pubkey import Pubkey
from solders.rpc.config import (
    RpcAccountInfoConfig,
    RpcContextConfig,
    RpcProgramAccountsConfig,
    RpcSendTransactionConfig,
    RpcSignaturesForAddressConfig,
    RpcSignatureStatusConfig,
    RpcTransactionConfig,
)
from solders.rpc.filter import Memcmp
from solders.rpc.requests import (
    Body,
    GetBalance,
    GetEpochInfo,
    GetGenesisHash,
    GetMinimumBalanceForRentExemption,
    GetMultipleAccounts,
    GetProgramAccounts,
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
MAX_ACCOUNT_SIZE = 10 * 1024 * 1024
"""The most bytes of an account on Solana."""


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


def _is_row(row: Any) -> bool:
    """Whether it lists a transaction."""
    try:
        Signature.from_string(row["signature"])
        time = row.get("blockTime")
    except (TypeError, ValueError, LookupError, AttributeError):
        return False
    return time is None or type(time) is int


def slot_of(result: Any) -> int:
    """The slot of an answer or a notification.

    Raises:
        ValueError, TypeError, LookupError: it has none.
    """
    slot = result["context"]["slot"]
    if type(slot) is not int or not 0 <= slot < 1 << 63:
        raise ValueError("it names no slot")
    return slot


def account_of(value: Any) -> Account | None:
    """An account from the JSON of a service; None for a missing one.

    Raises:
        ValueError, TypeError, LookupError: it is malformed, or larger than any account.
    """
    if value is None:
        return None
    (text, encoding), owner = value["data"], Pubkey.from_string(value["owner"])
    data = base64.b64decode(text, validate=True)
    if encoding == "base64+zstd":
        data = _decompressed(data)
    elif encoding != "base64":
        raise ValueError(f"an account in the encoding {encoding!r}")
    if type(value["lamports"]) is not int:
        raise TypeError("an account without a balance")
    return Account(owner, data, value["lamports"], value["executable"] is True)


def _decompressed(data: bytes) -> bytes:
    """Decompress an account; a few bytes of a hostile service might become any number."""
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(io.BytesIO(data))
        found = reader.read(MAX_ACCOUNT_SIZE + 1)
    except zstandard.ZstdError as error:
        raise ValueError("it is not compressed with zstd") from error
    if len(found) > MAX_ACCOUNT_SIZE:
        raise ValueError(f"an account of more than {MAX_ACCOUNT_SIZE} bytes")
    return found


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

        def decode(result: Any) -> tuple[int, list[Account | None]]:
            slot, found = slot_of(result), [account_of(value) for value in result["value"]]
            if len(found) != len(keys):
                raise RpcProblem("it answered with another number of accounts", retryable=True)
            if min_slot is not None and slot < min_slot:
                raise RpcProblem(f"it is behind: at slot {slot}, not {min_slot}", retryable=True)
            return slot, found

        return await self.provider.ask(GetMultipleAccounts(list(keys), config), decode)

    async def account(self, key: Pubkey) -> Account | None:
        """One account; None if it is missing."""
        return (await self.accounts([key]))[1][0]

    async def many(self, keys: Sequence[Pubkey]) -> list[Account | None]:
        """Any number of accounts, each hundred as of one slot."""
        found: list[Account | None] = []
        for at in range(0, len(keys), MOST_ACCOUNTS):
            found += (await self.accounts(keys[at : at + MOST_ACCOUNTS]))[1]
        return found

    async def owned(self, program: Pubkey, size: int, start: bytes, part: slice) -> dict[Pubkey, bytes]:
        """A part of each account of a program.

        Args:
            program: owns the accounts.
            size: bytes of such an account.
            start: how it begins.
            part: the wanted bytes.
        """
        wanted = UiDataSliceConfig(part.start, part.stop - part.start)
        config = RpcAccountInfoConfig(encoding=UiAccountEncoding.Base64, commitment=self.level, data_slice=wanted)
        filters: list[int | Memcmp] = [size, Memcmp(0, based58.b58encode(start).decode())]

        def decode(result: Any) -> dict[Pubkey, bytes]:
            found = {Pubkey.from_string(row["pubkey"]): account_of(row["account"]) for row in result}
            parts = {key: account.data for key, account in found.items() if account is not None}
            if any(len(data) != wanted.length for data in parts.values()):
                raise ValueError("it answered with another part of an account")
            return parts

        return await self.provider.ask(GetProgramAccounts(program, RpcProgramAccountsConfig(config, filters)), decode)

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
        if not isinstance(answer, list) or not all(map(_is_row, answer)):
            raise RpcProblem("it answered with a malformed list of signatures", retryable=True)
        return answer

    async def _json(self, request: Body) -> Any:
        return json.loads(await self.provider.make_request_unparsed(request))["result"]
