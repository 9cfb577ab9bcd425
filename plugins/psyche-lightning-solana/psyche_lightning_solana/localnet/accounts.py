"""Accounts as they were at each slot that somebody may still ask for."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterator

from solders.account import Account
from solders.pubkey import Pubkey


class Accounts:
    """Every account that a transaction changed, in versions by slot.

    Versions older than the newest finalized one are dropped, so there are as many of an account as slots between that
    and now in which it changed.
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
        """Store an account as of a slot, which is never before those stored already; without lamports it is gone."""
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
        """An account at the end of a slot; None if there was none."""
        versions = self._versions.get(key, ())
        place = bisect.bisect_right(versions, slot, key=lambda version: version[0])
        return versions[place - 1][1] if place else None

    def owned(self, slot: int, program: Pubkey) -> Iterator[tuple[Pubkey, Account]]:
        """The accounts of a program at a slot, by address."""
        for key in sorted(self._owners.get(program, ()), key=bytes):
            account = self.get(slot, key)
            if account is not None and account.owner == program:
                yield key, account

    def settle(self, slot: int) -> None:
        """Forget what nobody can see who looks at this slot or a later one."""
        self._settled = slot
        while self._pending and self._pending[0][0] <= slot:
            _, key = self._pending.popleft()
            versions = self._versions.get(key)
            if versions is None:  # gone, and the version after this one has settled already
                continue
            older = bisect.bisect_right(versions, slot, key=lambda version: version[0]) - 1
            dropped = versions[:older]
            del versions[:older]
            if len(versions) == 1 and versions[0][1] is None:
                del self._versions[key]
            kept = {account.owner for _, account in versions if account is not None}
            for owner in {account.owner for _, account in dropped if account is not None} - kept:
                self._disown(owner, key)

    def newest(self) -> Iterator[tuple[Pubkey, Account]]:
        """Every account as it is now."""
        for key, versions in self._versions.items():
            if versions[-1][1] is not None:
                yield key, versions[-1][1]

    def _disown(self, owner: Pubkey, key: Pubkey) -> None:
        keys = self._owners.get(owner, {})
        keys.pop(key, None)
        if not keys:
            self._owners.pop(owner, None)
