"""``psyche coordinator``: serves runs to nodes, and a page to people."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from psyche_lightning import system
from psyche_lightning.server.admin import TOKEN_VARIABLE


def coordinator(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 8080,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all interfaces.")] = "127.0.0.1",
    directory: Annotated[
        Path, typer.Option("--dir", help="Folder for the runs; runs that it contains continue.")
    ] = Path("psyche-coordinator"),
    token: Annotated[
        str | None, typer.Option(envvar=TOKEN_VARIABLE, help="Secret that creating and changing runs needs.")
    ] = None,
    grace: Annotated[float, typer.Option(min=0.0, help="Seconds in which a node may reconnect.")] = 5.0,
) -> None:
    """Serve runs to nodes, and a live page about them to people."""
    asyncio.run(_serve(host, port, directory, token, grace))


async def _serve(host: str, port: int, directory: Path, token: str | None, grace: float) -> None:
    from psyche_lightning.server.server import CoordinatorServer
    from psyche_lightning.server.store import SqliteStore

    # Install handlers before the server starts, and before its URL is printed.
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
