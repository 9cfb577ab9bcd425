"""The command ``psyche demo``: starts the processes, shows the run, and prints a summary."""

from __future__ import annotations

import shutil
import signal
import time
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from psyche_lightning.cli.console import stdout
from psyche_lightning.cli.demo.processes import Child, Ends, Processes
from psyche_lightning.cli.demo.report import Figures, Paces, note_paces, plot, read_results, read_validation
from psyche_lightning.cli.demo.stage import Stage, find_stage
from psyche_lightning.cli.demo.view import View
from psyche_lightning.doctor.finding import size
from psyche_lightning.errors import KILLED, ConfigError, PsycheError, counted
from psyche_lightning.json_text import json_text

if TYPE_CHECKING:
    from psyche_lightning.recipe import Recipe

_Number = TypeVar("_Number", int, float)
RUN = "demo"
MARK = "psyche-demo.json"
POLL = 1.0
GRACE = 60.0
"""Seconds in which nodes must write their results after the run is finished."""
SAMPLES = 16
"""Fewest samples of a round for each node in a demo of nodes of different speed."""
PROMPT = "def __init__(self"


def demo(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values for the recipe's keys, such as k=16."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, max=64, help="Number of nodes.")] = 3,
    rounds: Annotated[int | None, typer.Option(min=1, help="Number of rounds; by default the recipe's.")] = None,
    recipe: Annotated[str, typer.Option(help="The recipe to train.")] = "demo",
    twin: Annotated[bool, typer.Option("--twin", help="Train the recipe's CPU-sized twin.")] = False,
    coordinator: Annotated[
        str, typer.Option(help="The coordinator: `server`, or a plugin's that has a demo, such as `solana`.")
    ] = "server",
    transport: Annotated[
        str | None, typer.Option(help="The nodes' transport; by default the recipe's. `psyche plugins` lists them.")
    ] = None,
    slow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N:F", help="Let node N, counted from 0, compute F times slower, such as 3:4; may be repeated."
        ),
    ] = None,
    devices: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N:D[:INNER]",
            help="Let node N, counted from 0, train with D devices, such as 1:2, or 1:2:fsdp to divide the model among "
            "them; may be repeated.",
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    keep: Annotated[
        Path, typer.Option("--keep", metavar="DIR", help="Folder for all files; an earlier demo's is replaced.")
    ] = Path("psyche-demo"),
) -> None:
    """Train a small language model on real text with several nodes on this machine, over real sockets.

    Examples:
        psyche demo
        psyche demo --nodes 4 --slow 3:4 --rounds 40
        psyche demo trainer.accelerator=cpu --devices 0:2
        psyche demo trainer.accelerator=cpu --devices 1:2:fsdp --devices 2:2:ddp
        psyche demo k=8 --keep /tmp/my-demo
    """
    for interrupt in (signal.SIGINT, signal.SIGTERM):  # a shell may have started this process with interrupts ignored
        signal.signal(interrupt, signal.default_int_handler)
    console = stdout()
    stage = find_stage(coordinator)
    given = [*(overrides or []), f"init_min_clients={nodes}", "min_clients=1"]
    given += [f"node.transport={transport}"] if transport else []
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise ConfigError(f"the folder of --json {json_file} does not exist; create it first")

    slowdowns = _by_node(
        "--slow", slow or [], nodes, float, 1e3, "N:F, a node {} and how many times slower it computes"
    )
    several = _devices(devices or [], nodes)

    from psyche_lightning.recipe import load_recipe
    from psyche_lightning.recipe.estimate import estimate

    resolved = load_recipe(recipe, given, twin=twin)
    if slowdowns:
        given = [*_for_shares(resolved, nodes), *given]  # the user's values count instead
        resolved = load_recipe(recipe, given, twin=twin)
    if rounds:
        given = [*_stretched(resolved, rounds), *given, f"total_steps={rounds}"]
        resolved = load_recipe(recipe, given, twin=twin)
    estimated = estimate(resolved)
    # A single node exchanges no updates; its figures are compared with an all-reduce of two nodes.
    all_reduce = estimated.allreduce_bytes_per_round(max(nodes, 2))
    steps = resolved.run.coordinator.total_steps
    _prepare(keep)
    console.print(
        Text.assemble(
            ("psyche demo", "bold"),
            f": {counted(nodes, 'node')}, {estimated.trainable / 1e6:.2f} M parameters, {counted(steps, 'round')}. "
            "Ctrl-C stops everything.",
        )
    )
    console.print(f"logs, plot and checkpoint: {keep}/", highlight=False)
    paces: Paces = {}
    with Processes() as processes:
        console.print(f"starting {stage.what} and {'the nodes' if nodes > 1 else 'the node'} ...", style="dim")
        folders = [keep / f"node-{number}" for number in range(nodes)]
        url = stage.open(processes, keep, nodes, console)
        stage.create(RUN, recipe, given, twin)
        common = [recipe, *given, *(["--twin"] if twin else []), "--coordinator", url]
        children = []
        for number, folder in enumerate(folders):
            folder.mkdir()
            # All hold the same parameters, so one node is enough to validate them.
            extra = [f"node.directory={folder}", *([] if number == 0 else ["trainer.validate_every=0"])]
            extra += [f"trainer.slowdown={slowdowns[number]}"] if number in slowdowns else []
            extra += several.get(number, [])
            arguments = ["train", *common, "--run", RUN, *extra]
            child = Child(f"node {number}", arguments, folder / "log.txt", stage.environment(number))
            children.append(processes.add(child))
        endings = Ends(keep, RUN)
        with View(console, all_reduce=all_reduce if nodes > 1 else None, rounds=steps) as view:
            status = _watch(stage, children, view, paces, endings)
        _finish(children)
        endings.look(children)
        more = stage.finish(folders)
    figures = _figures(status, folders, estimated.trainable, all_reduce, steps)
    figures.paces, figures.seq_len = paces, resolved.data.seq_len
    if len(figures.digests) != 1:
        ends = ", ".join(f"{node['id'][:8]} with {node['digest'][:16]}" for node in figures.nodes)
        raise PsycheError(f"the nodes ended with different parameters: {ends}; their logs are in {keep}")
    unit = "nats a byte" if resolved.data.config.get("tokenizer", "bytes") == "bytes" else "nats a token"
    plot(figures, keep / "loss.png", unit)
    if json_file is not None:
        json_file.write_text(json_text({**figures.as_json(), **more}, 1) + "\n")
    stage.show(console)
    _sum_up(console, figures, keep, unit)
    if slowdowns:
        _show_pace(console, figures)


def _by_node(
    option: str, given: list[str], nodes: int, kind: type[_Number], most: float, expected: str
) -> dict[int, _Number]:
    """The numbers that an option gives to single nodes, by number of the node.

    Raises:
        ConfigError: a text is not a node and such a number, from 1.
    """
    found: dict[int, _Number] = {}
    for text in given:
        number, _, value = text.partition(":")
        try:
            found[int(number)] = kind(value)
            if not (0 <= int(number) < nodes and 1 <= found[int(number)] <= most):
                raise ValueError
        except ValueError:
            raise ConfigError(
                f"{option} {text}: expected {expected.format(f'from 0 to {nodes - 1}')}, from 1 to {most:g}, such as "
                f"{nodes - 1}:{2 if kind is int else 4}"
            ) from None
    return found


def _devices(given: list[str], nodes: int) -> dict[int, list[str]]:
    """Overrides for the nodes that ``--devices`` names, by number of the node.

    Raises:
        ConfigError: a text is not a node and its devices, or names no way to share their work.
    """
    from psyche_lightning.lightning.device import INNER

    found: dict[int, list[str]] = {}
    for text in given:
        place, colon, inner = text.rpartition(":") if text.count(":") > 1 else (text, "", "")
        if colon and inner not in INNER:
            raise ConfigError(f"--devices {text}: there is no {inner!r}; expected {' or '.join(INNER)}")
        expected = "N:D or N:D:INNER, a node {} and how many devices it has"
        for number, count in _by_node("--devices", [place], nodes, int, 64, expected).items():
            found[number] = [f"trainer.devices={count}", *([f"trainer.inner={inner}"] if inner else [])]
    return found


def _for_shares(recipe: Recipe, nodes: int) -> list[str]:
    """Overrides with which nodes wait for each other's computing alone, and have enough samples to divide."""
    samples = max(recipe.run.global_batch_size_end, SAMPLES * nodes)
    batch = [f"run.global_batch_size_{end}={samples}" for end in ("start", "end")]
    return ["run.overlap=true", "trainer.validate_every=0", *batch]


def _stretched(recipe: Recipe, rounds: int) -> list[str]:
    """Overrides that scale the schedules, of the rate and of k, to this number of rounds."""
    share = Fraction(rounds, recipe.run.coordinator.total_steps)
    lengths = recipe.optimizer.schedule.lengths(share)
    found = [f"optimizer.schedule.{name}={length}" for name, length in lengths.items()]
    if recipe.distro.schedule:
        found.append(f"distro.schedule={json_text(recipe.distro.stretched(share))}")
    return found


def _prepare(folder: Path) -> None:
    """Make an empty folder; replaces the folder of an earlier demo, but no other."""
    try:
        if folder.exists() and any(folder.iterdir()):
            if not (folder / MARK).exists():
                raise ConfigError(f"{folder} is not empty and not an earlier demo's; choose another with --keep DIR")
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).write_text('{"made by": "psyche demo"}\n')
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}; choose another with --keep DIR") from error


def _watch(stage: Stage, nodes: list[Child], view: View, paces: Paces, ends: Ends) -> dict[str, Any]:
    """Show the run until it is finished, and note how fast its nodes are and who ends; returns its last status.

    Raises:
        PsycheError: all nodes have ended before the run is finished.
    """
    while True:
        status = stage.look(nodes)
        ends.look(nodes)
        if status is not None:
            view.show(status)
            note_paces(paces, status)
            if status["phase"] == "finished":
                return status
        if all(node.code is not None for node in nodes):
            raise PsycheError(f"all nodes ended before the run did; the last one printed:\n{nodes[-1].tail()}")
        time.sleep(POLL)


def _finish(nodes: list[Child]) -> None:
    """Wait for the nodes to write their results. A node that somebody killed is no failure: the others go on without.

    Raises:
        PsycheError: a node failed, or did not end.
    """
    deadline = time.monotonic() + GRACE
    while any(node.code is None for node in nodes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for node in nodes:
        if node.code is None:
            raise PsycheError(
                f"{node.name} did not end within {GRACE:.0f} s after the run; its last lines:\n{node.tail()}"
            )
        if node.code > 0 and node.code != KILLED:  # that one says that a rank of the node was killed
            raise PsycheError(f"{node.name} failed with exit code {node.code}; its last lines:\n{node.tail()}")


def _figures(status: dict[str, Any], folders: list[Path], parameters: int, all_reduce: float, rounds: int) -> Figures:
    # If a step was trained again because its epoch was undone, its newest row counts.
    metrics = {row["step"]: row for row in status["metrics"]}
    rows = [{**row, "bytes_per_node": max(row["bytes_up"], row["bytes_down"])} for row in metrics.values()]
    times = [event["time"] for event in status["events"]]
    return Figures(
        parameters=parameters,
        all_reduce=all_reduce,
        rounds=rounds,
        seconds=max(times) - min(times) if times else 0.0,
        started=len(folders),
        nodes=read_results(folders),
        history=rows,
        validation=read_validation(folders[0]),
        events=status["events"],
    )


def _sum_up(console: Console, figures: Figures, folder: Path, unit: str) -> None:
    summary = figures.as_json()
    table = Table("node", "digest", box=None, pad_edge=False)
    for name in ("up / round", "down / round", "payload / round", "computed"):
        table.add_column(name, justify="right")
    for node in figures.nodes:
        rounds = figures.rounds
        table.add_row(
            node["id"][:8],
            node["digest"][:16],
            size(node["socket_bytes_up"] / rounds),
            size(node["socket_bytes_down"] / rounds),
            size(node["payload_bytes_up"] / rounds),
            size(node["payload_bytes_computed"]),
        )
    console.print(table)
    for name, ends in summary["loss"].items():
        if ends:
            before = f"{ends[0]:.3f} -> " if ends[0] != ends[1] else ""
            console.print(Text.assemble(f"{name:>10} loss  {before}", (f"{ends[-1]:.3f}", "bold"), f" {unit}"))
    if figures.started == 1:
        console.print("the node finished; alone it exchanges no updates")
    else:
        equal = ("equal", "green") if len(figures.digests) == 1 else ("different", "red")
        finished = f"{len(figures.nodes)} of {counted(figures.started, 'node')} finished with "
        console.print(Text.assemble(finished, equal, " parameters"))
        console.print(f"{figures.comparison}, everything counted at the sockets")
    gone = [event["text"] for event in figures.events if event["kind"] == "dropped"]
    for text in gone:
        console.print(text, style="yellow")
    console.print(f"plot: {folder / 'loss.png'}", highlight=False)
    checkpoint = folder / "node-0" / "checkpoint"
    if checkpoint.exists():
        console.print(f'try: psyche generate {checkpoint} --prompt "{PROMPT}"', highlight=False)


def _show_pace(console: Console, figures: Figures) -> None:
    """Print how fast each node is, its share, and how much of the summed speeds the run used."""
    pace = figures.pace
    if pace is None:
        console.print("the run was too short to say how fast its nodes are")
        return
    table = Table("node", box=None, pad_edge=False)
    for name in ("tokens/s", "share"):
        table.add_column(name, justify="right")
    for key, node in pace["nodes"].items():
        table.add_row(key, f"{node['tokens_per_second']:,.0f}", f"{node['share']:.1%}")
    console.print(table)
    text = (
        f"{pace['tokens_per_second']:,.0f} tokens/s: {pace['part']:.0%} of the nodes' summed speeds, in the second half"
    )
    console.print(text, highlight=False)
