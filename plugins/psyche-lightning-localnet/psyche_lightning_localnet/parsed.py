"""Shows instructions of well-known programs as ``jsonParsed`` does: SPL Token, associated accounts, memo and transfers.

The names are those of a validator. An instruction of another program or of another form is shown with its data.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

from solders.pubkey import Pubkey

from psyche_lightning_localnet.tokens import PROGRAMS as TOKEN_PROGRAMS
from psyche_lightning_localnet.tokens import token_amount
from psyche_lightning_localnet.transactions import MEMO_PROGRAMS

_SYSTEM = "11111111111111111111111111111111"
_ASSOCIATED = "ATokenGPvbdGVxr1b2hvZbsiqW5xWH25efTNsLJA8knL"
_AUTHORITIES = ("mintTokens", "freezeAccount", "accountOwner", "closeAccount")

Fields = dict[str, Any]


def _nothing(data: bytes) -> Fields:
    return {}


def _amount(data: bytes) -> Fields:
    return {"amount": str(*struct.unpack_from("<Q", data))}


def _token_amount(data: bytes) -> Fields:
    amount, decimals = struct.unpack_from("<QB", data)
    return {"tokenAmount": token_amount(amount, decimals)}


def _owner(data: bytes) -> Fields:
    return {"owner": _key(data, 0)}


def _mint(data: bytes) -> Fields:
    shown = {"decimals": data[0], "mintAuthority": _key(data, 1)}
    return {**shown, "freezeAuthority": _key(data, 34)} if data[33] else shown


# Number: name, accounts, what the data holds, and who signs, which may be several signers of one account.
_TOKEN: dict[int, tuple[str, tuple[str, ...], Callable[[bytes], Fields], str]] = {
    0: ("initializeMint", ("mint", "rentSysvar"), _mint, ""),
    1: ("initializeAccount", ("account", "mint", "owner", "rentSysvar"), _nothing, ""),
    3: ("transfer", ("source", "destination"), _amount, "authority"),
    4: ("approve", ("source", "delegate"), _amount, "owner"),
    5: ("revoke", ("source",), _nothing, "owner"),
    7: ("mintTo", ("mint", "account"), _amount, "mintAuthority"),
    8: ("burn", ("account", "mint"), _amount, "authority"),
    9: ("closeAccount", ("account", "destination"), _nothing, "owner"),
    10: ("freezeAccount", ("account", "mint"), _nothing, "freezeAuthority"),
    11: ("thawAccount", ("account", "mint"), _nothing, "freezeAuthority"),
    12: ("transferChecked", ("source", "mint", "destination"), _token_amount, "authority"),
    13: ("approveChecked", ("source", "mint", "delegate"), _token_amount, "owner"),
    14: ("mintToChecked", ("mint", "account"), _token_amount, "mintAuthority"),
    15: ("burnChecked", ("account", "mint"), _token_amount, "authority"),
    16: ("initializeAccount2", ("account", "mint", "rentSysvar"), _owner, ""),
    17: ("syncNative", ("account",), _nothing, ""),
    18: ("initializeAccount3", ("account", "mint"), _owner, ""),
    20: ("initializeMint2", ("mint",), _mint, ""),
    21: ("getAccountDataSize", ("mint",), _nothing, ""),
    22: ("initializeImmutableOwner", ("account",), _nothing, ""),
}


def parsed_instruction(program: str, accounts: Sequence[str], data: bytes) -> Fields | None:
    """The members ``program`` and ``parsed`` of an instruction; None if it is not one of those that are known.

    Args:
        program: address of the program.
        accounts: the instruction's accounts.
        data: the instruction's data.
    """
    key = Pubkey.from_string(program)
    try:
        if key in TOKEN_PROGRAMS:
            name, info = _token(accounts, data)
            return _shown(TOKEN_PROGRAMS[key], name, info)
        if program == _ASSOCIATED:
            name = {b"": "create", b"\0": "create", b"\1": "createIdempotent"}[data]
            fields = ("source", "account", "wallet", "mint", "systemProgram", "tokenProgram")
            return _shown("spl-associated-token-account", name, _named(fields, accounts))
        if key in MEMO_PROGRAMS:
            return {"program": "spl-memo", "parsed": data.decode()}
        if program == _SYSTEM:
            name, info = _system(accounts, data)
            return _shown("system", name, info)
    except (KeyError, IndexError, ValueError, struct.error):
        return None
    return None


def _token(accounts: Sequence[str], data: bytes) -> tuple[str, Fields]:
    number, rest = data[0], data[1:]
    if number in (2, 19):  # a group of signers
        first = 2 if number == 2 else 1
        named = _named(("multisig", "rentSysvar")[:first], accounts)
        return ("initializeMultisig" if number == 2 else "initializeMultisig2"), {
            **named,
            "signers": list(accounts[first:]),
            "m": rest[0],
        }
    if number == 6:
        kind = _AUTHORITIES[rest[0]]
        named = _named(("mint" if rest[0] < 2 else "account",), accounts)
        new = _key(rest, 2) if rest[1] else None
        signed = _signed("authority", accounts, 1)
        return "setAuthority", {**named, "authorityType": kind, "newAuthority": new, **signed}
    name, fields, read, signer = _TOKEN[number]
    signed = _signed(signer, accounts, len(fields)) if signer else {}
    return name, {**_named(fields, accounts), **read(rest), **signed}


def _system(accounts: Sequence[str], data: bytes) -> tuple[str, Fields]:
    number = int.from_bytes(data[:4], "little")
    if number == 0:
        lamports, space = struct.unpack_from("<QQ", data, 4)
        made = {"lamports": lamports, "space": space, "owner": _key(data, 20)}
        return "createAccount", {**_named(("source", "newAccount"), accounts), **made}
    if number == 1:
        return "assign", {**_named(("account",), accounts), "owner": _key(data, 4)}
    if number == 2:
        moved = {"lamports": struct.unpack_from("<Q", data, 4)[0]}
        return "transfer", {**_named(("source", "destination"), accounts), **moved}
    if number == 8:
        return "allocate", {**_named(("account",), accounts), "space": struct.unpack_from("<Q", data, 4)[0]}
    raise KeyError(number)


def _shown(program: str, name: str, info: Fields) -> Fields:
    return {"program": program, "parsed": {"type": name, "info": info}}


def _named(fields: Sequence[str], accounts: Sequence[str]) -> Fields:
    return {field: accounts[place] for place, field in enumerate(fields)}


def _signed(name: str, accounts: Sequence[str], place: int) -> Fields:
    """Who signs: an account alone, or one with several signers, which follow it."""
    signers = list(accounts[place + 1 :])
    if not signers:
        return {name: accounts[place]}
    return {f"multisig{name[0].upper()}{name[1:]}": accounts[place], "signers": signers}


def _key(data: bytes, place: int) -> str:
    return str(Pubkey(data[place : place + 32]))
