"""``psyche run``: the commands of a run's owner, for every kind of coordinator."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from psyche_lightning.cli.console import say, stdout
from psyche_lightning.cli.ledger import ledger
from psyche_lightning.cli.link import read_link
from psyche_lightning.cli.run_creation import split, wanted
from psyche_lightning.cli.run_picture import picture, words
from psyche_lightning.cli.top import LONGEST, show
from psyche_lightning.errors import ConfigError, CoordinatorError, counted
from psyche_lightning.json_text import json_text
from psyche_lightning.protocol.link import JoinLink
from psyche_lightning.server.admin import TOKEN_FILE_VARIABLE, TOKEN_VARIABLE, URL_VARIABLE, CoordinatorAdmin
from psyche_lightning.server.token import read_token
from psyche_lightning.sites import is_loopback
from psyche_lightning.text import plain

run = typer.Typer(no_args_is_help=True, help="Create, inspect, change and close the runs of a coordinator.")

Url = Annotated[
    str | None,
    typer.Option(
        "--coordinator",
        envvar=URL_VARIABLE,
        metavar="URL",
        help="The coordinator's URL, a join link, or @FILE with one.",
        callback=read_link,
    ),
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
Rate = Annotated[
    int | None,
    typer.Option(min=0, metavar="POINTS", help="On a chain: points of an epoch, shared by who is there at its end."),
]
Slash = Annotated[
    int | None, typer.Option(min=0, metavar="POINTS", help="On a chain: points that a node loses when it is ejected.")
]
EVERYBODY = "everybody"
CLOSED = ("uninitialized", "paused", "finished")
"""Phases in which a run takes no nodes."""


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
    rate: Rate = None,
    slash: Slash = None,
    reward_mint: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="On a chain: the token that a treasurer pays, one base unit a point. `psyche run fund` gives it some.",
        ),
    ] = None,
) -> None:
    """Create a run, and print the link with which nodes join it.

    Without a recipe, the first node that joins decides what the run trains.

    Examples:
        psyche run create my-run mla-200m init_min_clients=4
        psyche run create my-run mla-200m --invited
    """
    from psyche_lightning.cli.owner import administer

    if invited and anybody:
        raise ConfigError("--open lets everybody in, --invited only nodes that you name; give one of them")
    admin = administer(coordinator, run_id, token_file)
    by_link = not (invited or anybody)
    creation = wanted(run_id, arguments or [], twin, everybody=not invited, by_link=by_link)
    status = admin.create(replace(creation, rates=(rate, slash), mint=reward_mint))
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
    recipe = split(arguments or [])[0]
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
    """Print a run's join link, which nodes take as their coordinator.

    Examples:
        psyche run link my-run
        psyche run link my-run --new
    """
    from psyche_lightning.cli.owner import administer

    say(administer(coordinator, run_id, token_file).link(new=new))


@run.command()
def update(
    run_id: RunId,
    arguments: Arguments = None,
    coordinator: Url = None,
    token_file: TokenFile = None,
    twin: Twin = False,
    name: Annotated[str | None, typer.Option(metavar="TEXT", help="On a chain: the run's name for people.")] = None,
    description: Annotated[str | None, typer.Option(metavar="TEXT", help="On a chain: what the run is about.")] = None,
    client_version: Annotated[
        str | None,
        typer.Option(metavar="VERSION", help="On a chain: the version that nodes need, such as 0.1.0; '' for any."),
    ] = None,
    restart_from_step: Annotated[
        int | None,
        typer.Option(
            metavar="STEP", min=0, help="On a chain: go on from the parameters that a quorum named after this step."
        ),
    ] = None,
) -> None:
    """Change the settings of a run that is paused or not started yet.

    Examples:
        psyche run update my-run total_steps=20000
        psyche run update my-run --client-version 0.1.0 --description "A try"
        psyche run update my-run --restart-from-step 400
    """
    from psyche_lightning.cli.owner import administer

    creation = replace(
        wanted(run_id, arguments or [], twin), name=name, description=description, client_version=client_version
    )
    if not arguments and not creation.described and restart_from_step is None:
        raise ConfigError("nothing to change; give settings such as total_steps=2000, a recipe, or an option")
    admin = administer(coordinator, run_id, token_file)
    if restart_from_step is not None:
        say(admin.restart_from(None, restart_from_step))
        if not arguments and not creation.described:
            return
    after = admin.update(creation)
    total = after["config"]["total_steps"]
    steps = "? steps" if total is None else counted(total, "step")
    say(f"run {run_id} is changed: {steps}, {words(after['phase'])}")


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
    """Show a run's status.

    Examples:
        psyche run status my-run
        psyche run status my-run --json
    """
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
        stdout().print(picture(found))


@run.command()
def watch(
    run_id: RunId,
    coordinator: Url = None,
    every: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Look at least so often, though nothing changes.")
    ] = LONGEST,
) -> None:
    """Show a run and keep it up to date, as `psyche top` does, until it is finished or you press Ctrl-C.

    Examples:
        psyche run watch my-run --every 10
    """
    show(coordinator, run_id, every=every)


@run.command()
def start(run_id: RunId, coordinator: Url = None, token_file: TokenFile = None) -> None:
    """Open a run to nodes.

    Examples:
        psyche run start my-run
    """
    from psyche_lightning.cli.owner import administer

    after = administer(coordinator, run_id, token_file).start()
    say(f"run {run_id} is open: {words(after['phase'])}")


@run.command()
def close(run_id: RunId, coordinator: Url = None, token_file: TokenFile = None) -> None:
    """Remove a run that is paused or finished; on a chain, you get back what its accounts hold.

    A server keeps the run's history, which its page shows, until you delete it.

    Examples:
        psyche run close my-run
    """
    from psyche_lightning.cli.owner import administer

    say(administer(coordinator, run_id, token_file).close())


@run.command()
def delete(
    run_id: Annotated[
        str, typer.Argument(metavar="RUN", help="The run's name; its id if several closed runs had that name.")
    ],
    coordinator: Url = None,
    token_file: TokenFile = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a closed run's history from a server, or a paused or finished run together with its history.

    Examples:
        psyche run delete my-run
        psyche run delete my-run --yes
    """
    admin = CoordinatorAdmin(coordinator, token=None if token_file is None else read_token(token_file))
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"this deletes the history of run {run_id} for ever; if you want that, give --yes")
        typer.confirm(f"Delete run {run_id} with its whole history from {admin.url}, for ever?", abort=True)
    deleted = admin.command(run_id, "delete")["deleted"]
    say(f"run {plain(str(deleted))} and its history are deleted from {admin.url}")


@run.command()
def authorize(run_id: RunId, node: Node, coordinator: Url = None, token_file: TokenFile = None) -> None:
    """Let a node or everybody join.

    Examples:
        psyche run authorize my-run NODE
    """
    from psyche_lightning.cli.owner import administer

    say(administer(coordinator, run_id, token_file).authorize(None if node == EVERYBODY else node))


@run.command()
def revoke(run_id: RunId, node: Node, coordinator: Url = None, token_file: TokenFile = None) -> None:
    """Undo authorize; a node that already trains stays until its epoch ends.

    Examples:
        psyche run revoke my-run NODE
    """
    from psyche_lightning.cli.owner import administer

    say(administer(coordinator, run_id, token_file).revoke(None if node == EVERYBODY else node))


@run.command()
def kick(
    run_id: RunId,
    node: Annotated[str, typer.Argument(metavar="NODE", help="A member's key in hex, or how it begins.")],
    coordinator: Url = None,
    token_file: TokenFile = None,
) -> None:
    """Remove a node at once; it may not join again unless you authorize it.

    Examples:
        psyche run kick my-run NODE
    """
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
    """Go on from other parameters than the newest, if those are lost or spoiled; later steps are trained again.

    Examples:
        psyche run restart-from my-run DIGEST 1200
    """
    from psyche_lightning.cli.owner import administer

    say(administer(coordinator, run_id, token_file).restart_from(digest, step))


@run.command()
def points(run_id: RunId, coordinator: Url = None, as_json: Json = False) -> None:
    """Show what the nodes earned: on a server for their results, on a chain for being there when epochs end.

    Examples:
        psyche run points my-run
    """
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
    """Have your points paid, if the run has a treasurer.

    Examples:
        psyche run claim my-run 100
    """
    from psyche_lightning.cli.owner import administer

    say(administer(coordinator, run_id).claim(number))


@run.command()
def rates(
    run_id: RunId, coordinator: Url = None, token_file: TokenFile = None, rate: Rate = None, slash: Slash = None
) -> None:
    """Show the points of an epoch, on a chain, or change those of the epochs to come.

    Examples:
        psyche run rates first
        psyche run rates first --rate 250 --slash 20
    """
    from psyche_lightning.cli.owner import administer

    say(administer(coordinator, run_id, token_file).rates(rate, slash))


@run.command()
def fund(
    run_id: RunId,
    amount: Annotated[int, typer.Argument(min=1, help="Base units of the token; one is paid for a point.")],
    coordinator: Url = None,
) -> None:
    """Give tokens of your wallet to the run's treasurer, who pays points with them; they do not come back.

    Examples:
        psyche run fund first 5000
    """
    from psyche_lightning.cli.owner import administer

    say(administer(coordinator, run_id).fund(amount))


@run.command("list")
def list_runs(
    link: Annotated[
        str | None,
        typer.Argument(
            metavar="[LINK]", help="Only runs that can be joined, of this link's coordinator.", callback=read_link
        ),
    ] = None,
    coordinator: Url = None,
    as_json: Json = False,
) -> None:
    """List the runs of a coordinator; with a join link or URL, those that can be joined, and with what.

    Examples:
        psyche run list
        psyche run list --coordinator https://train.example.org --json
        psyche run list 'https://train.example.org#my-run:KEY:SECRET'
    """
    from psyche_lightning.cli.owner import runs_at

    if link is not None:
        _list_joinable(link, as_json)
        return
    runs = runs_at(coordinator)
    if as_json:
        print(json_text(runs, 2))
        return
    from rich.table import Table

    table = Table("run", "phase", "epoch", "step", "nodes")
    for row in runs:
        step = f"{max(0, row['step'] - 1)}/{row['total_steps'] or '?'}"
        table.add_row(plain(row["run_id"]), plain(words(row["phase"])), str(row["epoch"]), step, str(row["clients"]))
    stdout().print(table if runs else "no runs yet; create one with `psyche run create RUN`")


def _list_joinable(text: str, as_json: bool) -> None:
    """List the runs that nodes may join now, first those that this link opens."""
    from rich.table import Table

    from psyche_lightning.cli.owner import administer, runs_at

    link = JoinLink.parse(text)
    rows: list[dict[str, Any]] = []
    for row in runs_at(text):
        if row["phase"] in CLOSED:
            continue
        try:
            status = administer(text, row["run_id"]).status()
        except CoordinatorError as error:
            if error.code != "UnknownRun":  # it may have been closed just now
                raise
            continue
        if status.get("allowed") is not None:
            needs = "an invitation"
        elif not status.get("by_link"):  # a chain has no links
            needs = "nothing"
        else:
            needs = "this link" if link.secret and link.run == row["run_id"] else "its own link"
        rows.append({**row, "wants": status["config"]["init_min_clients"], "needs": needs})
    rows.sort(key=lambda row: row["needs"] not in ("this link", "nothing"))
    if as_json:
        print(json_text(rows, 2))
        return
    table = Table("run", "phase", "step", "nodes", "begins with", "to join it needs")
    for row in rows:
        step = f"{max(0, row['step'] - 1)}/{row['total_steps'] or '?'}"
        cells = (row["run_id"], words(row["phase"]), step, str(row["clients"]), str(row["wants"]), row["needs"])
        table.add_row(*map(plain, cells))
    stdout().print(table if rows else f"no run of {link.url} can be joined now: none is open")


@run.command()
def pause(run_id: RunId, coordinator: Url = None, token_file: TokenFile = None) -> None:
    """Pause a run at the end of its epoch.

    Examples:
        psyche run pause my-run
    """
    from psyche_lightning.cli.owner import administer

    after = administer(coordinator, run_id, token_file).pause()
    say(f"run {run_id} is paused" if after["phase"] == "paused" else f"run {run_id} pauses when its epoch has ended")


@run.command()
def resume(run_id: RunId, coordinator: Url = None, token_file: TokenFile = None) -> None:
    """Resume a paused run.

    Examples:
        psyche run resume my-run
    """
    from psyche_lightning.cli.owner import administer

    after = administer(coordinator, run_id, token_file).resume()
    say(f"run {run_id} is resumed: {words(after['phase'])}")


run.command()(ledger)
