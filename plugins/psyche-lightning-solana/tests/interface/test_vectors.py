"""Psyche's numbers: addresses, discriminators, offsets, sizes, as docs/solana-account.md has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from psyche_lightning_solana import addresses, layout
from psyche_lightning_solana.errors import NUMBERS, REFUSALS, refusal
from psyche_lightning_solana.hosting import Clock
from psyche_lightning_solana.instructions import RunKeys
from psyche_lightning_solana.interface import AUTHORIZER, COORDINATOR, JOIN_SCOPE, TREASURER
from psyche_lightning_solana.types import LLM, MODEL, OPTIMIZER, PROGRESS
from solders.pubkey import Pubkey

from psyche_lightning.protocol.state import WitnessProof


def test_addresses() -> None:
    coordinator, treasurer = addresses.PSYCHE_COORDINATOR, addresses.PSYCHE_TREASURER
    found = {
        str(addresses.instance_address(coordinator, "test")): 255,
        str(addresses.instance_address(coordinator, "consilience-40b")): 254,
        str(
            addresses.authorization_address(
                addresses.PSYCHE_AUTHORIZER, Pubkey(bytes([1] * 32)), Pubkey.default(), JOIN_SCOPE
            )
        ): 255,
        str(addresses.treasurer_run_address(treasurer, addresses.treasurer_index("test"))): 252,
    }
    assert list(found) == [
        "9L4yCH7TsMn9JfoXYEupuQwtcNPTTtHcyNL6uqDfjwGB",
        "2MV4Zy5ZF1TB4b85ajHiKdin5JD5mKa5tMdfr3MGXdQN",
        "7i6cbXVqahwHLEQmetfSnwz3FdckTxucZHNBczReh1Cv",
        "tG3nRngwkJC3JAL9Aq9AMhFtTzr56hr9ZmaSRpD8dT8",
    ]
    seeds = [b"coordinator", b"consilience-40b", bytes([254])]
    assert Pubkey.create_program_address(seeds, coordinator) == addresses.instance_address(
        coordinator, "consilience-40b"
    )
    assert addresses.treasurer_index("test") == 7313085519096743583


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (
            COORDINATOR,
            "init_coordinator 14399449e8857a19 free_coordinator 59d8d7e5dff24a20 update dbc858b09e3ffd7f "
            "update_client_version c1152e3c33020dfb set_future_epoch_rates ef15a057c7c8b681 join_run 48a07d666a86f64b "
            "set_paused 5b3c7dc0b0e1a6da tick 5c4f2c0865503f0f witness d5f495198edf1527 "
            "warmup_witness d3e87ae83f16375e health_check 735a63a88a129d83 checkpoint d5c813ccf08fb8fc",
        ),
        (
            AUTHORIZER,
            "authorization_create 149dc4b3e7df6d66 authorization_grantor_update 1d7441a161bd3af9 "
            "authorization_grantee_update ba6f7fc75990c143 authorization_close 81d0f820c8855717",
        ),
        (
            TREASURER,
            "run_create c638a3f70e3aa7fd run_update 33562e740d42149d participant_create 32b18e2875b046b5 "
            "participant_claim a096e8563b6bad26",
        ),
    ],
)
def test_instruction_discriminators(program: Any, expected: str) -> None:
    words = expected.split()
    for name, digits in zip(words[::2], words[1::2], strict=True):
        assert program.instructions[name].discriminator.hex() == digits


@pytest.mark.parametrize(
    ("name", "digits"),
    [
        ("CoordinatorAccount", "ef21b1372c9b562b"),
        ("CoordinatorInstance", "9c099910af181ffc"),
        ("Authorization", "0344a8f3c3a8204b"),
        ("Run", "c7369b56eb73f6bd"),
        ("Participant", "208e6c4ff7b33606"),
    ],
)
def test_account_discriminators(name: str, digits: str) -> None:
    assert layout.discriminator(name).hex() == digits


def _offset(dtype: np.dtype[Any], path: str) -> int:
    place = 0
    for name in path.split("."):
        if name.isdigit():
            dtype = dtype.subdtype[0] if dtype.subdtype else dtype
            place += int(name) * dtype.itemsize
            continue
        assert dtype.fields is not None
        dtype, offset = dtype.fields[name][:2]
        place += offset
        if dtype.subdtype is not None and dtype.subdtype[0].fields:
            continue
    return place


@pytest.mark.parametrize(
    ("path", "offset"),
    [
        ("version", 8),
        ("metadata", 16),
        ("run_id", 376),
        ("run_state", 408),
        ("model", 416),
        ("config.warmup_time", 968),
        ("config.cooldown_time", 976),
        ("config.max_round_train_time", 984),
        ("config.round_witness_time", 992),
        ("config.global_batch_size_warmup_tokens", 1000),
        ("config.epoch_time", 1008),
        ("config.total_steps", 1016),
        ("config.init_min_clients", 1020),
        ("config.min_clients", 1022),
        ("config.witness_nodes", 1024),
        ("config.global_batch_size_start", 1026),
        ("config.global_batch_size_end", 1028),
        ("config.verification_percent", 1030),
        ("config.waiting_for_members_extra_time", 1031),
        ("epoch", 1032),
        ("step", 1036),
        ("epoch_start_data_index", 1040),
        ("rounds", 1048),
        ("rounds.1", 1048 + 14112),
        ("clients", 57496),
        ("clients.len", 75928),
        ("exited_clients", 75936),
        ("rounds_head", 94376),
        ("start_step", 94380),
        ("last_step", 94384),
        ("epoch_start", 94392),
        ("first_round", 94400),
        ("cold_start_epoch", 94401),
        ("run_state_start", 94408),
        ("pending_pause", 94416),
        ("members", 94424),
        ("members_len", 119000),
        ("next_active", 119008),
        ("current_rates", 119016),
        ("future_rates", 119032),
        ("is_warmup_first_tick", 119048),
        ("is_training_first_tick", 119049),
        ("client_version", 119050),
        ("nonce", 119152),
    ],
)
def test_offsets_of_the_coordinator_account(path: str, offset: int) -> None:
    assert _offset(layout.COORDINATOR, path) == offset


def test_sizes_and_offsets_of_its_parts() -> None:
    assert layout.COORDINATOR.itemsize == layout.COORDINATOR_SIZE == 119_160
    assert layout.MANIFEST.itemsize == layout.MANIFEST_SIZE == 10_016 <= 10_240
    assert (layout.WITNESS.itemsize, layout.ROUND.itemsize, layout.CLIENT.itemsize) == (440, 14112, 72)
    assert (layout.CLIENTS.itemsize, layout.MEMBER.itemsize, layout.VOTE.itemsize) == (18440, 96, 37)
    places = {name: layout.WITNESS.fields[name][1] for name in ("index", "witness", "participants", "merkle")}  # type: ignore[index]
    assert places == {"index": 8, "witness": 16, "participants": 24, "merkle": 408}
    fields = {name: layout.ROUND.fields[name][1] for name in ("witnesses_len", "data_index", "seed", "height")}  # type: ignore[index]
    assert fields == {"witnesses_len": 14080, "data_index": 14088, "seed": 14096, "height": 14104}


def test_offsets_of_the_model() -> None:
    llm = 416 + MODEL.body
    assert {name: llm + offset for name, offset in LLM.offsets.items()} == {
        "max_seq_len": 424,
        "cold_start_warmup_steps": 428,
        "architecture": 432,
        "checkpoint": 436,
        "data_type": 572,
        "data_location": 576,
        "lr_schedule": 880,
        "optimizer": 936,
    }
    assert MODEL.size == 968 - 416
    value = {
        "clip_grad_norm": 1.0,
        "weight_decay": None,
        "compression_decay": 0.5,
        "compression_topk": 4,
        "compression_chunk": 64,
        "quantize_1bit": True,
    }
    packed = OPTIMIZER.pack({"Distro": value})
    # 936 tag, 940 clip option, 948 weight-decay option, 956 decay, 960 topk, 962 chunk, 964 quantize
    assert packed.hex() == "02000000010000000000803f00000000000000000000003f0400400001000000"
    assert OPTIMIZER.unpack(packed) == {"Distro": value}


def test_borsh_and_memory_order_differ_where_psyche_has_it_so() -> None:
    repo = {"Hub": {"repo_id": "r", "revision": "v"}}
    checkpoint = LLM.fields["checkpoint"]
    borsh, memory = checkpoint.write(repo), checkpoint.pack(repo)
    assert borsh == b"\2" + b"r".ljust(64, b"\0") + b"\1" + b"v".ljust(64, b"\0")
    assert memory == b"\2\0\0\0\1" + b"v".ljust(64, b"\0") + b"r".ljust(64, b"\0") + bytes(3)
    assert PROGRESS.write({"epoch": 1, "step": 2, "epoch_start_data_index": 3}).hex() == "0100020000000300000000000000"


def test_a_witness_has_830_bytes_and_ours_42_more() -> None:
    keys = RunKeys(addresses.PSYCHE_COORDINATOR, "test", Pubkey.default())
    proof = WitnessProof(0, 0)
    assert len(keys.witness(Pubkey.default(), proof, bytes(32)).data) == 830
    assert len(keys.witness(Pubkey.default(), proof, bytes(32), at=(1, 2)).data) == 872


def test_the_seed_of_a_round() -> None:
    assert Clock(1_700_000_000, 123_456_789).seed == 13388447589753139034


def test_error_numbers() -> None:
    names = ["UpdateConfigFinished", "NoActiveRound", "Halted", "InvalidCommitteeSelection", "RunIdInvalidLength"]
    assert [NUMBERS[name] for name in names] == [6000, 6010, 6015, 6020, 6023]
    assert len([number for number in REFUSALS["coordinator"] if number >= 6000]) == 24
    assert (refusal(6015).name, refusal(6015).code) == ("CoordinatorErrorHalted", "Halted")
    assert refusal(6012).retryable
    assert refusal(77).name == "Custom77"
