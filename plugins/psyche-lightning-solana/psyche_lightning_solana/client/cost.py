"""``psyche solana cost``: what a run costs on a chain, measured by playing an epoch of it through the programs."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from psyche_lightning.errors import ConfigError

MAX_NODES = 256
ROUNDS = 3
"""Rounds that are played: the first has none before it, and later ones cost the same."""
START = 1_700_000_000


@dataclass(frozen=True)
class Measured:
    """One instruction as it was played.

    Attributes:
        instruction: its name.
        units: compute units that it used.
        limit: compute units that its transaction was given, for which a priority fee is paid.
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
    """What some part of a run takes.

    Attributes:
        transactions: how many.
        units: compute units that they use.
        fees: lamports for signatures.
        priority: lamports for priority, at the price in question.
        storage: lamports that stay in accounts, and come back when these are closed.
    """

    transactions: float = 0.0
    units: float = 0.0
    fees: float = 0.0
    priority: float = 0.0
    storage: float = 0.0

    def __add__(self, other: Bill) -> Bill:
        return Bill(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def times(self, count: float) -> Bill:
        """So many of it."""
        return Bill(*(value * count for value in _values(self)))


def _values(bill: Bill) -> tuple[float, ...]:
    return (bill.transactions, bill.units, bill.fees, bill.priority, bill.storage)


def bill(rows: Sequence[Measured], price: int) -> Bill:
    """What these transactions take at a price in micro-lamports for each compute unit of their limits."""
    from psyche_lightning_solana.client.fees import SIGNATURE_FEE

    return Bill(
        transactions=len(rows),
        units=sum(row.units for row in rows),
        fees=sum(row.signatures * SIGNATURE_FEE for row in rows),
        priority=sum(math.ceil(row.limit * price / 1_000_000) for row in rows),
        storage=sum(row.storage for row in rows),
    )


@dataclass(frozen=True)
class Cost:
    """What a run costs.

    Attributes:
        nodes: nodes that take part.
        witnesses: of them, those who report in each round.
        creating: the run itself, once, by its owner.
        entering: all nodes' first coming: where they are reached.
        epoch: what each epoch takes besides its rounds: joining, warm-up, votes, a tick.
        round: one round.
        rows: what was played.
    """

    nodes: int
    witnesses: int
    creating: Bill
    entering: Bill
    epoch: Bill
    round: Bill
    rows: tuple[Measured, ...]

    def run(self, steps: int, epochs: int) -> Bill:
        """A whole run: each epoch has two rounds more than it trains."""
        return self.creating + self.entering + self.epoch.times(epochs) + self.round.times(steps + 2 * epochs)

    def node(self, steps: int, epochs: int) -> Bill:
        """A node's share of what the nodes pay; its owner pays the creation."""
        return (self.entering + self.epoch.times(epochs) + self.round.times(steps + 2 * epochs)).times(1 / self.nodes)


def measure(run: dict[str, Any], nodes: int, price: int = 0, *, address: str = "x" * 32) -> Cost:
    """Play a run of so many nodes through the programs on a chain within this process.

    Args:
        run: what :func:`~psyche_lightning_solana.client.translate.of_recipe` gives.
        nodes: how many, up to 256.
        price: micro-lamports for each compute unit.
        address: a node's address; empty if the transport needs none.

    Raises:
        ConfigError: the layout has no room for that.
    """
    from psyche_lightning_solana.client.played import Played

    played = Played(run, nodes, address)
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
    from rich.console import Console

    from psyche_lightning.recipe import load_recipe
    from psyche_lightning_solana.client.translate import of_recipe

    counts = nodes or [1, 16, 64, MAX_NODES]
    if any(not 0 < count <= MAX_NODES for count in counts):
        raise ConfigError(f"a run on a chain has 1 to {MAX_NODES} nodes, not {max(counts)}")
    resolved = load_recipe(recipe, overrides or (), twin=twin)
    values = of_recipe(resolved)
    config = resolved.run.coordinator
    steps = config.total_steps
    epochs = max(1, math.ceil(steps * round_seconds / config.epoch_time))
    console = Console()
    results = []
    for count in counts:
        if not as_json:
            console.print(f"[dim]playing a run of {count} nodes ...[/]")
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


def _show(console: Any, results: list[Cost], name: str, steps: int, epochs: int, price: int, seconds: float) -> None:
    from rich.table import Table

    from psyche_lightning_solana.client.fees import LAMPORTS, SIGNATURE_FEE

    console.print(
        f"[bold]{name}[/]: {steps:,} steps in {epochs} epoch(s) of rounds of {seconds:g} s; "
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
    console.print("[dim]in SOL; storage comes back when the accounts are closed[/]")
