"""The transactions of the chain, the newest of them."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """A transaction that landed; everything in it is plain, as it is stored and answered.

    Attributes:
        signature: its first signature, by which it is known, in base58.
        slot: in which it landed.
        time: of that slot, seconds since 1970.
        transaction: its bytes.
        addresses: the accounts that it names, in base58.
        static: how many of them are in its message, and not out of lookup tables.
        writable_loaded: how many of the others it may write to.
        err: why it failed, as a cluster writes it, or None.
        logs: lines of runtime and programs.
        units: compute units used.
        fee: lamports paid.
        price: micro-lamports offered for each compute unit.
        before: balances of the accounts in lamports.
        after: the same, afterwards.
        tokens_before: token balances as ``getTransaction`` shows them.
        tokens_after: the same, afterwards.
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
    """Records by signature and by address.

    Args:
        limit: most records; the oldest are forgotten.
    """

    def __init__(self, limit: int) -> None:
        self.count = 0
        self._limit = limit
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._by_address: dict[str, deque[str]] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def add(self, record: Record) -> None:
        """Add the newest record."""
        self.count += 1
        self._records[record.signature] = record
        for address in record.addresses:
            self._by_address.setdefault(address, deque()).append(record.signature)
        while len(self._records) > self._limit:
            _, oldest = self._records.popitem(last=False)
            for address in oldest.addresses:
                signatures = self._by_address[address]
                signatures.popleft()  # the oldest record is the first of each of its addresses
                if not signatures:
                    del self._by_address[address]

    def get(self, signature: str) -> Record | None:
        """A record, or None if there is none or it is forgotten."""
        return self._records.get(signature)

    def newest(self) -> Iterator[Record]:
        """Records, newest first."""
        return reversed(self._records.values())

    def of(self, address: str, before: str | None = None, until: str | None = None) -> Iterator[Record]:
        """Records that name an address, newest first: those before ``before``, down to ``until`` and without it."""
        waiting = before is not None
        for signature in reversed(self._by_address.get(address, ())):
            if waiting:
                waiting = signature != before
            elif signature == until:
                return
            else:
                yield self._records[signature]
