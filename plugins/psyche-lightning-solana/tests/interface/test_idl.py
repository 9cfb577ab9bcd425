"""The IDLs against each other, against anchorpy, against the interface, and against what the C programs say."""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

import numpy as np
import pytest
from anchorpy.coder.instruction import InstructionCoder
from psyche_lightning_solana import addresses, anchor_idl, layout, legacy_idl
from psyche_lightning_solana.client.owner import TOKEN_PROGRAM, token_account
from psyche_lightning_solana.errors import REFUSALS
from psyche_lightning_solana.interface import PROGRAMS, ProgramSpec
from sbf_toolchain.build import SOURCES
from solana_support.values import any_value
from solders.pubkey import Pubkey


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
    for form in (anchor_idl, legacy_idl):
        kept = (form.FOLDER / f"{program.name}.json").read_text()
        assert kept == form.text(program), f"run python -m {form.__name__}"


def _older(shown: Any) -> Any:
    """The newer form's values as the older one writes them, names aside."""
    if isinstance(shown, list):
        return [_older(item) for item in shown]
    if not isinstance(shown, dict):
        return {"pubkey": "publicKey"}.get(shown, shown) if isinstance(shown, str) else shown
    if isinstance(shown.get("defined"), dict):
        return {"defined": shown["defined"]["name"]}
    return {key: _older(value) for key, value in shown.items()}


def _named(fields: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    return [(field["name"].replace("_", "").lower(), _older(field["type"])) for field in fields]


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=lambda program: program.name)
def test_both_forms_say_the_same(program: ProgramSpec) -> None:
    newer, older = (json.loads((form.FOLDER / f"{program.name}.json").read_text()) for form in (anchor_idl, legacy_idl))
    for new, old in zip(newer["instructions"], older["instructions"], strict=True):
        assert bytes(new["discriminator"]) == program.instructions[new["name"]].discriminator
        assert new["name"].replace("_", "") == old["name"].lower()
        assert _named(new["args"]) == _named(old["args"])
        assert [(one.get("writable", False), one.get("signer", False)) for one in new["accounts"]] == [
            (one["isMut"], one["isSigner"]) for one in old["accounts"]
        ]
    kinds = {item["name"]: item["type"] for item in newer["types"]}
    for old in (*older["accounts"], *older["types"]):
        new = kinds[old["name"]]
        if new["kind"] == "enum":
            assert _older(new) == old["type"]
        else:
            assert _named(new["fields"]) == _named(old["type"]["fields"])
    assert newer["errors"] == older["errors"]


def test_the_zero_copy_accounts_have_every_field_where_it_is() -> None:
    """What reads one field after the other, as Anchor's clients do, finds each at its place."""
    idl = json.loads((anchor_idl.FOLDER / "coordinator.json").read_text())
    kinds = {item["name"]: item["type"] for item in idl["types"]}

    def size(kind: Any) -> int:
        if isinstance(kind, str):
            return {"pubkey": 32, "bool": 1}.get(kind) or int(kind[1:]) // 8
        if "array" in kind:
            return size(kind["array"][0]) * int(kind["array"][1])
        return sum(size(field["type"]) for field in kinds[kind["defined"]["name"]]["fields"])

    def check(name: str, dtype: np.dtype[np.void], place: int) -> None:
        found = {}
        for field in kinds[name]["fields"]:
            found[field["name"]] = place
            place += size(field["type"])
        assert place == dtype.itemsize
        assert dtype.fields is not None
        assert {field: found[field] for field in dtype.fields if field in found} == {
            field: at for field, (_, at, *_) in dtype.fields.items() if field in found
        }
        assert dtype.fields.keys() - found.keys() <= {"discriminator"}

    for name, dtype in (("CoordinatorAccount", layout.COORDINATOR), ("RunManifest", layout.MANIFEST)):
        listed = next(item for item in idl["accounts"] if item["name"] == name)
        assert bytes(listed["discriminator"]) == layout.discriminator(name)
        check(name, dtype, 8)
    for name, dtype in (
        ("StoredWitness", layout.WITNESS),
        ("StoredRound", layout.ROUND),
        ("StoredClient", layout.CLIENT),
        ("StoredClients", layout.CLIENTS),
        ("StoredMember", layout.MEMBER),
        ("StoredRates", layout.RATES),
        ("StoredCoordinatorConfig", layout.CONFIG),
        ("StoredVote", layout.VOTE),
    ):
        check(name, dtype, 0)


def _resolved(pda: dict[str, Any], program: Pubkey, arguments: dict[str, bytes], accounts: dict[str, Pubkey]) -> Pubkey:
    """What a client makes of seeds; ``accounts`` has fields of accounts by their path."""
    seeds = [
        bytes(seed["value"])
        if seed["kind"] == "const"
        else arguments[seed["path"]]
        if seed["kind"] == "arg"
        else bytes(accounts[seed["path"]])
        for seed in pda["seeds"]
    ]
    by = pda.get("program")
    if by is not None:
        program = Pubkey(bytes(by["value"])) if by["kind"] == "const" else accounts[by["path"]]
    return Pubkey.find_program_address(seeds, program)[0]


def test_seeds_lead_to_the_addresses() -> None:
    idls = {name: json.loads((anchor_idl.FOLDER / f"{name}.json").read_text()) for name in PROGRAMS}
    programs = {name: Pubkey.from_string(idl["address"]) for name, idl in idls.items()}
    mint, user, grantee = (Pubkey([number] * 32) for number in (1, 2, 3))
    run = addresses.treasurer_run_address(programs["treasurer"], 7)
    accounts: dict[str, Any] = {
        "coordinator_instance.run_id": b"r",
        "run.collateral_mint": mint,
        "collateral_mint": mint,
        "user": user,
        "grantor": user,
        "run": run,
        "coordinator_program": programs["coordinator"],
        "token_program": TOKEN_PROGRAM,
    }
    arguments = {"run_id": b"r", "index": (7).to_bytes(8, "little"), "grantee": bytes(grantee), "scope": b"s"}
    expected = {
        "coordinator_instance": addresses.instance_address(programs["coordinator"], "r"),
        "manifest": addresses.manifest_address(programs["coordinator"], "r"),
        "coordinator_manifest": addresses.manifest_address(programs["coordinator"], "r"),
        "address": addresses.node_address(programs["coordinator"], "r", user),
        "authorization": addresses.authorization_address(programs["authorizer"], user, grantee, b"s"),
        "run": run,
        "run_collateral": token_account(run, mint),
        "participant": addresses.participant_address(programs["treasurer"], run, user),
    }
    found = set()
    for program, idl in idls.items():
        for instruction in idl["instructions"]:
            names = [one["name"] for one in instruction["accounts"]]
            for one in instruction["accounts"]:
                assert set(one.get("relations", ())) <= set(names)
                if "pda" in one:
                    found.add(one["name"])
                    assert _resolved(one["pda"], programs[program], arguments, accounts) == expected[one["name"]]
    assert found == set(expected)


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
