"""Encodes accounts and transactions for answers."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Mapping, Sequence
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
from psyche_lightning_localnet.state import Record
from psyche_lightning_localnet.transactions import Named

ACCOUNT_ENCODINGS = ("binary", "base58", "base64", "base64+zstd", "jsonParsed")
TRANSACTION_ENCODINGS = ("binary", "base58", "base64", "json", "jsonParsed")
MAX_BASE58_DATA = 128
RENT_EXEMPT_EPOCH = (1 << 64) - 1
TOKEN_PROGRAMS = (
    Pubkey.from_string("TokenkegQfeZyiNwAJbNbGKPFXCWuBvf9Ss623VQ5DA"),
    Pubkey.from_string("TokenzQdBNbLqP5VEhdkAS6EPFLC1PHnBqCXEpPxuEb"),
)
TOKEN_ACCOUNT_SIZE, MINT_SIZE = 165, 82

_ZSTD = zstandard.ZstdCompressor(level=1)


def base58(data: bytes) -> str:
    """Bytes in base58."""
    return based58.b58encode(data).decode()


# ---------------------------------------------------------------------------------------------------------------------
# Accounts
# ---------------------------------------------------------------------------------------------------------------------


def account_json(account: Account, encoding: str, data_slice: Mapping[str, int] | None = None) -> dict[str, Any]:
    """An account in the form of ``getAccountInfo``.

    With ``jsonParsed``, validators show accounts of unknown programs in base64. This function does so for all programs.

    Args:
        account: the account.
        encoding: one of ``ACCOUNT_ENCODINGS``.
        data_slice: ``offset`` and ``length`` of the requested part of the data.

    Raises:
        RpcError: -32600, more than 128 bytes in base58.
    """
    data = bytes(account.data)
    shown = data if data_slice is None else data[data_slice["offset"] : data_slice["offset"] + data_slice["length"]]
    return {
        "lamports": account.lamports,
        "data": _data(shown, encoding),
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
        if "tokenAccountState" in item and not _is_token_account(account):
            return False
    return True


def _is_token_account(account: Account) -> bool:
    return account.owner in TOKEN_PROGRAMS and len(account.data) >= TOKEN_ACCOUNT_SIZE and account.data[108] != 0


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


def token_amount(amount: int, decimals: int) -> dict[str, Any]:
    """An amount of tokens in the form of a validator."""
    text = f"{amount:0{decimals + 1}d}"
    exact = text if decimals == 0 else f"{text[:-decimals]}.{text[-decimals:]}".rstrip("0").rstrip(".")
    return {"amount": str(amount), "decimals": decimals, "uiAmount": float(exact), "uiAmountString": exact}


def token_account(account: Account | None) -> tuple[Pubkey, Pubkey, int] | None:
    """Mint, owner and amount of an SPL token account; None for another account."""
    if account is None or not _is_token_account(account):
        return None
    data = bytes(account.data[:72])
    return Pubkey(data[:32]), Pubkey(data[32:64]), struct.unpack_from("<Q", data, 64)[0]


def mint_decimals(account: Account | None) -> int | None:
    """Decimals of an SPL mint; None for another account."""
    if account is None or account.owner not in TOKEN_PROGRAMS or len(account.data) < MINT_SIZE:
        return None
    return account.data[44]


def token_balances(
    keys: Sequence[Pubkey], accounts: Sequence[Account | None], read: Callable[[Pubkey], Account | None]
) -> tuple[dict[str, Any], ...]:
    """The token balances of a transaction's accounts, in the form of ``getTransaction``."""
    found = []
    for index, account in enumerate(accounts):
        token = token_account(account)
        if account is None or token is None or keys[index] == token[0]:
            continue
        mint, owner, amount = token
        decimals = mint_decimals(read(mint))
        if decimals is not None:
            found.append(
                {
                    "accountIndex": index,
                    "mint": str(mint),
                    "owner": str(owner),
                    "programId": str(account.owner),
                    "uiTokenAmount": token_amount(amount, decimals),
                }
            )
    return tuple(found)


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
    """A transaction in the form of ``getTransaction``.

    Args:
        record: the transaction.
        encoding: one of ``TRANSACTION_ENCODINGS``; with ``jsonParsed``, the answer describes the accounts, and
            instructions name theirs, as a validator does for unknown programs.
        max_version: the newest version that the caller understands; None for legacy transactions only.

    Raises:
        RpcError: -32015, the transaction has a newer version.
    """
    transaction = VersionedTransaction.from_bytes(record.transaction)
    version = 0 if isinstance(transaction.message, MessageV0) else None
    if version is not None and max_version is None:
        raise RpcError(
            UNSUPPORTED_VERSION,
            f"Transaction version ({version}) is not supported by the requesting client. Please try the request again "
            f'with the following configuration parameter: "maxSupportedTransactionVersion": {version}',
        )
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
    answer = {
        "slot": record.slot,
        "blockTime": record.time,
        "transaction": _transaction(transaction, record, encoding),
        "meta": meta,
    }
    return answer if max_version is None else {**answer, "version": "legacy" if version is None else version}


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
        names = Named((), record.static, record.writable_loaded, header)
        shown["accountKeys"] = [
            {
                "pubkey": address,
                "signer": names.signs(index),
                "writable": names.writable(index),
                "source": "transaction" if index < record.static else "lookupTable",
            }
            for index, address in enumerate(record.addresses)
        ]
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


def _inner_parsed(calls: Mapping[str, Any], record: Record) -> dict[str, Any]:
    return {"index": calls["index"], "instructions": [_parsed(item, record) for item in calls["instructions"]]}


def _parsed(instruction: Mapping[str, Any], record: Record) -> dict[str, Any]:
    return {
        "programId": record.addresses[instruction["programIdIndex"]],
        "accounts": [record.addresses[index] for index in instruction["accounts"]],
        "data": instruction["data"],
        "stackHeight": instruction["stackHeight"],
    }


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
