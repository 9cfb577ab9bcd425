"""``psyche solana ...``: a table of sub-commands, each imported only when called."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


@dataclass(frozen=True)
class Command:
    """A sub-command of ``psyche solana``.

    Attributes:
        target: ``"module:name"`` of a function with typer's annotations.
        help: its line in ``psyche solana --help``.
    """

    target: str
    help: str


# A new command is one line here and a module.
COMMANDS = {
    "localnet": Command("psyche_lightning_solana.localnet:localnet", "Serve a local chain with the programs on it."),
    "airdrop": Command("psyche_lightning_solana.wallets:airdrop", "Ask a faucet for SOL."),
    "deploy": Command("psyche_lightning_solana.deploy.command:deploy", "Put a program on a chain, or upgrade it."),
    "keygen": Command("psyche_lightning_solana.wallets:keygen", "Write a new wallet to a file."),
    "mint": Command("psyche_lightning_solana.mint:mint", "Make a token, with which a run may pay its points."),
    "can-join": Command("psyche_lightning_solana.permission:can_join", "Say whether this wallet can join a run now."),
    "authorization": Command("psyche_lightning_solana.permission:authorization", "Show who may join a run by whom."),
    "delegate": Command("psyche_lightning_solana.permission:delegate", "Let other wallets join in this one's place."),
    "cost": Command("psyche_lightning_solana.cost:cost", "Measure what a recipe's run costs on a chain."),
}


def app() -> typer.Typer:
    """The sub-commands, as an app for the hook ``register_commands``."""
    group = typer.Typer(cls=_Lazy, no_args_is_help=True, help="Programs and local chain of the Solana coordinator.")
    group.callback()(_group)
    return group


def _group() -> None:
    """Programs and local chain of the Solana coordinator."""


class _Lazy(TyperGroup):
    """Lists names and help lines, and imports the called command."""

    # Newer typer versions include their own click, so these types differ between versions.

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = COMMANDS.get(cmd_name)
        return None if command is None else TyperCommand(cmd_name, help=command.help)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else _load(name), rest


def _load(name: str) -> Any:
    module, _, attribute = COMMANDS[name].target.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    single.command(name)(function)
    return typer.main.get_command(single)
