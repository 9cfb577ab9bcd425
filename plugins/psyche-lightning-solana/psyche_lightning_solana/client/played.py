"""A run played through the programs on a chain within this process, to see what its transactions take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from psyche_lightning.errors import PsycheError
from psyche_lightning.protocol.bloom import participants_bloom
from psyche_lightning.protocol.committee import round_selection
from psyche_lightning.wire.canonical import sha256
from psyche_lightning_solana import account
from psyche_lightning_solana.account import RunAccounts
from psyche_lightning_solana.addresses import authorization_address
from psyche_lightning_solana.client import manifest
from psyche_lightning_solana.client.cluster import local_program
from psyche_lightning_solana.client.cost import ROUNDS, START, Measured
from psyche_lightning_solana.client.fees import budget
from psyche_lightning_solana.client.translate import config_section
from psyche_lightning_solana.client.units import units
from psyche_lightning_solana.instructions import (
    RunKeys,
    authorization_create,
    authorization_grantor_update,
    new_coordinator_account,
)
from psyche_lightning_solana.interface import JOIN_SCOPE
from psyche_lightning_solana.layout import COORDINATOR_SIZE
from psyche_lightning_solana.localnet.chain import LocalChain
from psyche_lightning_solana.localnet.clock import SlotClock
from psyche_lightning_solana.localnet.programs import fresh_chain

POCKET = 10**10
EXTRA_TIME, LONG = 1, 1_000_000
PARAMETERS = sha256(b"parameters")


class Played:
    """One epoch of a run.

    Args:
        run: what :func:`~psyche_lightning_solana.client.translate.of_recipe` gives.
        nodes: how many nodes take part.
        address: what each says of where it is reached; empty for nothing.

    Attributes:
        witnesses: reports that a round takes.
    """

    def __init__(self, run: dict[str, Any], nodes: int, address: str) -> None:
        # Batches and times do not matter to the price; they must not be in the way of the nodes.
        config = config_section(run["config"])
        batch = max(config["global_batch_size_end"], nodes)
        self._config = {
            **config,
            "init_min_clients": nodes,
            "min_clients": 1,
            "witness_nodes": min(config["witness_nodes"], nodes),
            "global_batch_size_start": min(config["global_batch_size_start"], batch),
            "global_batch_size_end": batch,
            "total_steps": ROUNDS,
            "waiting_for_members_extra_time": EXTRA_TIME,
            **dict.fromkeys(("warmup_time", "max_round_train_time", "round_witness_time", "cooldown_time"), LONG),
            "epoch_time": 2 * LONG,
        }
        self._run, self._address = run, address
        clock = SlotClock(400, running=False, unix_ms=START * 1000)
        self._chain: LocalChain = fresh_chain(clock)[0]
        self._owner = self._wallet(0)
        self._nodes = [self._wallet(1 + number) for number in range(nodes)]
        program = local_program("coordinator").pubkey()
        self._authorizer = local_program("authorizer").pubkey()
        self._account = Keypair.from_seed(sha256(b"coordinator account"))
        self._keys = RunKeys(program, "cost", self._account.pubkey())
        self.witnesses = 0

    def rows(self) -> Iterator[tuple[str, Measured]]:
        """What was sent, with the part of the run to which it belongs."""
        yield from (("creating", row) for row in self._create())
        if self._address:
            for node in self._nodes:
                yield (
                    "entering",
                    self._send("set_address", [self._keys.set_address(node.pubkey(), self._address)], node),
                )
        permit = authorization_address(self._authorizer, self._owner.pubkey(), Pubkey.default(), JOIN_SCOPE)
        for node in self._nodes:
            key = node.pubkey()
            join = self._keys.join_run(key, sha256(b"node", bytes(key)), permit)
            yield "epoch", self._send("join_run", [join], node)
        self._chain.advance_seconds(EXTRA_TIME + 1)
        if self._state().state.phase.name == "WAITING_FOR_MEMBERS":
            yield "epoch", self._send("tick", [self._keys.tick(self._nodes[0].pubkey())], self._nodes[0])
        for index, client in enumerate(self._state().state.clients):
            node = self._by(client.signer)
            report = self._keys.warmup_witness(node.pubkey(), index, PARAMETERS, 0)
            yield "epoch", self._send("warmup_witness", [report], node)
        for height in range(ROUNDS):
            yield from (("round", row) for row in self._play(height))
        while (state := self._state().state).current is not None and state.phase.name.startswith("ROUND"):
            list(self._play(state.current.height))
        for client in self._state().state.clients:
            node = self._by(client.signer)
            state = self._state().state
            if state.phase.name == "COOLDOWN":
                vote = self._keys.vote_checkpoint(node.pubkey(), 0, state.step - 1, PARAMETERS)
                yield "epoch", self._send("vote_checkpoint", [vote], node)

    # --- its parts ----------------------------------------------------------------------------------------------------

    def _create(self) -> Iterator[Measured]:
        me, keys, chain = self._owner.pubkey(), self._keys, self._chain
        make = new_coordinator_account(
            me, self._account.pubkey(), keys.program, chain.vm.minimum_balance(COORDINATOR_SIZE)
        )
        init = keys.init_coordinator(me, self._authorizer, me, me)
        yield self._send("init_coordinator", [make, init], self._owner, self._account)
        run = self._run
        sections = keys.update(me, metadata=run["metadata"], config=self._config, model=run["model"])
        yield self._send("update", [sections], self._owner)
        digest, data = manifest.compress(run["manifest"])
        rent = chain.vm.minimum_balance(manifest.HEADER + len(data))
        place = me, keys.run_id, digest
        yield self._send("create manifest", manifest.beginning(*place, len(data), rent), self._owner)
        for _, write in manifest.writing(*place, data):
            yield self._send("write manifest", [write], self._owner)
        yield self._send("set_manifest", [keys.set_manifest(me, digest, "account:" + "x" * 44)], self._owner)
        permit = authorization_address(self._authorizer, me, Pubkey.default(), JOIN_SCOPE)
        parts = [
            authorization_create(self._authorizer, me, me, Pubkey.default(), JOIN_SCOPE),
            authorization_grantor_update(self._authorizer, me, permit, True),
        ]
        yield self._send("authorization_create+authorization_grantor_update", parts, self._owner)
        yield self._send("set_paused", [keys.set_paused(me, False)], self._owner)

    def _play(self, height: int) -> Iterator[Measured]:
        """The reports of a round: a quorum ends it, and what comes later is refused and free."""
        state = self._state().state
        round_ = state.current
        assert round_ is not None
        filters = participants_bloom(round_.seed, round_.clients), bytes(192)
        selection = round_selection(round_, state.config)
        self.witnesses = max(self.witnesses, selection.witness_count)
        for index in selection.witnesses():
            now = self._state().state
            if now.current is None or now.current.height != height or not now.phase.name.startswith("ROUND"):
                return
            node = self._by(round_.clients[index])
            metadata = {"step": state.step, "loss": 2.0, "tokens_per_sec": 1.0}
            report = self._keys.witness(
                node.pubkey(), selection.witness_proof(index), PARAMETERS, *filters, metadata=metadata, at=(0, height)
            )
            yield self._send("witness", [report], node)

    # --- the chain ----------------------------------------------------------------------------------------------------

    def _wallet(self, number: int) -> Keypair:
        keypair = Keypair.from_seed(sha256(b"cost", number.to_bytes(4, "little")))
        self._chain.airdrop(keypair.pubkey(), POCKET)
        return keypair

    def _by(self, signer: bytes) -> Keypair:
        return next(node for node in self._nodes if bytes(node.pubkey()) == signer)

    def _state(self) -> RunAccounts:
        held = [self._chain.account(key) for key in (self._keys.coordinator_account, self._keys.manifest)]
        coordinator, manifest = (bytes(found.data) if found else b"" for found in held)
        return account.read(coordinator, manifest)

    def _send(self, name: str, parts: Sequence[Instruction], payer: Keypair, *signers: Keypair) -> Measured:
        chain = self._chain
        chain.advance()
        places = {meta.pubkey for part in parts for meta in part.accounts if meta.pubkey != payer.pubkey()}
        before = self._stored(places)
        transaction = chain.sign([*budget(units(name), 0), *parts], payer, *signers)
        outcome = chain.submit(transaction)
        if outcome.err is not None:
            raise PsycheError(f"{name} was refused while the run was played: {outcome.logs[-1:]}")
        return Measured(
            name,
            outcome.units,
            units(name),
            len(transaction.signatures),
            len(bytes(transaction)),
            self._stored(places) - before,
        )

    def _stored(self, places: set[Pubkey]) -> int:
        held = (self._chain.account(place) for place in places)
        return sum(found.lamports for found in held if found is not None and not found.executable)
