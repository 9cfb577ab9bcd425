"""The plugin: the coordinator ``solana:...`` and the commands ``psyche solana ...``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from psyche_lightning.hookspecs import CommandFactory, CoordinatorKind, Register, hookimpl

if TYPE_CHECKING:
    import typer

    from psyche_lightning.cli.demo.stage import Stage
    from psyche_lightning.protocol.owner import RunAdmin
    from psyche_lightning.protocol.requests import Coordinator
    from psyche_lightning.wire.identity import Identity


@hookimpl
def register_coordinators(register: Register[CoordinatorKind]) -> None:
    """Register the coordinator."""
    register("solana", CoordinatorKind(client=coordinator, owner=_owner, account=_account, demo=_demo, runs=_runs))


def coordinator(url: str, run_id: str, identity: Identity, options: Mapping[str, Any]) -> Coordinator:
    """A run on a Solana chain; the options are those of :class:`~psyche_lightning_solana.client.cluster.Options`."""
    from psyche_lightning_solana.client.cluster import parse
    from psyche_lightning_solana.client.coordinator import SolanaCoordinator

    return SolanaCoordinator(parse(url, options), run_id, identity)


def _demo() -> Stage:
    from psyche_lightning_solana.demo import SolanaStage

    return SolanaStage()


def _owner(url: str, run_id: str, token: str | None) -> RunAdmin:
    from psyche_lightning_solana.owner_side import SolanaRunAdmin

    return SolanaRunAdmin(url, run_id)


def _runs(url: str) -> list[dict[str, Any]]:
    from psyche_lightning_solana.owner_side import list_runs

    return list_runs(url)


def _account(data: bytes, name: str) -> dict[str, Any]:
    from psyche_lightning_solana.owner_side import read_account

    return read_account(data, name)


@hookimpl
def register_commands(register: Register[CommandFactory]) -> None:
    """Register the commands."""
    register("solana", commands)


def commands() -> typer.Typer:
    """Programs and local chain of the Solana coordinator."""
    from psyche_lightning_solana.commands import app

    return app()
