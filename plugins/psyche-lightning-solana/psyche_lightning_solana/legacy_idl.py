"""The programs' interfaces as legacy Anchor IDL, which anchorpy reads: ``idl/<program>.json``.

``python -m psyche_lightning_solana.legacy_idl`` rewrites the files from
:mod:`psyche_lightning_solana.interface`. The coordinator account is not in them: it is zero-copy, see
:mod:`psyche_lightning_solana.account`. An IDL cannot describe the witness instructions' trailers, either.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psyche_lightning_solana.borsh import Array, Enum, FixedVector, Option, Struct, Type, Vector
from psyche_lightning_solana.errors import REFUSALS
from psyche_lightning_solana.interface import PROGRAMS, InstructionSpec, Meta, ProgramSpec

if TYPE_CHECKING:
    from anchorpy_core.idl import Idl

FOLDER = Path(__file__).with_name("idl")
_VERSION = "0.1.0"


def idl(program: ProgramSpec) -> dict[str, Any]:
    """The IDL of a program, as JSON values."""
    kinds: dict[str, Any] = {}
    for spec in program.instructions.values():
        _collect(spec.arguments, kinds)
        del kinds[spec.arguments.name]
    for account in program.accounts.values():
        _collect(account, kinds)
        del kinds[account.name]
    own = [refusal for number, refusal in REFUSALS[program.name].items() if number >= 6000]
    return {
        "version": _VERSION,
        "name": program.name,
        "instructions": [_instruction(spec) for spec in program.instructions.values()],
        "accounts": [{"name": kind.name, "type": _struct(kind)} for kind in program.accounts.values()],
        "types": [{"name": name, "type": body} for name, body in kinds.items()],
        "errors": [{"code": refusal.number, "name": refusal.name, "msg": refusal.message} for refusal in own],
    }


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part[:1].upper() + part[1:] for part in rest)


def _instruction(spec: InstructionSpec) -> dict[str, Any]:
    accounts = [_account(meta) for meta in spec.accounts]
    return {"name": _camel(spec.name), "accounts": accounts, "args": _fields(spec.arguments)}


def _account(meta: Meta) -> dict[str, Any]:
    return {"name": _camel(meta.name), "isMut": meta.writable, "isSigner": meta.signer}


def _fields(kind: Struct) -> list[dict[str, Any]]:
    return [{"name": _camel(name), "type": field.idl()} for name, field in kind.fields.items()]


def _struct(kind: Struct) -> dict[str, Any]:
    return {"kind": "struct", "fields": _fields(kind)}


def _collect(kind: Type, kinds: dict[str, Any]) -> None:
    """Define the types that ``kind`` needs, inner types first."""
    if isinstance(kind, (Option, Vector, Array)):
        _collect(kind.item, kinds)
    elif isinstance(kind, Struct):
        for field in kind.fields.values():
            _collect(field, kinds)
        kinds[kind.name] = _struct(kind)
    elif isinstance(kind, FixedVector):
        _collect(kind.item, kinds)
        items = {"name": "data", "type": {"array": [kind.item.idl(), kind.count]}}
        kinds[kind.name] = {"kind": "struct", "fields": [items, {"name": "len", "type": "u64"}]}
    elif isinstance(kind, Enum):
        variants: list[dict[str, Any]] = []
        for name, body in kind.variants.items():
            variants.append({"name": name})
            if body is not None:
                _collect(body, kinds)
                variants[-1]["fields"] = [body.idl()]
        kinds[kind.name] = {"kind": "enum", "variants": variants}


def text(program: ProgramSpec) -> str:
    """The IDL in the file's form."""
    return json.dumps(idl(program), indent=1) + "\n"


def load(name: str) -> Idl:
    """The stored IDL of ``coordinator``, ``authorizer`` or ``treasurer``, for ``anchorpy.Program``."""
    from anchorpy_core.idl import Idl

    return Idl.from_json((FOLDER / f"{name}.json").read_text())


def main() -> None:
    """Write the files."""
    for program in PROGRAMS.values():
        (FOLDER / f"{program.name}.json").write_text(text(program))


if __name__ == "__main__":
    main()
