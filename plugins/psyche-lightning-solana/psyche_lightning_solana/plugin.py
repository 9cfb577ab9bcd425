"""The plugin: the commands ``psyche solana ...``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from psyche_lightning import hookimpl

if TYPE_CHECKING:
    import typer


@hookimpl
def register_commands(register: Callable[[str, Callable[..., Any]], None]) -> None:
    """Register the commands."""
    register("solana", commands)


def commands() -> typer.Typer:
    """Programs and local chain of the Solana coordinator."""
    from psyche_lightning_solana.commands import app

    return app()
