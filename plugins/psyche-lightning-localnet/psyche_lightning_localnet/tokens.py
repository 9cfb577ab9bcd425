"""SPL Token and Token-2022: reads mints and token accounts, and shows them as ``jsonParsed`` does."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from solders.account import Account
from solders.pubkey import Pubkey

PROGRAMS = {
    Pubkey.from_string("TokenkegQfeZyiNwAJbNbGKPFXCWuBvf9Ss623VQ5DA"): "spl-token",
    Pubkey.from_string("TokenzQdBNbLqP5VEhdkAS6EPFLC1PHnBqCXEpPxuEb"): "spl-token-2022",
}
NATIVE_MINTS = {
    Pubkey.from_string("So11111111111111111111111111111111111111112"): "spl-token",
    Pubkey.from_string("9pan9bMn5HatX4EJdBwg9VgCa7Uz5HL8N1m5D3NdXej9"): "spl-token-2022",
}
"""The mints of wrapped SOL, and the name of each one's program."""
NATIVE_DECIMALS = 9
ACCOUNT_SIZE, MINT_SIZE, MULTISIG_SIZE = 165, 82, 355

_IS_MINT, _IS_ACCOUNT = 1, 2
_STATES = {1: "initialized", 2: "frozen"}
_SIGNERS = 11
_EXTENSIONS = {7: "immutableOwner", 9: "nonTransferable", 13: "nonTransferableAccount"}
"""Extensions without data; validators have names and values for the others, and a common name for unknown ones."""

Read = Callable[[Pubkey], Account | None]
"""Reads an account; None if it is missing."""


@dataclass(frozen=True)
class TokenAccount:
    """A token account.

    Attributes:
        mint: its mint.
        owner: who may spend it.
        amount: its tokens, in base units.
        delegate: who else may spend some, or None.
        delegated: how many base units the delegate may spend.
        state: 1 for an ordinary account, 2 for a frozen one.
        reserve: lamports that keep an account of wrapped SOL rent-exempt; None for another mint.
        close_authority: who may close it besides the owner, or None.
    """

    mint: Pubkey
    owner: Pubkey
    amount: int
    delegate: Pubkey | None
    delegated: int
    state: int
    reserve: int | None
    close_authority: Pubkey | None


@dataclass(frozen=True)
class Mint:
    """A mint.

    Attributes:
        authority: who may mint, or None.
        supply: its tokens, in base units.
        decimals: decimals of one token.
        initialized: whether it can be used.
        freeze_authority: who may freeze accounts, or None.
    """

    authority: Pubkey | None
    supply: int
    decimals: int
    initialized: bool
    freeze_authority: Pubkey | None


def read_account(account: Account | None) -> TokenAccount | None:
    """A token account that is in use; None for any other account."""
    data = _data(account, ACCOUNT_SIZE, _IS_ACCOUNT)
    if data is None or data[108] not in _STATES:
        return None
    return TokenAccount(
        mint=Pubkey(data[:32]),
        owner=Pubkey(data[32:64]),
        amount=_u64(data, 64),
        delegate=_key(data, 72),
        delegated=_u64(data, 121),
        state=data[108],
        reserve=_u64(data, 113) if data[109] else None,
        close_authority=_key(data, 129),
    )


def read_mint(account: Account | None) -> Mint | None:
    """A mint; None for any other account."""
    data = _data(account, MINT_SIZE, _IS_MINT)
    if data is None:
        return None
    return Mint(_key(data, 0), _u64(data, 36), data[44], data[45] == 1, _key(data, 46))


def native_mints() -> dict[Pubkey, Account]:
    """The mints of wrapped SOL, as every cluster has them. Nobody may mint: only lamports become such tokens."""
    data = bytes(44) + bytes([NATIVE_DECIMALS, 1]) + bytes(36)
    owners = {name: program for program, name in PROGRAMS.items()}
    return {key: Account(10**9, data, owners[name]) for key, name in NATIVE_MINTS.items()}


def token_amount(amount: int, decimals: int) -> dict[str, Any]:
    """An amount of tokens in the form of a validator."""
    text = f"{amount:0{decimals + 1}d}"
    exact = text if decimals == 0 else f"{text[:-decimals]}.{text[-decimals:]}".rstrip("0").rstrip(".")
    return {"amount": str(amount), "decimals": decimals, "uiAmount": float(exact), "uiAmountString": exact}


def token_balances(
    keys: Sequence[Pubkey], accounts: Sequence[Account | None], read: Read
) -> tuple[dict[str, Any], ...]:
    """The token balances of a transaction's accounts, in the form of ``getTransaction``."""
    found = []
    for index, account in enumerate(accounts):
        token = read_account(account)
        mint = None if token is None else read_mint(read(token.mint))
        if account is not None and token is not None and mint is not None:
            found.append(
                {
                    "accountIndex": index,
                    "mint": str(token.mint),
                    "owner": str(token.owner),
                    "programId": str(account.owner),
                    "uiTokenAmount": token_amount(token.amount, mint.decimals),
                }
            )
    return tuple(found)


def parsed_json(account: Account, read: Read) -> dict[str, Any] | None:
    """The member ``data`` of an account in parsed form; None if it is not one of SPL.

    Args:
        account: the account.
        read: reads the mint of a token account, which has the decimals.
    """
    if account.owner not in PROGRAMS:
        return None
    data = bytes(account.data)
    token, mint = read_account(account), read_mint(account)
    if token is not None:
        of = read_mint(read(token.mint))
        if of is None:
            return None
        kind, info = "account", _account_json(token, of.decimals)
    elif mint is not None:
        kind = "mint"
        info = {
            "mintAuthority": _text(mint.authority),
            "supply": str(mint.supply),
            "decimals": mint.decimals,
            "isInitialized": mint.initialized,
            "freezeAuthority": _text(mint.freeze_authority),
        }
    elif len(data) == MULTISIG_SIZE and data[1] <= _SIGNERS:
        kind = "multisig"
        keys = [str(Pubkey(data[3 + 32 * index : 35 + 32 * index])) for index in range(data[1])]
        info = {
            "numRequiredSigners": data[0],
            "numValidSigners": data[1],
            "isInitialized": data[2] == 1,
            "signers": keys,
        }
    else:
        return None
    extensions = list(_extensions(data)) if kind != "multisig" else []
    if extensions:
        info["extensions"] = extensions
    return {"program": PROGRAMS[account.owner], "parsed": {"type": kind, "info": info}, "space": len(data)}


def _account_json(token: TokenAccount, decimals: int) -> dict[str, Any]:
    info: dict[str, Any] = {
        "isNative": token.reserve is not None,
        "mint": str(token.mint),
        "owner": str(token.owner),
        "state": _STATES[token.state],
        "tokenAmount": token_amount(token.amount, decimals),
    }
    if token.delegate is not None:
        info["delegate"] = str(token.delegate)
        info["delegatedAmount"] = token_amount(token.delegated, decimals)
    if token.reserve is not None:
        info["rentExemptReserve"] = token_amount(token.reserve, decimals)
    if token.close_authority is not None:
        info["closeAuthority"] = str(token.close_authority)
    return info


def _data(account: Account | None, size: int, kind: int) -> bytes | None:
    """The data of an account of that kind: alone, or with a byte of its kind and extensions behind it."""
    if account is None or account.owner not in PROGRAMS:
        return None
    data = bytes(account.data)
    extended = len(data) > ACCOUNT_SIZE and len(data) != MULTISIG_SIZE and data[ACCOUNT_SIZE] == kind
    return data if len(data) == size or extended else None


def _extensions(data: bytes) -> Iterator[dict[str, str]]:
    place = ACCOUNT_SIZE + 1
    while place + 4 <= len(data):
        kind, size = struct.unpack_from("<HH", data, place)
        if kind == 0:
            return
        yield {"extension": _EXTENSIONS.get(kind, "unparseableExtension")}
        place += 4 + size


def _u64(data: bytes, place: int) -> int:
    return int.from_bytes(data[place : place + 8], "little")


def _key(data: bytes, place: int) -> Pubkey | None:
    """An optional address: a tag of 4 bytes, and 32 bytes."""
    return Pubkey(data[place + 4 : place + 36]) if data[place] else None


def _text(key: Pubkey | None) -> str | None:
    return None if key is None else str(key)
