"""``psyche coordinator``: serve runs to nodes, and a page to people."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from psyche_lightning import system
from psyche_lightning.server.admin import TOKEN_VARIABLE


def coordinator(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 8080,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    directory: Annotated[
        Path, typer.Option("--dir", help="Where the runs are kept; the same directory goes on from where it was.")
    ] = Path("psyche-coordinator"),
    token: Annotated[
        str | None, typer.Option(envvar=TOKEN_VARIABLE, help="Secret without which nobody creates, pauses or resumes.")
    ] = None,
    grace: Annotated[
        float, typer.Option(min=0.0, help="Seconds in which a node whose connection broke may come back.")
    ] = 5.0,
) -> None:
    """Serve runs to nodes, and a page that shows them live to people."""
    asyncio.run(_serve(host, port, directory, token, grace))


async def _serve(host: str, port: int, directory: Path, token: str | None, grace: float) -> None:
    from psyche_lightning.server.server import CoordinatorServer
    from psyche_lightning.server.store import SqliteStore

    # Before anything can go wrong with a half-started server, and before the URL invites a signal.
    stop = asyncio.Event()
    system.on_stop(stop.set)
    store = SqliteStore(directory)
    try:
        server = CoordinatorServer(store, token=token or None, grace=grace)
        url = await server.start(host, port)
        try:
            print(
                f"psyche coordinator on {url}  ({_kept(len(server.runs))} in {directory}; Ctrl-C stops it)", flush=True
            )
            await stop.wait()
        finally:
            await server.stop()
    finally:
        store.close()


def _kept(runs: int) -> str:
    return f"{runs} run" if runs == 1 else f"{runs} runs"
