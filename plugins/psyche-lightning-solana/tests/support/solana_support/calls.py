"""Instructions for tests, right or wrong: whatever accounts, flags and bytes a test wants to send."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from psyche_lightning_solana.interface import InstructionSpec
from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey


def call(
    program: Pubkey,
    spec: InstructionSpec,
    accounts: Mapping[str, Pubkey | AccountMeta],
    arguments: Mapping[str, Any] | bytes = b"",
) -> Instruction:
    """An instruction as its table says.

    Args:
        program: the program's address.
        spec: the instruction.
        accounts: account name to address; one with flags (an ``AccountMeta``) replaces the table's flags.
        arguments: values, or bytes that stand in their place.
    """
    data = arguments if isinstance(arguments, bytes) else spec.arguments.write(dict(arguments))
    metas = []
    for meta in (*spec.accounts, *(each for each in spec.more if each.name in accounts)):
        account = accounts[meta.name]
        if not isinstance(account, AccountMeta):
            account = AccountMeta(account, meta.signer, meta.writable)
        metas.append(account)
    return Instruction(program, spec.discriminator + data, metas)
