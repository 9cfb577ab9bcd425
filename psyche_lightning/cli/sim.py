"""``psyche sim``: replays histories of the simulator, whole runs under faults in virtual time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.text import Text

from psyche_lightning.chronicle.entry import COORDINATOR, SIMULATOR, Entry, Kind, line_of
from psyche_lightning.cli.console import say, stdout
from psyche_lightning.errors import ConfigError, counted
from psyche_lightning.simulation.scenario import History, Scenario, SimulationError
from psyche_lightning.simulation.simulator import simulate, simulate_all


def sim(
    seed: Annotated[int, typer.Option(help="Seed of the first history; a seed always gives the same history.")] = 0,
    histories: Annotated[int, typer.Option(min=1, help="Number of histories, with seeds from --seed on.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that play histories in parallel.")] = 1,
    trace: Annotated[
        bool, typer.Option("--trace", help="Print all events of one history, with virtual times.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="With --trace: print every event as a line of JSON, which `psyche observe` opens."),
    ] = False,
) -> None:
    """Play runs of 4 to 32 nodes under faults, and with nodes that break the rules, in virtual time; each replays.

    Examples:
        psyche sim --histories 100
        psyche sim --seed 7 --trace
        psyche sim --seed 7 --trace --json
    """
    console = stdout()

    if as_json and not trace:
        raise ConfigError("--json prints the events of one history: give --trace, too")
    if as_json:
        simulate(seed, lambda entry: say(line_of(entry.values()).decode().rstrip()))
        return
    if trace:
        console.print(str(Scenario.draw(seed)), style="dim")
        _sum_up(console, [simulate(seed, lambda entry: _show(console, entry))])
        return
    played = simulate_all(range(seed, seed + histories), jobs)
    if console.is_terminal:
        played = iter(track(played, "Histories", total=histories, console=console, disable=histories == 1))
    else:
        played = _told(console, played, histories)
    _sum_up(console, list(played))


def _show(console: Console, entry: Entry) -> None:
    """Print what is not the same in every round."""
    if entry.kind.usual or (entry.kind is Kind.PHASE and entry.node != COORDINATOR):
        return
    who = "" if entry.node == SIMULATOR else f"{entry.node}: "
    text = entry.text if entry.kind not in (Kind.START, Kind.PHASE) else f"{entry.kind.value} {entry.text}".rstrip()
    style = "bold red" if entry.node == SIMULATOR else ""
    console.print(Text.assemble((f"{entry.time:8.2f}", "dim"), f"  {who}", (text, style)))


def _told(
    console: Console, played: Iterator[History | SimulationError], total: int
) -> Iterator[History | SimulationError]:
    """Says in a log, some twenty times, how far it is, and each failure when it comes."""
    failed = 0
    for number, history in enumerate(played, 1):
        if isinstance(history, SimulationError):
            failed += 1
            console.print(Text(str(history)))
        if number < total and number % max(1, total // 20) == 0:
            console.print(f"{number} of {total} histories, {failed} failed")
        yield history


def _sum_up(console: Console, histories: list[History | SimulationError]) -> None:
    failed = [history for history in histories if isinstance(history, SimulationError)]
    held = [history for history in histories if isinstance(history, History)]
    rounds, faults = sum(history.rounds for history in held), sum(history.faults for history in held)
    console.print(
        f"{len(held)} of {counted(len(histories), 'history', 'histories')} held: {counted(rounds, 'round')} with equal "
        f"parameters, {counted(faults, 'fault')}"
    )
    if failed:
        raise SimulationError("\n".join(map(str, failed)))
