"""``psyche coordinator``: serves runs to nodes, and a page to people."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from psyche_lightning import system
from psyche_lightning.errors import counted
from psyche_lightning.server.admin import TOKEN_FILE_VARIABLE, TOKEN_VARIABLE


def coordinator(
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
) -> None:
    """Serve runs to nodes, and a live page about them to people."""
    from psyche_lightning.sites import is_loopback

    encrypted = tls if tls is not None else not is_loopback(host)
    asyncio.run(_serve(host, port, directory, token_file, allow_host or [], encrypted, grace))


async def _serve(
    host: str, port: int, directory: Path, token_file: Path | None, hosts: list[str], tls: bool, grace: float
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
        server = CoordinatorServer(store, token=token, hosts=hosts, tls=tls, grace=grace)
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
