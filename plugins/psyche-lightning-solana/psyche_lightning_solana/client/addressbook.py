"""Nodes' transport addresses: each node may keep an account with its address on the chain."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from psyche_lightning.errors import WireError
from psyche_lightning.protocol.state import RunState
from psyche_lightning_solana.client.reader import Account
from psyche_lightning_solana.client.run import SolanaRun
from psyche_lightning_solana.interface import COORDINATOR
from psyche_lightning_solana.layout import discriminator

MAX_AGE = 15.0
"""Seconds before a known address is looked up again: nodes may move."""


class AddressBook:
    """The addresses of a run's nodes, by wallet.

    Args:
        run: the run.
        clock: monotonic seconds.
    """

    def __init__(self, run: SolanaRun, clock: Callable[[], float] = time.monotonic) -> None:
        self._run = run
        self._clock = clock
        self._known: dict[bytes, str] = {}
        self._at: dict[bytes, float] = {}

    async def update(self, signers: Iterable[bytes], *, all_of_them: bool = False) -> bool:
        """Look up unknown and old addresses; returns whether any changed.

        Raises:
            RpcProblem: no service answers.
        """
        now = self._clock()
        old = [s for s in dict.fromkeys(signers) if all_of_them or now - self._at.get(s, float("-inf")) >= MAX_AGE]
        if not old:
            return False
        found = await self._run.reader.many([self._run.node_address(signer) for signer in old])
        before = dict(self._known)
        for signer, account in zip(old, found, strict=True):
            self._known[signer], self._at[signer] = self._read(account), now
        return before != self._known

    def _read(self, account: Account | None) -> str:
        kind = COORDINATOR.accounts["NodeAddress"]
        if account is None or account.owner != self._run.program or account.data[:8] != discriminator(kind.name):
            return ""
        try:
            values = kind.decode(account.data[8:])
            address: str = values["address"][: values["len"]].decode()
        except (WireError, UnicodeDecodeError):
            return ""
        return address

    def get(self, signer: bytes) -> str:
        """A node's address; empty if it has none."""
        return self._known.get(signer, "")

    def fill(self, state: RunState) -> RunState:
        """The state with its clients' addresses."""
        return replace(
            state,
            clients=tuple(replace(c, address=self.get(c.signer)) for c in state.clients),
            exited_clients=tuple(replace(c, address=self.get(c.signer)) for c in state.exited_clients),
        )
