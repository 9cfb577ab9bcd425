"""The transactions that touched a run, from the chain: payer, instructions, cost and result."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import based58
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.transaction import VersionedTransaction

from psyche_lightning_solana.client.reader import PAGE, Reader
from psyche_lightning_solana.client.rpc import RpcProblem, error_name

WIDTH = 8
"""Transactions requested at once."""
AT_ONCE = 64
"""Transactions read before it looks whether they suffice."""
MAX_TRANSACTIONS = 20_000
TRIES = 5


@dataclass(frozen=True)
class Call:
    """One instruction to a program, from the transaction itself or from another program.

    Attributes:
        program: receiver.
        data: its bytes.
        accounts: the accounts that it names.
    """

    program: Pubkey
    data: bytes
    accounts: tuple[Pubkey, ...]


@dataclass(frozen=True)
class Entry:
    """A landed transaction.

    Attributes:
        signature: its first signature in base58.
        slot: its slot.
        time: the chain's clock there, in Unix seconds.
        payer: its payer.
        error: JSON of its ``TransactionError``; None when it succeeded.
        units: compute units that it used.
        fee: lamports that it cost.
        calls: its instructions, each followed by its inner ones.
        logs: the programs' lines.
        size: bytes.
    """

    signature: str
    slot: int
    time: int
    payer: Pubkey
    error: Any
    units: int
    fee: int
    calls: tuple[Call, ...]
    logs: tuple[str, ...]
    size: int

    @property
    def result(self) -> str:
        """``ok``, or the error's name."""
        return "ok" if self.error is None else error_name(self.error)


class Ledger:
    """Reads the transactions of one account, each only once.

    Args:
        reader: the RPC services.
        key: the account.
    """

    def __init__(self, reader: Reader, key: Pubkey) -> None:
        self._reader = reader
        self._key = key
        self._entries: list[Entry] = []
        self._lock = asyncio.Lock()

    async def entries(self, *, since: int = 0, enough: Callable[[Entry], bool] | None = None) -> list[Entry]:
        """Transactions so far, oldest first, and at most the newest 20,000.

        Args:
            since: Unix seconds; earlier ones are optional.
            enough: whether those before this one are optional.

        Raises:
            RpcProblem: no service answers, or it no longer keeps some of them.
        """
        async with self._lock:
            until = Signature.from_string(self._entries[-1].signature) if self._entries else None
            found: list[Entry] = []  # newest first
            before: Signature | None = None
            over = False
            while not over and len(found) < MAX_TRANSACTIONS:
                page = await self._reader.signatures(self._key, before, until)
                for at in range(0, len(page), AT_ONCE):
                    rows = page[at : at + AT_ONCE]
                    wanted = [row for row in rows if (row.get("blockTime") or since) >= since]
                    gate = asyncio.Semaphore(WIDTH)
                    read = await asyncio.gather(*(self._entry(row, gate) for row in wanted))
                    found += read
                    over = len(wanted) < len(rows) or (enough is not None and any(map(enough, read)))
                    if over:
                        break
                if len(page) < PAGE:
                    break
                before = Signature.from_string(page[-1]["signature"])
            self._entries += reversed(found)
            return list(self._entries)

    async def _entry(self, row: Mapping[str, Any], gate: asyncio.Semaphore) -> Entry:
        signature = str(row["signature"])
        async with gate:
            for attempt in range(TRIES):
                found = await self._reader.transaction(Signature.from_string(signature))
                if found is not None:
                    return _decode(signature, found)
                await asyncio.sleep(0.2 * (attempt + 1))  # listed, but not available yet
        raise RpcProblem(f"it lists the transaction {signature[:12]} and does not have it", retryable=True)


def _decode(signature: str, found: Mapping[str, Any]) -> Entry:
    try:
        meta = found["meta"]
        raw = base64.b64decode(found["transaction"][0])
        transaction = VersionedTransaction.from_bytes(raw)
        keys = list(transaction.message.account_keys)
        loaded = meta.get("loadedAddresses") or {}
        keys += [Pubkey.from_string(key) for kind in ("writable", "readonly") for key in loaded.get(kind, ())]
        return Entry(
            signature=signature,
            slot=_whole(found["slot"]),
            time=_whole(found.get("blockTime") or 0),
            payer=keys[0],
            error=meta.get("err"),
            units=int(meta.get("computeUnitsConsumed") or 0),
            fee=int(meta["fee"]),
            calls=tuple(_calls(transaction, keys, meta)),
            logs=tuple(str(line) for line in meta.get("logMessages") or ()),
            size=len(raw),
        )
    except (TypeError, ValueError, LookupError, AttributeError, binascii.Error):
        raise RpcProblem(f"it gave the transaction {signature[:12]} in a malformed way", retryable=True) from None


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r:.40} is no slot and no time")
    return value


def _calls(transaction: VersionedTransaction, keys: list[Pubkey], meta: Mapping[str, Any]) -> Iterator[Call]:
    inner = {int(group["index"]): group["instructions"] for group in meta.get("innerInstructions") or ()}
    for place, part in enumerate(transaction.message.instructions):
        yield Call(keys[part.program_id_index], bytes(part.data), tuple(keys[i] for i in part.accounts))
        for led in inner.get(place, ()):
            accounts = tuple(keys[i] for i in led["accounts"])
            yield Call(keys[led["programIdIndex"]], bytes(based58.b58decode(led["data"].encode())), accounts)
