"""Decodes transactions, checks their limits, finds their accounts, and computes their fees."""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Callable
from dataclasses import dataclass

import based58
from solders.account import Account
from solders.hash import Hash
from solders.instruction import CompiledInstruction
from solders.message import Message, MessageHeader, MessageV0, from_bytes_versioned
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.transaction import VersionedTransaction

from psyche_lightning_localnet.errors import invalid_params

MAX_SIZE = 1232
"""The most bytes of a transaction: the minimum MTU of IPv6, 1280, less 48 bytes of headers."""
MAX_BASE58, MAX_BASE64 = 1683, 1644
MAX_ACCOUNT_LOCKS = 64
LOOKUP_TABLE_META = 56
MEMO_PROGRAMS = frozenset(
    Pubkey.from_string(text)
    for text in ("MemoSq4gqABAXKb96qnH8TysNcWxMyWCqXgDLGmfcHr", "Memo1UhkJRfHyvLMcVucJwxXeuD728EqVDDwQDxFMNo")
)

_TYPE = "solana_transaction::versioned::VersionedTransaction"


def decode(text: object, encoding: str) -> VersionedTransaction:
    """Decode a transaction in the form of ``sendTransaction``, and check it.

    Raises:
        RpcError: -32602, with the text of a validator.
    """
    if not isinstance(text, str):
        raise invalid_params("Invalid params: invalid type: expected a string.")
    if encoding not in ("base58", "base64"):
        raise invalid_params(f"unsupported encoding: {encoding}. Supported encodings: base58, base64")
    longest = MAX_BASE58 if encoding == "base58" else MAX_BASE64
    if len(text) > longest:
        raise invalid_params(
            f"{encoding} encoded {_TYPE} too large: {len(text)} bytes (max: encoded/raw {longest}/{MAX_SIZE})"
        )
    try:
        raw = based58.b58decode(text.encode()) if encoding == "base58" else base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise invalid_params(f"invalid {encoding} encoding: {error}") from None
    if len(raw) > MAX_SIZE:
        raise invalid_params(f"decoded {_TYPE} too large: {len(raw)} bytes (max: {MAX_SIZE} bytes)")
    try:
        transaction = VersionedTransaction.from_bytes(raw)
    except ValueError as error:
        raise invalid_params(f"failed to deserialize {_TYPE}: {error}") from None
    try:
        transaction.sanitize()
    except Exception as error:  # solders' SanitizeError is private to it
        raise invalid_params(f"invalid transaction: {error}") from None
    return transaction


def decode_message(text: object) -> Message | MessageV0:
    """Decode a message in base64, in the form of ``getFeeForMessage``.

    Raises:
        RpcError: -32602, it is not a valid message.
    """
    if not isinstance(text, str) or len(text) > MAX_BASE64:
        raise invalid_params(
            f"base64 encoded message too large or not a string (max: encoded/raw {MAX_BASE64}/{MAX_SIZE})"
        )
    try:
        message = from_bytes_versioned(base64.b64decode(text, validate=True))
        VersionedTransaction.populate(
            message, [Signature.default()] * message.header.num_required_signatures
        ).sanitize()
    except Exception as error:  # those of binascii and solders, whose SanitizeError is private
        raise invalid_params(f"failed to deserialize message: {error}") from None
    return message


@dataclass(frozen=True)
class Named:
    """The accounts that a transaction names, in the order of its instructions' indices.

    Attributes:
        keys: the accounts of the message, then the writable and the read-only ones from lookup tables.
        static: number of accounts of the message.
        writable_loaded: number of writable accounts from lookup tables.
        header: the header of the message.
    """

    keys: tuple[Pubkey, ...]
    static: int
    writable_loaded: int
    header: MessageHeader

    def signs(self, index: int) -> bool:
        """Whether the account at that index signs."""
        return index < self.header.num_required_signatures

    def writable(self, index: int) -> bool:
        """Whether the transaction asks to write to the account at that index."""
        header = self.header
        if index >= self.static:
            return index < self.static + self.writable_loaded
        if index < header.num_required_signatures:
            return index < header.num_required_signatures - header.num_readonly_signed_accounts
        return index < self.static - header.num_readonly_unsigned_accounts


def named(message: Message | MessageV0, account: Callable[[Pubkey], Account | None]) -> Named:
    """Find the accounts of a message.

    Args:
        message: a legacy message, or one of version 0.
        account: reads an account.

    Raises:
        RpcError: -32602, a lookup table is missing or too short.
    """
    keys = list(message.account_keys)
    writable: list[Pubkey] = []
    readonly: list[Pubkey] = []
    for lookup in message.address_table_lookups if isinstance(message, MessageV0) else ():
        table = account(lookup.account_key)
        if table is None or len(table.data) < LOOKUP_TABLE_META:
            raise invalid_params("invalid transaction: Transaction loads an address table account that doesn't exist")
        addresses = bytes(table.data)[LOOKUP_TABLE_META:]
        for loaded, indexes in ((writable, lookup.writable_indexes), (readonly, lookup.readonly_indexes)):
            for index in bytes(indexes):
                if (index + 1) * 32 > len(addresses):
                    raise invalid_params("invalid transaction: Transaction address table lookup uses an invalid index")
                loaded.append(Pubkey(addresses[index * 32 : (index + 1) * 32]))
    return Named((*keys, *writable, *readonly), len(keys), len(writable), message.header)


def with_blockhash(transaction: VersionedTransaction, blockhash: Hash) -> VersionedTransaction:
    """The same transaction with another blockhash; its signatures are no longer valid."""
    old = transaction.message
    header, instructions = old.header, list(old.instructions)
    message: Message | MessageV0
    if isinstance(old, MessageV0):
        message = MessageV0(header, list(old.account_keys), blockhash, instructions, list(old.address_table_lookups))
    else:
        message = Message.new_with_compiled_instructions(
            header.num_required_signatures,
            header.num_readonly_signed_accounts,
            header.num_readonly_unsigned_accounts,
            list(old.account_keys),
            blockhash,
            instructions,
        )
    return VersionedTransaction.populate(message, list(transaction.signatures))


def memo_of(instructions: list[CompiledInstruction], keys: tuple[Pubkey, ...]) -> str | None:
    """The memos of a transaction, each with its length, in the form of ``getSignaturesForAddress``."""
    memos = [
        f"[{len(instruction.data)}] {bytes(instruction.data).decode('utf-8', 'replace')}"
        for instruction in instructions
        if keys[instruction.program_id_index] in MEMO_PROGRAMS
    ]
    return "; ".join(memos) or None


def require_locks(keys: tuple[Pubkey, ...]) -> str | None:
    """The name of the error if these accounts cannot be locked together, else None."""
    if len(keys) > MAX_ACCOUNT_LOCKS:
        return "TooManyAccountLocks"
    return None if len(set(keys)) == len(keys) else "AccountLoadedTwice"


# ---------------------------------------------------------------------------------------------------------------------
# Fees (Agave's ``fee`` and ``compute-budget``)
# ---------------------------------------------------------------------------------------------------------------------

LAMPORTS_PER_SIGNATURE = 5000
MAX_COMPUTE_UNITS = 1_400_000
DEFAULT_UNITS = 200_000
"""Compute units of an instruction if the transaction sets no limit."""
BUILTIN_UNITS = 3_000
"""Compute units of an instruction of a built-in program if the transaction sets no limit (SIMD-0170)."""

COMPUTE_BUDGET = Pubkey.from_string("ComputeBudget111111111111111111111111111111")
# Their instructions have signatures of their own; the first byte of the data is their number.
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
    """The fee of a transaction.

    Attributes:
        base: lamports for its signatures.
        priority: lamports for its priority: ``price`` times ``limit``, rounded up.
        price: micro-lamports that it offers for each compute unit.
        limit: compute units that the transaction may use.
    """

    base: int
    priority: int
    price: int
    limit: int

    @property
    def total(self) -> int:
        """The whole fee in lamports."""
        return self.base + self.priority


def fee_of(message: Message | MessageV0) -> Fee:
    """The fee of a message, with the default limit if it sets none."""
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
