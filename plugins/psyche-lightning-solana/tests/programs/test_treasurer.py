"""What the treasurer does, with the real coordinator, authorizer and token programs."""

from __future__ import annotations

import re
import struct

import pytest
import spl.token.instructions as token
from psyche_lightning_solana.errors import REFUSALS
from psyche_lightning_solana.interface import AUTHORIZER, COORDINATOR, TREASURER
from psyche_lightning_solana.layout import view_coordinator, view_manifest
from psyche_lightning_solana.types import METADATA as METADATA_TYPE
from sbf_toolchain.build import SOURCES
from solana_support.treasury import CONFIG, MODEL, PROGRESS, Treasury
from solana_support.vm import MAX_TRANSACTION_BYTES, Vm, must
from solders.pubkey import Pubkey
from spl.token.constants import TOKEN_PROGRAM_ID

from psyche_lightning.protocol.state import Phase

METADATA = {"name": "a run", "description": "of tests", "num_parameters": 12, "vocab_size": 34}


@pytest.fixture
def world() -> Treasury:
    return Treasury(Vm(features=True))


@pytest.mark.parametrize("features", [False, True], ids=["cluster", "all features"])
def test_a_run_from_its_creation_to_the_payment(features: bool) -> None:
    world = Treasury(Vm(features=features))
    must(world.create())
    must(world.update(config=CONFIG, model=MODEL, progress=PROGRESS, epoch_earning_rate_total_shared=700, paused=False))
    world.hold(world.run, 10_000)
    must(world.join())
    world.train()
    state = world.state
    assert state.state.phase is Phase.FINISHED
    earned = state.members[0].earned
    assert earned > 0
    assert earned % 700 == 0

    world.hold(world.user.pubkey())
    must(world.participate())
    must(world.claim(300))
    must(world.claim(earned - 300))
    assert world.claim(1).error == 6000
    assert world.balance(world.tokens_of(world.user.pubkey())) == earned
    assert world.balance(world.vault) == 10_000 - earned
    assert world.read("Participant", world.participant()) == {
        "bump": Pubkey.find_program_address(
            [b"Participant", bytes(world.run), bytes(world.user.pubkey())], world.treasurer
        )[1],
        "claimed_collateral_amount": earned,
        "claimed_earned_points": earned,
    }
    run = world.read("Run", world.run)
    assert (run["total_claimed_collateral_amount"], run["total_claimed_earned_points"]) == (earned, earned)


def test_what_creation_makes(world: Treasury) -> None:
    outcome = must(world.create())
    assert outcome.size <= MAX_TRANSACTION_BYTES
    assert world.vm.data(world.run)[:8].hex() == "c7369b56eb73f6bd"  # docs/solana-account.md
    address, bump = Pubkey.find_program_address([b"Run", struct.pack("<Q", world.index)], world.treasurer)
    assert world.read("Run", address) == {
        "bump": bump,
        "index": world.index,
        "main_authority": bytes(world.authority.pubkey()),
        "join_authority": bytes(world.joiner.pubkey()),
        "coordinator_account": bytes(world.account),
        "coordinator_instance": bytes(world.instance),
        "collateral_mint": bytes(world.mint),
        "total_claimed_collateral_amount": 0,
        "total_claimed_earned_points": 0,
        "coordinator_program": bytes(world.coordinator),
    }
    data = world.vm.data(world.run)
    assert (data[81:113], data[113:145]) == (bytes(world.account), bytes(world.instance)), "where Psyche has them"
    vault = world.vm.data(world.vault)
    assert (vault[:32], vault[32:64]) == (bytes(world.mint), bytes(world.run))
    instance = COORDINATOR.accounts["CoordinatorInstance"]
    values = instance.decode(world.vm.data(world.instance)[8 : 8 + 1 + 96 + 4 + len(world.run_id)])
    assert values["main_authority"] == bytes(world.run)
    assert values["join_authority"] == bytes(world.joiner.pubkey())
    assert bytes(view_manifest(world.vm.data(world.manifest))["authorizer"]) == bytes(world.authorizer)
    must(world.participate())
    assert world.vm.data(world.participant())[:8].hex() == "208e6c4ff7b33606"


def test_the_addresses_of_the_specification(world: Treasury) -> None:
    assert world.index == 7313085519096743583
    psyche = Pubkey.from_string("EnU7DRx5az5YWxaxgqEGbXSYtudcfnjXewyBRRZCjJPw")
    address, bump = Pubkey.find_program_address([b"Run", struct.pack("<Q", world.index)], psyche)
    assert (str(address), bump) == ("tG3nRngwkJC3JAL9Aq9AMhFtTzr56hr9ZmaSRpD8dT8", 252)


def test_nobody_can_prevent_a_run_by_making_its_accounts_before(world: Treasury) -> None:
    world.hold(world.run, 5)  # its token account
    for address in (world.run, world.instance, world.manifest):
        world.vm.svm.airdrop(address, 1_000_000)
    must(world.create())
    assert world.balance(world.vault) == 5
    world.vm.svm.airdrop(world.participant(), 1)
    must(world.participate())


def test_each_command_is_forwarded(world: Treasury) -> None:
    must(world.create())

    def account() -> object:
        return view_coordinator(world.vm.data(world.account))

    must(world.update())  # nothing to do
    must(world.update(metadata=METADATA))
    assert bytes(account()["metadata"]) == METADATA_TYPE.pack(METADATA)
    must(world.update(config=CONFIG, model=MODEL))
    assert account()["config"]["epoch_time"] == CONFIG["epoch_time"]
    must(world.update(epoch_slashing_rate_per_client=3))
    must(world.update(epoch_earning_rate_total_shared=7))
    assert account()["future_rates"].item() == (7, 3)
    must(world.update(client_version="v2"))
    assert bytes(account()["client_version"]).rstrip(b"\0") == b"v2"
    must(world.update(progress=PROGRESS, paused=False))
    assert account()["run_state"] == 1
    must(world.update(paused=True))
    assert account()["run_state"] == 7


def test_commands_of_one_instruction_are_forwarded_in_their_order(world: Treasury) -> None:
    must(world.create())
    must(world.update(config=CONFIG, model=MODEL, progress=PROGRESS, paused=False))
    outcome = must(
        world.update(
            metadata=METADATA,
            epoch_earning_rate_total_shared=2**64 - 1,
            epoch_slashing_rate_per_client=2**64 - 1,
            paused=True,
            client_version="x" * 96,  # only of a halted run
        )
    )
    commands = [line.split()[-1] for line in outcome.logs if "Instruction: " in line]
    assert commands == ["RunUpdate", "Update", "SetFutureEpochRates", "SetPaused", "UpdateClientVersion"]


def test_the_largest_update_fits(world: Treasury) -> None:
    """The longest variants of everything; one transaction holds them without the description."""
    longest = MODEL["LLM"] | {
        "checkpoint": {"P2PGcs": {"bucket": "b" * 64, "prefix": "p" * 64}},
        "data_location": {
            "Http": {
                "location": {"Gcp": {"bucket_name": "b" * 64, "filter_directory": "f" * 192}},
                "token_size_in_bytes": "TwoBytes",
                "shuffle": {"Seeded": bytes(32)},
            }
        },
        "lr_schedule": {
            "WarmupStableDecay": {
                "base_lr": 1.0,
                "warmup_init_lr": 0.0,
                "cosine_decay_final_lr": 0.1,
                "linear_decay_final_lr": 0.0,
                "warmup_steps": 1,
                "stable_steps": 1,
                "cosine_decay_steps": 1,
                "linear_decay_steps": 1,
            }
        },
    }
    must(world.create())
    must(world.update(config=CONFIG, model={"LLM": longest}, progress=PROGRESS, client_version="v" * 96))
    assert view_coordinator(world.vm.data(world.account))["config"]["total_steps"] == CONFIG["total_steps"]


def test_the_manifest_and_the_checkpoint_are_the_authoritys(world: Treasury) -> None:
    must(world.create())
    must(world.update(config=CONFIG, model=MODEL, progress=PROGRESS))
    must(world.send(world.instruction("run_set_manifest", {"digest": bytes([9]) * 32, "address": "somewhere"})))
    manifest = view_manifest(world.vm.data(world.manifest))
    assert bytes(manifest["digest"]) == bytes([9]) * 32
    before = world.vm.data(world.account)
    repo = {"Hub": {"repo_id": "another/place", "revision": "main"}}
    must(world.send(world.instruction("run_checkpoint", {"repo": repo})))
    after = world.vm.data(world.account)
    assert before != after
    assert b"another/place" in after
    must(world.send(world.instruction("run_update", {"paused": False})))
    older = {"step": 0, "digest": bytes([8]) * 32}
    must(world.send(world.instruction("run_restart_from", older)))
    assert bytes(view_manifest(world.vm.data(world.manifest))["checkpoint_digest"]) == bytes([8]) * 32


def test_points_are_paid_in_parts(world: Treasury) -> None:
    world.ready(earned=100, funds=90)
    must(world.claim(0))
    must(world.claim(60))
    assert world.claim(41).error == 6000
    assert world.claim(40).error == 1, "the token program's: the vault holds 30"
    must(world.claim(30))
    world.give_points(250)
    world.hold(world.run, 1000)
    assert world.claim(161).error == 6000
    must(world.claim(160))
    assert world.balance(world.tokens_of(world.user.pubkey())) == 250


def test_any_token_account_of_the_user_will_do(world: Treasury) -> None:
    world.ready()
    other = world.vm.wallet()
    account = world.hold(other.pubkey())
    kind, user = token.AuthorityType.ACCOUNT_OWNER, world.user.pubkey()
    hand_over = token.SetAuthorityParams(TOKEN_PROGRAM_ID, account, kind, other.pubkey(), [], user)
    must(world.vm.send([token.set_authority(hand_over)], [other]))
    must(world.claim(10, user_collateral=account))
    assert world.balance(account) == 10


def test_who_never_joined_has_no_points(world: Treasury) -> None:
    world.ready()
    stranger = world.vm.wallet()
    world.hold(stranger.pubkey())
    accounts = {
        "user": stranger.pubkey(),
        "participant": world.participant(stranger.pubkey()),
        "user_collateral": world.tokens_of(stranger.pubkey()),
    }
    create = world.instruction("participant_create", **accounts)
    must(world.vm.send([create], [stranger]))
    for points, error in [(0, None), (1, 6000)]:
        claim = world.instruction("participant_claim", {"claim_earned_points": points}, **accounts)
        assert world.vm.send([claim], [stranger]).error == error


def test_units_are_as_documented(world: Treasury) -> None:
    text = (SOURCES.parents[2] / "docs/solana-programs.md").read_text()
    table = {
        name: int(units.replace(",", "")) for name, units in re.findall(r"^\| `(\w+)`[^|]*\| ([\d,]+) \|", text, re.M)
    }
    measured = {"run_create": must(world.create())}
    everything = {"config": CONFIG, "model": MODEL, "progress": PROGRESS, "epoch_earning_rate_total_shared": 1}
    measured["run_update"] = must(world.update(**everything, paused=False))
    must(world.update(paused=True))
    manifest = {"digest": bytes([9]) * 32, "address": "x" * 192}
    measured["run_set_manifest"] = must(world.send(world.instruction("run_set_manifest", manifest)))
    repo = {"Hub": {"repo_id": "another/place", "revision": "main"}}
    measured["run_checkpoint"] = must(world.send(world.instruction("run_checkpoint", {"repo": repo})))
    older = {"step": 0, "digest": bytes([8]) * 32}
    measured["run_restart_from"] = must(world.send(world.instruction("run_restart_from", older)))
    for number in range(255):
        world.give_points(1, Pubkey(number.to_bytes(32, "little")))
    world.give_points(1)
    world.hold(world.run, 1)
    world.hold(world.user.pubkey())
    measured["participant_create"] = must(world.participate())
    measured["participant_claim"] = must(world.claim(1))
    for name, outcome in measured.items():
        assert table[name] / 3 < outcome.units <= table[name], name
        assert outcome.size <= MAX_TRANSACTION_BYTES
    assert set(table) == {*AUTHORIZER.instructions, *TREASURER.instructions}


def test_the_errors_are_those_of_the_python_table() -> None:
    found = re.findall(r'X\((\w+), "([^"]*)"\)', (SOURCES / "treasurer/treasurer.h").read_text())
    assert found == [(each.name, each.message) for number, each in REFUSALS["treasurer"].items() if number >= 6000]
