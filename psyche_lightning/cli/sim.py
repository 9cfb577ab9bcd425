"""``psyche sim``: replay histories of the simulator, whole runs under faults in virtual time."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from psyche_lightning.testing.simulator import Scenario, SimulationError, simulate


def sim(
    seed: Annotated[int, typer.Option(help="Seed of the (first) history; the same seed gives the same history.")] = 0,
    histories: Annotated[int, typer.Option(min=1, help="How many seeds to play, counting up from --seed.")] = 1,
    trace: Annotated[bool, typer.Option("--trace", help="Print what happens, with virtual times.")] = False,
) -> None:
    """Play runs of 4 to 8 nodes with loss, delay, kills, cuts and cheats in virtual time; a failure replays."""
    console = Console()

    def show(now: float, text: str) -> None:
        console.print(f"[dim]{now:8.2f}[/dim]  {text}", highlight=False)

    began, faults, rounds, failed = time.monotonic(), 0, 0, []
    seeds = range(seed, seed + histories)
    for number in track(seeds, "Histories", console=console, disable=histories == 1):
        if trace:
            show(0.0, str(Scenario.draw(number)))
        try:
            outcome = simulate(number, show if trace else None)
        except SimulationError as error:
            failed.append(number)
            console.print(f"[red]{error}[/red]", highlight=False)
            continue
        faults += outcome.faults
        rounds += outcome.rounds
    console.print(
        f"{histories - len(failed)} of {histories} histories held: {rounds} rounds with equal parameters under "
        f"{faults} faults, in {time.monotonic() - began:.1f} s"
    )
    if failed:
        raise SimulationError(f"{len(failed)} histories failed: seeds {', '.join(map(str, failed))}")
