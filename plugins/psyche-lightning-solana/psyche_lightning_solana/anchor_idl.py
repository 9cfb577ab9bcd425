"""The programs' interfaces as Anchor IDL (specification 0.1.0): ``idl/anchor/<program>.json``.

``@coral-xyz/anchor`` reads this form, since 0.30. ``python -m psyche_lightning_solana.anchor_idl`` rewrites the files
from :mod:`psyche_lightning_solana.interface`; :mod:`psyche_lightning_solana.legacy_idl` derives the older form.

The coordinator account and the manifest account are zero-copy. Anchor's clients read every account as borsh, so their
types here, ``Stored...``, name all padding, and show a variant of an enum by its number and the bytes of its body. An
IDL cannot describe the witness instructions' trailers, or accounts that may follow.

Accounts that follow from arguments or from other accounts say so, by seeds (``pda``) or as a field of another account
(``relations``), and Anchor's clients find them by themselves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from solders.pubkey import Pubkey

from psyche_lightning_solana import layout
from psyche_lightning_solana.borsh import Array, Enum, FixedVector, Option, Struct, Type, Vector
from psyche_lightning_solana.client.cluster import local_program
from psyche_lightning_solana.errors import REFUSALS
from psyche_lightning_solana.interface import PROGRAMS, InstructionSpec, Meta, ProgramSpec
from psyche_lightning_solana.types import CONFIG, METADATA, MODEL

FOLDER = Path(__file__).with_name("idl") / "anchor"
VERSION = "0.1.0"
_SPECIFICATION = "0.1.0"
_ADDRESSES = {
    "system_program": "11111111111111111111111111111111",
    "associated_token_program": "ATokenGPvbdGVxr1b2hvZbsiqW5xWH25efTNsLJA8knL",
    "token_program": "TokenkegQfeZyiNwAJbNbGKPFXCWuBvf9Ss623VQ5DA",
}
_STORED = {"CoordinatorAccount": layout.COORDINATOR, "RunManifest": layout.MANIFEST}
"""The coordinator program's zero-copy accounts; their discriminator comes first."""
_NAMES = {
    layout.WITNESS: "StoredWitness",
    layout.ROUND: "StoredRound",
    layout.CLIENT: "StoredClient",
    layout.CLIENTS: "StoredClients",
    layout.MEMBER: "StoredMember",
    layout.RATES: "StoredRates",
    layout.VOTE: "StoredVote",
}
_KINDS: dict[str, Type] = {"metadata": METADATA, "config": CONFIG, "model": MODEL}
"""Fields of the coordinator account whose parts :mod:`psyche_lightning_solana.types` describes."""

_KEYS = ("signer", "p2p", "coordinator_account", "authorizer")
"""Fields of 32 bytes that are addresses."""

_INSTANCE = "coordinator_instance.run_id CoordinatorInstance"
_SEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "init_coordinator": {
        "coordinator_instance": ("'coordinator", "=run_id"),
        "manifest": ("'manifest", "=run_id"),
    },
    "set_address": {"address": ("'address", _INSTANCE, "user")},
    "authorization_create": {"authorization": ("'Authorization", "grantor", "=grantee", "=scope")},
    "run_create": {
        "run": ("'Run", "=index"),
        "run_collateral": ("run", "token_program", "collateral_mint"),
        "coordinator_instance": ("'coordinator", "=run_id"),
        "coordinator_manifest": ("'manifest", "=run_id"),
    },
    "participant_create": {"participant": ("'Participant", "run", "user")},
    "participant_claim": {
        "participant": ("'Participant", "run", "user"),
        "run_collateral": ("run", "token_program", "run.collateral_mint Run"),
    },
}
"""Seeds of an instruction's accounts: ``'text``, ``=argument``, an account, or a field of an account with its type.

Not those of accounts whose seeds lie in themselves, or in an account of another program, which clients cannot read.
"""
_MANIFEST = ("'manifest", _INSTANCE)
_COORDINATOR_PROGRAM = {"kind": "account", "path": "coordinator_program"}
_DERIVED_BY: dict[tuple[str, str], dict[str, Any]] = {
    ("run_create", "coordinator_instance"): _COORDINATOR_PROGRAM,
    ("run_create", "coordinator_manifest"): _COORDINATOR_PROGRAM,
    **{
        (name, "run_collateral"): {
            "kind": "const",
            "value": list(bytes(Pubkey.from_string(_ADDRESSES["associated_token_program"]))),
        }
        for name in ("run_create", "participant_claim")
    },
}
"""The program that an account's seeds belong to, where it is not the instruction's own."""
_FIELDS = {
    "coordinator_instance": ("coordinator_account",),
    "run": ("coordinator_account", "coordinator_instance", "coordinator_program"),
}
"""The accounts that an account names, if it exists before the instruction."""
_MADE: dict[str, set[str]] = {
    "init_coordinator": {"coordinator_instance"},
    "run_create": {"run", "coordinator_instance"},
}
"""The accounts that an instruction makes, so that nobody can read them before."""

Kinds = dict[str, dict[str, Any]]
"""Definitions of types by name."""


def idl(program: ProgramSpec) -> dict[str, Any]:
    """The IDL of a program, as JSON values. Its address is that on local chains."""
    kinds: Kinds = {}
    for spec in program.instructions.values():
        _collect(spec.arguments, kinds)
        del kinds[spec.arguments.name]
    for account in program.accounts.values():
        _collect(account, kinds)
    accounts = list(program.accounts)
    if program.name == "coordinator":
        accounts += _STORED
        for name, dtype in _STORED.items():
            _memory(name, dtype, kinds, start=8)
    own = [refusal for number, refusal in REFUSALS[program.name].items() if number >= 6000]
    return {
        "address": str(local_program(program.name).pubkey()),
        "metadata": {"name": program.name, "version": VERSION, "spec": _SPECIFICATION},
        "instructions": [_instruction(spec) for spec in program.instructions.values()],
        "accounts": [{"name": name, "discriminator": list(layout.discriminator(name))} for name in accounts],
        "errors": [{"code": refusal.number, "name": refusal.name, "msg": refusal.message} for refusal in own],
        "types": [{"name": name, **body} for name, body in kinds.items()],
    }


def _instruction(spec: InstructionSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "discriminator": list(spec.discriminator),
        "accounts": [_account(meta, spec) for meta in spec.accounts],
        "args": _fields(spec.arguments),
    }


def _account(meta: Meta, spec: InstructionSpec) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": meta.name}
    if meta.writable:
        shown["writable"] = True
    if meta.signer:
        shown["signer"] = True
    if meta.name in _ADDRESSES:
        shown["address"] = _ADDRESSES[meta.name]
    seeds = _SEEDS.get(spec.name, {}).get(meta.name, _MANIFEST if meta.name == "manifest" else None)
    if seeds is not None:
        shown["pda"] = {"seeds": [_seed(text) for text in seeds]}
        if program := _DERIVED_BY.get((spec.name, meta.name)):
            shown["pda"]["program"] = program
    elif named := _named_by(meta, spec):
        shown["relations"] = [named]
    return shown


def _seed(text: str) -> dict[str, Any]:
    if text.startswith("'"):
        return {"kind": "const", "value": list(text[1:].encode())}
    if text.startswith("="):
        return {"kind": "arg", "path": text[1:]}
    path, _, kind = text.partition(" ")
    return {"kind": "account", "path": path, **({"account": kind} if kind else {})}


def _named_by(meta: Meta, spec: InstructionSpec) -> str | None:
    """The account of the instruction that has this one's address in a field."""
    others = {other.name for other in spec.accounts} - _MADE.get(spec.name, set())
    # A treasurer's run comes first: a client of the treasurer cannot read accounts of the coordinator.
    return next((one for one in ("run", "coordinator_instance") if one in others and meta.name in _FIELDS[one]), None)


def _fields(kind: Struct) -> list[dict[str, Any]]:
    return [{"name": name, "type": _modern(field.idl())} for name, field in kind.fields.items()]


def _modern(kind: Any) -> Any:
    """A type of a legacy IDL in the newer form."""
    if kind == "publicKey":
        return "pubkey"
    if not isinstance(kind, dict):
        return kind
    [(word, inner)] = kind.items()
    if word == "defined":
        return _defined(inner)
    if word == "array":
        return {"array": [_modern(inner[0]), inner[1]]}
    return {word: _modern(inner)}


def _defined(name: str) -> dict[str, Any]:
    return {"defined": {"name": name}}


def _struct(fields: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": {"kind": "struct", "fields": fields}}


def _collect(kind: Type, kinds: Kinds) -> None:
    """Define the types that ``kind`` needs, inner types first."""
    if isinstance(kind, (Option, Vector, Array)):
        _collect(kind.item, kinds)
    elif isinstance(kind, Struct):
        for field in kind.fields.values():
            _collect(field, kinds)
        kinds[kind.name] = _struct(_fields(kind))
    elif isinstance(kind, FixedVector):
        _collect(kind.item, kinds)
        items = {"name": "data", "type": {"array": [_modern(kind.item.idl()), kind.count]}}
        kinds[kind.name] = _struct([items, {"name": "len", "type": "u64"}])
    elif isinstance(kind, Enum):
        variants: list[dict[str, Any]] = []
        for name, body in kind.variants.items():
            variants.append({"name": name})
            if body is not None:
                _collect(body, kinds)
                variants[-1]["fields"] = [_modern(body.idl())]
        kinds[kind.name] = {"type": {"kind": "enum", "variants": variants}}


# ---------------------------------------------------------------------------------------------------------------------
# Zero-copy accounts
# ---------------------------------------------------------------------------------------------------------------------


def _memory(name: str, dtype: np.dtype[np.void], kinds: Kinds, *, start: int = 0) -> dict[str, Any]:
    """Define a C struct by its dtype, from the byte ``start`` on."""
    assert dtype.fields is not None
    parts = []
    for field, (kind, place, *_) in dtype.fields.items():
        if place >= start:
            described = _KINDS.get(field) if dtype is layout.COORDINATOR else None
            shown = _element(kind, kinds) if described is None else _stored(described, kinds)
            shown = "pubkey" if field in _KEYS else shown
            parts.append((int(place), kind.itemsize, field, shown))
    return _padded(name, parts, start, dtype.itemsize, kinds, packed=not dtype.isalignedstruct)


def _element(kind: np.dtype[Any], kinds: Kinds) -> Any:
    if kind.subdtype is not None:
        item, shape = kind.subdtype
        shown = _element(item, kinds)
        for count in reversed(shape):
            shown = {"array": [shown, int(count)]}
        return shown
    if kind.fields is not None:
        return _memory(_NAMES[kind], kind, kinds)
    return f"{kind.kind}{8 * kind.itemsize}"


def _stored(kind: Type, kinds: Kinds) -> Any:
    """The C form of a type, and the definitions that it needs."""
    if isinstance(kind, Struct):
        parts = [(kind.offsets[name], field.size, name, _stored(field, kinds)) for name, field in kind.fields.items()]
        return _padded(f"Stored{kind.name}", parts, 0, kind.size, kinds)
    if isinstance(kind, Enum):
        bodies = [body for body in kind.variants.values() if body is not None]
        if not bodies:
            return "u32"
        room = kind.size - kind.body
        # Bytes that mean what the variant says, unless there is one alone.
        body = _stored(bodies[0], kinds) if len(kind.variants) == 1 else {"array": ["u8", room]}
        size = bodies[0].size if len(kind.variants) == 1 else room
        parts = [(0, 4, "variant", "u32"), (kind.body, size, "body", body)]
        return _padded(f"Stored{kind.name}", parts, 0, kind.size, kinds)
    return _modern(kind.idl())


def _padded(
    name: str, parts: list[tuple[int, int, str, Any]], start: int, end: int, kinds: Kinds, *, packed: bool = False
) -> dict[str, Any]:
    """Define a struct of parts (place, size, name, type), with fields for the bytes between them."""
    fields = []
    place = start
    for at, size, field, shown in [*sorted(parts, key=lambda part: part[0]), (end, 0, "", None)]:
        if at > place:
            fields.append({"name": f"padding_{place}", "type": {"array": ["u8", at - place]}})
        if shown is not None:
            fields.append({"name": field, "type": shown})
        place = at + size
    form = {"kind": "c", "packed": True} if packed else {"kind": "c"}
    kinds[name] = {"serialization": "bytemuck", "repr": form, **_struct(fields)}
    return _defined(name)


def text(program: ProgramSpec) -> str:
    """The IDL in the file's form."""
    return json.dumps(idl(program), indent=1) + "\n"


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    for program in PROGRAMS.values():
        (FOLDER / f"{program.name}.json").write_text(text(program))


if __name__ == "__main__":
    main()
