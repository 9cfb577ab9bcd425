"""A run on a chain in this process, brought to any phase; and refusals, which must change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from psyche_lightning_solana.account import RunAccounts, read
from psyche_lightning_solana.addresses import authorization_address
from psyche_lightning_solana.errors import refusal
from psyche_lightning_solana.instructions import (
    RunKeys,
    authorization_create,
    authorization_grantor_update,
)
from psyche_lightning_solana.interface import JOIN_SCOPE
from psyche_lightning_solana.layout import COORDINATOR_SIZE
from psyche_lightning_solana.programs import image
from solders.compute_budget import set_compute_unit_limit
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from psyche_lightning.protocol.bloom import participants_bloom
from psyche_lightning.protocol.committee import round_selection
from psyche_lightning.protocol.state import Phase, Round, RunState
from psyche_lightning.wire.canonical import sha256
from solana_support.vm import Outcome, Vm, must

PARAMETERS, LIST = sha256(b"parameters"), sha256(b"list")
CONFIG: dict[str, Any] = {
    "warmup_time": 100,
    "cooldown_time": 100,
    "max_round_train_time": 100,
    "round_witness_time": 10,
    "global_batch_size_warmup_tokens": 0,
    "epoch_time": 10_000,
    "total_steps": 1000,
    "init_min_clients": 3,
    "min_clients": 1,
    "witness_nodes": 0,
    "global_batch_size_start": 1024,
    "global_batch_size_end": 1024,
    "verification_percent": 0,
    "waiting_for_members_extra_time": 3,
}
MODEL: dict[str, Any] = {
    "LLM": {
        "max_seq_len": 64,
        "cold_start_warmup_steps": 0,
        "architecture": "HfLlama",
        "checkpoint": {"Hub": {"repo_id": "org/model"}},
        "data_type": "Pretraining",
        "data_location": "Dummy",
        "lr_schedule": {"Constant": {"base_lr": 1e-3, "warmup_init_lr": 0.0, "warmup_steps": 0}},
        "optimizer": {
            "Distro": {
                "compression_decay": 0.999,
                "compression_topk": 8,
                "compression_chunk": 64,
                "quantize_1bit": True,
            }
        },
    }
}
MAX_UNITS = 1_400_000


def node_of(wallet: Keypair) -> Keypair:
    """The key of that wallet's node."""
    return Keypair.from_seed(sha256(bytes(wallet.pubkey())))


class Run:
    """One run, its owner and its wallets.

    Args:
        wallets: how many may take part; as many must, before an epoch forms.
        config: what differs from :data:`CONFIG`.
    """

    def __init__(self, wallets: int = 4, **config: Any) -> None:
        self.vm = Vm(tokens=False)
        self.program, self.authorizer = (self._place(name) for name in ("coordinator", "authorizer"))
        self.owner, self.stranger = self.vm.wallet(), self.vm.wallet()
        self.wallets = [self.vm.wallet() for _ in range(wallets)]
        self.config = {**CONFIG, "init_min_clients": wallets, **config}
        self.keys = self.make("attacked", self.owner)
        self.open = self.authorize(self.owner, JOIN_SCOPE)

    def _place(self, name: str) -> Pubkey:
        address = self.vm.keypair().pubkey()
        self.vm.svm.add_program(address, image(name))
        return address

    def make(self, run_id: str, owner: Keypair) -> RunKeys:
        """Another run."""
        account = self.vm.create_account(self.program, COORDINATOR_SIZE).pubkey()
        keys, key = RunKeys(self.program, run_id, account), owner.pubkey()
        self.do(keys.init_coordinator(key, self.authorizer, key, key, "test"), owner)
        return keys

    def authorize(self, grantor: Keypair, scope: bytes, grantee: Pubkey | None = None) -> Pubkey:
        """An active authorization, for everybody unless for one."""
        grantee = grantee or Pubkey.default()
        make = authorization_create(self.authorizer, self.vm.payer.pubkey(), grantor.pubkey(), grantee, scope)
        address = authorization_address(self.authorizer, grantor.pubkey(), grantee, scope)
        must(
            self.vm.send(
                [make, authorization_grantor_update(self.authorizer, grantor.pubkey(), address, True)], [grantor]
            )
        )
        return address

    # Sending.

    def send(self, instruction: Instruction, *signers: Keypair) -> Outcome:
        """Send an instruction with as many compute units as there are."""
        return self.vm.send([set_compute_unit_limit(MAX_UNITS), instruction], signers)

    def do(self, instruction: Instruction, *signers: Keypair) -> Outcome:
        """Send an instruction that has to succeed."""
        return must(self.send(instruction, *signers))

    def refused(self, instruction: Instruction, *signers: Keypair) -> str:
        """Send an instruction that has to be refused, and see that nothing has changed.

        Returns:
            The error's name, or the runtime's words.
        """
        before = self.snapshot()
        outcome = self.send(instruction, *signers)
        assert outcome.error is not None, "it was accepted"
        assert self.snapshot() == before, "a refusal changed something"
        return refusal(outcome.error).code if isinstance(outcome.error, int) else outcome.error

    def snapshot(self) -> list[bytes]:
        """The run's accounts."""
        keys = self.keys
        return [self.vm.data(key) for key in (keys.instance, keys.coordinator_account, keys.manifest)]

    def read(self) -> RunAccounts:
        """The run as it stands."""
        _, coordinator, manifest = self.snapshot()
        return read(coordinator, manifest)

    @property
    def state(self) -> RunState:
        """What the state machine works on."""
        return self.read().state

    @property
    def round(self) -> Round:
        """The current round."""
        round_ = self.state.current
        assert round_ is not None
        return round_

    # Getting somewhere.

    def configure(self) -> Run:
        """Give it its configuration."""
        self.do(self.keys.update(self.owner.pubkey(), config=self.config, model=MODEL), self.owner)
        return self

    def start(self) -> Run:
        """Configured and open to members."""
        self.configure()
        self.do(self.keys.set_paused(self.owner.pubkey(), False), self.owner)
        return self

    def joining(self, wallet: Keypair, node: Keypair | None = None) -> tuple[Instruction, Keypair, Keypair]:
        """Taking part from the next epoch on: the instruction, and who signs it."""
        node = node or node_of(wallet)
        return self.keys.join_run(wallet.pubkey(), bytes(node.pubkey()), self.open), wallet, node

    def join(self, wallet: Keypair) -> Outcome:
        """Take part from the next epoch on."""
        return self.do(*self.joining(wallet))

    def gather(self) -> Run:
        """Everybody joins, and warm-up begins."""
        if self.state.phase in (Phase.UNINITIALIZED,):
            self.start()
        for wallet in self.wallets:
            self.join(wallet)
        self.wait(self.config["waiting_for_members_extra_time"])
        assert self.state.phase is Phase.WARMUP
        return self

    def train(self) -> Run:
        """Everybody holds the parameters, and the first round begins."""
        self.gather()
        for index, wallet in enumerate(self.wallets):
            self.do(self.keys.warmup_witness(wallet.pubkey(), index, PARAMETERS), wallet)
        assert self.state.phase is Phase.ROUND_TRAIN
        return self

    def report(
        self,
        wallet: Keypair,
        heard: Sequence[bytes] | None = None,
        root: bytes = LIST,
        held: tuple[int, bytes] | None = None,
    ) -> Instruction:
        """A witness' report on the current round as it should be; the wallet must have been in it."""
        round_, state = self.round, self.state
        index = round_.clients.index(bytes(wallet.pubkey()))
        proof = round_selection(round_, state.config).witness_proof(index)
        bloom = participants_bloom(round_.seed, round_.clients if heard is None else heard)
        return self.keys.witness(
            wallet.pubkey(),
            proof,
            root,
            bloom,
            at=(state.epoch, round_.height),
            held=held or (state.step - 1, PARAMETERS),
            metadata={"step": state.step},
        )

    def witness(self, heard: Sequence[bytes] | None = None) -> Run:
        """All witnesses of the current round report, until it ends."""
        height, epoch = self.round.height, self.state.epoch
        for wallet in self.wallets:
            state = self.state
            if state.epoch != epoch or state.current is None or state.current.height != height:
                break
            listed = {client.signer for client in state.clients if not client.status}
            if state.phase is Phase.ROUND_TRAIN and bytes(wallet.pubkey()) in listed:
                self.send(self.report(wallet, heard), wallet)  # who has no seat is refused
        return self

    def end(self) -> Run:
        """The epoch ends by a pause that is asked for."""
        self.train()
        self.do(self.keys.set_paused(self.owner.pubkey(), True), self.owner)
        while self.state.phase.active:
            self.witness()
        return self

    def wait(self, seconds: int) -> Run:
        """Time passes, and somebody ticks."""
        self.vm.advance(seconds)
        self.do(self.keys.tick(self.stranger.pubkey()), self.stranger)
        return self


def altered(instruction: Instruction, *, data: bytes | None = None, **accounts: Any) -> Instruction:
    """The same instruction with other data, or with other accounts at the places ``a0``, ``a1`` and so on.

    An account is an address, which keeps the flags of the place, or a whole ``AccountMeta``.
    """
    metas = list(instruction.accounts)
    for name, account in accounts.items():
        place = int(name[1:])
        meta = metas[place]
        metas[place] = (
            account if isinstance(account, AccountMeta) else AccountMeta(account, meta.is_signer, meta.is_writable)
        )
    return Instruction(instruction.program_id, bytes(instruction.data) if data is None else data, metas)
