"""``psyche run``: create, look at, pause and resume the runs of a coordinator."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from psyche_lightning.coordinator.admin import TOKEN_VARIABLE, URL_VARIABLE, CoordinatorAdmin
from psyche_lightning.cli.ledger import ledger
from psyche_lightning.errors import ConfigError

if TYPE_CHECKING:
    from psyche_lightning.recipe import Recipe

run = typer.Typer(no_args_is_help=True, help="Create, look at, pause and resume the runs of a coordinator.")

Url = Annotated[
    str | None, typer.Option("--coordinator", envvar=URL_VARIABLE, metavar="URL", help="The coordinator's URL.")
]
Token = Annotated[str | None, typer.Option(envvar=TOKEN_VARIABLE, help="The coordinator's token, if it has one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")]
EVENTS = 10


@run.command()
def create(
    run_id: RunId,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [KEY=VALUE]...",
            help="A recipe, and values that replace its own or the defaults, such as init_min_clients=2.",
        ),
    ] = None,
    coordinator: Url = None,
    token: Token = None,
    twin: Annotated[bool, typer.Option("--twin", help="The recipe's CPU-sized twin.")] = False,
) -> None:
    """Create a run. Without a recipe, the first node that joins decides what it trains."""
    admin = CoordinatorAdmin(coordinator, token=token)
    recipe, overrides = _split(arguments or [])
    if recipe is None and twin:
        raise ConfigError("--twin is a form of a recipe; name the recipe as well")
    request = _bare(run_id, overrides) if recipe is None else _from_recipe(recipe, overrides, twin)
    status = admin.create(run_id, **request)
    config = status["config"]
    steps = "steps until its nodes' max_steps" if config["total_steps"] is None else f"{config['total_steps']} steps"
    print(f"created run {run_id} on {admin.url}: {steps}, begins with {config['init_min_clients']} node(s)")
    print(f"on each node: PSYCHE_COORDINATOR={admin.url} PSYCHE_RUN={run_id}")


@run.command()
def status(run_id: RunId, coordinator: Url = None, as_json: Json = False) -> None:
    """Show where a run stands."""
    found = CoordinatorAdmin(coordinator).status(run_id)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)


@run.command("list")
def list_runs(coordinator: Url = None, as_json: Json = False) -> None:
    """List the runs of a coordinator."""
    runs = CoordinatorAdmin(coordinator).runs()
    if as_json:
        print(json.dumps(runs, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "phase", "epoch", "step", "nodes")
    for row in runs:
        step = f"{row['step'] - 1}/{row['total_steps'] or '?'}"
        table.add_row(row["run_id"], _words(row["phase"]), str(row["epoch"]), step, str(row["clients"]))
    Console().print(table if runs else "no runs yet; create one with `psyche run create RUN`")


@run.command()
def pause(run_id: RunId, coordinator: Url = None, token: Token = None) -> None:
    """Pause a run at the end of its epoch."""
    after = CoordinatorAdmin(coordinator, token=token).pause(run_id)
    print(f"run {run_id} is paused" if after["phase"] == "paused" else f"run {run_id} pauses when its epoch has ended")


@run.command()
def resume(run_id: RunId, coordinator: Url = None, token: Token = None) -> None:
    """Resume a paused run."""
    after = CoordinatorAdmin(coordinator, token=token).resume(run_id)
    print(f"run {run_id} is resumed: {_words(after['phase'])}")


run.command()(ledger)


def _split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The recipe, if the first argument is one, and the overrides."""
    recipe = arguments[0] if arguments and "=" not in arguments[0] else None
    overrides = arguments[recipe is not None :]
    for text in overrides:
        if "=" not in text:
            raise ConfigError(f"{text!r} is not of the form key=value; the recipe comes first, right after the run")
    return recipe, overrides


def _from_recipe(name: str, overrides: list[str], twin: bool) -> dict[str, Any]:
    """What is created for a recipe: everything is known."""
    from psyche_lightning.recipe import load_recipe
    from psyche_lightning.recipe.manifest import manifest

    recipe = load_recipe(name, overrides, twin=twin)
    sections = manifest(recipe)
    del sections["data"]  # what the samples are only a node that has them can say, so the first fixes this section
    return {
        "config": asdict(recipe.run.coordinator),
        "manifest": sections,
        "seed": recipe.run.seed,
        "max_seq_len": recipe.data.seq_len,
    }


def _bare(run_id: str, overrides: list[str]) -> dict[str, Any]:
    """What is created without a recipe: only what was given; the first node fixes the rest."""
    from psyche_lightning.recipe import resolve
    from psyche_lightning.recipe.loading import parse_override
    from psyche_lightning.recipe.manifest import manifest

    given: dict[str, dict[str, Any]] = {"run": {}, "distro": {}}
    for text in overrides:
        key, value = parse_override(text)
        section, _, name = key.partition(".")
        if section not in given:
            raise ConfigError(
                f"{text.partition('=')[0]!r} belongs to what is trained; name a recipe before it: "
                f"`psyche run create RUN RECIPE {text}`"
            )
        given[section][name] = value
    if "global_batch_size_start" in given["run"]:
        given["run"].setdefault("global_batch_size_end", given["run"]["global_batch_size_start"])
    recipe: Recipe = resolve({"name": run_id, **given}, source="psyche run create")
    config = asdict(recipe.run.coordinator)
    sections = manifest(recipe)
    return {
        "config": {name: config[name] for name in given["run"] if name in config},
        "manifest": {
            **({"run": sections["run"]} if "overlap" in given["run"] else {}),
            **({"distro": sections["distro"]} if given["distro"] else {}),
        },
        "seed": given["run"].get("seed"),
    }


def _words(phase: str) -> str:
    return phase.replace("_", " ")


def _show(found: dict[str, Any]) -> None:
    from datetime import datetime

    from rich.console import Console
    from rich.table import Table

    console = Console()
    height = "" if found["height"] is None else f", round {found['height']}"
    console.print(
        f"[bold]{found['run_id']}[/]: {_words(found['phase'])}, epoch {found['epoch']}{height}, "
        f"{found['step'] - 1} of {found['total_steps'] or '?'} steps trained"
    )
    losses = [row["loss"] for row in found["metrics"] if row["loss"] is not None]
    if losses:
        console.print(f"training loss {losses[-1]:.4f}, at first {losses[0]:.4f}")
    table = Table("node", "status", "address", "step", "loss", "tokens/s", "bytes up", "bytes down")
    for node in (*found["clients"], *found["pending"], *found["exited"]):
        loss, rate = node["loss"], node["tokens_per_second"]
        table.add_row(
            node["key"],
            node["status"],
            node["address"],
            str(node["step"] or ""),
            "" if loss is None else f"{loss:.4f}",
            "" if rate is None else f"{rate:,.0f}",
            *("" if node[name] is None else f"{node[name]:,}" for name in ("bytes_up", "bytes_down")),
        )
    if table.row_count:
        console.print(table)
    for event in found["events"][-EVENTS:]:
        console.print(f"{datetime.fromtimestamp(event['time']):%H:%M:%S}  {event['text']}", highlight=False)
