"""Reading runs from bytes: what is refused, and what a run without a manifest account shows."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
from psyche_lightning_solana.account import AccountError, read, write_manifest
from psyche_lightning_solana.layout import COORDINATOR_SIZE, view_coordinator, view_manifest
from solana_support.runs import PARAMETERS, Run

from psyche_lightning.protocol.state import Checkpoint, Phase


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(3).train().witness()


@pytest.fixture
def data(run: Run) -> bytearray:
    return bytearray(run.snapshot()[1])


def test_a_run_as_values(run: Run) -> None:
    whole = run.read()
    state = whole.state
    assert (state.run_id, state.phase, state.epoch, state.step) == ("attacked", Phase.ROUND_TRAIN, 0, 2)
    assert [round_.height for round_ in state.rounds] == [0, 1]
    signers = tuple(bytes(wallet.pubkey()) for wallet in run.wallets)
    assert state.rounds[0].clients == state.rounds[1].clients == signers
    assert (state.rounds[1].step, state.rounds[1].data_index, state.rounds[1].batch_size) == (2, 1024, 1024)
    assert state.epoch_digest == PARAMETERS
    assert state.holders == tuple(member.signer for member in whole.members)
    assert whole.manifest is not None
    assert whole.manifest.authorizer == bytes(run.authorizer)
    assert whole.llm["LLM"]["checkpoint"] == {"Hub": {"repo_id": "org/model", "revision": None}}
    assert whole.client_version == "test"


def test_a_run_without_a_manifest_account(run: Run) -> None:
    whole, plain = run.read(), read(run.snapshot()[1])
    nothing = {"checkpoint": Checkpoint(), "epoch_digest": b"", "holders": (), "needed": 1, "checkpoint_votes": ()}
    assert plain.state == replace(whole.state, **nothing)
    assert plain.manifest is None
    with pytest.raises(AccountError, match="no manifest account"):
        write_manifest(plain)


def test_reading_copies_nothing(data: bytearray) -> None:
    record = view_coordinator(data)
    data[1032:1034] = struct.pack("<H", 77)
    assert record["epoch"] == 77
    record["step"] = 9
    assert data[1036:1040] == b"\x09\0\0\0"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: b"", "this is not a coordinator account: it begins with nothing"),
        (lambda data: b"\1" + data[1:], "this is not a coordinator account"),
        (lambda data: data[:-1], "a coordinator account has 119,160 bytes; this one has 119,159"),
        (lambda data: data + b"\0", "has 119,160 bytes; this one has 119,161"),
        (lambda data: data[:8] + struct.pack("<Q", 2) + data[16:], "has version 2; this package reads version 1"),
        (lambda data: data[:408] + b"\x08" + data[409:], "damaged: 8 is not a valid Phase"),
        (lambda data: data[:416] + b"\1" + data[417:], "damaged: Model has no variant 1"),
        (lambda data: data[:75928] + struct.pack("<Q", 257) + data[75936:], "damaged: len is 257"),
        (lambda data: data[:119000] + struct.pack("<Q", 2**63) + data[119008:], "damaged: members_len"),
        (lambda data: data[:94376] + struct.pack("<I", 4) + data[94380:], "damaged: rounds_head is 4"),
        (lambda data: data[:94376] + struct.pack("<I", 3) + data[94380:], "damaged: its newest round is missing"),
        (lambda data: data[: 1048 + 14080] + b"\x21" + data[1048 + 14081 :], "damaged: witnesses_len is 33"),
        (lambda data: data[: 57496 + 64] + b"\4" + data[57496 + 65 :], "damaged: 4 is not a valid ClientStatus"),
    ],
)
def test_what_is_no_run(data: bytearray, spoil: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(AccountError, match=message):
        read(spoil(bytes(data)))


def test_what_is_no_manifest_account(run: Run) -> None:
    _, coordinator, manifest = run.snapshot()
    with pytest.raises(AccountError, match="this is not a manifest account"):
        read(coordinator, coordinator)
    with pytest.raises(AccountError, match="a manifest account has 10,016 bytes"):
        read(coordinator, manifest[:-1])
    record = view_manifest(bytearray(manifest))
    record["votes_len"] = 300
    with pytest.raises(AccountError, match="votes_len is 300"):
        read(coordinator, record.tobytes())
    rounds = view_coordinator(bytearray(coordinator))
    rounds["rounds"][0]["tie_breaker_tasks"] = 300
    with pytest.raises(AccountError, match="damaged: 300 tie breakers among"):
        read(rounds.tobytes(), manifest)
    assert len(coordinator) == COORDINATOR_SIZE
