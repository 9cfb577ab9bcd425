"""The page of accounts, instructions and errors says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from psyche_lightning_solana import layout
from psyche_lightning_solana.errors import REFUSALS
from psyche_lightning_solana.interface import COORDINATOR, Meta
from psyche_lightning_solana.layout import ADDRESS_SIZE, INSTANCE_SIZE

PAGE = (Path(__file__).parents[4] / "docs" / "solana-account.md").read_text()


def _rows(heading: str) -> list[list[str]]:
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def _shown(meta: Meta) -> str:
    flags = "s" * meta.signer + "w" * meta.writable
    return f"{meta.name} *{flags}*" if flags else meta.name


def test_every_instruction_is_listed() -> None:
    expected = [
        [
            f"`{spec.name}`",
            spec.discriminator.hex(),
            ", ".join([*map(_shown, spec.accounts), *(f"[{meta.name}]" for meta in spec.more)]),
            ", ".join(f"`{name}`" for name in spec.arguments.fields),
        ]
        for spec in COORDINATOR.instructions.values()
    ]
    assert [[*row, ""][:4] for row in _rows("Instructions")] == expected


def test_every_error_is_listed() -> None:
    listed = [(int(number), name, message) for number, name, message in _rows("Errors")]
    assert listed == [(n, refusal.name, refusal.message) for n, refusal in REFUSALS["coordinator"].items()]


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
