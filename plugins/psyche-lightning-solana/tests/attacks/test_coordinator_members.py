"""What members and strangers may send to the coordinator in bad faith: each is refused, and not one byte changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from psyche_lightning_solana.interface import CHECKPOINT_SCOPE, JOIN_SCOPE
from psyche_lightning_solana.layout import MAX_CLIENTS, view_coordinator
from solana_support.runs import CONFIG, PARAMETERS, Run, altered, node_of
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair

from psyche_lightning.protocol.committee import Committee, round_selection
from psyche_lightning.protocol.state import Phase, WitnessProof
from psyche_lightning.wire.canonical import sha256

HUB = {"Hub": {"repo_id": "evil/model"}}


@pytest.fixture
def training() -> Run:
    return Run().train()


@pytest.fixture
def waiting() -> Run:
    return Run().start()


# Members.


def test_joining_for_somebody_else(waiting: Run) -> None:
    victim, thief = waiting.wallets[0], waiting.stranger
    instruction, _, node = waiting.joining(victim)
    meta = AccountMeta(thief.pubkey(), True, False)
    assert waiting.refused(altered(instruction, a0=meta), thief, node) == "SignerMismatch"


def test_joining_with_the_node_key_of_another(waiting: Run) -> None:
    """Whoever has not the key cannot use it, whether or not its node is a member; who has it uses it once."""
    run, victim, thief = waiting, waiting.wallets[0], waiting.stranger
    stolen, _, node = run.joining(thief, node_of(victim))
    claimed = altered(stolen, a5=AccountMeta(node.pubkey(), False, False))
    own = altered(stolen, a5=AccountMeta(node_of(thief).pubkey(), True, False))
    for _ in range(2):
        assert run.refused(claimed, thief) == "AccountNotSigner"
        assert run.refused(own, thief, node_of(thief)) == "SignerMismatch"
        run.join(victim)
    assert run.refused(stolen, thief, node) == "SignerMismatch"
    run.do(run.keys.withdraw(victim.pubkey()), victim)
    run.do(stolen, thief, node)


def test_joining_with_what_does_not_authorize(waiting: Run) -> None:
    run, user = waiting, waiting.wallets[0]
    join, *signers = run.joining(user)
    foreign = run.authorize(run.stranger, JOIN_SCOPE)
    scope = run.authorize(run.owner, CHECKPOINT_SCOPE)
    named = run.authorize(run.owner, JOIN_SCOPE, run.wallets[1].pubkey())
    for authorization in (foreign, scope, named):
        assert run.refused(altered(join, a1=authorization), *signers) == "ConstraintRaw"
    forged = run.vm.keypair().pubkey()
    run.vm.put(forged, run.stranger.pubkey(), run.vm.data(run.open))
    for wrong in (forged, run.keys.instance):
        assert run.refused(altered(join, a1=wrong), *signers) == "AccountOwnedByWrongProgram"


def test_the_list_of_members_is_full() -> None:
    run = Run(3, global_batch_size_start=257, global_batch_size_end=257).start()
    wallets = [run.vm.wallet() for _ in range(MAX_CLIENTS + 1)]
    for wallet in wallets[:MAX_CLIENTS]:
        run.join(wallet)
    late = wallets[-1]
    assert run.refused(*run.joining(late)) == "ClientsFull"
    run.join(wallets[0])
    run.do(run.keys.withdraw(wallets[7].pubkey()), wallets[7])
    run.join(late)
    assert len(run.read().members) == MAX_CLIENTS
    assert run.read().members[7].signer == bytes(late.pubkey()), "in the place of the one that left"
    assert run.refused(*run.joining(wallets[7])) == "ClientsFull"


def test_more_members_than_samples() -> None:
    run = Run(3, global_batch_size_start=2, global_batch_size_end=2).start()
    for wallet in run.wallets[:2]:
        run.join(wallet)
    assert run.refused(*run.joining(run.wallets[2])) == "MoreClientsThanBatches"


def test_wallets_that_left_fill_no_run() -> None:
    run = Run(3, init_min_clients=2, global_batch_size_start=2, global_batch_size_end=2).start()
    for wallet in (*run.wallets, run.stranger, *run.wallets):
        run.join(wallet)
        run.do(run.keys.withdraw(wallet.pubkey()), wallet)
    run.join(run.wallets[1])
    run.join(run.stranger)
    run.wait(3)
    assert [client.signer for client in run.state.clients] == [
        bytes(wallet.pubkey()) for wallet in (run.wallets[1], run.stranger)
    ]


def test_the_places_of_who_is_listed_or_has_points_are_not_given_away() -> None:
    run = Run(3, global_batch_size_start=257, global_batch_size_end=257).train()
    wallets = [run.vm.wallet() for _ in range(MAX_CLIENTS - 3)]
    for wallet in wallets:
        run.join(wallet)
    assert run.refused(*run.joining(run.stranger)) == "ClientsFull", "the clients of the epoch keep their places"
    for wallet in wallets[2:]:
        run.do(run.keys.withdraw(wallet.pubkey()), wallet)
    run.do(run.keys.withdraw(run.wallets[2].pubkey()), run.wallets[2])
    data = bytearray(run.vm.data(run.keys.coordinator_account))
    view_coordinator(data)["members"]["earned"][5] = 1
    run.vm.put(run.keys.coordinator_account, run.program, bytes(data))
    run.join(run.stranger)
    members = run.read().members
    assert members[6].signer == bytes(run.stranger.pubkey())
    assert [member.signer for member in members[:3]] == [bytes(wallet.pubkey()) for wallet in run.wallets]


def test_leaving_without_being_there(training: Run) -> None:
    assert training.refused(training.keys.withdraw(training.stranger.pubkey()), training.stranger) == "InvalidWithdraw"
    training.do(training.keys.withdraw(training.wallets[0].pubkey()), training.wallets[0])
    instruction = training.keys.withdraw(training.wallets[0].pubkey())
    assert training.refused(instruction, training.wallets[0]) == "InvalidWithdraw"


def test_the_address_of_another(training: Run) -> None:
    run, victim, thief = training, training.wallets[0], training.stranger
    theirs = run.keys.set_address(victim.pubkey(), "tcp://1.2.3.4:5")
    run.do(theirs, victim)
    place = theirs.accounts[1].pubkey
    before = run.vm.data(place)
    assert run.refused(altered(run.keys.set_address(thief.pubkey(), "mine"), a1=place), thief) == "ConstraintHasOne"
    assert run.refused(altered(run.keys.set_address(thief.pubkey(), ""), a1=place), thief) == "ConstraintHasOne"
    own = altered(run.keys.set_address(victim.pubkey(), "x"), a2=run.make("another", thief).instance)
    assert run.refused(own, victim) == "ConstraintSeeds"
    assert run.vm.data(place) == before


# Reports.


def test_warm_up_reports_that_are_not_ones_own() -> None:
    run = Run().gather()
    keys, thief, user = run.keys, run.stranger, run.wallets[1]
    assert run.refused(keys.warmup_witness(thief.pubkey(), 0, PARAMETERS), thief) == "SignerNotAClient"
    for index in (0, 2, 4, 255, 256, 2**64 - 1):
        assert run.refused(keys.warmup_witness(user.pubkey(), index, PARAMETERS), user) == "InvalidWitness"
    assert run.refused(keys.warmup_witness(user.pubkey(), 1, bytes(32)), user) == "InvalidWitness"
    assert run.refused(keys.warmup_witness(user.pubkey(), 1, PARAMETERS, epoch=1), user) == "InvalidWitness"
    run.do(keys.warmup_witness(user.pubkey(), 1, PARAMETERS), user)
    assert run.refused(keys.warmup_witness(user.pubkey(), 1, PARAMETERS), user) == "DuplicateWitness"


def test_other_parameters_than_those_that_were_agreed() -> None:
    run = Run().cool()
    for wallet in run.wallets:
        step = run.state.step - 1
        if run.state.phase is Phase.COOLDOWN:
            run.do(run.keys.vote_checkpoint(wallet.pubkey(), 0, step, PARAMETERS), wallet)
    run.start().gather()
    assert run.state.checkpoint.digest == PARAMETERS
    other = run.keys.warmup_witness(run.wallets[0].pubkey(), 0, sha256(b"other"))
    assert run.refused(other, run.wallets[0]) == "InvalidWitness"


def test_reports_by_one_who_is_no_member(training: Run) -> None:
    run, thief = training, training.stranger
    meta = AccountMeta(thief.pubkey(), True, False)
    stolen = altered(run.report(run.wallets[0]), a0=meta)
    assert run.refused(stolen, thief) == "SignerNotAClient"
    run.join(thief)  # a member of the next epoch only
    assert run.refused(stolen, thief) == "InvalidWitness"


def test_a_report_twice_and_on_another_seat(training: Run) -> None:
    run, first, second = training, training.wallets[0], training.wallets[1]
    as_second = AccountMeta(second.pubkey(), True, False)
    assert run.refused(altered(run.report(first), a0=as_second), second) == "InvalidWitness"
    run.do(run.report(first), first)
    assert run.refused(run.report(first), first) == "DuplicateWitness"
    assert run.refused(altered(run.report(first), a0=as_second), second) == "InvalidWitness"


def test_a_report_on_another_round(training: Run) -> None:
    run, user = training, training.wallets[0]
    old = run.report(user)
    for at in ((0, 1), (1, 0), (65535, 0), (0, 2**32 - 1)):
        proof = round_selection(run.round, run.state.config).witness_proof(0)
        assert run.refused(run.keys.witness(user.pubkey(), proof, bytes(32), at=at), user) == "InvalidWitness"
    step = run.state.step + 1
    late = run.keys.witness(user.pubkey(), proof, bytes(32), metadata={"step": step})
    assert run.refused(late, user) == "InvalidWitness"
    run.witness()
    assert run.round.height == 1
    assert run.refused(old, user) == "InvalidWitness", "what was sent for height 0 does not count for height 1"


@pytest.mark.parametrize("nodes", [0, 2])
def test_a_forged_seat(nodes: int) -> None:
    run = Run(5, witness_nodes=nodes, min_clients=2).train()
    selection = round_selection(run.round, run.state.config)
    for index, wallet in enumerate(run.wallets):
        true = selection.witness_proof(index)
        for position in {0, 1, 2, 4, 5, 31, 2**64 - 1} - {true.position}:
            forged = WitnessProof(position, index, True)
            report = run.keys.witness(wallet.pubkey(), forged, bytes(32))
            assert run.refused(report, wallet) == "InvalidWitness"
        unwilling = run.keys.witness(wallet.pubkey(), WitnessProof(true.position, index, False), bytes(32))
        assert run.refused(unwilling, wallet) == "InvalidWitness"
        for other in (2**32, 2**64 - 1, 5):
            outside = run.keys.witness(wallet.pubkey(), WitnessProof(true.position, other, True), bytes(32))
            assert run.refused(outside, wallet) == "InvalidWitness"


def test_reports_while_there_is_no_round() -> None:
    run = Run().gather()
    user = run.wallets[0]
    report = run.keys.witness(user.pubkey(), WitnessProof(0, 0), bytes(32))
    assert run.refused(report, user) == "InvalidRunState"
    vote = run.keys.vote_checkpoint(user.pubkey(), 0, 0, PARAMETERS)
    assert run.refused(vote, user) == "InvalidRunState"
    run.do(run.keys.set_paused(run.owner.pubkey(), True), run.owner)
    for instruction in (report, vote, run.keys.tick(user.pubkey())):
        assert run.refused(instruction, user) == "Halted"


# Health checks.


def test_a_healthy_client_is_not_dropped(training: Run) -> None:
    run, accuser = training, training.wallets[0]
    listed = bytes(run.wallets[1].pubkey())
    assert (
        run.refused(run.keys.health_check(accuser.pubkey(), listed, bytes(32), 0, 1), accuser) == "InvalidHealthCheck"
    )
    run.witness()
    before = run.state.round_at(0)
    assert before is not None
    selection = round_selection(before, run.state.config)

    def accusation(user: Keypair, listed: bytes, position: int, index: int, committee: Committee) -> Instruction:
        return run.keys.health_check(user.pubkey(), listed, bytes(32), position, index, committee)

    seat = selection.committee_position(1)
    true = accusation(accuser, listed, seat, 1, Committee.TRAINER)
    assert run.refused(true, accuser) == "InvalidHealthCheck", "all witnesses heard from it"
    for wrong in (
        accusation(accuser, listed, seat + 1, 1, Committee.TRAINER),
        accusation(accuser, listed, seat, 2, Committee.TRAINER),
        accusation(accuser, listed, seat, 2**64 - 1, Committee.TRAINER),
        accusation(accuser, listed, seat, 1, Committee.VERIFIER),
        accusation(accuser, bytes(run.stranger.pubkey()), seat, 1, Committee.TRAINER),
    ):
        assert run.refused(wrong, accuser) == "InvalidCommitteeProof"
    stranger = altered(true, a0=AccountMeta(run.stranger.pubkey(), True, False))
    assert run.refused(stranger, run.stranger) == "SignerNotAClient"


def test_a_silent_client_is_dropped_with_a_true_proof(training: Run) -> None:
    run, accuser = training, training.wallets[0]
    silent = bytes(run.wallets[1].pubkey())
    run.witness(heard=[signer for signer in run.round.clients if signer != silent])
    before = run.state.round_at(0)
    assert before is not None
    seat = round_selection(before, run.state.config).committee_position(1)
    forged = run.keys.health_check(accuser.pubkey(), silent, bytes(32), seat + 1, 1)
    assert run.refused(forged, accuser) == "InvalidCommitteeProof"
    run.do(run.keys.health_check(accuser.pubkey(), silent, bytes(32), seat, 1), accuser)
    report = run.report(run.wallets[1])
    assert run.refused(report, run.wallets[1]) == "InvalidWitness", "who is dropped does not witness"


# Checkpoints.


def test_votes_that_do_not_count() -> None:
    run = Run().cool()
    keys, user, step = run.keys, run.wallets[0], run.state.step
    thief = run.stranger
    assert run.refused(keys.vote_checkpoint(thief.pubkey(), 0, step - 1, PARAMETERS), thief) == "InvalidCheckpoint"
    for epoch, at, digest in (
        (1, step - 1, PARAMETERS),
        (0, step, PARAMETERS),
        (0, 2**32 - 1, PARAMETERS),
        (0, step - 1, bytes(32)),
    ):
        assert run.refused(keys.vote_checkpoint(user.pubkey(), epoch, at, digest), user) == "InvalidCheckpoint"
    run.do(keys.vote_checkpoint(user.pubkey(), 0, step - 1, PARAMETERS), user)
    second = keys.vote_checkpoint(user.pubkey(), 0, step - 1, sha256(b"other"))
    assert run.refused(second, user) == "InvalidCheckpoint"


def test_the_checkpoint_is_moved_only_by_those_who_may(training: Run) -> None:
    run, user = training, training.wallets[0]
    key = user.pubkey()
    assert run.refused(run.keys.checkpoint(key, HUB), user) == "InvalidCheckpoint", "a client of the epoch"
    foreign = run.authorize(run.stranger, CHECKPOINT_SCOPE, key)
    scope = run.authorize(run.owner, JOIN_SCOPE, key)
    other = run.authorize(run.owner, CHECKPOINT_SCOPE, run.wallets[1].pubkey())
    for authorization in (foreign, scope, other, run.open):
        assert run.refused(run.keys.checkpoint(key, HUB, authorization), user) == "ConstraintRaw"
    own = run.keys.checkpoint(key, HUB, run.keys.instance)
    assert run.refused(own, user) == "AccountOwnedByWrongProgram"
    run.do(run.keys.checkpoint(key, HUB, run.authorize(run.owner, CHECKPOINT_SCOPE, key)), user)
    assert run.read().llm["LLM"]["checkpoint"] == {"Hub": {"repo_id": "evil/model", "revision": None}}


# Ticks.


def test_early_and_flooded_ticks_change_nothing(training: Run) -> None:
    run, thief = training, training.stranger
    before = run.snapshot()
    for _ in range(50):
        run.do(run.keys.tick(thief.pubkey()), thief)
    run.wait(CONFIG["max_round_train_time"] - 1)
    assert run.snapshot() == before
    run.wait(1)
    assert run.state.phase is Phase.ROUND_WITNESS


def test_a_run_that_is_halted_does_not_tick() -> None:
    run = Run()
    assert run.refused(run.keys.tick(run.stranger.pubkey()), run.stranger) == "Halted"


# Arithmetic at the limits.


def _limits() -> list[tuple[str, Callable[[Run], None]]]:
    def late(run: Run) -> None:
        """The last epoch that the layout counts, the last step, and data ids past 2^63."""
        progress = {"epoch": 65535, "step": 2**32 - 3, "epoch_start_data_index": 2**63 - 1}
        run.do(run.keys.update(run.owner.pubkey(), progress=progress), run.owner)

    def rich(run: Run) -> None:
        """All points that there are, twice."""
        run.do(run.keys.set_future_epoch_rates(run.owner.pubkey(), 2**64 - 1, 2**64 - 1), run.owner)

    return [("late", late), ("rich", rich)]


@pytest.mark.parametrize(("name", "prepare"), _limits())
def test_at_the_limits(name: str, prepare: Callable[[Run], None]) -> None:
    run = Run(1, total_steps=2**32 - 2, epoch_time=2**64 - 1, global_batch_size_warmup_tokens=2**64 - 1).configure()
    prepare(run)
    for _ in range(2):
        if run.state.phase is Phase.FINISHED:
            break
        run.cool()
        vote = run.keys.vote_checkpoint(run.wallets[0].pubkey(), run.state.epoch, run.state.step - 1, PARAMETERS)
        run.do(vote, run.wallets[0])
        assert run.state.phase is Phase.PAUSED
        if name == "late":
            assert (run.state.epoch, run.state.step) == (65535, 2**32 - 2)
            assert run.state.epoch_start_data_index == 2**63 - 1 + 1024
            run.do(run.keys.set_paused(run.owner.pubkey(), False), run.owner)
            run.train().witness().witness().witness()
            assert run.state.step == 2**32 - 1
            run.do(
                run.keys.vote_checkpoint(run.wallets[0].pubkey(), 65535, run.state.step - 1, PARAMETERS),
                run.wallets[0],
            )
            assert run.state.phase is Phase.FINISHED
            return
        run.do(run.keys.set_paused(run.owner.pubkey(), False), run.owner)
    assert run.read().members[0].earned == 2**64 - 1
