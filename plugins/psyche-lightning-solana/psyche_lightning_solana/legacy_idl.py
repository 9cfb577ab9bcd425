"""The programs' interfaces as legacy Anchor IDL, which anchorpy reads: ``idl/<program>.json``.

``python -m psyche_lightning_solana.legacy_idl`` rewrites the files. They are :mod:`psyche_lightning_solana.anchor_idl`
in the form before Anchor 0.30, without the zero-copy accounts, whose C structs that form cannot mark as such.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psyche_lightning_solana import anchor_idl
from psyche_lightning_solana.interface import PROGRAMS, ProgramSpec

if TYPE_CHECKING:
    from anchorpy_core.idl import Idl

FOLDER = Path(__file__).with_name("idl")


def idl(program: ProgramSpec) -> dict[str, Any]:
    """The IDL of a program, as JSON values."""
    newer = anchor_idl.idl(program)
    kinds = {item["name"]: _kind(item["type"]) for item in newer["types"] if "serialization" not in item}
    return {
        "version": newer["metadata"]["version"],
        "name": program.name,
        "instructions": [
            {
                "name": _camel(item["name"]),
                "accounts": [_account(account) for account in item["accounts"]],
                "args": _fields(item["args"]),
            }
            for item in newer["instructions"]
        ],
        "accounts": [{"name": name, "type": kinds.pop(name)} for name in program.accounts],
        "types": [{"name": name, "type": kind} for name, kind in kinds.items()],
        "errors": newer["errors"],
    }


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part[:1].upper() + part[1:] for part in rest)


def _account(account: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": _camel(account["name"]),
        "isMut": account.get("writable", False),
        "isSigner": account.get("signer", False),
    }


def _fields(fields: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"name": _camel(field["name"]), "type": _older(field["type"])} for field in fields]


def _kind(kind: dict[str, Any]) -> dict[str, Any]:
    """The definition of a struct or an enum."""
    if kind["kind"] == "struct":
        return {"kind": "struct", "fields": _fields(kind["fields"])}
    variants = [
        {name: list(map(_older, part)) if name == "fields" else part for name, part in variant.items()}
        for variant in kind["variants"]
    ]
    return {"kind": "enum", "variants": variants}


def _older(kind: Any) -> Any:
    """A type in the older form."""
    if kind == "pubkey":
        return "publicKey"
    if not isinstance(kind, dict):
        return kind
    [(word, inner)] = kind.items()
    if word == "defined":
        return {"defined": inner["name"]}
    if word == "array":
        return {"array": [_older(inner[0]), inner[1]]}
    return {word: _older(inner)}


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
