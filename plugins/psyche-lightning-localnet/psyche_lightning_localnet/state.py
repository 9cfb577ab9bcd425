"""Keeps a chain's accounts, at each slot that clients can still see, and its transactions."""

from __future__ import annotations

import bisect
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from solders.account import Account
from solders.pubkey import Pubkey


class Accounts:
    """All accounts that transactions changed, each with a version for each slot in which it changed.

    Versions that are older than the newest finalized one are dropped.
    """

    def __init__(self) -> None:
        self._versions: dict[Pubkey, list[tuple[int, Account | None]]] = {}
        self._owners: dict[Pubkey, dict[Pubkey, None]] = {}
        self._pending: deque[tuple[int, Pubkey]] = deque()
        self._settled = -1

    def __len__(self) -> int:
        return len(self._versions)

    def __contains__(self, key: Pubkey) -> bool:
        return key in self._versions

    def put(self, slot: int, key: Pubkey, account: Account) -> None:
        """Store an account at the newest slot; an account without lamports no longer exists."""
        kept = account if account.lamports else None
        versions = self._versions.setdefault(key, [])
        fresh = not versions or versions[-1][0] != slot
        if not fresh:
            del versions[-1]
        versions.append((slot, kept))
        if fresh or slot <= self._settled:
            self._pending.append((slot, key))
        if kept is not None:
            self._owners.setdefault(kept.owner, {})[key] = None

    def get(self, slot: int, key: Pubkey) -> Account | None:
        """An account at the end of a slot; None if it does not exist."""
        versions = self._versions.get(key, ())
        place = bisect.bisect_right(versions, slot, key=lambda version: version[0])
        return versions[place - 1][1] if place else None

    def owned(self, slot: int, program: Pubkey) -> Iterator[tuple[Pubkey, Account]]:
        """The accounts of a program at a slot, sorted by address."""
        for key in sorted(self._owners.get(program, ()), key=bytes):
            account = self.get(slot, key)
            if account is not None and account.owner == program:
                yield key, account

    def settle(self, slot: int) -> None:
        """Drop versions that are not visible at this slot or later."""
        self._settled = slot
        while self._pending and self._pending[0][0] <= slot:
            _, key = self._pending.popleft()
            versions = self._versions.get(key)
            if versions is None:  # the account no longer exists, and a later version was settled
                continue
            older = bisect.bisect_right(versions, slot, key=lambda version: version[0]) - 1
            dropped = versions[:older]
            del versions[:older]
            if len(versions) == 1 and versions[0][1] is None:
                del self._versions[key]
            kept = {account.owner for _, account in versions if account is not None}
            for owner in {account.owner for _, account in dropped if account is not None} - kept:
                self._disown(owner, key)

    def visible(self, slot: int) -> Iterator[tuple[Pubkey, Account]]:
        """All accounts at the end of a slot."""
        for key in self._versions:
            account = self.get(slot, key)
            if account is not None:
                yield key, account

    def newest(self) -> Iterator[tuple[Pubkey, Account]]:
        """All current accounts."""
        for key, versions in self._versions.items():
            if versions[-1][1] is not None:
                yield key, versions[-1][1]

    def _disown(self, owner: Pubkey, key: Pubkey) -> None:
        keys = self._owners.get(owner, {})
        keys.pop(key, None)
        if not keys:
            self._owners.pop(owner, None)


@dataclass(frozen=True)
class Record:
    """A transaction that landed. All values are plain, as the ledger and the answers need them.

    Attributes:
        signature: its first signature in base58, which identifies it.
        slot: the slot in which it landed.
        time: time of that slot in seconds since 1970.
        transaction: its bytes.
        addresses: the accounts that it names, in base58.
        static: number of these accounts that its message has; the others come from lookup tables.
        writable_loaded: number of accounts from lookup tables that it may write to.
        err: its error as JSON in the form of a validator, or None.
        logs: log lines of the runtime and the programs.
        units: compute units that it used.
        fee: lamports that it paid.
        price: micro-lamports that it offered for each compute unit.
        before: balances of the accounts in lamports before it.
        after: balances of the accounts in lamports after it.
        tokens_before: token balances before it, as ``getTransaction`` shows them.
        tokens_after: token balances after it, as ``getTransaction`` shows them.
        inner: inner instructions as ``getTransaction`` shows them.
        return_data: as ``getTransaction`` shows it, or None.
        memo: as ``getSignaturesForAddress`` shows it, or None.
    """

    signature: str
    slot: int
    time: int
    transaction: bytes
    addresses: tuple[str, ...]
    static: int
    writable_loaded: int
    err: Any
    logs: tuple[str, ...]
    units: int
    fee: int
    price: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    tokens_before: tuple[dict[str, Any], ...]
    tokens_after: tuple[dict[str, Any], ...]
    inner: tuple[dict[str, Any], ...]
    return_data: dict[str, Any] | None
    memo: str | None


class History:
    """Finds records by signature, by address and by slot.

    Args:
        limit: the most records to keep; the oldest are forgotten.

    Attributes:
        count: number of all records, including forgotten ones.
    """

    def __init__(self, limit: int) -> None:
        self.count = 0
        self._limit = limit
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._by_address: dict[str, deque[str]] = {}
        self._by_slot: dict[int, deque[str]] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def add(self, record: Record) -> None:
        """Add the newest record."""
        self.count += 1
        self._records[record.signature] = record
        self._by_slot.setdefault(record.slot, deque()).append(record.signature)
        for address in record.addresses:
            self._by_address.setdefault(address, deque()).append(record.signature)
        while len(self._records) > self._limit:
            _, oldest = self._records.popitem(last=False)
            _forget_first(self._by_slot, oldest.slot)
            for address in oldest.addresses:
                _forget_first(self._by_address, address)

    @property
    def first_slot(self) -> int:
        """The first slot from which on no record is forgotten."""
        oldest = next(iter(self._records.values()), None)
        return 0 if oldest is None or self.count == len(self._records) else oldest.slot + 1

    def at(self, slot: int) -> list[Record]:
        """The remembered records of a slot, in order."""
        return [self._records[signature] for signature in self._by_slot.get(slot, ())]

    def count_at(self, slot: int) -> int:
        """The number of all records up to a slot, including forgotten ones."""
        later = 0
        for record in self.newest():
            if record.slot <= slot:
                break
            later += 1
        return self.count - later

    def get(self, signature: str) -> Record | None:
        """A record by its signature; None if it is unknown or forgotten."""
        return self._records.get(signature)

    def newest(self) -> Iterator[Record]:
        """All records, newest first."""
        return reversed(self._records.values())

    def of(self, address: str, before: str | None = None, until: str | None = None) -> Iterator[Record]:
        """Records that name an address, newest first: those older than ``before`` and newer than ``until``."""
        waiting = before is not None
        for signature in reversed(self._by_address.get(address, ())):
            if waiting:
                waiting = signature != before
            elif signature == until:
                return
            else:
                yield self._records[signature]


def _forget_first(index: dict[Any, deque[str]], key: Any) -> None:
    """Drop the oldest record from an index: it is the first one of each of its keys."""
    signatures = index[key]
    signatures.popleft()
    if not signatures:
        del index[key]
