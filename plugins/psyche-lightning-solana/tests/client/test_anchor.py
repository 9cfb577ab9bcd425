import pytest
from psyche_lightning_solana.client import anchor
from psyche_lightning_solana.client.cluster import Endpoint
from psyche_lightning_solana.client.rpc import PoolProvider
from psyche_lightning_solana.client.translate import metadata_section, plain_model
from psyche_lightning_solana.instructions import RunKeys
from solders.pubkey import Pubkey

from psyche_lightning.protocol.committee import Committee
from psyche_lightning.protocol.state import WitnessProof

A, B, C = (Pubkey(bytes([i]) * 32) for i in (1, 2, 3))
CONFIG = {name: 1 for name in (
    "warmup_time", "cooldown_time", "max_round_train_time", "round_witness_time", "global_batch_size_warmup_tokens",
    "epoch_time", "total_steps", "init_min_clients", "min_clients", "witness_nodes", "global_batch_size_start",
    "global_batch_size_end", "verification_percent", "waiting_for_members_extra_time")}  # fmt: skip

CALLS = {
    "init": lambda keys: keys.init_coordinator(A, B, A, C, "1.2"),
    "free": lambda keys: keys.free_coordinator(A, B),
    "update": lambda keys: keys.update(A, metadata=metadata_section("x"), config=CONFIG, model=plain_model("x", 7)),
    "progress": lambda keys: keys.update(A, progress={"epoch": 3, "step": 4, "epoch_start_data_index": 5}),
    "version": lambda keys: keys.update_client_version(A, "9"),
    "rates": lambda keys: keys.set_future_epoch_rates(A, 5, None),
    "paused": lambda keys: keys.set_paused(A, True),
    "manifest": lambda keys: keys.set_manifest(A, b"\7" * 32, "account:x"),
    "checkpoint": lambda keys: keys.checkpoint(A, {"Hub": {"repo_id": "a/b", "revision": None}}),
    "authorized": lambda keys: keys.checkpoint(A, {"Gcs": {"bucket": "b", "prefix": "p"}}, B),
    "join": lambda keys: keys.join_run(A, b"\5" * 32, B),
    "withdraw": lambda keys: keys.withdraw(A),
    "tick": lambda keys: keys.tick(A),
    "warmup": lambda keys: keys.warmup_witness(A, 3, b"\1" * 32, 9),
    "witness": lambda keys: keys.witness(
        A, WitnessProof(1, 2), b"\1" * 32, bytes(range(192)), bytes(192), metadata={"step": 1, "loss": 2.5}, at=(1, 2)
    ),
    "health": lambda keys: keys.health_check(A, bytes(B), b"\5" * 32, 4, 5, Committee.TRAINER),
    "address": lambda keys: keys.set_address(A, "tcp://1.2.3.4:5"),
}


@pytest.mark.parametrize("name", CALLS)
def test_anchorpy_builds_the_same_instructions(name):
    plain = RunKeys(C, "run", B)
    pool = PoolProvider([Endpoint("http://127.0.0.1:9", "ws://127.0.0.1:9")])
    through = anchor.AnchorKeys(C, "run", B, anchor.program(C, pool, "confirmed"))
    assert CALLS[name](through) == CALLS[name](plain)
