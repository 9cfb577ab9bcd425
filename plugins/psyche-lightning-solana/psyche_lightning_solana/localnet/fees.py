"""What a transaction costs: signatures, and priority by compute units (Agave's ``fee`` and ``compute-budget``)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from solders.message import Message, MessageV0
from solders.pubkey import Pubkey

LAMPORTS_PER_SIGNATURE = 5000
MAX_COMPUTE_UNITS = 1_400_000
DEFAULT_UNITS = 200_000
"""Compute units of an instruction when the transaction sets no limit."""
BUILTIN_UNITS = 3_000
"""The same for an instruction of a built-in program (SIMD-0170)."""

COMPUTE_BUDGET = Pubkey.from_string("ComputeBudget111111111111111111111111111111")
# These carry signatures of their own; the first byte of their data says how many.
PRECOMPILES = frozenset(
    Pubkey.from_string(text)
    for text in (
        "Ed25519SigVerify111111111111111111111111111",
        "KeccakSecp256k11111111111111111111111111111",
        "Secp256r1SigVerify1111111111111111111111111",
    )
)
BUILTINS = PRECOMPILES | frozenset(
    Pubkey.from_string(text)
    for text in (
        "11111111111111111111111111111111",
        "Vote111111111111111111111111111111111111111",
        "BPFLoader1111111111111111111111111111111111",
        "BPFLoader2111111111111111111111111111111111",
        "BPFLoaderUpgradeab1e11111111111111111111111",
        "ComputeBudget111111111111111111111111111111",
    )
)

_LIMIT, _PRICE = 2, 3
MICRO = 1_000_000


@dataclass(frozen=True)
class Fee:
    """The price of a transaction.

    Attributes:
        base: lamports for signatures.
        priority: lamports for priority: price times the limit of units, rounded up.
        price: micro-lamports for each compute unit.
        limit: compute units that the transaction may use.
    """

    base: int
    priority: int
    price: int
    limit: int

    @property
    def total(self) -> int:
        """Lamports."""
        return self.base + self.priority


def fee_of(message: Message | MessageV0) -> Fee:
    """The fee of a message; one that does not say its limit is charged for the default one."""
    keys = message.account_keys
    signatures = message.header.num_required_signatures
    limit: int | None = None
    price = default = 0
    for instruction in message.instructions:
        program = keys[instruction.program_id_index]
        data = bytes(instruction.data)
        default += BUILTIN_UNITS if program in BUILTINS else DEFAULT_UNITS
        if program in PRECOMPILES and data:
            signatures += data[0]
        elif program == COMPUTE_BUDGET and len(data) >= 5 and data[0] == _LIMIT:
            limit = struct.unpack_from("<I", data, 1)[0]
        elif program == COMPUTE_BUDGET and len(data) >= 9 and data[0] == _PRICE:
            price = struct.unpack_from("<Q", data, 1)[0]
    limit = min(MAX_COMPUTE_UNITS, default if limit is None else limit)
    return Fee(signatures * LAMPORTS_PER_SIGNATURE, -(-price * limit // MICRO), price, limit)
