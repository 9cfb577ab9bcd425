"""A run with a treasurer on a test's virtual machine: the three programs, a token, an authority, users."""

from __future__ import annotations

import struct
from dataclasses import asdict
from hashlib import sha256
from typing import Any

import spl.token.instructions as token
from psyche_lightning_solana.account import RunAccounts, read
from psyche_lightning_solana.interface import (
    AUTHORIZER,
    COORDINATOR,
    JOIN_SCOPE,
    TREASURER,
    WITNESS_TRAILER,
    InstructionSpec,
)
from psyche_lightning_solana.layout import COORDINATOR_SIZE, view_coordinator
from psyche_lightning_solana.programs import image
from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey
from solders.system_program import ID as SYSTEM_PROGRAM
from spl.token.constants import ASSOCIATED_TOKEN_PROGRAM_ID, MINT_LEN, TOKEN_PROGRAM_ID

from psyche_lightning.protocol.committee import round_selection
from psyche_lightning.protocol.state import Phase
from solana_support.calls import call
from solana_support.vm import Outcome, Vm, must

CONFIG = {
    "warmup_time": 2,
    "cooldown_time": 1,
    "max_round_train_time": 2,
    "round_witness_time": 1,
    "global_batch_size_warmup_tokens": 0,
    "epoch_time": 60,
    "total_steps": 3,
    "init_min_clients": 1,
    "min_clients": 1,
    "witness_nodes": 1,
    "global_batch_size_start": 4,
    "global_batch_size_end": 4,
    "verification_percent": 0,
    "waiting_for_members_extra_time": 1,
}
MODEL = {
    "LLM": {
        "max_seq_len": 64,
        "cold_start_warmup_steps": 0,
        "architecture": "HfAuto",
        "checkpoint": {"Hub": {"repo_id": "somebody/something", "revision": None}},
        "data_type": "Pretraining",
        "data_location": {"Local": "data"},
        "lr_schedule": {"Constant": {"base_lr": 0.001, "warmup_init_lr": 0.0, "warmup_steps": 0}},
        "optimizer": {
            "Distro": {
                "clip_grad_norm": 1.0,
                "weight_decay": None,
                "compression_decay": 0.999,
                "compression_topk": 8,
                "compression_chunk": 64,
                "quantize_1bit": True,
            }
        },
    }
}
PROGRESS = {"epoch": 0, "step": 1, "epoch_start_data_index": 0}
_NO_BLOOM = {"keys": [0] * 8, "bits": [0] * 16}

Address = Pubkey | AccountMeta


class Treasury:
    """Deploys the programs and mints a token; the run itself is made by :meth:`create`.

    Attributes:
        authority: who commands the run through the treasurer.
        user: who earns.
        mint: the token that points are paid in.
    """

    def __init__(self, vm: Vm, run_id: str = "test") -> None:
        self.vm, self.run_id = vm, run_id
        self.coordinator, self.authorizer, self.treasurer = (
            vm.deploy(image(name)) for name in ("coordinator", "authorizer", "treasurer")
        )
        self.authority, self.joiner, self.user = vm.wallet(), vm.wallet(), vm.wallet()
        self.mint = self.new_mint()
        self.account = vm.create_account(self.coordinator, COORDINATOR_SIZE).pubkey()
        self.index = int.from_bytes(sha256(run_id.encode()).digest()[:8], "little")

    # Addresses

    @property
    def run(self) -> Pubkey:
        """The run, which is the main authority of its coordinator."""
        return self.derived(self.treasurer, b"Run", struct.pack("<Q", self.index))

    @property
    def instance(self) -> Pubkey:
        """The coordinator's instance account."""
        return self.derived(self.coordinator, b"coordinator", self.run_id.encode())

    @property
    def manifest(self) -> Pubkey:
        """The coordinator's manifest account."""
        return self.derived(self.coordinator, b"manifest", self.run_id.encode())

    @property
    def vault(self) -> Pubkey:
        """The run's token account."""
        return self.tokens_of(self.run)

    def participant(self, user: Pubkey | None = None) -> Pubkey:
        """What a user was paid."""
        return self.derived(self.treasurer, b"Participant", bytes(self.run), bytes(user or self.user.pubkey()))

    def tokens_of(self, owner: Pubkey, mint: Pubkey | None = None) -> Pubkey:
        """The associated token account."""
        return token.get_associated_token_address(owner, mint or self.mint)

    @staticmethod
    def derived(program: Pubkey, *seeds: bytes) -> Pubkey:
        """A program-derived address."""
        return Pubkey.find_program_address(list(seeds), program)[0]

    # Tokens

    def new_mint(self) -> Pubkey:
        """A token whose mint authority is the virtual machine's payer."""
        mint = self.vm.create_account(TOKEN_PROGRAM_ID, MINT_LEN).pubkey()
        initialize = token.InitializeMintParams(6, TOKEN_PROGRAM_ID, mint, self.vm.payer.pubkey(), None)
        must(self.vm.send([token.initialize_mint(initialize)]))
        return mint

    def hold(self, owner: Pubkey, amount: int = 0, mint: Pubkey | None = None) -> Pubkey:
        """Make the owner's token account if need be, and mint into it."""
        payer, mint = self.vm.payer.pubkey(), mint or self.mint
        account = self.tokens_of(owner, mint)
        must(self.vm.send([token.create_idempotent_associated_token_account(payer, owner, mint)]))
        if amount:
            must(self.vm.send([token.mint_to(token.MintToParams(TOKEN_PROGRAM_ID, mint, account, payer, amount))]))
        return account

    def balance(self, account: Pubkey) -> int:
        """Base units in a token account."""
        return int.from_bytes(self.vm.data(account)[64:72], "little")

    # Instructions

    def instruction(self, name: str, arguments: Any = b"", **changed: Address) -> Instruction:
        """An instruction of the treasurer with this run's accounts, some of them changed."""
        return call(self.treasurer, TREASURER.instructions[name], self.accounts() | changed, arguments)

    def accounts(self) -> dict[str, Address]:
        """The run's accounts, by the names that the instructions have for them."""
        return {
            "payer": self.vm.payer.pubkey(),
            "authority": self.authority.pubkey(),
            "user": self.user.pubkey(),
            "user_collateral": self.tokens_of(self.user.pubkey()),
            "run": self.run,
            "run_collateral": self.vault,
            "participant": self.participant(),
            "collateral_mint": self.mint,
            "coordinator_instance": self.instance,
            "coordinator_account": self.account,
            "coordinator_program": self.coordinator,
            "coordinator_manifest": self.manifest,
            "authorizer": self.authorizer,
            "associated_token_program": ASSOCIATED_TOKEN_PROGRAM_ID,
            "token_program": TOKEN_PROGRAM_ID,
            "system_program": SYSTEM_PROGRAM,
        }

    def send(self, *instructions: Instruction) -> Outcome:
        """Send, signed by whoever has to."""
        return self.vm.send(instructions, [self.authority, self.joiner, self.user])

    def creation(self, **arguments: Any) -> dict[str, Any]:
        """The arguments of ``run_create``."""
        return {
            "index": self.index,
            "run_id": self.run_id,
            "client_version": "test",
            "main_authority": bytes(self.authority.pubkey()),
            "join_authority": bytes(self.joiner.pubkey()),
        } | arguments

    def create(self, **changed: Address) -> Outcome:
        """``run_create``."""
        return self.send(self.instruction("run_create", self.creation(), **changed))

    def update(self, accounts: dict[str, Address] | None = None, **arguments: Any) -> Outcome:
        """``run_update``."""
        return self.send(self.instruction("run_update", arguments, **(accounts or {})))

    def participate(self, **changed: Address) -> Outcome:
        """``participant_create``."""
        return self.send(self.instruction("participant_create", **changed))

    def claim(self, points: int | bytes, **changed: Address) -> Outcome:
        """``participant_claim``."""
        arguments = points if isinstance(points, bytes) else {"claim_earned_points": points}
        return self.send(self.instruction("participant_claim", arguments, **changed))

    def read(self, kind: str, address: Pubkey) -> dict[str, Any]:
        """An account of the treasurer."""
        value: dict[str, Any] = TREASURER.accounts[kind].decode(self.vm.data(address)[8:])
        return value

    # The coordinator

    @property
    def state(self) -> RunAccounts:
        """What the coordinator says of the run."""
        return read(self.vm.data(self.account), self.vm.data(self.manifest))

    def coordinate(self, spec: InstructionSpec, arguments: Any = b"", **changed: Address) -> Outcome:
        """An instruction of the user to the coordinator."""
        accounts = self.accounts() | {"manifest": self.manifest} | changed
        return self.send(call(self.coordinator, spec, accounts, arguments))

    def give_points(self, earned: int, user: Pubkey | None = None) -> None:
        """Write points into the coordinator account, in place of epochs of training."""
        data = bytearray(self.vm.data(self.account))
        record = view_coordinator(data)
        user = user or self.user.pubkey()
        count = int(record["members_len"])
        place = next((i for i in range(count) if bytes(record["members"][i]["signer"]) == bytes(user)), count)
        record["members"][place]["signer"] = list(bytes(user))
        record["members"][place]["earned"] = earned
        record["members_len"] = max(count, place + 1)
        self.vm.put(self.account, self.coordinator, bytes(data))

    def ready(self, earned: int = 100, funds: int = 1000) -> Treasury:
        """A run, a user with points, and tokens to pay them with."""
        must(self.create())
        self.give_points(earned)
        self.hold(self.run, funds)
        self.hold(self.user.pubkey())
        must(self.participate())
        return self

    def join(self) -> Outcome:
        """Let anybody join, and the user does."""
        granted = self.derived(self.authorizer, b"Authorization", bytes(self.joiner.pubkey()), bytes(32), JOIN_SCOPE)
        accounts = self.accounts() | {"grantor": self.joiner.pubkey(), "authorization": granted}
        arguments = {"grantee": bytes(32), "scope": list(JOIN_SCOPE)}
        create = call(self.authorizer, AUTHORIZER.instructions["authorization_create"], accounts, arguments)
        grant = AUTHORIZER.instructions["authorization_grantor_update"]
        must(self.send(create, call(self.authorizer, grant, accounts, {"active": True})))
        user = self.user.pubkey()
        identity = {"signer": bytes(user), "p2p_identity": bytes(user)}
        spec = COORDINATOR.instructions["join_run"]
        return self.coordinate(spec, {"client_id": identity}, authorization=granted, node=user)

    def train(self) -> None:
        """Play the user's part until the run is finished or waits for members."""
        specs = COORDINATOR.instructions
        for _ in range(100):
            state = self.state.state
            if state.phase is Phase.FINISHED:
                return
            if state.phase is Phase.WARMUP and not state.warmup_witnesses:
                must(
                    self.coordinate(specs["warmup_witness"], self._report({"position": 0, "index": 0, "witness": True}))
                )
            elif state.phase is Phase.ROUND_TRAIN:
                round_ = state.rounds[state.head]
                proof = asdict(round_selection(round_, state.config).witness_proof(0))
                report = specs["witness"].arguments.write(self._report(proof) | {"metadata": _METADATA})
                held = {"step": state.step - 1, "digest": bytes([7]) * 32}
                place = WITNESS_TRAILER.write({"epoch": state.epoch, "height": round_.height, **held})
                must(self.coordinate(specs["witness"], report + place))
            else:
                self.vm.advance(1)
                must(self.coordinate(specs["tick"]))
        raise AssertionError(f"the run is still in {self.state.state.phase}")

    @staticmethod
    def _report(proof: dict[str, Any]) -> dict[str, Any]:
        filters = {"participant_bloom": _NO_BLOOM, "broadcast_bloom": _NO_BLOOM}
        return {"proof": proof, **filters, "broadcast_merkle": bytes([7]) * 32}


_METADATA = {
    "step": 0,
    "tokens_per_sec": 0.0,
    "bandwidth_per_sec": 0.0,
    "loss": 0.0,
    "evals": [],
    "prompt_results": [],
    "prompt_index": 0,
    "efficency": 0.0,
}
