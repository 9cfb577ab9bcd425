"""What the treasurer refuses."""

from __future__ import annotations

import struct

import pytest
import spl.token.instructions as token
from psyche_lightning_solana.interface import COORDINATOR, TREASURER
from psyche_lightning_solana.layout import COORDINATOR_SIZE
from solana_support.treasury import CONFIG, MODEL, PROGRESS, Treasury
from solana_support.vm import Outcome, Vm, must
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.system_program import ID as SYSTEM_PROGRAM
from spl.token.constants import TOKEN_PROGRAM_ID

MAX_U64 = 2**64 - 1


@pytest.fixture
def world() -> Treasury:
    return Treasury(Vm(features=True))


@pytest.fixture
def ready(world: Treasury) -> Treasury:
    return world.ready()


def unsigned(key: Keypair, writable: bool = False) -> AccountMeta:
    return AccountMeta(key.pubkey(), False, writable)


def read_only(address: Pubkey) -> AccountMeta:
    return AccountMeta(address, False, False)


def error_of(outcome: Outcome, account: str) -> int | str | None:
    """The number, after a look at the log line that names the account at fault."""
    assert any(f"AnchorError caused by account: {account}. Error Code:" in line for line in outcome.logs), outcome.logs
    return outcome.error


def tokens(world: Treasury) -> tuple[int, int]:
    return world.balance(world.vault), world.balance(world.tokens_of(world.user.pubkey()))


# ---- creation


def test_a_run_is_created_once(world: Treasury) -> None:
    must(world.create())
    before = world.vm.data(world.run)
    assert world.create().error == 3000
    another = world.instruction(
        "run_create", world.creation(main_authority=bytes(world.user.pubkey())), run_collateral=world.vault
    )
    assert world.send(another).error == 3000
    assert world.vm.data(world.run) == before


def test_another_index_for_the_same_run_is_refused_by_the_coordinator(world: Treasury) -> None:
    must(world.create())
    first = world.run
    world.index += 1
    account = world.vm.create_account(world.coordinator, COORDINATOR_SIZE).pubkey()
    outcome = world.create(coordinator_account=account)
    assert outcome.error == 3000
    assert world.vm.data(world.run) == b"", "nothing is left of it"
    assert world.vm.data(first) != b""


@pytest.mark.parametrize(
    ("run_id", "error"), [("", 6001), ("x" * 33, 6001), ("x" * 32, None), ("ö" * 16, None), ("ö" * 17, 6001)]
)
def test_run_ids_have_1_to_32_bytes(run_id: str, error: int | None) -> None:
    world = Treasury(Vm(features=True), run_id[:16] or "test")
    world.run_id = run_id if error is None else world.run_id
    assert world.send(world.instruction("run_create", world.creation(run_id=run_id))).error == error


def test_oversized_and_malformed_arguments(world: Treasury) -> None:
    keys = bytes(64)
    index = struct.pack("<Q", world.index)
    for data in [
        b"",
        index,
        index + b"\x04\0\0\0test" + b"\x04\0\0\0test" + keys[:-1],
        index + b"\x04\0\0\0test" + b"\x04\0\0\0test" + keys + b"\0",
        index + b"\xff\xff\xff\xfftest" + b"\x04\0\0\0test" + keys,
        index + b"\x04\0\0\0te\xff\xff" + b"\x04\0\0\0test" + keys,  # not UTF-8
        index + b"\x04\0\0\0test" + struct.pack("<I", 97) + b"v" * 97 + keys,
    ]:
        assert world.send(world.instruction("run_create", data)).error == 102
    assert world.vm.data(world.run) == b""


def test_creation_needs_its_programs(world: Treasury) -> None:
    stranger = world.vm.wallet().pubkey()
    for name in ("associated_token_program", "token_program", "system_program"):
        assert error_of(world.create(**{name: world.authorizer}), name) == 3008
    assert error_of(world.create(coordinator_program=stranger), "coordinator_program") == 3009
    assert error_of(world.create(authorizer=stranger), "authorizer") == 3009
    # A program that is no coordinator does not know the instruction.
    assert world.create(coordinator_program=world.authorizer).error == 101


def test_creation_needs_the_right_addresses(world: Treasury) -> None:
    stranger = world.vm.keypair().pubkey()
    assert world.create(run=stranger).error == 2006
    assert world.create(coordinator_instance=stranger).error == 2006
    assert world.create(coordinator_manifest=stranger).error == 2006
    assert "InvalidSeeds" in str(world.create(run_collateral=stranger).error)
    assert error_of(world.create(coordinator_account=stranger), "coordinator_account") == 3007
    assert world.create(payer=unsigned(world.vm.wallet(), True)).error == 3010
    assert world.vm.data(world.run) == b""
    must(world.create())


def test_who_pays_is_writable(world: Treasury) -> None:
    poor = AccountMeta(world.user.pubkey(), True, False)
    assert error_of(world.create(payer=poor), "payer") == 3006
    must(world.create())
    assert error_of(world.participate(payer=poor), "payer") == 3006


def test_a_token_that_is_none_is_refused(world: Treasury) -> None:
    fake = world.vm.keypair().pubkey()
    world.vm.put(fake, SYSTEM_PROGRAM, bytes(82))
    vault = world.tokens_of(world.run, fake)
    assert world.create(collateral_mint=fake, run_collateral=vault).error is not None
    assert world.vm.data(world.run) == b""


def test_accounts_are_counted(world: Treasury) -> None:
    for name, spec in TREASURER.instructions.items():
        arguments = world.creation() if name == "run_create" else bytes(_argument_bytes(name))
        whole = world.instruction(name, arguments)
        for count in (0, 1, len(spec.accounts) - 1):
            cut = Instruction(world.treasurer, bytes(whole.data), whole.accounts[:count])
            assert world.send(cut).error == 3005, (name, count)


def _argument_bytes(name: str) -> int:
    return {"run_update": 8, "participant_claim": 8}.get(name, 0)


# ---- commands


def test_only_the_main_authority_commands(world: Treasury) -> None:
    must(world.create())
    for name, arguments in [
        ("run_update", {"paused": False}),
        ("run_set_manifest", {"digest": bytes([1]) * 32, "address": ""}),
        ("run_checkpoint", {"repo": {"Hub": {"repo_id": "a/b", "revision": None}}}),
        ("run_restart_from", {"step": 0, "digest": bytes([1]) * 32}),
    ]:
        for thief in (world.user, world.joiner):
            assert error_of(world.send(world.instruction(name, arguments, authority=thief.pubkey())), "run") == 2003
        outcome = world.send(world.instruction(name, arguments, authority=unsigned(world.authority)))
        assert error_of(outcome, "authority") == 3010


def test_the_coordinator_obeys_the_run_only(world: Treasury) -> None:
    """The main authority itself, or a run account that does not sign, gets nowhere."""
    must(world.create())
    pause = COORDINATOR.instructions["set_paused"]
    assert world.coordinate(pause, {"paused": True}).error == 2003
    assert world.coordinate(pause, {"paused": True}, authority=read_only(world.run)).error == 3010
    free = COORDINATOR.instructions["free_coordinator"]
    assert world.coordinate(free, spill=world.user.pubkey()).error == 2003
    assert world.vm.data(world.account) != b""


def test_the_authority_of_another_run_commands_its_own_only(world: Treasury) -> None:
    must(world.create())
    victim, manifest = world.run, world.manifest
    accounts = {"coordinator_instance": world.instance, "coordinator_account": world.account}
    owner, world.authority = world.authority, world.user
    world.run_id, world.index = "thief", 5
    world.account = world.vm.create_account(world.coordinator, COORDINATOR_SIZE).pubkey()
    must(world.create())
    world.authority, thief = owner, world.user
    signs = {"authority": thief.pubkey()}
    assert error_of(world.update(signs | {"run": victim}, paused=True), "run") == 2003
    for name, address in accounts.items():
        outcome = world.update(signs | {name: address}, paused=True)
        assert error_of(outcome, "run") == 2003
        assert not any(str(world.coordinator) in line for line in outcome.logs), "refused before anything is forwarded"
    assert error_of(world.update(signs | {"coordinator_manifest": manifest}, paused=True), "manifest") == 2006
    assert (
        error_of(world.update(signs | {"coordinator_program": world.authorizer}, paused=True), "coordinator_program")
        == 3008
    )
    must(world.update(signs, config=CONFIG, model=MODEL, progress=PROGRESS, paused=False))


def test_forged_runs_are_refused(world: Treasury) -> None:
    must(world.create())
    genuine = world.vm.data(world.run)
    elsewhere = world.vm.keypair().pubkey()
    mine = genuine[:17] + bytes(world.user.pubkey()) + genuine[49:]  # the user as its authority
    for owner, data, error in [
        (SYSTEM_PROGRAM, mine, 3007),
        (world.coordinator, mine, 3007),
        (world.treasurer, mine, 2006),
        (world.treasurer, b"", 3001),
        (world.treasurer, bytes(len(genuine)), 3002),
        (world.treasurer, genuine[:-1], 3003),
        (world.treasurer, world.vm.data(world.participant()) or b"\x20\x8e\x6c\x4f\xf7\xb3\x36\x06" + bytes(17), 3002),
    ]:
        world.vm.put(elsewhere, owner, data)
        accounts = {"run": elsewhere, "authority": world.user.pubkey()}
        assert error_of(world.update(accounts, paused=True), "run") == error


@pytest.mark.parametrize(
    "data",
    [
        bytes(7),
        bytes(9),
        b"\x02" + bytes(7),
        bytes(6) + b"\x01\x02" + b"\0",  # paused: neither true nor false
        bytes(6) + b"\x02\x01" + b"\0",
        bytes(7) + b"\x01" + struct.pack("<I", 0xFFFFFFFF),
        bytes(7) + b"\x01" + struct.pack("<I", 2) + b"\xff\xfe",
        bytes(4) + b"\x01" + bytes(7),  # a rate is cut short
        bytes(2) + b"\x01\x01" + bytes(600),  # a model of another kind
    ],
    ids=range(9),
)
def test_commands_have_one_encoding(world: Treasury, data: bytes) -> None:
    must(world.create())
    before = world.vm.data(world.account)
    assert world.send(world.instruction("run_update", data)).error == 102
    assert world.vm.data(world.account) == before


@pytest.mark.parametrize("name", ["run_set_manifest", "run_checkpoint", "run_restart_from"])
def test_what_is_forwarded_is_bounded(world: Treasury, name: str) -> None:
    """More than a transaction holds comes from another program that calls."""
    must(world.create())
    for size in (0, 1024, 1025, 4000):
        assert world.send(world.instruction(name, bytes(size))).error == 102


def test_a_command_that_fails_undoes_those_before_it(world: Treasury) -> None:
    must(world.create())
    must(world.update(config=CONFIG, model=MODEL, progress=PROGRESS, paused=False))
    before = world.vm.data(world.account)
    # The version of a run that is not halted cannot change.
    assert world.update(epoch_earning_rate_total_shared=5, client_version="v2").error == 6001
    assert world.vm.data(world.account) == before


# ---- claims


def test_claiming_twice_or_too_much(ready: Treasury) -> None:
    assert ready.claim(101).error == 6000
    must(ready.claim(100))
    for points in (1, 100, MAX_U64, MAX_U64 - 99):
        assert ready.claim(points).error == 6000
    assert tokens(ready) == (900, 100)


def test_two_claims_in_one_transaction_are_counted_both(ready: Treasury) -> None:
    claim = ready.instruction("participant_claim", {"claim_earned_points": 60})
    outcome = ready.send(claim, claim)
    assert (outcome.error, outcome.failed_instruction) == (6000, 1)
    assert tokens(ready) == (1000, 0)


def test_the_user_has_to_sign(ready: Treasury) -> None:
    assert error_of(ready.claim(1, user=unsigned(ready.user)), "user") == 3010
    stranger = ready.vm.wallet()
    accounts = {"user": unsigned(stranger), "participant": ready.participant(stranger.pubkey())}
    assert error_of(ready.participate(**accounts), "user") == 3010
    assert ready.participate(payer=unsigned(stranger, True)).error == 3010


def test_nobody_claims_anothers_points(ready: Treasury) -> None:
    thief = ready.vm.wallet()
    ready.hold(thief.pubkey())
    own = {"user": thief.pubkey(), "user_collateral": ready.tokens_of(thief.pubkey())}
    participant = ready.participant(thief.pubkey())
    create = ready.instruction("participant_create", **own, participant=participant)
    must(ready.vm.send([create], [thief]))

    def steal(**changed: Pubkey | AccountMeta) -> Outcome:
        claim = ready.instruction("participant_claim", {"claim_earned_points": 1}, **own | changed)
        return ready.vm.send([claim], [thief])

    assert error_of(steal(), "participant") == 2006
    assert steal(participant=participant).error == 6000, "no points of its own"
    assert error_of(steal(user=unsigned(ready.user)), "user") == 3010
    assert tokens(ready) == (1000, 0)


def test_a_participant_is_made_once(ready: Treasury) -> None:
    must(ready.claim(100))
    assert ready.participate().error == 3000
    assert ready.claim(1).error == 6000
    assert ready.participate(participant=ready.vm.keypair().pubkey()).error == 2006
    assert error_of(ready.participate(system_program=ready.authorizer), "system_program") == 3008


def test_forged_participants_are_refused(ready: Treasury) -> None:
    must(ready.claim(100))
    data = ready.vm.data(ready.participant())
    fresh = data[:9] + bytes(16)
    elsewhere = ready.vm.keypair().pubkey()
    for owner, forged, error in [
        (SYSTEM_PROGRAM, fresh, 3007),
        (ready.treasurer, fresh, 2006),
        (ready.treasurer, fresh[:-1], 3003),
        (ready.treasurer, b"", 3001),
        (ready.treasurer, bytes(25), 3002),
        (ready.treasurer, ready.vm.data(ready.run), 3002),
    ]:
        ready.vm.put(elsewhere, owner, forged)
        assert error_of(ready.claim(1, participant=elsewhere), "participant") == error
    assert tokens(ready) == (900, 100)


def test_a_participant_of_another_run_does_not_count(ready: Treasury) -> None:
    must(ready.claim(100))
    used, victim = ready.run, ready.participant()
    ready.run_id, ready.index = "another", 3
    account, ready.account = ready.account, ready.vm.create_account(ready.coordinator, COORDINATOR_SIZE).pubkey()
    must(ready.create())
    must(ready.participate())
    vault = ready.tokens_of(used)
    assert error_of(ready.claim(1, run=used, run_collateral=vault, coordinator_account=account), "participant") == 2006
    assert victim != ready.participant()


def test_a_delegated_token_account_is_refused(ready: Treasury) -> None:
    account, thief = ready.tokens_of(ready.user.pubkey()), ready.vm.wallet()
    approve = token.ApproveParams(TOKEN_PROGRAM_ID, account, thief.pubkey(), ready.user.pubkey(), 10)
    must(ready.send(token.approve(approve)))
    assert error_of(ready.claim(1), "user_collateral") == 2003
    must(ready.send(token.revoke(token.RevokeParams(TOKEN_PROGRAM_ID, account, ready.user.pubkey()))))
    must(ready.claim(1))


def test_foreign_token_accounts_are_refused(ready: Treasury) -> None:
    other, mint = ready.vm.wallet().pubkey(), ready.new_mint()
    foreign, worthless = ready.hold(other), ready.hold(ready.user.pubkey(), mint=mint)
    assert error_of(ready.claim(1, user_collateral=foreign), "user_collateral") == 2003
    assert error_of(ready.claim(1, user_collateral=worthless), "user_collateral") == 2003
    assert error_of(ready.claim(1, user_collateral=ready.vault), "user_collateral") == 2003
    fake = ready.vm.keypair().pubkey()
    genuine = ready.vm.data(ready.tokens_of(ready.user.pubkey()))
    for owner, data, error in [
        (SYSTEM_PROGRAM, genuine, 3007),
        (TOKEN_PROGRAM_ID, genuine + b"\0", 3003),
        (TOKEN_PROGRAM_ID, ready.vm.data(ready.mint), 3003),
        (TOKEN_PROGRAM_ID, bytes(165), 3012),
    ]:
        ready.vm.put(fake, owner, data)
        assert error_of(ready.claim(1, user_collateral=fake), "user_collateral") == error
    assert tokens(ready) == (1000, 0)


def test_tokens_come_from_the_runs_account_only(ready: Treasury) -> None:
    other = ready.hold(ready.vm.wallet().pubkey(), 50)
    assert error_of(ready.claim(1, run_collateral=other), "run_collateral") == 2015
    worthless = ready.hold(ready.run, 50, ready.new_mint())
    assert error_of(ready.claim(1, run_collateral=worthless), "run_collateral") == 2009
    own = ready.tokens_of(ready.user.pubkey())
    assert error_of(ready.claim(1, run_collateral=own), "run_collateral") == 2015


def test_points_come_from_the_runs_coordinator_only(ready: Treasury) -> None:
    rich = bytearray(ready.vm.data(ready.account))
    rich[94424 + 72 : 94424 + 80] = struct.pack("<Q", MAX_U64)
    elsewhere = ready.vm.keypair().pubkey()
    for owner in (ready.coordinator, ready.treasurer, SYSTEM_PROGRAM):
        ready.vm.put(elsewhere, owner, bytes(rich))
        assert error_of(ready.claim(1000, coordinator_account=elsewhere), "run") == 2003
    assert error_of(ready.claim(1, coordinator_account=ready.instance), "run") == 2003


def test_a_coordinator_account_that_is_none_any_more(ready: Treasury) -> None:
    genuine = ready.vm.data(ready.account)
    for owner, data, error in [
        (SYSTEM_PROGRAM, genuine, 3007),
        (ready.authorizer, genuine, 3007),
        (ready.coordinator, bytes(len(genuine)), 3002),
        (ready.coordinator, genuine[:-1], 3003),
        (ready.coordinator, genuine[:8] + struct.pack("<Q", 2) + genuine[16:], 3003),  # another version
        (ready.coordinator, genuine[:119000] + struct.pack("<Q", 257) + genuine[119008:], 3003),
    ]:
        ready.vm.put(ready.account, owner, data)
        assert error_of(ready.claim(1), "coordinator_account") == error


def test_another_program_in_the_place_of_the_token_program(ready: Treasury) -> None:
    assert error_of(ready.claim(1, token_program=ready.authorizer), "token_program") == 3008


def test_accounts_have_to_be_writable(ready: Treasury) -> None:
    for name in ("user_collateral", "run", "run_collateral", "participant"):
        address = ready.accounts()[name]
        assert isinstance(address, Pubkey)
        assert error_of(ready.claim(1, **{name: read_only(address)}), name) == 3006


def test_arithmetic_at_the_limits(ready: Treasury) -> None:
    ready.give_points(MAX_U64)
    assert ready.claim(MAX_U64).error == 1, "the token program's: so much is not there"
    must(ready.claim(1000))
    participant, run = ready.vm.data(ready.participant()), ready.vm.data(ready.run)
    # More was claimed than earned: it never happens, and is not a negative number.
    ready.give_points(999)
    assert ready.claim(1).error == 6000
    ready.give_points(MAX_U64)
    ready.hold(ready.run, 10)
    limit = struct.pack("<Q", MAX_U64)
    at = 8 + 1 + 8 + 5 * 32  # the run's totals
    for changed in (run[:at] + limit + run[at + 8 :], run[: at + 8] + limit + run[at + 16 :]):
        ready.vm.put(ready.run, ready.treasurer, changed)
        assert ready.claim(1).error == 6000
        must(ready.claim(0))
    ready.vm.put(ready.run, ready.treasurer, run)
    ready.vm.put(ready.participant(), ready.treasurer, participant[:9] + limit + participant[17:])
    assert ready.claim(1).error == 6000
    ready.vm.put(ready.participant(), ready.treasurer, participant)
    must(ready.claim(10))


@pytest.mark.parametrize("data", [b"", bytes(7), bytes(9)])
def test_a_claim_says_how_much_in_8_bytes(ready: Treasury, data: bytes) -> None:
    assert ready.claim(data).error == 102
    assert ready.send(ready.instruction("participant_create", b"\0")).error == 102


@pytest.mark.parametrize("data", [b"", bytes(7), bytes(8), b"\xff" * 100], ids=["none", "7", "8", "100"])
def test_unknown_instructions(world: Treasury, data: bytes) -> None:
    assert world.send(Instruction(world.treasurer, data, [])).error == 101
