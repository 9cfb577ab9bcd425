"""What members and strangers may send to the coordinator in bad faith: each is refused, and not one byte changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from psyche_lightning_solana.interface import CHECKPOINT_SCOPE, JOIN_SCOPE
from psyche_lightning_solana.layout import MAX_CLIENTS, view_coordinator
from solana_support.runs import CONFIG, LIST, PARAMETERS, Run, altered, node_of
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair

from psyche_lightning.protocol.committee import Committee, round_selection
from psyche_lightning.protocol.state import Checkpoint, ClientStatus, Phase, WitnessProof
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


def test_who_is_kicked_leaves_at_once_and_pays() -> None:
    run = Run().start()
    run.do(run.keys.set_future_epoch_rates(run.owner.pubkey(), 900, 7), run.owner)
    gone = run.wallets[1]
    run.train()
    run.do(run.keys.kick(run.owner.pubkey(), gone.pubkey()), run.owner)
    assert run.state.clients[1].status is ClientStatus.EJECTED
    assert run.refused(run.report(gone), gone) == "InvalidWitness"
    assert run.refused(run.keys.kick(run.owner.pubkey(), gone.pubkey()), run.owner) == "InvalidWithdraw"
    run.do(run.keys.set_paused(run.owner.pubkey(), True), run.owner)
    while run.state.phase.active:
        run.witness()
    assert [(member.earned, member.slashed) for member in run.read().members] == [(300, 0), (0, 7), (300, 0), (300, 0)]


def test_the_address_of_another(training: Run) -> None:
    run, victim, thief = training, training.wallets[0], training.stranger
    theirs = run.keys.set_address(victim.pubkey(), "tcp://1.2.3.4:5")
    run.do(theirs, victim)
    place = theirs.accounts[1].pubkey
    before = run.vm.data(place)
    assert run.refused(altered(run.keys.set_address(thief.pubkey(), "mine"), a1=place), thief) == "ConstraintRaw"
    assert run.refused(altered(run.keys.set_address(thief.pubkey(), ""), a1=place), thief) == "ConstraintRaw"
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
    fresh = keys.warmup_witness(user.pubkey(), 1, PARAMETERS)
    assert run.refused(fresh, user) == "InvalidWitness", "the first says with which parameters a fresh run begins"
    run.do(keys.warmup_witness(run.wallets[0].pubkey(), 0, PARAMETERS), run.wallets[0])
    run.do(fresh, user)
    assert run.refused(fresh, user) == "DuplicateWitness"


def test_the_first_of_a_fresh_run_who_says_nothing_loses_its_turn() -> None:
    run = Run().gather()
    order = [bytes(wallet.pubkey()) for wallet in run.wallets]
    for first in (3, 0):
        run.wait(CONFIG["warmup_time"])
        assert run.state.phase is Phase.WAITING_FOR_MEMBERS
        run.wait(CONFIG["waiting_for_members_extra_time"])
        assert run.state.clients[0].signer == order[first]
        assert {client.signer for client in run.state.clients} == set(order)


def test_other_parameters_than_those_that_were_agreed() -> None:
    run = Run().end()
    run.start().gather()
    assert run.state.checkpoint.digest == PARAMETERS
    assert run.state.settled
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
    run.do(run.keys.set_paused(run.owner.pubkey(), True), run.owner)
    for instruction in (report, run.keys.tick(user.pubkey())):
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


def test_a_client_that_delivers_nothing_in_three_rounds_is_dropped_with_a_true_proof(training: Run) -> None:
    run, accuser = training, training.wallets[0]
    silent = bytes(run.wallets[1].pubkey())

    def accusation(shift: int = 0) -> Instruction:
        before = run.state.round_at(run.round.height - 1)
        assert before is not None
        seat = round_selection(before, run.state.config).committee_position(1)
        return run.keys.health_check(accuser.pubkey(), silent, bytes(32), seat + shift, 1)

    for _ in range(3):
        if run.round.height:
            assert run.refused(accusation(), accuser) == "InvalidHealthCheck", "too early"
        run.witness(heard=[signer for signer in run.round.clients if signer != silent])
    assert run.refused(accusation(1), accuser) == "InvalidCommitteeProof"
    run.do(accusation(), accuser)
    report = run.report(run.wallets[1])
    assert run.refused(report, run.wallets[1]) == "InvalidWitness", "who is dropped does not witness"


# What decides.


def test_a_few_equal_reports_decide_nothing() -> None:
    """Also when those who would say otherwise are silent, or leave: a quorum is one of all."""
    run = Run(6).train()
    for wallet in run.wallets[:2]:
        run.do(run.report(wallet, root=sha256(b"lie"), held=(run.state.step - 1, sha256(b"lie"))), wallet)
    run.wait(CONFIG["max_round_train_time"])
    run.wait(CONFIG["round_witness_time"])
    assert run.state.phase is Phase.WAITING_FOR_MEMBERS, "too few reported, so the epoch ends"
    assert run.state.checkpoint.digest == PARAMETERS
    run = Run(6).train()
    for wallet in run.wallets[2:]:
        run.do(run.keys.withdraw(wallet.pubkey()), wallet)
        if not run.state.phase.active:
            break
    assert run.state.phase is Phase.WAITING_FOR_MEMBERS
    assert run.state.checkpoint == Checkpoint(PARAMETERS, 0)


def test_roots_that_differ_are_reported_again_until_a_quorum_is_equal() -> None:
    run = Run(6).train()
    for wallet in run.wallets:
        if run.round.height == 0:
            run.do(run.report(wallet, root=sha256(bytes(wallet.pubkey()))), wallet)
    assert (run.state.phase, run.round.height) == (Phase.ROUND_WITNESS, 0), "everybody reported, and nobody agrees"
    for wallet in run.wallets[:3]:
        run.do(run.report(wallet), wallet)
        assert run.refused(run.report(wallet), wallet) == "DuplicateWitness"
    assert run.round.height == 0
    assert [record.merkle for record in run.round.witnesses].count(LIST) == 3
    run.do(run.report(run.wallets[5]), run.wallets[5])
    assert (run.state.phase, run.round.height, run.state.step) == (Phase.ROUND_TRAIN, 1, 2)
    assert [record.merkle for record in run.state.rounds[0].witnesses].count(LIST) == 4


def test_what_is_decided_stays_decided_while_the_run_drains(training: Run) -> None:
    run, unknown = training, (0, bytes(32))
    run.do(run.keys.set_paused(run.owner.pubkey(), True), run.owner)
    run.witness()
    for _ in range(2):
        for wallet in run.wallets[:3]:
            run.do(run.report(wallet, held=unknown), wallet)
    assert (run.round.height, run.round.step) == (2, 0), "the last round, which waits for the parameters' name"
    for wallet in run.wallets[:3]:
        assert run.refused(run.report(wallet, root=sha256(b"other"), held=unknown), wallet) == "DuplicateWitness"
        run.do(run.report(wallet, root=sha256(b"other"), held=(1, PARAMETERS)), wallet)
    assert [record.merkle for record in run.round.witnesses] == [LIST] * 3
    assert (run.state.phase, run.state.checkpoint) == (Phase.PAUSED, Checkpoint(PARAMETERS, 1))


def test_parameters_that_no_quorum_holds(training: Run) -> None:
    run, user, step = training, training.wallets[0], training.state.step
    for held in ((step, PARAMETERS), (2**32 - 1, PARAMETERS)):
        assert run.refused(run.report(user, held=held), user) == "InvalidWitness"
    other = sha256(b"other")
    run.witness()
    assert run.state.checkpoint == Checkpoint(PARAMETERS, 0)
    for wallet in run.wallets[:2]:
        run.do(run.report(wallet, held=(1, other)), wallet)
    assert run.state.checkpoint == Checkpoint(PARAMETERS, 0), "two of four name them"
    run.do(run.report(run.wallets[2], held=(1, other)), run.wallets[2])
    assert run.state.checkpoint == Checkpoint(other, 1)


def test_a_run_that_applies_nothing_pauses(training: Run) -> None:
    run = training
    while run.state.phase.active:
        assert run.round.height < 7
        for wallet in run.wallets:
            if run.state.phase is Phase.ROUND_TRAIN:
                run.send(run.report(wallet, root=bytes(32)), wallet)
    assert run.state.phase is Phase.PAUSED


def test_a_run_waits_for_a_holder_of_its_parameters() -> None:
    run = Run(3, init_min_clients=2).end()
    run.do(run.keys.set_paused(run.owner.pubkey(), False), run.owner)
    strangers = [run.vm.wallet() for _ in range(3)]
    for wallet in strangers:
        run.join(wallet)
    run.wait(CONFIG["waiting_for_members_extra_time"]).wait(100)
    assert run.state.phase is Phase.WAITING_FOR_MEMBERS
    other = run.keys.warmup_witness(strangers[0].pubkey(), 0, sha256(b"other"))
    assert run.refused(other, strangers[0]) == "InvalidWitness"
    run.do(run.keys.warmup_witness(strangers[0].pubkey(), 0, PARAMETERS), strangers[0])
    run.wait(CONFIG["waiting_for_members_extra_time"])
    assert run.state.phase is Phase.WARMUP
    assert len(run.state.clients) == 3


def test_the_owner_goes_back_to_older_parameters() -> None:
    run, old = Run(3, init_min_clients=2).end(), sha256(b"old")
    key, keys = run.owner.pubkey(), run.keys
    assert (run.state.step, run.state.epoch_start_data_index) == (2, 1024)
    for step, digest in ((2, old), (2**32 - 1, old), (0, bytes(32))):
        assert run.refused(keys.restart_from(key, step, digest), run.owner) == "InvalidCheckpoint"
    run.do(keys.restart_from(key, 0, old), run.owner)
    assert (run.state.step, run.state.epoch_start_data_index, run.state.rounds) == (1, 0, ())
    run.do(keys.set_paused(key, False), run.owner)
    for wallet in run.wallets:
        run.join(wallet)
    run.wait(CONFIG["waiting_for_members_extra_time"]).wait(100)
    assert run.state.phase is Phase.WAITING_FOR_MEMBERS, "nobody holds them"
    run.do(keys.warmup_witness(run.wallets[2].pubkey(), 2, old), run.wallets[2])
    run.wait(CONFIG["waiting_for_members_extra_time"])
    for index, wallet in enumerate(run.wallets):
        run.do(keys.warmup_witness(wallet.pubkey(), index, old), wallet)
    assert (run.state.phase, run.round.step, run.round.data_index) == (Phase.ROUND_TRAIN, 1, 0)
    assert run.refused(keys.restart_from(key, 0, old), run.owner) == "InvalidRunState", "an epoch is under way"


# Checkpoints.


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
        run.end()
        assert run.state.phase is Phase.PAUSED
        if name == "late":
            assert (run.state.epoch, run.state.step) == (65535, 2**32 - 2)
            assert run.state.epoch_start_data_index == 2**63 - 1 + 1024
            run.do(run.keys.set_paused(run.owner.pubkey(), False), run.owner)
            run.train().witness().witness()
            assert run.state.step == 2**32 - 1
            assert run.state.phase is Phase.FINISHED
            return
        run.do(run.keys.set_paused(run.owner.pubkey(), False), run.owner)
    assert run.read().members[0].earned == 2**64 - 1
