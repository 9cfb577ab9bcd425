"""``psyche run``: the commands of a run's owner, for every kind of coordinator."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from psyche_lightning.cli.console import say, stdout
from psyche_lightning.cli.ledger import ledger
from psyche_lightning.errors import ConfigError, CoordinatorError, counted
from psyche_lightning.json_text import json_text
from psyche_lightning.logs import redirections
from psyche_lightning.protocol.link import JoinLink
from psyche_lightning.protocol.owner import Creation
from psyche_lightning.server.admin import TOKEN_FILE_VARIABLE, TOKEN_VARIABLE, URL_VARIABLE, CoordinatorAdmin
from psyche_lightning.sites import is_loopback
from psyche_lightning.text import plain

if TYPE_CHECKING:
    from rich.console import RenderableType

    from psyche_lightning.recipe import Recipe

run = typer.Typer(no_args_is_help=True, help="Create, inspect, change and close the runs of a coordinator.")

Url = Annotated[
    str | None,
    typer.Option("--coordinator", envvar=URL_VARIABLE, metavar="URL", help="The coordinator's URL, or a join link."),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The owner's token, which changing a run of a server needs. By default that of the environment "
        f"({TOKEN_VARIABLE}, {TOKEN_FILE_VARIABLE}), or of a coordinator that you run on this machine.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")]
Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY=VALUE]...",
        help="A recipe and values for its keys, or values alone, such as init_min_clients=2.",
    ),
]
Twin = Annotated[bool, typer.Option("--twin", help="Use the recipe's CPU-sized twin.")]
Node = Annotated[
    str, typer.Argument(metavar="NODE", help="A node's key in hex (on a chain its wallet's address), or 'everybody'.")
]
EVERYBODY = "everybody"
EVENTS = 10


@run.command()
def create(
    run_id: RunId,
    arguments: Arguments = None,
    coordinator: Url = None,
    token_file: TokenFile = None,
    twin: Twin = False,
    paused: Annotated[bool, typer.Option("--paused", help="Create it closed; `psyche run start` opens it.")] = False,
    invited: Annotated[
        bool, typer.Option("--invited", help="Only nodes named with `psyche run authorize` may join.")
    ] = False,
    anybody: Annotated[
        bool, typer.Option("--open", help="Whoever reaches the coordinator may join, without the link.")
    ] = False,
) -> None:
    """Create a run, and print the link with which nodes join it.

    Without a recipe, the first node that joins decides what the run trains.
    """
    from psyche_lightning.cli.owner import administer

    if invited and anybody:
        raise ConfigError("--open lets everybody in, --invited only nodes that you name; give one of them")
    admin = administer(coordinator, run_id, token_file)
    by_link = not (invited or anybody)
    status = admin.create(wanted(run_id, arguments or [], twin, everybody=not invited, by_link=by_link))
    if paused and status["phase"] not in ("paused", "uninitialized"):
        status = admin.pause()
    elif not paused and status["phase"] in ("paused", "uninitialized"):
        status = admin.start()
    config, url = status["config"], JoinLink.parse(coordinator or os.environ[URL_VARIABLE]).url
    steps = (
        "steps until its nodes' max_steps" if config["total_steps"] is None else counted(config["total_steps"], "step")
    )
    say(f"created run {run_id} on {url}: {steps}, begins with {counted(config['init_min_clients'], 'node')}")
    if paused:
        say(f"it is not open yet: psyche run start {run_id}")
    recipe = _split(arguments or [])[0]
    _tell_how_to_join(JoinLink.parse(admin.link()), run_id, anybody=anybody, recipe=recipe is not None)


def _tell_how_to_join(link: JoinLink, run_id: str, *, anybody: bool, recipe: bool) -> None:
    """Say what a node needs, and what the owner should know about it.

    Args:
        link: what a node gives as its coordinator.
        run_id: the run.
        anybody: whether it is open.
        recipe: whether it has a recipe, so that nodes need none.
    """
    if not link.key:  # a chain's own rules decide who joins
        if recipe:
            say(f"on each node: psyche join '{link.url}' --run {run_id}")
        else:
            say(f"on each node: PSYCHE_COORDINATOR={link.url} PSYCHE_RUN={run_id}")
        return
    if link.secret:
        say(
            "only nodes with the join link below may join; so may those of your user on the coordinator's machine. "
            f"Send it to nobody else: whoever has it can join. `psyche run link {run_id}` prints it again."
        )
    elif anybody:
        say(
            f"the run is open: whoever reaches {link.url} can join, get the parameters and train with results of its "
            "own. What the other nodes bear is in docs/trust.md."
        )
    if recipe:
        say(f"on each node: psyche join '{link}'")
    else:
        say(f"on each node: PSYCHE_COORDINATOR='{link}'")
    if is_loopback(urlsplit(link.url).hostname or ""):
        say(f"for nodes on other machines, put an address that they reach in place of {urlsplit(link.url).netloc}")


@run.command()
def link(
    run_id: RunId,
    coordinator: Url = None,
    token_file: TokenFile = None,
    new: Annotated[
        bool, typer.Option("--new", help="Make a new link: the former one lets nobody in any more, members stay.")
    ] = False,
) -> None:
    """Print a run's join link, which nodes take as their coordinator."""
    from psyche_lightning.cli.owner import administer

    say(administer(coordinator, run_id, token_file).link(new=new))


@run.command()
def update(
    run_id: RunId,
    arguments: Arguments = None,
    coordinator: Url = None,
    token_file: TokenFile = None,
    twin: Twin = False,
) -> None:
    """Change the settings of a run that is paused or not started yet."""
    from psyche_lightning.cli.owner import administer

    if not arguments:
        raise ConfigError("nothing to change; give settings such as total_steps=2000, or a recipe")
    after = administer(coordinator, run_id, token_file).update(wanted(run_id, arguments, twin))
    total = after["config"]["total_steps"]
    steps = "? steps" if total is None else counted(total, "step")
    say(f"run {run_id} is changed: {steps}, {_words(after['phase'])}")


@run.command()
def status(
    run_id: Annotated[
        str | None, typer.Argument(metavar="RUN", help="The run's name; on a chain also its account's address.")
    ] = None,
    coordinator: Url = None,
    as_json: Json = False,
    account_file: Annotated[
        Path | None, typer.Option("--account-file", metavar="FILE", help="A dump of a run's account, of any version 1.")
    ] = None,
) -> None:
    """Show a run's status."""
    from psyche_lightning.cli.owner import administer, read_account_file

    if (run_id is None) == (account_file is None):
        raise ConfigError("give the name of a run, or --account-file FILE")
    if account_file is not None:
        found = read_account_file(account_file)
    else:
        assert run_id is not None
        found = administer(coordinator, run_id).status()
    if as_json:
        print(json_text(found, 2))
    else:
        _show(found)


@run.command()
def watch(
    run_id: RunId,
    coordinator: Url = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two updates.")] = 1.0,
) -> None:
    """Show a run's status and keep it up to date, until the run is finished or you press Ctrl-C."""
    from rich.live import Live

    from psyche_lightning.cli.owner import administer

    admin, console = administer(coordinator, run_id), stdout()
    found = admin.status()
    with Live(_picture(found), console=console, auto_refresh=False, **redirections()) as live:
        while found["phase"] != "finished":
            time.sleep(every)
            try:
                found = admin.status()
            except CoordinatorError as error:
                if not error.retryable:
                    raise
                continue
            live.update(_picture(found), refresh=True)


@run.command()
def start(run_id: RunId, coordinator: Url = None, token_file: TokenFile = None) -> None:
    """Open a run to nodes."""
    from psyche_lightning.cli.owner import administer

    after = administer(coordinator, run_id, token_file).start()
    say(f"run {run_id} is open: {_words(after['phase'])}")


@run.command()
def close(run_id: RunId, coordinator: Url = None, token_file: TokenFile = None) -> None:
    """Remove a run that is paused or finished; on a chain, you get back what its accounts hold."""
    from psyche_lightning.cli.owner import administer

    say(administer(coordinator, run_id, token_file).close())


@run.command()
def authorize(run_id: RunId, node: Node, coordinator: Url = None, token_file: TokenFile = None) -> None:
    """Let a node or everybody join."""
    from psyche_lightning.cli.owner import administer

    say(administer(coordinator, run_id, token_file).authorize(None if node == EVERYBODY else node))


@run.command()
def revoke(run_id: RunId, node: Node, coordinator: Url = None, token_file: TokenFile = None) -> None:
    """Undo authorize; a node that already trains stays until its epoch ends."""
    from psyche_lightning.cli.owner import administer

    say(administer(coordinator, run_id, token_file).revoke(None if node == EVERYBODY else node))


@run.command()
def kick(
    run_id: RunId,
    node: Annotated[str, typer.Argument(metavar="NODE", help="A member's key in hex, or how it begins.")],
    coordinator: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Remove a node at once; it may not join again unless you authorize it."""
    from psyche_lightning.cli.owner import administer

    print(administer(coordinator, run_id, token_file).kick(node))


@run.command("restart-from")
def restart_from(
    run_id: RunId,
    digest: Annotated[str, typer.Argument(metavar="DIGEST", help="The digest of the parameters in hex, 64 digits.")],
    step: Annotated[int, typer.Argument(metavar="STEP", min=0, help="Training steps that they contain.")],
    coordinator: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Go on from other parameters than the newest, if those are lost or spoiled; later steps are trained again."""
    from psyche_lightning.cli.owner import administer

    say(administer(coordinator, run_id, token_file).restart_from(digest, step))


@run.command()
def points(run_id: RunId, coordinator: Url = None, as_json: Json = False) -> None:
    """Show what the nodes earned: on a server for their results, on a chain for being there when epochs end."""
    from rich.table import Table

    from psyche_lightning.cli.owner import administer

    rows = administer(coordinator, run_id).points()
    if as_json:
        print(json_text(rows, 2))
        return
    table = Table("node", "earned", "slashed", "claimed")
    for row in sorted(rows, key=lambda row: -row["earned"]):
        table.add_row(row["node"], *(f"{row[name]:,}" for name in ("earned", "slashed", "claimed")))
    stdout().print(table if rows else "nobody has earned points yet")


@run.command()
def claim(
    run_id: RunId,
    number: Annotated[int | None, typer.Argument(metavar="[POINTS]", min=1, help="How many; by default all.")] = None,
    coordinator: Url = None,
) -> None:
    """Have your points paid, if the run has a treasurer."""
    from psyche_lightning.cli.owner import administer

    say(administer(coordinator, run_id).claim(number))


@run.command("list")
def list_runs(coordinator: Url = None, as_json: Json = False) -> None:
    """List the runs of a coordinator."""
    runs = CoordinatorAdmin(coordinator).runs()
    if as_json:
        print(json_text(runs, 2))
        return
    from rich.table import Table

    table = Table("run", "phase", "epoch", "step", "nodes")
    for row in runs:
        step = f"{row['step'] - 1}/{row['total_steps'] or '?'}"
        table.add_row(plain(row["run_id"]), plain(_words(row["phase"])), str(row["epoch"]), step, str(row["clients"]))
    stdout().print(table if runs else "no runs yet; create one with `psyche run create RUN`")


@run.command()
def pause(run_id: RunId, coordinator: Url = None, token_file: TokenFile = None) -> None:
    """Pause a run at the end of its epoch."""
    from psyche_lightning.cli.owner import administer

    after = administer(coordinator, run_id, token_file).pause()
    say(f"run {run_id} is paused" if after["phase"] == "paused" else f"run {run_id} pauses when its epoch has ended")


@run.command()
def resume(run_id: RunId, coordinator: Url = None, token_file: TokenFile = None) -> None:
    """Resume a paused run."""
    from psyche_lightning.cli.owner import administer

    after = administer(coordinator, run_id, token_file).resume()
    say(f"run {run_id} is resumed: {_words(after['phase'])}")


run.command()(ledger)


def wanted(run_id: str, arguments: list[str], twin: bool, *, everybody: bool = True, by_link: bool = False) -> Creation:
    """Returns the run that the arguments of ``create`` and ``update`` describe."""
    recipe, overrides = _split(arguments)
    if recipe is None and twin:
        raise ConfigError("--twin is an option of a recipe; also name the recipe")
    values = _bare(run_id, overrides) if recipe is None else _from_recipe(recipe, overrides, twin)
    return Creation(**values, everybody=everybody, by_link=by_link)


def _split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The recipe, if the first argument names one, and the overrides."""
    recipe = arguments[0] if arguments and "=" not in arguments[0] else None
    overrides = arguments[recipe is not None :]
    for text in overrides:
        if "=" not in text:
            raise ConfigError(f"{text!r} does not have the form key=value; the recipe comes first, right after the run")
    return recipe, overrides


def _from_recipe(name: str, overrides: list[str], twin: bool) -> dict[str, Any]:
    """The parameters of a run with a recipe, which fixes all of them."""
    from psyche_lightning.protocol.manifest import START
    from psyche_lightning.recipe import load_recipe
    from psyche_lightning.recipe.joining import SECTION as JOIN
    from psyche_lightning.recipe.joining import offer
    from psyche_lightning.recipe.manifest import manifest, start_section

    recipe = load_recipe(name, overrides, twin=twin)
    sections = manifest(recipe)
    if recipe.checkpoint.resume is not None:
        from psyche_lightning.checkpoints.folder import newest

        found = newest(recipe.checkpoint.resume)
        sections[START] = start_section(found.manifest)
        say(f"resuming after step {found.manifest.metadata.step}, from {found}")
    del sections["data"]  # only a node has the samples and can describe them, so the first node fixes this section
    sections[JOIN], local = offer(recipe)
    for key in local:
        say(f"{key} names files of this machine, so who joins with the link alone has to give it: {key}=PATH")
    return {
        "config": asdict(recipe.run.coordinator),
        "manifest": sections,
        "seed": recipe.run.seed,
        "max_seq_len": recipe.data.seq_len,
        "recipe": recipe,
    }


def _bare(run_id: str, overrides: list[str]) -> dict[str, Any]:
    """The parameters of a run without a recipe; the first node fixes the missing ones."""
    from psyche_lightning.recipe import resolve
    from psyche_lightning.recipe.loading import parse_override
    from psyche_lightning.recipe.manifest import manifest

    given: dict[str, dict[str, Any]] = {"run": {}, "distro": {}}
    for text in overrides:
        key, value = parse_override(text)
        section, _, name = key.partition(".")
        if section not in given:
            raise ConfigError(
                f"{text.partition('=')[0]!r} belongs to a recipe; name the recipe before it: "
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
            **({"run": sections["run"]} if given["run"].keys() & sections["run"].keys() else {}),
            **({"distro": sections["distro"]} if given["distro"] else {}),
        },
        "seed": given["run"].get("seed"),
    }


def _words(phase: str) -> str:
    return phase.replace("_", " ")


def _show(found: dict[str, Any]) -> None:

    stdout().print(_picture(found))


def _picture(found: dict[str, Any]) -> RenderableType:
    from datetime import datetime

    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    height = "" if found["height"] is None else f", round {found['height']}"
    head = (
        f"{plain(_words(found['phase']))}, epoch {found['epoch']}{height}, "
        f"{max(0, found['step'] - 1)} of {found['total_steps'] or '?'} steps trained"
    )
    parts: list[RenderableType] = [Text.assemble((plain(found["run_id"]), "bold"), ": ", head)]
    if found.get("waits_for"):
        parts.append(Text(plain(found["waits_for"]), style="yellow"))
    if found.get("problem"):
        parts.append(Text(plain(found["problem"]), style="bold red"))
    parts += [Text(plain(f"{name}: {value}")) for name, value in found.get("about", {}).items()]
    losses = [row["loss"] for row in found["metrics"] if row["loss"] is not None]
    if losses:
        parts.append(Text(f"training loss {losses[-1]:.4f}, first {losses[0]:.4f}"))
    named = next((row for row in reversed(found["metrics"]) if row.get("figures")), None)
    if named:
        means = ", ".join(f"{plain(name).replace('_', ' ')} {mean:.4g}" for name, mean in named["figures"].items())
        parts.append(Text(f"at step {named['step']}: {means}"))
    table = Table("node", "status", "address", "step", "loss", "tokens/s", "share", "bytes up", "bytes down")
    for node in (*found["clients"], *found["pending"], *found["exited"]):
        loss, rate, share = node["loss"], node["tokens_per_second"], node.get("share")  # a chain's has no share
        table.add_row(
            *(plain(node[name]) for name in ("key", "status", "address")),
            str(node["step"] or ""),
            "" if loss is None else f"{loss:.4f}",
            "" if rate is None else f"{rate:,.0f}",
            f"{share:.0%}" if type(share) is float else "",
            *("" if node[name] is None else f"{node[name]:,}" for name in ("bytes_up", "bytes_down")),
        )
    if table.row_count:
        parts.append(table)
    if found.get("evaluations"):
        parts.append(_evaluations(found["evaluations"]))
    for event in found["events"][-EVENTS:]:
        parts.append(Text(f"{datetime.fromtimestamp(event['time']):%H:%M:%S}  {plain(event['text'])}"))
    return Group(*parts)


def _evaluations(found: list[dict[str, Any]]) -> RenderableType:
    """The newest evaluation of each task."""
    from rich.table import Table

    table = Table("task", "after step", "documents", "figures")
    for one in {one["task"]: one for one in found}.values():
        figures = ", ".join(f"{plain(name)} {value:.4f}" for name, value in one["figures"].items())
        asked = "" if one["documents"] is None else f"{one['measured']:,} of {one['documents']:,}"
        table.add_row(plain(one["task"]), str(one["step"]), asked, figures)
    return table
