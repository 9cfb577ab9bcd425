"""Compute units and bytes of every coordinator instruction in a run of the largest size, in the real virtual machine.

``python -m solana_support.units FILE`` writes the table into the page ``FILE``, between its marks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from psyche_lightning_solana.addresses import authorization_address
from psyche_lightning_solana.instructions import RunKeys, authorization_create, authorization_grantor_update
from psyche_lightning_solana.interface import CHECKPOINT_SCOPE, JOIN_SCOPE
from psyche_lightning_solana.layout import COORDINATOR_SIZE, MAX_CLIENTS, Record, view_coordinator
from psyche_lightning_solana.programs import image
from solders.compute_budget import set_compute_unit_limit, set_compute_unit_price
from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from psyche_lightning.protocol.bloom import Bloom
from psyche_lightning.protocol.committee import CommitteeSelection
from psyche_lightning.wire.canonical import ZERO_HASH
from solana_support.runs import node_of
from solana_support.vm import Outcome, Vm, must

MAX_UNITS = 1_400_000
PARAMETERS = b"\1" * 32
BEGIN, END = "<!-- units: begin -->", "<!-- units: end -->"

CONFIG = {
    "warmup_time": 1000,
    "cooldown_time": 1000,
    "max_round_train_time": 1000,
    "round_witness_time": 1000,
    "global_batch_size_warmup_tokens": 2**63 + 1,
    "epoch_time": 1_000_000,
    "total_steps": 1_000_000,
    "init_min_clients": 256,
    "min_clients": 1,
    "witness_nodes": 0,  # everyone, up to 32
    "global_batch_size_start": 1000,
    "global_batch_size_end": 65535,
    "verification_percent": 0,
    "waiting_for_members_extra_time": 10,
}
MODEL: dict[str, Any] = {
    "LLM": {
        "max_seq_len": 2048,
        "cold_start_warmup_steps": 0,
        "architecture": "HfDeepseek",
        "checkpoint": {"Hub": {"repo_id": "r" * 64, "revision": "v" * 64}},
        "data_type": "Pretraining",
        "data_location": {
            "Http": {
                "location": {"Gcp": {"bucket_name": "b" * 64, "filter_directory": "d" * 192}},
                "token_size_in_bytes": "TwoBytes",
                "shuffle": {"Seeded": bytes(32)},
            }
        },
        "lr_schedule": {
            "WarmupStableDecay": {
                **dict.fromkeys(["base_lr", "warmup_init_lr", "cosine_decay_final_lr", "linear_decay_final_lr"], 0.5),
                **dict.fromkeys(["warmup_steps", "stable_steps", "cosine_decay_steps", "linear_decay_steps"], 9),
            }
        },
        "optimizer": {
            "Distro": {
                "clip_grad_norm": 1.0,
                "weight_decay": 0.5,
                "compression_decay": 0.5,
                "compression_topk": 4,
                "compression_chunk": 64,
                "quantize_1bit": True,
            }
        },
    }
}
METADATA = {"name": "n" * 64, "description": "d" * 280, "num_parameters": 40_000_000_000, "vocab_size": 129280}


@lru_cache(maxsize=8)
def _selection(clients: int, seed: int) -> CommitteeSelection:
    return CommitteeSelection(0, 0, 0, clients, seed)


def _all_but_one_left(run: Record) -> None:
    left = MAX_CLIENTS - 1
    run["exited_clients"]["items"]["place"][:left] = range(left)
    run["exited_clients"]["len"] = left
    run["members"]["active"] = 0


@dataclass(frozen=True)
class Row:
    """One measurement: what was sent, when, its compute units (with two of the budget's own), its bytes."""

    instruction: str
    case: str
    units: int
    size: int


class LargeRun:
    """A run in which 256 wallets take part, driven into the expensive corners."""

    def __init__(self, clients: int = 256) -> None:
        self.vm = Vm()
        self.rows: list[Row] = []
        program = self.vm.deploy(image("coordinator"))
        self.authorizer = self.vm.deploy(image("authorizer"))
        self.owner = self.vm.wallet()
        self.wallets = [self.vm.wallet() for _ in range(clients)]
        self.by_key = {bytes(wallet.pubkey()): wallet for wallet in self.wallets}
        account = self.vm.create_account(program, COORDINATOR_SIZE)
        self.keys = RunKeys(program, "r" * 32, account.pubkey())
        self.join_permit = self._permit(Pubkey.default(), JOIN_SCOPE)
        self.checkpoint_permit = self._permit(self.wallets[0].pubkey(), CHECKPOINT_SCOPE)

    def _permit(self, grantee: Pubkey, scope: bytes) -> Pubkey:
        owner = self.owner.pubkey()
        address = authorization_address(self.authorizer, owner, grantee, scope)
        self.send(self.owner, authorization_create(self.authorizer, owner, owner, grantee, scope))
        self.send(self.owner, authorization_grantor_update(self.authorizer, owner, address, True))
        return address

    @property
    def run(self) -> Record:
        """The coordinator account."""
        return view_coordinator(self.vm.data(self.keys.coordinator_account))

    @property
    def round(self) -> Record:
        """The current round."""
        run = self.run
        return run["rounds"][int(run["rounds_head"])]  # type: ignore[no-any-return]

    def send(self, user: Keypair, instruction: Instruction) -> Outcome:
        """Send as a client does: the user pays, and sets a compute limit and a price."""
        self.vm.payer = user
        return must(
            self.vm.send(
                [set_compute_unit_limit(MAX_UNITS), set_compute_unit_price(1), instruction], [user, node_of(user)]
            )
        )

    def measure(self, name: str, case: str, user: Keypair, instruction: Instruction) -> None:
        """Send, and note what it took."""
        outcome = self.send(user, instruction)
        self.rows.append(Row(name, case, outcome.units, outcome.size))

    def each(self, build: Callable[[int, Keypair], Instruction], users: list[Keypair]) -> None:
        """Everyone sends."""
        for index, user in enumerate(users):
            self.send(user, build(index, user))

    def change(self, edit: Callable[[Record], None]) -> None:
        """Bring the account into a state that other members, or another order of events, would have led to."""
        account = self.vm.svm.get_account(self.keys.coordinator_account)
        assert account is not None
        data = bytearray(account.data)
        edit(view_coordinator(data))
        self.vm.put(self.keys.coordinator_account, self.keys.program, bytes(data), account.lamports)

    def selection(self, round_: Record) -> CommitteeSelection:
        """The committees of a round."""
        return _selection(int(round_["clients_len"]), int(round_["seed"]))

    def witness(self, index: int, filters: bytes = bytes(192), root: bytes = b"\5" * 32) -> tuple[Keypair, Instruction]:
        """The report of the client at that index."""
        run, round_ = self.run, self.round
        user = self.by_key[bytes(run["clients"]["items"][index]["signer"])]
        proof = self.selection(round_).witness_proof(index)
        figures = {"step": int(run["step"]), "loss": 2.5, "evals": [{"name": bytes(32), "value": 1.0}] * 8}
        at = (int(run["epoch"]), int(round_["height"]))
        held = int(run["step"]) - 1, PARAMETERS
        both = filters, filters
        return user, self.keys.witness(user.pubkey(), proof, root, *both, metadata=figures, at=at, held=held)

    def begin(self) -> None:
        """From nothing to the first round."""
        owner, keys = self.owner.pubkey(), self.keys
        self.measure(
            "init_coordinator", "", self.owner, keys.init_coordinator(owner, self.authorizer, owner, owner, "v" * 96)
        )
        self.measure("update", "metadata", self.owner, keys.update(owner, metadata=METADATA))
        progress = {"epoch": 0, "step": 1, "epoch_start_data_index": 2**52}
        self.measure(
            "update",
            "configuration, model and progress",
            self.owner,
            keys.update(owner, config=CONFIG, model=MODEL, progress=progress),
        )
        self.measure("update_client_version", "", self.owner, keys.update_client_version(owner, "w" * 96))
        self.measure("set_future_epoch_rates", "", self.owner, keys.set_future_epoch_rates(owner, 444_444, 1))
        self.measure("set_manifest", "", self.owner, keys.set_manifest(owner, b"\7" * 32, "m" * 192))
        self.measure("set_paused", "start of a run", self.owner, keys.set_paused(owner, False))
        first, last = self.wallets[0], self.wallets[-1]
        self.measure("set_address", "new", first, keys.set_address(first.pubkey(), "a" * 126))
        self.measure("set_address", "changed", first, keys.set_address(first.pubkey(), "b" * 126))
        self.measure("set_address", "closed", first, keys.set_address(first.pubkey(), ""))
        self.each(lambda index, user: self._join(user), self.wallets[:-1])
        self.measure("join_run", "the last of 256", last, self._join(last))
        before = self.vm.data(keys.coordinator_account)
        self.change(_all_but_one_left)
        newcomer = self.vm.wallet()
        self.measure("join_run", "in the place of one that left", newcomer, self._join(newcomer))
        self.change(lambda run: run[...].__setitem__((), view_coordinator(before)))
        self.vm.advance(5)
        self.measure("tick", "nothing is due, while members gather", first, keys.tick(first.pubkey()))
        self.vm.advance(5)
        self.measure("tick", "an epoch of 256 clients forms", first, keys.tick(first.pubkey()))
        self.each(lambda index, user: self._warm(index, user), self.wallets[:-1])
        self.measure("warmup_witness", "the last of 256, round 0 begins", last, self._warm(255, last))

    def _join(self, user: Keypair) -> Instruction:
        key = user.pubkey()
        return self.keys.join_run(key, bytes(node_of(user).pubkey()), self.join_permit)

    def _warm(self, index: int, user: Keypair) -> Instruction:
        return self.keys.warmup_witness(user.pubkey(), index, PARAMETERS, 0)

    def train(self) -> None:
        """A round that ends early, one that ends when the last witness reports, a health check."""
        self._decide("the quorum's last, the next round begins")
        # Clients that are gone make it worth while to look up who the witnesses are.
        seats = self.selection(self.round).witnesses()
        others = [index for index in range(256) if index not in seats]
        gone = [self.wallets[index] for index in others[:40]]
        self.each(lambda index, user: self.keys.withdraw(user.pubkey()), gone[:-1])
        self.measure("withdraw", "the 40th of 256 clients", gone[-1], self.keys.withdraw(gone[-1].pubkey()))
        user = self.wallets[seats[0]]
        self.measure("tick", "nothing is due in a round", user, self.keys.tick(user.pubkey()))
        for index in seats:
            self.send(*self.witness(index, self._filter(index), root=b"\6" * 32 if index in seats[:12] else b"\5" * 32))
        self.measure("witness", "another root, everybody reported", *self.witness(seats[0], root=b"\7" * 32))
        self.vm.advance(1000)
        self.measure("tick", "the time to witness is over, 40 clients leave", user, self.keys.tick(user.pubkey()))
        for _ in range(3):
            self._decide("")
        self._check_health(100)

    def _decide(self, case: str) -> None:
        """A round that 21 of 32 witnesses decide."""
        seats = self.selection(self.round).witnesses()
        for index in seats[:20]:
            self.send(*self.witness(index, self._filter(index)))
        last = self.witness(seats[20], self._filter(seats[20]))
        if case:
            self.measure("witness", case, *last)
        else:
            self.send(*last)

    def _filter(self, index: int) -> bytes:
        """A filter that has everybody, except that two thirds lack the last bit of the client that is asked for."""
        bloom = Bloom([sha256(bytes([index, key])).digest()[0] + 1000 * key for key in range(8)], bits=2**1024 - 1)
        return bloom.to_bytes()

    def _check_health(self, index: int) -> None:
        run = self.run
        past = [(int(run["rounds_head"]) + 4 - back) % 4 for back in (1, 2, 3)]
        before = run["rounds"][past[0]]
        signers = run["clients"]["items"]["signer"]
        listed, caller = bytes(signers[index]), bytes(signers[0])
        item = sha256(listed).digest()

        # All 32 witnesses reported; 21 miss its last bit, and the others have all of it.
        def unhear(record: Record) -> None:
            for slot in past:
                round_ = record["rounds"][slot]
                round_["witnesses"][21:] = round_["witnesses"][:11]
                round_["witnesses_len"] = 32
                for place in range(21):
                    filters = round_["witnesses"][place]["participants"]
                    bloom = Bloom.from_bytes(bytes(filters))
                    bloom.bits &= ~(1 << bloom.positions(item)[-1])
                    filters[:] = list(bloom.to_bytes())

        self.change(unhear)
        user = self.by_key[caller]
        position = self.selection(before).committee_position(index)
        instruction = self.keys.health_check(user.pubkey(), listed, ZERO_HASH, position, index)
        self.measure("health_check", "one of 216 clients is dropped, three rounds of 32 reports", user, instruction)

    def end(self) -> None:
        """The run drains, the parameters are named, and all are paid."""
        keys, owner = self.keys, self.owner.pubkey()
        self.measure("set_paused", "a pause in a round", self.owner, keys.set_paused(owner, True))
        while True:
            run = self.run
            statuses = run["clients"]["items"]["status"]
            seats = [index for index in self.selection(self.round).witnesses() if not statuses[index]]
            if int(run["last_step"]):
                break
            height = int(self.round["height"])
            for index in seats:
                if int(self.round["height"]) == height:
                    self.send(*self.witness(index))
        for index in seats[:20]:
            self.send(*self.witness(index))
        self.measure("witness", "the parameters are named, the epoch ends", *self.witness(seats[20]))
        assert int(self.run["run_state"]) == 7
        moved = {"Hub": {"repo_id": "o" * 64, "revision": "p" * 64}}
        first = self.wallets[0]
        self.measure("checkpoint", "by the main authority", self.owner, keys.checkpoint(owner, moved))
        by_permit = keys.checkpoint(first.pubkey(), moved, self.checkpoint_permit)
        self.measure("checkpoint", "with an authorization", first, by_permit)
        self.measure("set_paused", "a run goes on", self.owner, keys.set_paused(owner, False))

    def leave(self) -> None:
        """So many leave in the second epoch that it ends, when one more is kicked."""
        keys, last = self.keys, self.wallets[-1]
        self.each(lambda index, user: self._join(user), self.wallets)
        self.vm.advance(10)
        self.send(last, keys.tick(last.pubkey()))
        self.each(lambda index, user: keys.warmup_witness(user.pubkey(), index, PARAMETERS, 1), self.wallets)
        self.send(*self.witness(self.selection(self.round).witnesses()[0]))
        leaving = self.wallets[1:87]
        self.each(lambda index, user: keys.withdraw(user.pubkey()), leaving[:-1])
        user = leaving[-1]
        self.measure("withdraw", "another, after 85 have left", user, keys.withdraw(user.pubkey()))
        kick = keys.kick(self.owner.pubkey(), self.wallets[0].pubkey())
        self.measure("kick", "too few of 256 clients are left, the epoch ends", self.owner, kick)
        self.send(self.owner, keys.set_paused(self.owner.pubkey(), True))
        owner = self.owner.pubkey()
        self.measure("restart_from", "", self.owner, keys.restart_from(owner, 0, PARAMETERS))
        self.measure("free_coordinator", "", self.owner, keys.free_coordinator(owner, owner))


def measure() -> list[Row]:
    """Every instruction of the coordinator, at 256 clients and 32 witnesses."""
    large = LargeRun()
    large.begin()
    large.train()
    large.end()
    large.leave()
    return sorted(large.rows, key=lambda row: (row.instruction, row.units))


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| instruction | when | compute units | bytes of the transaction |", "|---|---|---|---|"]
    lines += [f"| `{row.instruction}` | {row.case} | {row.units:,} | {row.size:,} |" for row in rows]
    return "\n".join(lines)


def with_table(page: str, rows: list[Row]) -> str:
    """The page with that table between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    written = Path(sys.argv[1])
    written.write_text(with_table(written.read_text(), measure()))
