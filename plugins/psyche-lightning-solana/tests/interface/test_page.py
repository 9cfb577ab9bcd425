"""The page of accounts, instructions and errors says what the code says."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
from psyche_lightning_solana import layout
from psyche_lightning_solana.borsh import Struct
from psyche_lightning_solana.errors import REFUSALS
from psyche_lightning_solana.interface import AUTHORIZER, COORDINATOR, PROGRAMS, TREASURER, Meta, ProgramSpec
from psyche_lightning_solana.layout import ADDRESS_SIZE, INSTANCE_SIZE, discriminator
from solana_support.values import any_value

PAGE = (Path(__file__).parents[4] / "docs" / "solana-account.md").read_text()


def _rows(heading: str) -> list[list[str]]:
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def _shown(meta: Meta) -> str:
    flags = "s" * meta.signer + "w" * meta.writable
    return f"{meta.name} *{flags}*" if flags else meta.name


PREFIX = {"coordinator": "", "authorizer": "The authorizer's ", "treasurer": "The treasurer's "}
PROGRAM = pytest.mark.parametrize("program", PROGRAMS.values(), ids=lambda program: program.name)


def _of(program: ProgramSpec, what: str) -> list[list[str]]:
    return _rows(f"{PREFIX[program.name]}{what}" if PREFIX[program.name] else what.capitalize())


@PROGRAM
def test_every_instruction_is_listed(program: ProgramSpec) -> None:
    expected = [
        [
            f"`{spec.name}`",
            spec.discriminator.hex(),
            ", ".join([*map(_shown, spec.accounts), *(f"[{meta.name}]" for meta in spec.more)]),
            ", ".join(f"`{name}`" for name in spec.arguments.fields),
        ]
        for spec in program.instructions.values()
    ]
    assert [[*row, ""][:4] for row in _of(program, "instructions")] == expected


@PROGRAM
def test_every_error_is_listed(program: ProgramSpec) -> None:
    """Anchor's, which are of all three, stand with the coordinator's."""
    listed = [(int(number), name, message) for number, name, message in _of(program, "errors")]
    first = 0 if program is COORDINATOR else 6000
    known = REFUSALS[program.name].items()
    assert listed == [(n, refusal.name, refusal.message) for n, refusal in known if n >= first]


def _offsets(kind: Struct, values: dict[str, Any]) -> list[tuple[int, str, int]]:
    """Each field's offset, name and length in an account, behind the discriminator."""
    rows, offset = [(0, f"discriminator `{discriminator(kind.name).hex()}`", 8)], 8
    for name, field in kind.fields.items():
        length = len(field.pack(values[name]))
        rows.append((offset, name, length))
        offset += length
    return rows


def test_the_treasurers_accounts_byte_by_byte() -> None:
    listed = [(name, int(offset), field, int(size)) for name, offset, field, size in _rows("The treasurer's accounts")]
    expected = []
    for kind in TREASURER.accounts.values():
        values = {name: any_value(field, Random(name)) for name, field in kind.fields.items()}
        expected += [(kind.name, *row) for row in _offsets(kind, values)]
    assert listed == expected


def test_the_authorization_byte_by_byte() -> None:
    """With a scope of n bytes and d delegates."""
    kind, n, d = AUTHORIZER.accounts["Authorization"], 18, 3
    values = {name: any_value(field, Random(name)) for name, field in kind.fields.items()}
    values |= {"scope": [1] * n, "delegates": [bytes(32)] * d}
    listed = []
    for offset, field, size in _rows("The authorizer's account"):
        place, length = (
            sum(part[0] * part[1] for part in _terms(text, {"*n*": n, "*d*": d})) for text in (offset, size)
        )
        name = field if field.startswith("discriminator") else re.match(r"\w+", field)[0]  # type: ignore[index]
        listed.append((place, name, length))
    assert listed == _offsets(kind, values)


def _terms(text: str, letters: dict[str, int]) -> list[tuple[int, int]]:
    """``82 + *n* + 32 *d*`` as factors."""
    found = []
    for term in text.split(" + "):
        words = term.split()
        letter = letters[words.pop()] if words[-1] in letters else 1
        found.append((int(words[0]) if words else 1, letter))
    return found


def test_the_offsets_are_those_of_the_dtypes() -> None:
    fields = layout.MANIFEST.fields
    assert fields is not None
    listed = [(int(offset), name, int(size)) for offset, name, size, _ in _rows("The manifest account")]
    assert listed == [(offset, name, kind.itemsize) for name, (kind, offset, *_) in fields.items()]
    account = layout.COORDINATOR.fields
    assert account is not None
    starts = {place for _, place, *_ in account.values()}
    for offset, text, _ in _rows("The coordinator account"):
        for place in [offset, *re.findall(r"at (\d+)", text)]:
            assert int(place) in starts | {layout.COORDINATOR_SIZE}


def test_sizes_and_rent() -> None:
    sizes = [INSTANCE_SIZE, layout.COORDINATOR_SIZE, layout.MANIFEST_SIZE, ADDRESS_SIZE]
    rents = [f"{(128 + size) * 6960 / 1e9:.4f}" for size in sizes]
    assert [row[2:] for row in _rows("The accounts of a run")] == [
        [f"{size:,}", rent] for size, rent in zip(sizes, rents, strict=True)
    ]
