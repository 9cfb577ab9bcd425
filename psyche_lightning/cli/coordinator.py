"""``psyche coordinator``: serves runs to nodes, and a page to people."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from psyche_lightning import system
from psyche_lightning.cli.console import say
from psyche_lightning.errors import CoordinatorError, counted
from psyche_lightning.server.admin import TOKEN_FILE_VARIABLE, TOKEN_VARIABLE, URL_VARIABLE

if TYPE_CHECKING:
    from psyche_lightning.server.admin import CoordinatorAdmin
    from psyche_lightning.server.backup import Backup

logger = logging.getLogger(__name__)


coordinator = typer.Typer(invoke_without_command=True)


@coordinator.callback()
def serve(
    context: typer.Context,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 8080,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all interfaces.")] = "127.0.0.1",
    directory: Annotated[
        Path, typer.Option("--dir", help="Folder for the runs; runs that it contains continue.")
    ] = Path("psyche-coordinator"),
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar=TOKEN_FILE_VARIABLE,
            metavar="FILE",
            help="The owner's token, which creating and changing runs needs; made if missing. By default owner.token "
            "in the folder of the runs.",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name under which others reach it, such as that of a proxy in front; may be repeated. A coordinator "
            "on 127.0.0.1 answers to no other names.",
        ),
    ] = None,
    tls: Annotated[
        bool | None,
        typer.Option(
            "--tls/--plain",
            help="Encrypt, with the coordinator's own key; by default unless it listens on 127.0.0.1. --plain is for a "
            "TLS proxy in front of it.",
        ),
    ] = None,
    grace: Annotated[float, typer.Option(min=0.0, help="Seconds in which a node may reconnect.")] = 5.0,
    max_runs: Annotated[
        int | None, typer.Option(min=1, help="Runs that it takes at once, finished ones included; 256 unless given.")
    ] = None,
) -> None:
    """Serve runs to nodes, and a live page about them to people. Sub-commands make and restore backups of it.

    Examples:
        psyche coordinator
        psyche coordinator --host 0.0.0.0 --tls --dir /var/lib/psyche
        psyche coordinator backup today.backup --coordinator 127.0.0.1:8080
    """
    if context.invoked_subcommand is not None:
        return
    from psyche_lightning.sites import is_loopback

    encrypted = tls if tls is not None else not is_loopback(host)
    asyncio.run(_serve(host, port, directory, token_file, allow_host or [], encrypted, grace, max_runs))


@coordinator.command()
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The backup; a former one is replaced.")],
    url: Annotated[
        str | None,
        typer.Option("--coordinator", envvar=URL_VARIABLE, metavar="URL", help="The coordinator's URL, or a link."),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            envvar=TOKEN_FILE_VARIABLE,
            metavar="FILE",
            help="The owner's token. By default that of a coordinator that you run on this machine.",
        ),
    ] = None,
    every: Annotated[
        float | None, typer.Option(min=1.0, metavar="SECONDS", help="Go on, and replace it again and again.")
    ] = None,
) -> None:
    """Copy all that a coordinator has into one file, while it runs: its runs, its key and the owner's token.

    Examples:
        psyche coordinator backup today.backup --coordinator 127.0.0.1:8080
        psyche coordinator backup standby.backup --coordinator LINK --every 10
    """
    from psyche_lightning.protocol.link import whole_url
    from psyche_lightning.server.admin import CoordinatorAdmin
    from psyche_lightning.server.backup import keep
    from psyche_lightning.server.token import read_token

    token = None if token_file is None else read_token(token_file)
    admin = CoordinatorAdmin(url and whole_url(url), token=token)
    data = admin.backup()
    say(f"{file}: {_described(keep(data, file))}, {len(data) / 1e6:.1f} MB")
    if every is not None:
        _back_up_again(admin, file, every)


def _back_up_again(admin: CoordinatorAdmin, file: Path, every: float) -> None:
    """Replace a backup every so many seconds, and when an epoch begins, until somebody stops it.

    Nodes forget what an earlier epoch needs, so a backup from before the newest one would be of no use.
    """
    from psyche_lightning.logs import Outage
    from psyche_lightning.server.backup import keep

    away = Outage(logger, f"the backup of {admin.url}")
    epochs: dict[str, int] = {}
    made = time.monotonic()
    while True:
        time.sleep(min(1.0, every))
        try:
            now = {run["run_id"]: run["epoch"] for run in admin.runs()}
            if now != epochs or time.monotonic() - made >= every:
                keep(admin.backup(), file)
                epochs, made = now, time.monotonic()
                away.works()
        except CoordinatorError as error:
            away.fails(error)


@coordinator.command()
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A backup.")],
    directory: Annotated[Path, typer.Option("--dir", help="Folder for the runs, which has no coordinator yet.")],
) -> None:
    """Make a coordinator's folder from a backup. The coordinator from which it was made must not run any more.

    Examples:
        psyche coordinator restore standby.backup --dir psyche-coordinator
    """
    from psyche_lightning.server import backup as backups

    say(f"{directory}: {_described(backups.restore(file, directory))}")
    say(f"start it where nodes look for it: psyche coordinator --dir {shlex.quote(str(directory))}")


def _described(found: Backup) -> str:
    states = [run.state for run in found.runs]
    runs = ", ".join(f"{state.run_id} at step {state.step - 1}" for state in states[:8])
    more = ", ..." * (len(states) > 8)
    when = datetime.fromtimestamp(found.made).strftime("%Y-%m-%d %H:%M:%S")
    return f"{counted(len(states), 'run')} of {when}{f' ({runs}{more})' if runs else ''}"


async def _serve(
    host: str,
    port: int,
    directory: Path,
    token_file: Path | None,
    hosts: list[str],
    tls: bool,
    grace: float,
    max_runs: int | None,
) -> None:
    from psyche_lightning.server.server import CoordinatorServer
    from psyche_lightning.server.store import SqliteStore
    from psyche_lightning.server.token import FILE, announced, check_token, load_or_create

    # Install handlers before the server starts, and before its URL is printed.
    stop = asyncio.Event()
    system.on_stop(stop.set)
    store = SqliteStore(directory)
    try:
        path = token_file or directory / FILE
        given = os.environ.get(TOKEN_VARIABLE)
        token, fresh = (check_token(given, TOKEN_VARIABLE), False) if given else load_or_create(path)
        server = CoordinatorServer(
            store, token=token, hosts=hosts, tls=tls, grace=grace, events=directory / "events", max_runs=max_runs
        )
        url = await server.start(host, port)
        try:
            with contextlib.nullcontext() if given else announced(url, path) as found:
                runs = counted(len(server.runs), "run")
                print(f"psyche coordinator on {url}  ({runs} in {directory}; Ctrl-C stops it)", flush=True)
                _tell_owner(path, token if fresh else None, found)
                if tls:
                    _tell_key(url, server.key)
                await stop.wait()
        finally:
            await server.stop()
    finally:
        store.close()


def _tell_owner(path: Path, fresh: str | None, found: bool | None) -> None:
    """Say what changing runs needs.

    Args:
        path: the token's file.
        fresh: the token, if it is new.
        found: whether commands on this machine find it; None if the environment gave the token.
    """
    if found is None:
        print(f"creating and changing runs needs the owner's token, here that of {TOKEN_VARIABLE}", flush=True)
        return
    if fresh is not None and sys.stdout.isatty():  # what is not a terminal may be a log
        print(f"the owner's token, which is shown only now: {fresh}")
    here = "; `psyche run` on this machine finds it" if found else ""
    print(f"creating and changing runs needs the owner's token, in {path}{here}", flush=True)


def _tell_key(url: str, key: bytes) -> None:
    """Say how commands on other machines know this coordinator, for which no authority vouches."""
    from psyche_lightning.protocol.link import JoinLink

    place = url.replace("//0.0.0.0:", "//ADDRESS:").replace("//[::]:", "//ADDRESS:")
    print(f"`psyche run` on other machines takes --coordinator '{JoinLink(place, key=key)}'", flush=True)
