"""The authorizer in the real virtual machine, deployed by the real loader."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from psyche_lightning_solana.errors import REFUSALS
from psyche_lightning_solana.interface import AUTHORIZER, JOIN_SCOPE
from psyche_lightning_solana.programs import image
from sbf_toolchain.build import SOURCES
from solana_support.calls import call
from solana_support.vm import START_TIME, Outcome, Vm, must
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.system_program import ID as SYSTEM_PROGRAM

CREATE, GRANT, DELEGATE, CLOSE = (
    AUTHORIZER.instructions[f"authorization_{name}"] for name in ("create", "grantor_update", "grantee_update", "close")
)
AUTHORIZATION = AUTHORIZER.accounts["Authorization"]
MONTH = 30 * 86400
ANYBODY = Pubkey.default()


@dataclass
class World:
    vm: Vm
    program: Pubkey
    grantor: Keypair
    grantee: Keypair

    def address(
        self, grantor: Pubkey | None = None, grantee: Pubkey | None = None, scope: bytes = JOIN_SCOPE
    ) -> Pubkey:
        seeds = [b"Authorization", grantor or self.grantor.pubkey(), grantee or self.grantee.pubkey(), scope]
        return Pubkey.find_program_address([bytes(seed) for seed in seeds], self.program)[0]

    def accounts(self, **changed: Pubkey | AccountMeta) -> dict[str, Pubkey | AccountMeta]:
        return {
            "payer": self.vm.payer.pubkey(),
            "grantor": self.grantor.pubkey(),
            "grantee": self.grantee.pubkey(),
            "spill": self.vm.payer.pubkey(),
            "authorization": self.address(),
            "system_program": SYSTEM_PROGRAM,
        } | changed

    def send(self, *instructions: Instruction) -> Outcome:
        return self.vm.send(instructions, [self.grantor, self.grantee])

    def create(self, scope: bytes = JOIN_SCOPE, grantee: Pubkey | None = None, **changed: Any) -> Outcome:
        grantee = grantee or self.grantee.pubkey()
        accounts = self.accounts(authorization=self.address(grantee=grantee, scope=scope[:32])) | changed
        return self.send(call(self.program, CREATE, accounts, {"grantee": bytes(grantee), "scope": list(scope)}))

    def grant(self, active: bool | bytes = True, **changed: Any) -> Outcome:
        arguments = active if isinstance(active, bytes) else {"active": active}
        return self.send(call(self.program, GRANT, self.accounts(**changed), arguments))

    def delegate(self, added: Sequence[Pubkey] = (), *, clear: bool = False, **changed: Any) -> Outcome:
        arguments = {"delegates_clear": clear, "delegates_added": [bytes(each) for each in added]}
        return self.send(call(self.program, DELEGATE, self.accounts(**changed), arguments))

    def close(self, **changed: Any) -> Outcome:
        return self.send(call(self.program, CLOSE, self.accounts(**changed)))

    def read(self, address: Pubkey | None = None) -> dict[str, Any]:
        data = self.vm.data(address or self.address())
        assert data[:8].hex() == "0344a8f3c3a8204b"  # docs/solana-account.md
        return AUTHORIZATION.decode(data[8:])


@pytest.fixture(params=[False, True], ids=["cluster", "all features"])
def world(request: pytest.FixtureRequest) -> World:
    vm = Vm(features=request.param)
    program = vm.deploy(image("authorizer"))
    return World(vm, program, vm.wallet(), vm.wallet())


def keys(count: int, start: int = 0) -> list[Pubkey]:
    return [Pubkey(struct.pack(">I28x", start + i + 1)) for i in range(count)]


def test_an_authorization_from_beginning_to_end(world: World) -> None:
    before = world.vm.lamports(world.vm.payer.pubkey())
    must(world.create())
    account = world.read()
    assert account == {
        "bump": account["bump"],
        "grantor": world.grantor.pubkey().__bytes__(),
        "grantee": world.grantee.pubkey().__bytes__(),
        "scope": list(JOIN_SCOPE),
        "active": False,
        "delegates": [],
        "grantor_update_unix_timestamp": 0,
    }
    must(world.grant())
    account |= {"active": True, "grantor_update_unix_timestamp": START_TIME}
    assert world.read() == account
    world.vm.advance(100)
    must(world.delegate(keys(2)))
    assert world.read() == account | {"delegates": [bytes(each) for each in keys(2)]}
    must(world.delegate(keys(1, 7)))
    assert world.read() == account | {"delegates": [bytes(each) for each in [*keys(2), *keys(1, 7)]]}
    must(world.delegate(keys(2, 20), clear=True))
    assert world.read() == account | {"delegates": [bytes(each) for each in keys(2, 20)]}
    must(world.grant(False))
    world.vm.advance(MONTH)
    must(world.close())
    assert world.vm.svm.get_account(world.address()) is None or world.vm.data(world.address()) == b""
    fees = before - world.vm.lamports(world.vm.payer.pubkey())
    assert fees <= 8 * 15_000, "the rent came back"
    must(world.create())  # a new one at the same address, with nothing of the old
    assert world.read()["delegates"] == []


def test_units_are_as_documented(world: World) -> None:
    text = (SOURCES.parents[2] / "docs/solana-programs.md").read_text()
    table = dict(re.findall(r"^\| `authorization_(\w+)`[^|]*\| ([\d,]+) \|", text, re.MULTILINE))
    measured = {"create": world.create(), "grantor_update": world.grant(), "grantee_update": world.delegate(keys(25))}
    must(world.delegate(clear=True))
    must(world.grant(False))
    measured["close"] = world.close()
    assert set(table) == set(measured)
    for name, outcome in measured.items():
        most = int(table[name].replace(",", ""))
        assert most / 3 < must(outcome).units <= most, name


def test_rent_follows_the_list_of_delegates(world: World) -> None:
    must(world.create())
    rent = world.vm.svm.minimum_balance_for_rent_exemption
    sizes = []
    for added, clear in [(30, False), (30, False), (0, True), (3, True), (0, False)]:
        must(world.delegate(keys(added), clear=clear))
        sizes.append(len(world.vm.data(world.address())))
        assert world.vm.lamports(world.address()) == rent(sizes[-1])
    empty = 8 + 1 + 64 + 4 + len(JOIN_SCOPE) + 1 + 4 + 8
    assert sizes == [empty + 32 * count for count in (30, 60, 0, 3, 3)]


def test_lamports_that_lie_at_the_address_do_not_prevent_it(world: World) -> None:
    world.vm.svm.airdrop(world.address(), 5)
    must(world.create())
    assert world.read()["scope"] == list(JOIN_SCOPE)


@pytest.mark.parametrize("scope", [b"", b"x", bytes(range(32))])
def test_scopes_have_up_to_32_bytes(world: World, scope: bytes) -> None:
    must(world.create(scope))
    assert world.read(world.address(scope=scope))["scope"] == list(scope)


def test_a_longer_scope_is_refused(world: World) -> None:
    assert world.create(bytes(33)).error == 2006


def test_anybody_can_be_a_grantee(world: World) -> None:
    must(world.create(grantee=ANYBODY))
    assert world.read(world.address(grantee=ANYBODY))["grantee"] == bytes(32)


def test_hundreds_of_delegates(world: World) -> None:
    must(world.create())
    for start in range(0, 600, 25):
        must(world.delegate(keys(25, start)))
    assert world.read()["delegates"] == [bytes(each) for each in keys(600)]


def test_the_address_of_the_specification() -> None:
    psyche = Pubkey.from_string("PsyAUmhpmiUouWsnJdNGFSX8vZ6rWjXjgDPHsgqPGyw")
    seeds = [b"Authorization", bytes([1] * 32), bytes(32), JOIN_SCOPE]
    address, bump = Pubkey.find_program_address(seeds, psyche)
    assert (str(address), bump) == ("7i6cbXVqahwHLEQmetfSnwz3FdckTxucZHNBczReh1Cv", 255)


# ---- attacks


def unsigned(key: Keypair, writable: bool = False) -> AccountMeta:
    return AccountMeta(key.pubkey(), False, writable)


def error_of(outcome: Outcome, account: str | None = None) -> int | str | None:
    """The number, after a look at the log line that names the account at fault."""
    if account is not None:
        assert any(f"AnchorError caused by account: {account}. Error Code:" in line for line in outcome.logs), (
            outcome.logs
        )
    return outcome.error


def test_each_signature_is_needed(world: World) -> None:
    assert error_of(world.create(grantor=unsigned(world.grantor)), "grantor") == 3010
    poor = world.vm.wallet()
    assert error_of(world.create(payer=AccountMeta(poor.pubkey(), False, True)), "payer") == 3010
    must(world.create())
    assert error_of(world.grant(grantor=unsigned(world.grantor)), "grantor") == 3010
    assert error_of(world.delegate(keys(1), grantee=unsigned(world.grantee)), "grantee") == 3010
    assert error_of(world.delegate(keys(1), payer=AccountMeta(poor.pubkey(), False, True)), "payer") == 3010
    assert error_of(world.close(grantor=unsigned(world.grantor)), "grantor") == 3010


def test_only_the_grantor_grants_revokes_and_closes(world: World) -> None:
    must(world.create())
    for attempt in (world.grant, world.close):
        assert error_of(attempt(grantor=world.grantee.pubkey()), "authorization") == 2003
    assert error_of(world.delegate(keys(1), grantee=world.grantor.pubkey()), "authorization") == 2003
    assert world.read()["active"] is False


def test_an_authorization_of_another_grantor_is_of_no_use(world: World) -> None:
    must(world.create())
    thief = world.vm.wallet()
    own = World(world.vm, world.program, thief, world.grantee)
    must(own.create())
    assert error_of(own.grant(authorization=world.address()), "authorization") == 2003
    assert error_of(own.create(authorization=world.address()), None) == 2006
    assert world.read()["active"] is False


def test_it_cannot_be_made_twice(world: World) -> None:
    must(world.create())
    must(world.grant())
    before = world.vm.data(world.address())
    assert world.create().error == 3000
    assert world.vm.data(world.address()) == before


def test_forged_accounts_are_refused(world: World) -> None:
    must(world.create())
    must(world.grant())
    genuine = world.vm.data(world.address())
    elsewhere = world.vm.keypair().pubkey()
    for owner, data, error in [
        (SYSTEM_PROGRAM, genuine, 3007),
        (world.vm.payer.pubkey(), genuine, 3007),
        (world.program, genuine, 2006),  # right in everything but its address
        (world.program, b"", 3001),
        (world.program, bytes(len(genuine)), 3002),
        (world.program, genuine[:8], 3003),
        (world.program, genuine[:-1], 3003),
        (world.program, genuine[:73] + b"\xff\xff\xff\xff" + genuine[77:], 3003),  # scope beyond the end
        (world.program, genuine[:-12] + b"\xff\xff\xff\xff" + genuine[-8:], 3003),  # so many delegates
        (world.program, genuine[:-13] + b"\x02" + genuine[-12:], 3003),  # active: neither true nor false
    ]:
        world.vm.put(elsewhere, owner, data, lamports=10**9)
        assert error_of(world.grant(authorization=elsewhere), "authorization") == error


def test_accounts_have_to_be_writable_and_enough(world: World) -> None:
    read_only = AccountMeta(world.address(), False, False)
    assert world.create(authorization=read_only).error == 3006
    must(world.create())
    assert error_of(world.grant(authorization=read_only), "authorization") == 3006
    assert error_of(world.close(authorization=read_only), "authorization") == 3006
    assert error_of(world.close(spill=AccountMeta(world.vm.keypair().pubkey(), False, False)), "spill") == 3006
    assert error_of(world.delegate(keys(1), authorization=read_only), "authorization") == 3006
    poor = AccountMeta(world.grantee.pubkey(), True, False)
    assert error_of(world.create(payer=poor), "payer") == 3006
    assert error_of(world.delegate(keys(1), payer=poor), "payer") == 3006


def test_accounts_are_counted(world: World) -> None:
    must(world.create())
    no_delegates = {"delegates_clear": False, "delegates_added": []}
    for spec, arguments in [
        (CREATE, {"grantee": bytes(32), "scope": []}),
        (GRANT, {"active": True}),
        (DELEGATE, no_delegates),
        (CLOSE, {}),
    ]:
        whole = call(world.program, spec, world.accounts(), arguments)
        for count in range(len(spec.accounts)):
            assert world.send(Instruction(world.program, bytes(whole.data), whole.accounts[:count])).error == 3005


def test_another_program_in_the_place_of_the_system(world: World) -> None:
    assert error_of(world.create(system_program=world.program), "system_program") == 3008
    must(world.create())
    assert error_of(world.delegate(keys(1), system_program=world.program), "system_program") == 3008


def test_closing_needs_revocation_and_patience(world: World) -> None:
    must(world.create())
    must(world.grant())
    assert world.close().error == 6000
    must(world.delegate(keys(1)))
    must(world.grant(False))
    assert world.close().error == 6001
    world.vm.advance(MONTH - 1)
    assert world.close().error == 6001
    must(world.grant(False))  # another update: the month begins anew
    world.vm.advance(1)
    assert world.close().error == 6001
    world.vm.advance(MONTH - 1)
    must(world.close())


def test_without_delegates_it_closes_at_once(world: World) -> None:
    must(world.create())
    must(world.grant())
    must(world.grant(False))
    must(world.close())


def test_a_closed_one_is_gone_for_the_rest_of_the_transaction(world: World) -> None:
    must(world.create())
    close = call(world.program, CLOSE, world.accounts())
    revive = call(world.program, GRANT, world.accounts(), {"active": True})
    outcome = world.send(close, revive)
    assert (outcome.error, outcome.failed_instruction) == (3007, 1)


def test_it_cannot_be_closed_into_itself(world: World) -> None:
    must(world.create())
    assert error_of(world.close(spill=world.address()), "spill") == 2040


@pytest.mark.parametrize("active", [b"", b"\x02", b"\xff", b"\x01\x00", b"\x00\x00"], ids=bytes.hex)
def test_a_boolean_has_one_byte_and_two_values(world: World, active: bytes) -> None:
    must(world.create())
    assert world.grant(active).error == 102


def test_lists_say_how_long_they_are(world: World) -> None:
    must(world.create())
    key = bytes(keys(1)[0])
    for data in [
        b"\x00",
        b"\x02" + struct.pack("<I", 0),
        b"\x00" + struct.pack("<I", 2) + key,
        b"\x00" + struct.pack("<I", 1) + key[:-1],
        b"\x00" + struct.pack("<I", 1) + key + b"\x00",
        b"\x00" + struct.pack("<I", 0xFFFFFFFF),
        b"\x00" + struct.pack("<I", 0x08000000) + key,  # times 32 is 2^32
    ]:
        assert world.send(call(world.program, DELEGATE, world.accounts(), data)).error == 102
    for data in [b"", bytes(31), bytes(32), bytes(32) + struct.pack("<I", 0xFFFFFFFF), bytes(32) + b"\1\0\0\0"]:
        assert world.send(call(world.program, CREATE, world.accounts(), data)).error == 102
    assert world.send(call(world.program, CLOSE, world.accounts(), b"\0")).error == 102


@pytest.mark.parametrize("data", [b"", bytes(7), bytes(8), b"\xff" * 100], ids=["none", "7", "8", "100"])
def test_unknown_instructions(world: World, data: bytes) -> None:
    assert world.send(Instruction(world.program, data, [])).error == 101


def test_who_cannot_pay_leaves_nothing(world: World) -> None:
    poor = world.vm.wallet(1000)
    world.grantee = poor  # signs too
    outcome = world.create(payer=AccountMeta(poor.pubkey(), True, True))
    assert outcome.error == 1  # the system program's: the balance is too low
    assert world.vm.data(world.address()) == b""


def test_the_errors_are_those_of_the_python_table() -> None:
    text = re.sub(r"\\\n\s*", "", (SOURCES / "authorizer/authorizer.h").read_text())
    found = re.findall(r'X\((\w+),\s*"([^"]*)"\)', text)
    assert found == [(each.name, each.message) for number, each in REFUSALS["authorizer"].items() if number >= 6000]
