"""Wrong accounts and arguments for the coordinator: each is refused, and not one byte changes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from psyche_lightning_solana.interface import COORDINATOR
from psyche_lightning_solana.layout import COORDINATOR_DISCRIMINATOR, COORDINATOR_SIZE
from solana_support.runs import CONFIG, MODEL, PARAMETERS, Run, altered
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair

from psyche_lightning.protocol.state import Phase
from psyche_lightning.wire.canonical import sha256

HUB = {"Hub": {"repo_id": "evil/model"}}


@pytest.fixture
def training() -> Run:
    return Run().train()


def every_instruction(run: Run) -> Iterator[tuple[Instruction, list[Keypair]]]:
    """One of each on an existing run, with those who sign it."""
    keys, owner, user = run.keys, run.owner, run.wallets[0]
    for instruction in (
        keys.free_coordinator(owner.pubkey(), owner.pubkey()),
        keys.update(owner.pubkey(), metadata={"name": "", "description": "", "num_parameters": 0, "vocab_size": 0}),
        keys.update_client_version(owner.pubkey(), "v2"),
        keys.set_future_epoch_rates(owner.pubkey(), 1, 1),
        keys.set_paused(owner.pubkey(), True),
        keys.checkpoint(owner.pubkey(), HUB),
        keys.set_manifest(owner.pubkey(), sha256(b"m"), "here"),
        keys.kick(owner.pubkey(), user.pubkey()),
        keys.restart_from(owner.pubkey(), 0, PARAMETERS),
    ):
        yield instruction, [owner]
    instruction, *signers = run.joining(user)
    yield instruction, signers
    for instruction in (
        keys.tick(user.pubkey()),
        run.report(user),
        keys.warmup_witness(user.pubkey(), 0, PARAMETERS),
        keys.health_check(user.pubkey(), bytes(run.wallets[1].pubkey()), bytes(32), 0, 0),
        keys.withdraw(user.pubkey()),
        keys.set_address(user.pubkey(), "somewhere"),
    ):
        yield instruction, [user]


def unsigned(meta: AccountMeta) -> AccountMeta:
    return AccountMeta(meta.pubkey, False, meta.is_writable)


# Signers and accounts.


def test_who_should_sign_and_does_not(training: Run) -> None:
    names = set()
    for instruction, signers in every_instruction(training):
        for place, meta in enumerate(instruction.accounts):
            if meta.is_signer:
                others = [signer for signer in signers if signer.pubkey() != meta.pubkey]
                assert (
                    training.refused(altered(instruction, **{f"a{place}": unsigned(meta)}), *others)
                    == "AccountNotSigner"
                )
        names.add(bytes(instruction.data[:8]))
    specs = COORDINATOR.instructions
    assert names == {spec.discriminator for name, spec in specs.items() if name != "init_coordinator"}


@pytest.mark.parametrize("name", ["free", "update", "version", "rates", "paused", "manifest", "kick", "restart"])
def test_commands_of_somebody_who_is_not_the_owner(training: Run, name: str) -> None:
    keys, thief = training.keys, training.stranger
    key = thief.pubkey()
    instruction = {
        "free": lambda: keys.free_coordinator(key, key),
        "update": lambda: keys.update(key, config=CONFIG),
        "version": lambda: keys.update_client_version(key, "mine"),
        "rates": lambda: keys.set_future_epoch_rates(key, 2**64 - 1, 0),
        "paused": lambda: keys.set_paused(key, True),
        "manifest": lambda: keys.set_manifest(key, sha256(b"mine"), "mine"),
        "restart": lambda: keys.restart_from(key, 0, PARAMETERS),
        "kick": lambda: keys.kick(key, training.wallets[0].pubkey()),
    }[name]()
    assert training.refused(instruction, thief) == "ConstraintRaw"


def test_accounts_that_are_missing(training: Run) -> None:
    for instruction, signers in every_instruction(training):
        for count in range(len(instruction.accounts)):
            if count == 0 and not instruction.accounts:
                continue
            short = Instruction(instruction.program_id, bytes(instruction.data), instruction.accounts[:count])
            given = signers if count else []
            assert training.refused(short, *given) == "AccountNotEnoughKeys"


def test_accounts_that_may_not_be_written(training: Run) -> None:
    for instruction, signers in every_instruction(training):
        for place, meta in enumerate(instruction.accounts):
            if meta.is_writable and not meta.is_signer and meta.pubkey != training.owner.pubkey():
                locked = altered(instruction, **{f"a{place}": AccountMeta(meta.pubkey, False, False)})
                assert training.refused(locked, *signers) == "AccountNotMutable"


def test_the_accounts_of_another_run(training: Run) -> None:
    """Its owner commands only it: none of its accounts stands in for those of the run that is attacked."""
    other = training.make("another", training.stranger)
    swaps = {
        training.keys.instance: (other.instance, {"ConstraintRaw"}),
        training.keys.coordinator_account: (other.coordinator_account, {"ConstraintRaw"}),
        training.keys.manifest: (other.manifest, {"ConstraintSeeds"}),
    }
    swapped = 0
    for instruction, signers in every_instruction(training):
        if training.keys.manifest not in [meta.pubkey for meta in instruction.accounts]:
            continue  # an address belongs to a wallet and a run, see below
        for place, meta in enumerate(instruction.accounts):
            if meta.pubkey in swaps:
                substitute, names = swaps[meta.pubkey]
                assert training.refused(altered(instruction, **{f"a{place}": substitute}), *signers) in names
                swapped += 1
    assert swapped == 3 * 15
    mine = altered(training.keys.set_paused(training.stranger.pubkey(), True), a1=other.instance)
    assert training.refused(mine, training.stranger) == "ConstraintRaw"
    whole = altered(mine, a3=other.manifest)
    assert training.refused(whole, training.stranger) == "ConstraintRaw"


def test_accounts_of_another_owner_or_kind(training: Run) -> None:
    """Copies that the program does not own, and its own accounts in the place of others."""
    run, keys = training, training.keys
    for place, key in ((1, keys.instance), (2, keys.coordinator_account), (3, keys.manifest)):
        instruction, user = keys.tick(run.stranger.pubkey()), run.stranger
        copy = run.vm.keypair().pubkey()
        run.vm.put(copy, run.stranger.pubkey(), run.vm.data(key))
        assert run.refused(altered(instruction, **{f"a{place}": copy}), user) == "AccountOwnedByWrongProgram"
        for other in {keys.instance, keys.coordinator_account, keys.manifest} - {key}:
            wrong = altered(instruction, **{f"a{place}": other})
            assert run.refused(wrong, user) == "AccountDiscriminatorMismatch"
        # A copy that the program owns could not come to be; its address gives it away all the same.
        run.vm.put(copy, run.program, run.vm.data(key))
        refusal = run.refused(altered(instruction, **{f"a{place}": copy}), user)
        assert refusal == ("ConstraintRaw" if place == 2 else "ConstraintSeeds")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"short", "AccountDiscriminatorNotFound"),
        (COORDINATOR_DISCRIMINATOR, "AccountDidNotDeserialize"),
        (COORDINATOR_DISCRIMINATOR + (1).to_bytes(8, "little"), "CoordinatorAccountIncorrectSize"),
        (
            (COORDINATOR_DISCRIMINATOR + (1).to_bytes(8, "little")).ljust(COORDINATOR_SIZE + 1, b"\0"),
            "CoordinatorAccountIncorrectSize",
        ),
        (
            (COORDINATOR_DISCRIMINATOR + (2).to_bytes(8, "little")).ljust(COORDINATOR_SIZE, b"\0"),
            "AccountDidNotDeserialize",
        ),
    ],
)
def test_a_coordinator_account_of_another_size_or_version(training: Run, data: bytes, name: str) -> None:
    odd = training.vm.keypair().pubkey()
    training.vm.put(odd, training.program, data)
    instruction = altered(training.keys.tick(training.stranger.pubkey()), a2=odd)
    assert training.refused(instruction, training.stranger) == name


# The beginning and the end.


def test_initialized_twice(training: Run) -> None:
    run, thief = training, training.stranger
    key = thief.pubkey()
    again = run.keys.init_coordinator(key, run.authorizer, key, key)
    assert run.refused(again, thief) == "AccountDiscriminatorAlreadySet", "its own account is taken"
    blank = run.vm.create_account(run.program, COORDINATOR_SIZE).pubkey()
    assert run.refused(altered(again, a2=blank), thief) == "AccountDiscriminatorAlreadySet", "the instance is there"


def test_what_init_does_not_take() -> None:
    run = Run()
    key, keys = run.stranger.pubkey(), run.keys
    fresh = type(keys)(run.program, "fresh", run.vm.create_account(run.program, COORDINATOR_SIZE).pubkey())
    init = fresh.init_coordinator(key, run.authorizer, key, key)
    foreign = run.vm.create_account(run.stranger.pubkey(), COORDINATOR_SIZE).pubkey()
    small = run.vm.create_account(run.program, COORDINATOR_SIZE - 1).pubkey()
    for instruction, name in (
        (altered(init, a0=unsigned(init.accounts[0])), "AccountNotSigner"),
        (altered(init, a1=fresh.manifest, a5=fresh.instance), "ConstraintSeeds"),
        (altered(init, a1=keys.instance), "ConstraintSeeds"),
        (altered(init, a5=keys.manifest), "ConstraintSeeds"),
        (altered(init, a2=foreign), "AccountOwnedByWrongProgram"),
        (altered(init, a2=small), "CoordinatorAccountIncorrectSize"),
        (altered(init, a2=keys.coordinator_account), "AccountDiscriminatorAlreadySet"),
        (altered(init, a3=run.owner.pubkey()), "InvalidProgramId"),
        (altered(init, a4=run.owner.pubkey()), "InvalidProgramExecutable"),
    ):
        assert run.refused(instruction, run.stranger) == name
        assert run.vm.data(fresh.instance) == run.vm.data(fresh.manifest) == b""
    run.do(init, run.stranger)


def test_lamports_sent_ahead_do_not_keep_a_run_from_its_addresses() -> None:
    run = Run()
    fresh = type(run.keys)(run.program, "early", run.vm.create_account(run.program, COORDINATOR_SIZE).pubkey())
    for address in (fresh.instance, fresh.manifest):
        run.vm.svm.airdrop(address, 1_000_000)
    key = run.stranger.pubkey()
    run.do(fresh.init_coordinator(key, run.authorizer, key, key), run.stranger)
    assert run.vm.data(fresh.instance)


@pytest.mark.parametrize("size", [0, 33, 600])
def test_run_ids_that_are_no_seed(size: int) -> None:
    run = Run()
    key = run.stranger.pubkey()
    spec = COORDINATOR.instructions["init_coordinator"]
    arguments = {"main_authority": bytes(32), "join_authority": bytes(32), "run_id": "r" * size, "client_version": ""}
    instruction = altered(
        run.keys.init_coordinator(key, run.authorizer, key, key),
        data=spec.discriminator + spec.arguments.write(arguments),
    )
    assert run.refused(instruction, run.stranger) == "RunIdInvalidLength"


@pytest.mark.parametrize("phase", [Phase.WAITING_FOR_MEMBERS, Phase.WARMUP, Phase.ROUND_TRAIN])
def test_closed_while_it_runs(phase: Phase) -> None:
    run = Run()
    {"WAITING_FOR_MEMBERS": run.start, "WARMUP": run.gather, "ROUND_TRAIN": run.train}[phase.name]()
    owner = run.owner.pubkey()
    assert run.refused(run.keys.free_coordinator(owner, owner), run.owner) == "CloseCoordinatorNotHalted"


def test_closed_into_one_of_its_own_accounts() -> None:
    run = Run()
    for own in (run.keys.instance, run.keys.coordinator_account, run.keys.manifest):
        instruction = run.keys.free_coordinator(run.owner.pubkey(), own)
        assert run.refused(instruction, run.owner) == "ConstraintDuplicateMutableAccount"
    before = run.vm.lamports(run.stranger.pubkey())
    run.do(run.keys.free_coordinator(run.owner.pubkey(), run.stranger.pubkey()), run.owner)
    assert run.snapshot() == [b"", b"", b""]
    assert run.vm.lamports(run.stranger.pubkey()) - before > 800_000_000, "all rent comes back"


# Arguments.


def test_what_follows_or_is_cut_off(training: Run) -> None:
    for instruction, signers in every_instruction(training):
        data = bytes(instruction.data)
        for wrong in (data + b"\0", data[:-1] if len(data) > 8 else data + bytes(7), data + bytes(300)):
            assert training.refused(altered(instruction, data=wrong), *signers) == "InstructionDidNotDeserialize"
        for wrong in (b"", data[:7], data[:7] + bytes([data[7] ^ 1]) + data[8:]):
            assert training.refused(altered(instruction, data=wrong), *signers) == "InstructionFallbackNotFound"


def test_booleans_options_and_enums_have_one_form() -> None:
    run = Run().configure()
    owner, keys = run.owner.pubkey(), run.keys
    boolean = keys.set_paused(owner, False)
    option = keys.set_future_epoch_rates(owner, None, None)
    model = keys.update(owner, model=MODEL)
    checkpoint = keys.checkpoint(owner, HUB)
    # Offsets in the data: the flag, the option, the model's variant, its architecture, the checkpoint's variant.
    for instruction, place in ((boolean, 8), (option, 8), (option, 9), (model, 11), (model, 20), (checkpoint, 8)):
        for value in (7, 255):
            data = bytearray(instruction.data)
            data[place] = value
            assert run.refused(altered(instruction, data=bytes(data)), run.owner) == "InstructionDidNotDeserialize"
    run.do(model, run.owner)


def test_the_flag_of_a_proof_and_the_committee_have_one_form(training: Run) -> None:
    user = training.wallets[0]
    for instruction, place in (
        (training.report(user), 8 + 16),
        (training.keys.health_check(user.pubkey(), bytes(32), bytes(32), 0, 0), 8 + 64),
    ):
        data = bytearray(instruction.data)
        data[place] = 3
        assert training.refused(altered(instruction, data=bytes(data)), user) == "InstructionDidNotDeserialize"


def test_numbers_that_are_none(training: Run) -> None:
    user = training.wallets[0]
    nan = b"\0\0\xc0\x7f"
    data = bytearray(training.report(user).data)
    loss = 8 + 17 + 192 + 192 + 32 + 12
    data[loss : loss + 4] = nan
    assert training.refused(altered(training.report(user), data=bytes(data)), user) == "InstructionDidNotDeserialize"


def test_strings_that_are_too_long_or_no_text() -> None:
    run = Run().configure()
    owner, keys, user = run.owner.pubkey(), run.keys, run.wallets[0]
    discriminators = {name: spec.discriminator for name, spec in COORDINATOR.instructions.items()}

    def text(data: bytes, size: int | None = None) -> bytes:
        return (len(data) if size is None else size).to_bytes(4, "little") + data

    version, manifest = keys.update_client_version(owner, ""), keys.set_manifest(owner, bytes(32), "")
    address = keys.set_address(user.pubkey(), "a")
    start = discriminators["set_manifest"] + bytes(32)
    for instruction, data, signer in (
        (version, discriminators["update_client_version"] + text(b"v" * 97), run.owner),
        (version, discriminators["update_client_version"] + text(b"v", 2**32 - 1), run.owner),
        (version, discriminators["update_client_version"] + text(b"\xff\xfe"), run.owner),
        (version, discriminators["update_client_version"] + text(b"\xc0\x80"), run.owner),
        (manifest, start + text(b"m" * 193), run.owner),
        (address, discriminators["set_address"] + text(b"a" * 127), user),
    ):
        assert run.refused(altered(instruction, data=data), signer) == "InstructionDidNotDeserialize"
    run.do(altered(version, data=discriminators["update_client_version"] + text(b"v" * 96)), run.owner)
    long = keys.update(owner, metadata={"name": "n", "description": "", "num_parameters": 0, "vocab_size": 0})
    data = bytearray(long.data)
    data[9 + 2] = 65  # behind the zero that ends the name
    assert run.refused(altered(long, data=bytes(data)), run.owner) == "InstructionDidNotDeserialize"


# Configuration.


@pytest.mark.parametrize(
    "wrong",
    [
        {"epoch_time": 0},
        {"warmup_time": 0},
        {"warmup_time": 10_000},
        {"max_round_train_time": 10_000},
        {"min_clients": 0},
        {"init_min_clients": 257},
        {"witness_nodes": 2},
        {"witness_nodes": 33, "min_clients": 40, "init_min_clients": 40},
        {"global_batch_size_start": 0},
        {"global_batch_size_end": 1},
        {"total_steps": 0},
        {"total_steps": 2**32 - 1},
        {"cooldown_time": 0},
        {"verification_percent": 1},
        {"waiting_for_members_extra_time": 0},
    ],
    ids=str,
)
def test_configurations_with_which_a_run_could_not_go_on(wrong: dict[str, int]) -> None:
    run = Run()
    instruction = run.keys.update(run.owner.pubkey(), config={**CONFIG, **wrong}, model=MODEL)
    assert run.refused(instruction, run.owner) == "ConfigSanityCheckFailed"


def test_models_with_which_a_run_could_not_go_on() -> None:
    run = Run()
    llm = MODEL["LLM"]
    for wrong in (
        {"max_seq_len": 0},
        {"checkpoint": "Ephemeral"},
        {"checkpoint": {"Hub": {"repo_id": ""}}},
        {"checkpoint": {"Gcs": {"bucket": ""}}},
        {"optimizer": "Dummy"},
        {"data_location": {"Server": ""}},
        {"data_location": {"WeightedHttp": ""}},
        {"cold_start_warmup_steps": 100},
    ):
        model = {"LLM": {**llm, **wrong}}
        instruction = run.keys.update(run.owner.pubkey(), config=CONFIG, model=model)
        assert run.refused(instruction, run.owner) == "ModelSanityCheckFailed"
    for progress in ({"step": 0}, {"epoch_start_data_index": 2**63}):
        values = {"epoch": 0, "step": 1, "epoch_start_data_index": 0, **progress}
        instruction = run.keys.update(run.owner.pubkey(), progress=values)
        assert run.refused(instruction, run.owner) == "ProgressSanityCheckFailed"


def test_a_running_run_keeps_its_configuration(training: Run) -> None:
    owner, keys = training.owner.pubkey(), training.keys
    for instruction in (
        keys.update(owner, config=CONFIG),
        keys.update(owner, model=MODEL),
        keys.update(owner, progress={"epoch": 9, "step": 9, "epoch_start_data_index": 9}),
        keys.update_client_version(owner, "other"),
    ):
        assert training.refused(instruction, training.owner) == "UpdateConfigNotHalted"
    training.do(keys.set_manifest(owner, sha256(b"first"), "a"), training.owner)
    assert training.refused(keys.set_manifest(owner, sha256(b"second"), "b"), training.owner) == "UpdateConfigNotHalted"


def test_a_run_begins_only_with_a_configuration() -> None:
    run = Run()
    assert run.refused(run.keys.set_paused(run.owner.pubkey(), False), run.owner) == "ConfigSanityCheckFailed"
    assert run.refused(run.keys.set_paused(run.owner.pubkey(), True), run.owner) == "Halted"
    run.start()
    assert run.refused(run.keys.set_paused(run.owner.pubkey(), False), run.owner) == "CannotResume"
