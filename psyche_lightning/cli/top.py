"""``psyche top``: a live view of any run in the terminal, as the demo shows its own."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from psyche_lightning.cli.console import say, stdout
from psyche_lightning.cli.demo.view import View, heading
from psyche_lightning.errors import ConfigError, CoordinatorError, counted

if TYPE_CHECKING:
    from psyche_lightning.protocol.owner import RunAdmin

GAP, LONGEST = 0.25, 2.0
"""Seconds between two looks: at least, though the run changes faster, and at most, though nothing changes."""


def top(
    url: Annotated[
        str | None,
        typer.Argument(metavar="[URL]", help="The coordinator, or a join link; by default PSYCHE_COORDINATOR."),
    ] = None,
    run_id: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="The run; needed where a coordinator has several.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print it once, and end.")] = False,
) -> None:
    """Watch a run in the terminal: progress, loss, nodes, whom it waits for. It ends with the run, or with Ctrl-C.

    In a pipe it prints lines instead.

    Examples:
        psyche top http://127.0.0.1:8080
        psyche top 127.0.0.1:8080 my-run --once
    """
    from psyche_lightning.protocol.link import JoinLink

    show(url, run_id or (JoinLink.parse(url).run if url else None) or _chosen(url), once=once)


def show(url: str | None, run_id: str, *, once: bool = False, every: float = LONGEST) -> None:
    """Show a run until it is finished.

    Args:
        url: its coordinator; None for the environment's.
        run_id: its name.
        once: whether to end after the first look.
        every: the most seconds between two looks.
    """
    from psyche_lightning.cli.owner import administer

    admin = administer(url, run_id)
    status = admin.status()
    with View(stdout(), all_reduce=_all_reduce(status), rounds=status["total_steps"], live=not once) as view:
        if once:
            view.once(status)
            return
        asyncio.run(_follow(url, run_id, admin, view, status, every))
        view.last()


def _all_reduce(status: dict[str, Any]) -> float | None:
    """Bytes of an all-reduce for comparison; None for a single node, which sends nothing."""
    return status.get("allreduce_bytes") if len(status["clients"]) > 1 else None


def _chosen(url: str | None) -> str:
    """The only run of a coordinator, or the one that the user chooses.

    Raises:
        ConfigError: there is none, or nobody can be asked.
    """
    from psyche_lightning.cli.owner import runs_at

    runs = runs_at(url)
    names = [str(run["run_id"]) for run in runs]
    if not runs:
        raise ConfigError("the coordinator has no run yet; create one: psyche run create RUN")
    going = [name for name, run in zip(names, runs, strict=True) if run["phase"] != "finished"]
    if len(names) == 1 or len(going) == 1:
        return (going or names)[0]
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(f"the coordinator has {counted(len(names), 'run')}: name one of {', '.join(names)}")
    for place, run in enumerate(runs, 1):
        phase, total = str(run["phase"]).replace("_", " "), run["total_steps"]
        say(f"{place:3}  {run['run_id']}: {phase}, step {run['step'] - 1} of {total or '?'}")
    number: int = typer.prompt("which run", type=int, default=1)
    if not 1 <= number <= len(names):
        raise ConfigError(f"there is no run {number}; choose 1 to {len(names)}, or name it: psyche top URL RUN")
    return names[number - 1]


async def _follow(
    url: str | None, run_id: str, admin: RunAdmin, view: View, status: dict[str, Any], every: float
) -> None:
    """Show a run whenever it changes, until it is finished."""
    changed = asyncio.Event()
    async with _listening(url, run_id, changed) as listening:
        told = ""
        while True:
            text = ", ".join(part for part in (heading(status), status.get("waits_for")) if part)
            if not view.redraws and text != told:
                say(text)
                told = text
            view.all_reduce = _all_reduce(status)
            view.show(status)
            if status["phase"] == "finished":
                return
            await asyncio.sleep(min(GAP, every))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), every)
            changed.clear()
            if listening is not None and listening.done():
                listening.result()  # the run was closed, for example
            with contextlib.suppress(_Away):
                status = await _ask(admin)


class _Away(Exception):
    """The coordinator does not answer at the moment."""


async def _ask(admin: RunAdmin) -> dict[str, Any]:
    try:
        return await asyncio.to_thread(admin.status)
    except CoordinatorError as error:
        if error.retryable:
            raise _Away from error
        raise


@contextlib.asynccontextmanager
async def _listening(url: str | None, run_id: str, changed: asyncio.Event) -> Any:
    """Sets the event at each change that a server announces; yields the task, or None where nobody announces any."""
    from psyche_lightning.cli.owner import coordinator_url
    from psyche_lightning.server.client import HttpCoordinator
    from psyche_lightning.wire.identity import Identity

    found = coordinator_url(url)
    if not found.startswith(("http://", "https://")):  # a chain is asked from time to time
        yield None
        return
    client = HttpCoordinator(found, run_id, Identity.generate())  # somebody who only looks

    async def listen() -> None:
        async for _ in client.watch():
            changed.set()

    task = asyncio.ensure_future(listen())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()
