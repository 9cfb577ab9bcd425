"""``psyche solana cost``: a run's cost on a chain, measured by running one epoch through the programs."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from psyche_lightning.cli.console import stdout
from psyche_lightning.errors import ConfigError, PsycheError
from psyche_lightning.protocol.bloom import participants_bloom
from psyche_lightning.protocol.committee import round_selection
from psyche_lightning.recipe import load_recipe
from psyche_lightning.wire.canonical import sha256
from psyche_lightning_solana import account
from psyche_lightning_solana.account import RunAccounts
from psyche_lightning_solana.addresses import authorization_address
from psyche_lightning_solana.client import manifest
from psyche_lightning_solana.client.cluster import local_program
from psyche_lightning_solana.client.fees import LAMPORTS, SIGNATURE_FEE, budget, units
from psyche_lightning_solana.client.translate import config_section, of_recipe
from psyche_lightning_solana.instructions import (
    RunKeys,
    authorization_create,
    authorization_grantor_update,
    new_coordinator_account,
)
from psyche_lightning_solana.interface import JOIN_SCOPE
from psyche_lightning_solana.layout import COORDINATOR_SIZE
from psyche_lightning_solana.localnet import SlotClock, local_chain

MAX_NODES = 256
ROUNDS = 3
"""Measured rounds: the first has no predecessor, and later ones cost the same."""
START = 1_700_000_000
POCKET = 10**10
EXTRA_TIME, LONG = 1, 1_000_000
PARAMETERS = sha256(b"parameters")


@dataclass(frozen=True)
class Measured:
    """One measured instruction.

    Attributes:
        instruction: its name.
        units: compute units that it used.
        limit: its transaction's compute limit, which the priority fee is based on.
        signatures: of its transaction.
        size: bytes of its transaction.
        storage: lamports that it put into new accounts.
    """

    instruction: str
    units: int
    limit: int
    signatures: int
    size: int
    storage: int


@dataclass(frozen=True)
class Bill:
    """The cost of one part of a run.

    Attributes:
        transactions: their number.
        units: compute units that they use.
        fees: lamports for signatures.
        priority: lamports for priority, at the given price.
        storage: lamports held in accounts; closing these returns them.
    """

    transactions: float = 0.0
    units: float = 0.0
    fees: float = 0.0
    priority: float = 0.0
    storage: float = 0.0

    def __add__(self, other: Bill) -> Bill:
        return Bill(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def times(self, count: float) -> Bill:
        """A multiple."""
        return Bill(*(value * count for value in _values(self)))


def _values(bill: Bill) -> tuple[float, ...]:
    return (bill.transactions, bill.units, bill.fees, bill.priority, bill.storage)


def bill(rows: Sequence[Measured], price: int) -> Bill:
    """The cost of these transactions at a price in micro-lamports per compute unit of their limits."""
    return Bill(
        transactions=len(rows),
        units=sum(row.units for row in rows),
        fees=sum(row.signatures * SIGNATURE_FEE for row in rows),
        priority=sum(math.ceil(row.limit * price / 1_000_000) for row in rows),
        storage=sum(row.storage for row in rows),
    )


@dataclass(frozen=True)
class Cost:
    """The cost of a run.

    Attributes:
        nodes: participating nodes.
        witnesses: number of them that report in each round.
        creating: the run itself, once, by its owner.
        entering: all nodes' first join: their addresses.
        epoch: each epoch without its rounds: joining, warm-up, a tick.
        round: one round.
        rows: measured instructions.
    """

    nodes: int
    witnesses: int
    creating: Bill
    entering: Bill
    epoch: Bill
    round: Bill
    rows: tuple[Measured, ...]

    def run(self, steps: int, epochs: int) -> Bill:
        """A whole run: each epoch has two more rounds than it trains."""
        return self.creating + self.entering + self.epoch.times(epochs) + self.round.times(steps + 2 * epochs)

    def node(self, steps: int, epochs: int) -> Bill:
        """A node's share of the nodes' cost; the owner pays the creation."""
        return (self.entering + self.epoch.times(epochs) + self.round.times(steps + 2 * epochs)).times(1 / self.nodes)


def measure(run: dict[str, Any], nodes: int, price: int = 0, *, address: str = "x" * 32) -> Cost:
    """Measure a run with the programs on a chain within this process.

    Args:
        run: what :func:`~psyche_lightning_solana.client.translate.of_recipe` gives.
        nodes: number, up to 256.
        price: micro-lamports for each compute unit.
        address: a node's address; empty if the transport needs none.

    Raises:
        ConfigError: it does not fit the layout.
    """
    played = _Played(run, nodes, address)
    groups: dict[str, list[Measured]] = defaultdict(list)
    for part, row in played.rows():
        groups[part].append(row)
    return Cost(
        nodes=nodes,
        witnesses=played.witnesses,
        creating=bill(groups["creating"], price),
        entering=bill(groups["entering"], price),
        epoch=bill(groups["epoch"], price),
        round=bill(groups["round"], price).times(1 / ROUNDS),
        rows=tuple(row for rows in groups.values() for row in rows),
    )


class _Played:
    """One epoch of a run.

    Args:
        run: what :func:`~psyche_lightning_solana.client.translate.of_recipe` gives.
        nodes: number of nodes.
        address: each node's address; empty if the transport needs none.

    Attributes:
        witnesses: reports in a round.
    """

    def __init__(self, run: dict[str, Any], nodes: int, address: str) -> None:
        # Batches and times do not affect the price; they must not limit the nodes.
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
        self._chain = local_chain(clock)
        self._owner = self._wallet(0)
        self._nodes = [self._wallet(1 + number) for number in range(nodes)]
        program = local_program("coordinator").pubkey()
        self._authorizer = local_program("authorizer").pubkey()
        self._account = Keypair.from_seed(sha256(b"coordinator account"))
        self._keys = RunKeys(program, "cost", self._account.pubkey())
        self.witnesses = 0

    def rows(self) -> Iterator[tuple[str, Measured]]:
        """Sent instructions, by part of the run."""
        yield from (("creating", row) for row in self._create())
        if self._address:
            for node in self._nodes:
                yield (
                    "entering",
                    self._send("set_address", [self._keys.set_address(node.pubkey(), self._address)], node),
                )
        permit = authorization_address(self._authorizer, self._owner.pubkey(), Pubkey.default(), JOIN_SCOPE)
        for node in self._nodes:
            key = Keypair.from_seed(sha256(b"node", bytes(node.pubkey())))
            join = self._keys.join_run(node.pubkey(), bytes(key.pubkey()), permit)
            yield "epoch", self._send("join_run", [join], node, key)
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
        """The reports of a round: a quorum ends it; later ones are refused and free."""
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
                node.pubkey(),
                selection.witness_proof(index),
                PARAMETERS,
                *filters,
                metadata=metadata,
                at=(0, height),
                held=(state.step - 1, PARAMETERS),
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


def cost(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of one that comes with psyche.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the recipe's, such as epoch_time=86400."),
    ] = None,
    nodes: Annotated[
        list[int] | None, typer.Option(help="How many nodes; may be given several times. 1, 16, 64, 256 unless given.")
    ] = None,
    price: Annotated[
        int, typer.Option(min=0, help="Priority fee, in micro-lamports for each compute unit of a limit.")
    ] = 0,
    round_seconds: Annotated[float, typer.Option(min=0.1, help="How long a round takes.")] = 30.0,
    twin: Annotated[bool, typer.Option("--twin", help="The recipe's CPU-sized twin.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what a recipe's run costs on a chain: transactions, compute units, fees, storage."""
    counts = nodes or [1, 16, 64, MAX_NODES]
    if any(not 0 < count <= MAX_NODES for count in counts):
        raise ConfigError(f"a run on a chain has 1 to {MAX_NODES} nodes, not {max(counts)}")
    resolved = load_recipe(recipe, overrides or (), twin=twin)
    values = of_recipe(resolved)
    config = resolved.run.coordinator
    steps = config.total_steps
    epochs = max(1, math.ceil(steps * round_seconds / config.epoch_time))
    console = stdout()
    results = []
    for count in counts:
        if not as_json:
            console.print(f"playing a run of {count} nodes ...", style="dim")
        results.append(measure(values, count, price))
    if as_json:
        print(json.dumps([_as_json(result, steps, epochs, price) for result in results], indent=1))
    else:
        _show(console, results, resolved.name, steps, epochs, price, round_seconds)


def _as_json(result: Cost, steps: int, epochs: int, price: int) -> dict[str, Any]:
    instructions: dict[str, list[Measured]] = defaultdict(list)
    for row in result.rows:
        instructions[row.instruction].append(row)
    return {
        "nodes": result.nodes,
        "witnesses": result.witnesses,
        "steps": steps,
        "epochs": epochs,
        "price_micro_lamports": price,
        **{
            name: asdict(value)
            for name, value in {
                "creating": result.creating,
                "entering": result.entering,
                "epoch": result.epoch,
                "round": result.round,
                "run": result.run(steps, epochs),
                "node": result.node(steps, epochs),
            }.items()
        },
        "instructions": {
            name: {
                "count": len(rows),
                "units_mean": sum(row.units for row in rows) / len(rows),
                "units_most": max(row.units for row in rows),
                "limit": max(row.limit for row in rows),
                "size": max(row.size for row in rows),
            }
            for name, rows in sorted(instructions.items())
        },
    }


def _show(
    console: Console, results: list[Cost], name: str, steps: int, epochs: int, price: int, seconds: float
) -> None:
    console.print(
        f"{name}: {steps:,} steps in {epochs} epoch(s) of rounds of {seconds:g} s; "
        f"{SIGNATURE_FEE:,} lamports a signature, {price:,} micro-lamports for each compute unit of a limit",
        highlight=False,
    )
    for result in results:
        table = Table(
            f"{result.nodes} node(s)", "transactions", "compute units", "fees", "priority", "storage", box=None
        )
        table.columns[0].no_wrap = True
        for column in table.columns[1:]:
            column.justify = "right"
        parts = {
            "create the run": result.creating,
            f"a round ({result.witnesses} witnesses)": result.round,
            "an epoch beside its rounds": result.epoch,
            "all nodes' addresses": result.entering,
            "the whole run": result.run(steps, epochs),
            "each node, the whole run": result.node(steps, epochs),
        }
        for part, values in parts.items():
            count = values.transactions
            table.add_row(
                part,
                f"{count:,.0f}" if count >= 100 or count == int(count) else f"{count:.1f}",
                f"{values.units:,.0f}",
                *(f"{lamports / LAMPORTS:.6f}" for lamports in (values.fees, values.priority, values.storage)),
            )
        console.print(table)
        console.print()
    console.print("in SOL; storage comes back when the accounts are closed", style="dim")
