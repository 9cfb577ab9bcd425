"""Encodes accounts and transactions for answers."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import based58
import zstandard
from solders.account import Account
from solders.instruction import CompiledInstruction
from solders.message import MessageV0
from solders.pubkey import Pubkey
from solders.transaction import VersionedTransaction
from solders.transaction_metadata import InnerInstruction

from psyche_lightning_localnet.errors import INVALID_REQUEST, UNSUPPORTED_VERSION, RpcError, invalid_params
from psyche_lightning_localnet.parsed import parsed_instruction
from psyche_lightning_localnet.state import Record
from psyche_lightning_localnet.tokens import Read, parsed_json, read_account
from psyche_lightning_localnet.transactions import Named

ACCOUNT_ENCODINGS = ("binary", "base58", "base64", "base64+zstd", "jsonParsed")
TRANSACTION_ENCODINGS = ("binary", "base58", "base64", "json", "jsonParsed")
MAX_BASE58_DATA = 128
RENT_EXEMPT_EPOCH = (1 << 64) - 1

_ZSTD = zstandard.ZstdCompressor(level=1)


def base58(data: bytes) -> str:
    """Bytes in base58."""
    return based58.b58encode(data).decode()


# ---------------------------------------------------------------------------------------------------------------------
# Accounts
# ---------------------------------------------------------------------------------------------------------------------


def account_json(
    account: Account, encoding: str, data_slice: Mapping[str, int] | None = None, *, read: Read
) -> dict[str, Any]:
    """An account in the form of ``getAccountInfo``.

    With ``jsonParsed``, validators show accounts of unknown programs in base64. This function does so for all programs
    but those of SPL Token.

    Args:
        account: the account.
        encoding: one of ``ACCOUNT_ENCODINGS``.
        data_slice: ``offset`` and ``length`` of the requested part of the data; a parsed account is shown whole.
        read: reads the mint of a token account.

    Raises:
        RpcError: -32600, more than 128 bytes in base58.
    """
    data = bytes(account.data)
    shown = data if data_slice is None else data[data_slice["offset"] : data_slice["offset"] + data_slice["length"]]
    return {
        "lamports": account.lamports,
        "data": (parsed_json(account, read) if encoding == "jsonParsed" else None) or _data(shown, encoding),
        "owner": str(account.owner),
        "executable": account.executable,
        "rentEpoch": RENT_EXEMPT_EPOCH,
        "space": len(data),
    }


def _data(data: bytes, encoding: str) -> str | list[str]:
    if encoding in ("binary", "base58"):
        if len(data) > MAX_BASE58_DATA:
            raise RpcError(
                INVALID_REQUEST,
                f"Encoded binary (base 58) data should be less than {MAX_BASE58_DATA} bytes, "
                "please use Base64 encoding.",
            )
        return base58(data) if encoding == "binary" else [base58(data), "base58"]
    if encoding == "base64+zstd":
        return [base64.b64encode(_ZSTD.compress(data)).decode(), encoding]
    return [base64.b64encode(data).decode(), "base64"]


def matches(account: Account, filters: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an account passes all filters of ``getProgramAccounts``, as :func:`filters_of` returns them."""
    for item in filters:
        if "dataSize" in item and len(account.data) != item["dataSize"]:
            return False
        if "memcmp" in item:
            offset, wanted = item["memcmp"]
            if bytes(account.data[offset : offset + len(wanted)]) != wanted:
                return False
        if "tokenAccountState" in item and read_account(account) is None:
            return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Transactions
# ---------------------------------------------------------------------------------------------------------------------


def inner_json(inner: Sequence[Sequence[InnerInstruction]]) -> tuple[dict[str, Any], ...]:
    """The inner instructions of each instruction that has some."""
    return tuple(
        {
            "index": index,
            "instructions": [_instruction(call.instruction(), _height(call)) for call in calls],
        }
        for index, calls in enumerate(inner)
        if calls
    )


def _height(call: InnerInstruction) -> int:
    height: int = call.stack_height()  # type: ignore[attr-defined]  # not in solders' stubs
    return height


def return_data_json(return_data: tuple[Pubkey, bytes] | None) -> dict[str, Any] | None:
    """A transaction's return data."""
    if return_data is None:
        return None
    program, data = return_data
    return {"programId": str(program), "data": [base64.b64encode(data).decode(), "base64"]}


def _instruction(compiled: CompiledInstruction, stack_height: int | None) -> dict[str, Any]:
    return {
        "programIdIndex": compiled.program_id_index,
        "accounts": list(bytes(compiled.accounts)),
        "data": base58(bytes(compiled.data)),
        "stackHeight": stack_height,
    }


def transaction_json(record: Record, encoding: str, max_version: int | None) -> dict[str, Any]:
    """A transaction as a member of a block, in the form of ``getBlock``.

    Args:
        record: the transaction.
        encoding: one of ``TRANSACTION_ENCODINGS``; with ``jsonParsed``, the answer describes the accounts, and the
            instructions of well-known programs; others name their accounts.
        max_version: the newest version that the caller understands; None for legacy transactions only.

    Raises:
        RpcError: -32015, the transaction has a newer version.
    """
    transaction = VersionedTransaction.from_bytes(record.transaction)
    version = _version(transaction, max_version)
    parsed = encoding == "jsonParsed"
    loaded = record.addresses[record.static :]
    meta: dict[str, Any] = {
        "err": record.err,
        "status": {"Ok": None} if record.err is None else {"Err": record.err},
        "fee": record.fee,
        "preBalances": list(record.before),
        "postBalances": list(record.after),
        "innerInstructions": [_inner_parsed(calls, record) for calls in record.inner] if parsed else list(record.inner),
        "logMessages": list(record.logs),
        "preTokenBalances": list(record.tokens_before),
        "postTokenBalances": list(record.tokens_after),
        "rewards": [],
        "computeUnitsConsumed": record.units,
    }
    if not parsed:
        meta["loadedAddresses"] = {
            "writable": list(loaded[: record.writable_loaded]),
            "readonly": list(loaded[record.writable_loaded :]),
        }
    if record.return_data is not None:
        meta["returnData"] = record.return_data
    return {"transaction": _transaction(transaction, record, encoding), "meta": meta, **version}


def accounts_json(record: Record, max_version: int | None) -> dict[str, Any]:
    """A transaction's accounts as a member of a block, in the form of ``getBlock`` with ``accounts``.

    Raises:
        RpcError: -32015, the transaction has a newer version.
    """
    transaction = VersionedTransaction.from_bytes(record.transaction)
    version = _version(transaction, max_version)
    meta = {
        "err": record.err,
        "status": {"Ok": None} if record.err is None else {"Err": record.err},
        "fee": record.fee,
        "preBalances": list(record.before),
        "postBalances": list(record.after),
        "preTokenBalances": list(record.tokens_before),
        "postTokenBalances": list(record.tokens_after),
    }
    signatures = [str(signature) for signature in transaction.signatures]
    shown = {"signatures": signatures, "accountKeys": _account_keys(transaction, record)}
    return {"transaction": shown, "meta": meta, **version}


def _version(transaction: VersionedTransaction, newest: int | None) -> dict[str, Any]:
    """The member ``version``, which only callers get that say what they understand."""
    version = 0 if isinstance(transaction.message, MessageV0) else None
    if version is not None and newest is None:
        raise RpcError(
            UNSUPPORTED_VERSION,
            f"Transaction version ({version}) is not supported by the requesting client. Please try the request again "
            f'with the following configuration parameter: "maxSupportedTransactionVersion": {version}',
        )
    return {} if newest is None else {"version": "legacy" if version is None else version}


def _transaction(transaction: VersionedTransaction, record: Record, encoding: str) -> Any:
    if encoding == "base64":
        return [base64.b64encode(record.transaction).decode(), encoding]
    if encoding in ("binary", "base58"):
        text = base58(record.transaction)
        return text if encoding == "binary" else [text, encoding]
    message = transaction.message
    instructions = [_instruction(item, None) for item in message.instructions]
    shown: dict[str, Any] = {
        "accountKeys": list(record.addresses[: record.static]),
        "recentBlockhash": str(message.recent_blockhash),
        "instructions": instructions,
    }
    header = message.header
    if encoding == "json":
        shown["header"] = {
            "numRequiredSignatures": header.num_required_signatures,
            "numReadonlySignedAccounts": header.num_readonly_signed_accounts,
            "numReadonlyUnsignedAccounts": header.num_readonly_unsigned_accounts,
        }
    else:
        shown["accountKeys"] = _account_keys(transaction, record)
        shown["instructions"] = [_parsed(item, record) for item in instructions]
    if isinstance(message, MessageV0):
        shown["addressTableLookups"] = [
            {
                "accountKey": str(lookup.account_key),
                "writableIndexes": list(bytes(lookup.writable_indexes)),
                "readonlyIndexes": list(bytes(lookup.readonly_indexes)),
            }
            for lookup in message.address_table_lookups
        ]
    return {"signatures": [str(signature) for signature in transaction.signatures], "message": shown}


def _account_keys(transaction: VersionedTransaction, record: Record) -> list[dict[str, Any]]:
    names = Named((), record.static, record.writable_loaded, transaction.message.header)
    return [
        {
            "pubkey": address,
            "signer": names.signs(index),
            "writable": names.writable(index),
            "source": "transaction" if index < record.static else "lookupTable",
        }
        for index, address in enumerate(record.addresses)
    ]


def _inner_parsed(calls: Mapping[str, Any], record: Record) -> dict[str, Any]:
    return {"index": calls["index"], "instructions": [_parsed(item, record) for item in calls["instructions"]]}


def _parsed(instruction: Mapping[str, Any], record: Record) -> dict[str, Any]:
    program = record.addresses[instruction["programIdIndex"]]
    accounts = [record.addresses[index] for index in instruction["accounts"]]
    known = parsed_instruction(program, accounts, based58.b58decode(instruction["data"].encode()))
    shown = {"accounts": accounts, "data": instruction["data"]} if known is None else known
    return {**shown, "programId": program, "stackHeight": instruction["stackHeight"]}


def filters_of(given: object) -> tuple[dict[str, Any], ...]:
    """Read the filters of ``getProgramAccounts`` and ``programSubscribe``.

    Raises:
        RpcError: -32602, there are more than four filters, or one is invalid.
    """
    if given is None:
        return ()
    if not isinstance(given, list) or len(given) > 4:
        raise invalid_params("Too many filters provided; max 4")
    return tuple(_filter(item) for item in given)


def _filter(item: object) -> dict[str, Any]:
    if item == "tokenAccountState":
        return {"tokenAccountState": True}
    if not isinstance(item, dict) or len(item) != 1:
        raise invalid_params("Invalid params: a filter is one of dataSize, memcmp and tokenAccountState.")
    if isinstance(item.get("dataSize"), int):
        return {"dataSize": item["dataSize"]}
    compare = item.get("memcmp")
    if not isinstance(compare, dict) or not isinstance(compare.get("offset"), int) or compare["offset"] < 0:
        raise invalid_params("Invalid params: memcmp needs an offset and bytes.")
    return {"memcmp": (compare["offset"], _compared(compare.get("bytes"), compare.get("encoding")))}


def _compared(value: object, encoding: object) -> bytes:
    try:
        if isinstance(value, list):
            data = bytes(value)
        elif isinstance(value, str):
            data = base64.b64decode(value, validate=True) if encoding == "base64" else based58.b58decode(value.encode())
        else:
            raise ValueError
    except (ValueError, TypeError):
        raise invalid_params("Invalid param: memcmp bytes cannot be decoded") from None
    if len(data) > MAX_BASE58_DATA:
        raise invalid_params("Invalid param: encoded data too large: memcmp takes at most 128 bytes")
    return data
