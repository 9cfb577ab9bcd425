"""The IDL against anchorpy, against the interface, and against what the C programs say."""

from __future__ import annotations

import re
from random import Random
from typing import Any

import pytest
from anchorpy.coder.instruction import InstructionCoder
from psyche_lightning_solana import legacy_idl
from psyche_lightning_solana.errors import REFUSALS
from psyche_lightning_solana.interface import PROGRAMS, ProgramSpec
from sbf_toolchain.build import SOURCES
from solana_support.values import any_value


def _sources(program: str) -> str:
    folders = ("common", "machine", program) if program == "coordinator" else ("common", program)
    return "\n".join(
        path.read_text()
        for folder in folders
        for path in sorted((SOURCES / folder).iterdir())
        if path.suffix in (".c", ".h")
    )


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=lambda program: program.name)
def test_the_kept_files_are_what_the_interface_says(program: ProgramSpec) -> None:
    kept = (legacy_idl.FOLDER / f"{program.name}.json").read_text()
    assert kept == legacy_idl.text(program), "run python -m psyche_lightning_solana.legacy_idl"


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=lambda program: program.name)
def test_anchorpy_writes_the_same_bytes(program: ProgramSpec) -> None:
    """What anchorpy's coder reads out of our bytes, it writes as the same bytes again."""
    coder = InstructionCoder(legacy_idl.load(program.name))
    for spec in program.instructions.values():
        random = Random(spec.name)
        for _ in range(30):
            values = {name: any_value(kind, random) for name, kind in spec.arguments.fields.items()}
            data = spec.discriminator + spec.arguments.write(values)
            read: Any = coder.parse(data)
            assert read.name == spec.name
            assert coder.build(read) == data


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=lambda program: program.name)
def test_the_program_knows_the_same_instructions(program: ProgramSpec) -> None:
    text = _sources(program.name)
    for spec in program.instructions.values():
        number = int.from_bytes(spec.discriminator, "little")
        assert re.search(rf"\b0x0*{number:x}(ull)?\b", text), f"{spec.name} is not in the C of the {program.name}"
    known = {spec.discriminator for spec in program.instructions.values()}
    if program.name == "coordinator":
        listed = re.findall(r"X\(0x([0-9a-f]{16}), \w+, \"(\w+)\"\)", text)
        assert {bytes.fromhex(digits)[::-1] for digits, _ in listed} == known
        for digits, name in listed:
            snake = re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower()
            assert program.instructions[snake].discriminator == bytes.fromhex(digits)[::-1]


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=lambda program: program.name)
def test_the_program_has_the_same_errors(program: ProgramSpec) -> None:
    text = _sources(program.name)
    anchor = re.findall(r"X\((\w+), (\d+), \"([^\"]*)\"\)", text)
    own = re.search(rf"#define {program.name.upper()}_ERRORS\(X\)((?:.*\\\n)*.*\n)", text)
    assert own is not None
    listed = {int(number): (name, message) for name, number, message in anchor}
    for place, (name, message) in enumerate(re.findall(r"X\((\w+), \"([^\"]*)\"\)", own[1])):
        listed[6000 + place] = (name, message)
    assert listed == {number: (refusal.name, refusal.message) for number, refusal in REFUSALS[program.name].items()}
