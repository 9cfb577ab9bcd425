"""``psyche bench``: measures bytes on the wire, speed of the engine, and quality against bytes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.live import Live
from rich.progress import track
from rich.table import Table

from psyche_lightning.bench.report import check_folder, picture, write_json
from psyche_lightning.cli.console import stdout
from psyche_lightning.errors import counted
from psyche_lightning.logs import redirections

if TYPE_CHECKING:
    from psyche_lightning.bench.quality.comparison import Case, Row
    from psyche_lightning.bench.wire import StageRow
    from psyche_lightning.distro import DistroConfig

bench = typer.Typer(help="Measure bytes, speed and quality, as tables, JSON and pictures.", no_args_is_help=True)

Json = Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")]
Png = Annotated[Path | None, typer.Option("--png", help="Draw a picture into this file.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch; by default torch decides.")]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


@bench.command()
def wire(
    millions: Annotated[float, typer.Option(min=1, help="Parameters of the model, in millions.")] = 100,
    chunk: Annotated[int, typer.Option(help="Side of the chunks.")] = 64,
    k: Annotated[int, typer.Option(min=1, help="Votes per chunk for the relays, and of a schedule at first.")] = 4,
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Measure the stages of this distro.schedule, too, such as '[{from_step: 0, k: 96}, {from_step: 200, "
            "k: 6}]'.",
        ),
    ] = None,
    local_steps: Annotated[
        int, typer.Option(min=0, help="Local steps of a round at first, for --schedule; 0 for none.")
    ] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the run, for --schedule.")] = 1000,
    json_file: Json = None,
    png: Png = None,
) -> None:
    """Measure the payload for each k, the stages of a schedule of k, and the payload of a relay that merges N peers.

    Examples:
        psyche bench wire --millions 100 --k 8 --k 32
    """
    from psyche_lightning.bench.wire import as_json, payloads, relays

    check_folder(json_file, "--json")
    check_folder(png, "--png")
    planned = None if schedule is None else _schedule(chunk, k, schedule, local_steps)
    console = stdout()
    ks = [value for value in (1, 2, 4, 8, 16, 32, 64) if value <= chunk * chunk // 4]
    rows = payloads(int(millions * 1e6), ks, chunk)
    table = _table(
        f"Payloads of {millions:g} M parameters, chunks {chunk}x{chunk}",
        "k", "bits per vote", "limit", "over", "MB", "Psyche's form", "reference's", "fp32 gradient / payload",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            str(row.k), f"{row.bits:.3f}", f"{row.limit:.3f}", f"{100 * (row.bits / row.limit - 1):.2f} %",
            f"{row.megabytes:.3f}", f"{row.psyche:.3f}", f"{row.reference:.3f}", f"{row.parameters_ratio:,.0f}",
        )  # fmt: skip
    console.print(table)
    from psyche_lightning.distro import DistroConfig, payload_size

    size = payload_size(40_000_000_000 // 4096, DistroConfig(k=4)) / 1e6
    console.print(f"40 B parameters, k=4: {size:.1f} MB a round (Psyche's form of the same votes: 83.0 MB)\n")
    staged = [] if planned is None else _show_stages(int(millions * 1e6), planned, rounds)
    merged = relays(2048, k, [2, 4, 8, 16, 32, 64])
    table = _table(f"A relay of N peers, k={k}, 8.4 M parameters", "N", "N payloads, MB", "merged, MB", "bits per vote")
    for relay in merged:
        table.add_row(str(relay.peers), f"{relay.separate:.3f}", f"{relay.merged:.3f}", f"{relay.bits:.2f}")
    console.print(table)
    write_json(json_file, as_json({"payloads": rows, "relays": merged, "stages": staged}))
    lines = {
        "this wire": (ks, [row.bits for row in rows]),
        "limit": (ks, [row.limit for row in rows]),
        "Psyche": (ks, [17.0] * len(ks)),
    }
    picture(png, "Bits per vote, sign and header included", "votes per chunk", "bits", lines)


def _schedule(chunk: int, k: int, text: str, local_steps: int) -> DistroConfig:
    """The configuration with that schedule, which is written as in a recipe.

    Raises:
        ConfigError: it is no schedule.
    """
    from psyche_lightning.distro import DistroConfig
    from psyche_lightning.recipe.loading import parse_override

    return DistroConfig(chunk, k, local_steps=local_steps, schedule=parse_override(f"distro.schedule={text}")[1])


def _show_stages(parameters: int, planned: DistroConfig, rounds: int) -> list[StageRow]:
    from psyche_lightning.bench.wire import stages

    rows = stages(parameters, planned, rounds)
    table = _table(
        f"The schedule in a run of {counted(rounds, 'round')}",
        *("from step", "k", "local steps", "rounds", "bits per vote", "MB", "MB in all", "fp32 gradients / payload"),
    )
    for row in rows:
        table.add_row(
            *(str(number) for number in (row.first, row.k, row.steps or "-", row.rounds)),
            *(f"{row.bits:.3f}", f"{row.megabytes:.3f}", f"{row.megabytes * row.rounds:,.1f}", f"{row.ratio:,.0f}"),
        )
    console = stdout()
    console.print(table)
    mean = sum(row.megabytes * row.rounds for row in rows) / rounds
    console.print(f"{mean:.3f} MB a round in the mean of the whole run\n")
    return rows


@bench.command()
def engine(
    millions: Annotated[
        list[float] | None, typer.Option("--millions", min=0.2, help="Sizes in millions of parameters; repeatable.")
    ] = None,
    chunk: Annotated[int, typer.Option(help="Side of the chunks.")] = 64,
    k: Annotated[int, typer.Option(min=1, help="Votes per chunk.")] = 8,
    reference: Annotated[
        Path | None, typer.Option(help="Folder of a checkout of github.com/bloc97/DeMo to compare with.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs; the fastest counts.")] = 5,
    devices: Annotated[
        int, typer.Option(min=1, help="Instead, divide the models among so many processes over gloo.")
    ] = 1,
    threads: Threads = None,
    json_file: Json = None,
    png: Png = None,
) -> None:
    """Time a DisTrO step with 4 peers beside local steps with equal entries, AdamW, and the public reference.

    Examples:
        psyche bench engine --millions 10 --threads 1
        psyche bench engine --millions 100 --threads 1 --devices 2
    """
    import torch

    from psyche_lightning.bench.engine import load_reference, measure
    from psyche_lightning.distro import DistroConfig

    check_folder(json_file, "--json")
    check_folder(png, "--png")
    if threads:
        torch.set_num_threads(threads)
    config = DistroConfig(chunk, k)
    if devices > 1:
        _divided(millions or [100.0], config, devices, repeats, json_file)
        return
    theirs = None if reference is None else load_reference(reference)
    console = stdout()
    models = [("blocks", 0.4), ("blocks", 10.0), ("small", 10.0), ("odd", 10.0), ("blocks", 100.0)]
    if millions:
        models = [("blocks", size) for size in millions]
    results = [measure(kind, size, config, theirs, repeats) for kind, size in track(models, console=console)]
    names = [f"{one.parameters / 1e6:.{0 if one.parameters >= 1e6 else 1}f} M, {one.name}" for one in results]
    table = _table(
        f"One step, ns per parameter: k={k} of {chunk}x{chunk}, 4 peers, {torch.get_num_threads()} threads, float32",
        *("", *names),
    )
    for name in ("encode", "of it pack", "apply", "of it unpack"):
        table.add_row(name, *(f"{1e9 * one.times[name] / one.parameters:.2f}" for one in results))
    table.add_row("whole step", *(f"{1e9 * one.step / one.parameters:.2f}" for one in results), style="bold")
    for name in ("adamw", *(["reference"] if theirs else [])):
        table.add_row(f"{name}'s step", *(f"{1e9 * one.times[name] / one.parameters:.2f}" for one in results))
        table.add_row(f"  {name} / step", *(f"{one.times[name] / one.step:.2f}" for one in results))
    for part in ("encode", "apply"):
        table.add_row(f"local steps' {part}", *(f"{1e9 * one.local[part] / one.parameters:.2f}" for one in results))
        table.add_row(
            f"  local steps' {part} / {part}", *(f"{one.local[part] / one.times[part]:.2f}" for one in results)
        )
    table.add_row(
        "local steps' way there and back", *(f"{1e9 * one.local['working'] / one.parameters:.2f}" for one in results)
    )
    table.add_row(
        "step / larger of traffic and arithmetic", *(f"{one.step / one.bound(config):.2f}" for one in results)
    )
    table.add_row("copy, GB/s (read + written)", *(f"{one.bandwidth / 1e9:.1f}" for one in results))
    table.add_row("matrix product, G multiply-adds/s", *(f"{one.arithmetic / 1e9:.0f}" for one in results))
    for name in ("step", "round of local steps", *(["reference"] if theirs else [])):
        if all(one.memory for one in results):
            table.add_row(f"peak memory of the {name}, MB", *(f"{one.memory[name] / 1e6:.0f}" for one in results))
    console.print(table)
    console.print(
        "Memory besides parameters and gradients: delta (4 bytes a parameter); float32 masters of other dtypes (4); "
        "during look-ahead and local steps a copy of the parameters; the votes of the last two payloads.",
        style="dim",
    )
    write_json(
        json_file,
        {"threads": torch.get_num_threads(), "chunk": chunk, "k": k, "models": [asdict(one) for one in results]},
    )
    lines = {"this engine": (names, [1e9 * one.step / one.parameters for one in results])}
    for name in ("adamw", *(["reference"] if theirs else [])):
        lines[name] = (names, [1e9 * one.times[name] / one.parameters for one in results])
    picture(png, "One step with 4 peers", "model", "ns per parameter", lines)


def _divided(millions: list[float], config: DistroConfig, devices: int, repeats: int, json_file: Path | None) -> None:
    """Show what a step takes of each device, and of one alone."""
    import torch

    from psyche_lightning.bench.divided import measure

    threads, console = torch.get_num_threads(), stdout()
    found = []
    for size in track(millions, console=console):
        table = _table(
            f"One step of {size:g} M parameters: k={config.k} of {config.chunk}x{config.chunk}, 4 peers, float32, "
            f"threads of a device: {threads}",
            *("device", "encode, s", "apply, s", "memory at the peak, bytes a parameter"),
        )
        for count in (1, devices):
            for rank, one in enumerate(measure(size, config, count, repeats, threads), 1):
                table.add_row(
                    f"{rank} of {count}", f"{one.encode:.3f}", f"{one.apply:.3f}", f"{one.memory / one.parameters:.1f}"
                )
                found.append({"devices": count, "device": rank, **asdict(one)})
        console.print(table)
    write_json(json_file, {"threads": threads, "chunk": config.chunk, "k": config.k, "devices": found})


@bench.command()
def step(
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each training.")] = 300,
    repeats: Annotated[
        int, typer.Option(min=1, help="Trainings with each strategy; the one that took least counts.")
    ] = 3,
    local_steps: Annotated[
        int, typer.Option(min=0, help="Steps of a round with the strategy psyche; then a language model is trained.")
    ] = 0,
    threads: Threads = 1,
    json_file: Json = None,
) -> None:
    """Compare a step of Trainer(strategy="psyche") alone with one of the default strategy, for a very small model.

    With --local-steps H, compare a round of H steps of AdamW with H steps of the default strategy.

    Examples:
        psyche bench step --local-steps 8
    """
    import torch

    from psyche_lightning.bench.quality.training import CONTEXT
    from psyche_lightning.bench.step import SAMPLES, measure

    check_folder(json_file, "--json")
    if threads:
        torch.set_num_threads(threads)
    costs = measure(steps, repeats, local_steps)
    default = costs["default"]
    what = "Linear(32, 2), batch size 1"
    if local_steps:
        what = f"the small language model, {SAMPLES} x {CONTEXT} tokens, {local_steps} local steps a round"
    table = _table(
        f"One step of {what}, {torch.get_num_threads()} threads",
        "strategy", "CPU, ms", "/ default", "ms", "/ default",
    )  # fmt: skip
    for name, cost in costs.items():
        table.add_row(
            name, f"{1e3 * cost.least_cpu:.2f}", f"{cost.least_cpu / default.least_cpu:.2f}",
            f"{1e3 * cost.least_wall:.2f}", f"{cost.least_wall / default.least_wall:.2f}",
        )  # fmt: skip
    stdout().print(table)
    write_json(
        json_file,
        {
            "steps": steps,
            "local_steps": local_steps,
            "strategies": {name: asdict(cost) for name, cost in costs.items()},
        },
    )


@bench.command()
def ddp(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values for the recipe's keys, such as k=16.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="The recipe to train.")] = "demo",
    twin: Annotated[bool, typer.Option("--twin", help="Train the recipe's CPU-sized twin.")] = False,
    nodes: Annotated[int, typer.Option(min=2, max=64, help="Processes that train.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each training.")] = 60,
    repeats: Annotated[int, typer.Option(min=1, help="Trainings with psyche, each between two with DDP.")] = 3,
    json_file: Json = None,
) -> None:
    """Compare the tokens/s of `psyche demo` with those of torch DDP over gloo, once training goes on steadily.

    Examples:
        psyche bench ddp --nodes 3
    """
    from psyche_lightning.bench.ddp import Task, compare

    check_folder(json_file, "--json")
    task = Task(recipe, tuple(overrides or ()), twin, nodes, rounds)
    console = stdout()
    with console.status("") as status:
        found = compare(task, repeats, status.update)
    table = _table(
        f"{counted(nodes, 'process', 'processes')} of one machine, {task.tokens // rounds:,} tokens a round",
        *("", "tokens/s", "lowest", "highest", "waits for others"),
    )
    for name, speeds, waits in (
        ("torch DDP, gloo", found.ddp, ""),
        ("psyche demo", found.psyche, f"{fmean(found.waited):.0%}"),
    ):
        table.add_row(name, *(f"{speed:,.0f}" for speed in (fmean(speeds), min(speeds), max(speeds))), waits)
    ratios = found.ratios
    table.add_row(
        "psyche / DDP", *(f"{ratio:.3f}" for ratio in (fmean(ratios), min(ratios), max(ratios))), style="bold"
    )
    console.print(table)
    write_json(json_file, {**asdict(task), **asdict(found), "ratios": ratios})


@bench.command()
def quality(
    sizes: Annotated[list[str] | None, typer.Option("--size", help="small or demo; repeatable.")] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="NAME[:FIELD=VALUE,...]",
            help="allreduce, diloco, demo, distro or local, such as distro:k=8,muon=true; repeatable.",
        ),
    ] = None,
    nodes: Annotated[list[int] | None, typer.Option(min=2, help="Nodes that train together; repeatable.")] = None,
    steps: Annotated[list[int] | None, typer.Option(min=12, help="Optimizer steps; repeatable.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a node in a step.")] = 4,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings for mean and spread.")] = 3,
    rates: Annotated[
        list[float] | None,
        typer.Option("--rate", help="Learning rates to try; without, each method's best is searched. Repeatable."),
    ] = None,
    long: Annotated[
        bool, typer.Option("--long", help="Both sizes, 4 and 16 nodes, 120 to 1920 steps, all methods. Takes days.")
    ] = False,
    results: Annotated[
        Path | None, typer.Option(help="Note each training in this file, and repeat none that is in it.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Trainings at a time, each in a process of one thread.")] = 2,
    json_file: Json = None,
    png: Png = None,
) -> None:
    """Compare validation loss against bytes: all-reduce, DiLoCo, the DeMo rule, DisTrO at each step, local steps.

    Examples:
        psyche bench quality --steps 480 --method allreduce --method distro
    """
    from psyche_lightning.bench.quality.comparison import Case, Results, compare
    from psyche_lightning.bench.quality.methods import DEFAULT, LONG, method
    from psyche_lightning.bench.quality.picture import draw
    from psyche_lightning.bench.quality.training import SIZES, Task
    from psyche_lightning.errors import ConfigError

    check_folder(json_file, "--json")
    check_folder(png, "--png")
    check_folder(results, "--results")
    for size in sizes or ():
        if size not in SIZES:
            raise ConfigError(f"--size is {size!r}; choose {' or '.join(SIZES)}")
    if long and results is None:
        raise ConfigError("--long takes days; name a file with --results FILE, so that it goes on where it was stopped")
    compared = [method(text) for text in methods or (LONG if long else DEFAULT)]
    tasks = [
        Task(size, count, length, batch)
        for length in steps or ((120, 480, 1920) if long else (120,))
        for size in sizes or (SIZES if long else ("small",))
        for count in nodes or ((4, 16) if long else (4,))
    ]
    cases = [Case(task, one, seeds, tuple(rates or ())) for task in tasks for one in compared]
    known = Results(results)
    rows: dict[Case, Row] = {}

    def table() -> Table:
        shown = _table(
            f"The same tokens for all; {seeds} seeds",
            *("model", "nodes", "steps", "method", "setting", "rate", "loss, nats per byte", "bytes sent", "fewer"),
        )
        for row in (rows[case] for case in cases if case in rows):
            task = row.task
            shown.add_row(
                task.size, str(task.nodes), f"{task.steps:,}", row.method.family, row.method.setting, f"{row.rate:g}",
                f"{row.loss:.3f} ± {row.spread:.3f}", f"{row.sent:,.0f}", f"{row.ratio:,.0f}",
            )  # fmt: skip
        return shown

    with Live(table(), console=stdout(), refresh_per_second=2, **redirections()) as live:
        for case, row in compare(cases, known, workers):
            rows[case] = row
            live.update(table())
            finished = [rows[one] for one in cases if one in rows]
            write_json(json_file, {"rows": [one.figures() for one in finished]})
            if png is not None:
                draw(png, finished)


@bench.command()
def fuzz(
    inputs: Annotated[int, typer.Option(min=1, help="Inputs for each decoder.")] = 100_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same inputs.")] = 0,
    json_file: Json = None,
) -> None:
    """Give hostile bytes to the decoders of payloads and partial sums; each is refused or canonical.

    Examples:
        psyche bench fuzz --inputs 100000 --seed 7
    """
    from psyche_lightning.bench.fuzz import fuzz as run

    check_folder(json_file, "--json")
    outcomes = run(inputs, seed)
    table = _table(f"Fuzzed with seed {seed}", "decoder", "inputs", "accepted, all canonical", "slowest, ms")
    for name, outcome in outcomes.items():
        table.add_row(name, f"{outcome.inputs:,}", f"{outcome.accepted:,}", f"{1e3 * outcome.slowest:.1f}")
    stdout().print(table)
    write_json(json_file, {name: asdict(outcome) for name, outcome in outcomes.items()})


@bench.command()
def transport(
    names: Annotated[
        list[str] | None, typer.Option("--transport", help="A transport; repeatable. By default all for the network.")
    ] = None,
    megabytes: Annotated[float, typer.Option(min=1, max=1000, help="Size of a blob in MB.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Blobs of each; fastest and median are shown.")] = 8,
    json_file: Json = None,
) -> None:
    """Measure MB/s and latency of the transports between two processes of this machine, next to plain sockets.

    Examples:
        psyche bench transport --transport tcp --megabytes 100
    """
    from psyche_lightning.bench.transport import TransportSpeed, measure, sockets
    from psyche_lightning.plugins import load_plugins

    check_folder(json_file, "--json")
    known = load_plugins().transports()
    chosen = names or [name for name in known if name != "memory"]
    for name in chosen:
        known[name]  # refuse an unknown one before anything is measured
    size = int(megabytes * 1e6)
    table = _table(
        f"Blobs of {megabytes:g} MB over loopback, {repeats} of each",
        *("", "best MB/s", "median MB/s", "/ plain", "trip, ms", "wire/blob"),
    )
    results: list[TransportSpeed] = []
    console = stdout()
    for number, name in enumerate(track(["", *chosen], console=console, transient=True)):
        results.append(sockets(size, repeats) if number == 0 else measure(name, {}, size, repeats))
    for one in results:
        trip = "" if one.round_trip is None else f"{1e3 * one.round_trip:.2f}"
        overhead = "" if one.overhead is None else f"{one.overhead:.3f}"
        ratio = f"{one.median / results[0].median:.3f}"
        table.add_row(one.name, f"{one.best / 1e6:.0f}", f"{one.median / 1e6:.0f}", ratio, trip, overhead)
    console.print(table)
    write_json(json_file, {"size": size, "repeats": repeats, "transports": [asdict(one) for one in results]})
