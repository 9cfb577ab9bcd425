"""The coordinator program through anchorpy: its IDL, its ``Program``, and a ``Provider`` over the pool of RPC services.

It builds the owners' instructions, and is the reference for those that nodes build. The module
:mod:`~psyche_lightning_solana.client.sender` sends them: anchorpy's provider sends once, without limits and price.
anchorpy takes a second to import, so import this module only where needed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from anchorpy.program.context import Context
from anchorpy.program.core import Program
from anchorpy.provider import Provider, Wallet
from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey

from psyche_lightning_solana import legacy_idl
from psyche_lightning_solana.client.rpc import PoolClient, PoolProvider
from psyche_lightning_solana.instructions import RunKeys
from psyche_lightning_solana.interface import COORDINATOR


@functools.cache
def _idl() -> Any:
    return legacy_idl.load("coordinator")


def program(address: Pubkey, pool: PoolProvider, commitment: str) -> Program:
    """The coordinator program at an address. Its provider has no key and only reads."""
    return Program(_idl(), address, Provider(PoolClient(pool, commitment), Wallet.dummy()))


@dataclass(frozen=True)
class AnchorKeys(RunKeys):
    """A run's addresses; anchorpy builds the instructions.

    Attributes:
        anchor: the program.
    """

    anchor: Program = field(repr=False)

    def _instruction(
        self, name: str, accounts: Mapping[str, Pubkey], arguments: Mapping[str, Any], trailer: bytes
    ) -> Instruction:
        spec = COORDINATOR.instructions[name]
        # anchorpy has a class for every struct and enum; its coder builds them from the canonical bytes.
        values = self.anchor.coder.instruction.parse(spec.discriminator + spec.arguments.write(dict(arguments))).data
        more = [AccountMeta(accounts[m.name], m.signer, m.writable) for m in spec.more if m.name in accounts]
        named = {meta.name: accounts[meta.name] for meta in spec.accounts}
        given = [values[argument] for argument in spec.arguments.fields]
        built = self.anchor.instruction[name](*given, ctx=Context(accounts=named, remaining_accounts=more))
        # The IDL, which Psyche's tools share, lacks the trailer after Psyche's arguments.
        return Instruction(built.program_id, bytes(built.data) + trailer, built.accounts)
