"""``psyche solana authorization``, ``delegate`` and ``can-join``: who may join a run on a chain, and why not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import typer

RunId = Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")]
Coordinator = Annotated[
    str,
    typer.Option("--coordinator", envvar="PSYCHE_COORDINATOR", metavar="URL", help="Such as solana:localnet."),
]


def authorization(
    run_id: RunId,
    grantee: Annotated[
        str, typer.Argument(metavar="[WALLET]", help="Whose authorization; by default everybody's.")
    ] = "everybody",
    coordinator: Coordinator = "solana:localnet",
) -> None:
    """Show an authorization to join a run: whether it is active, and to whom its holder delegated it."""
    from psyche_lightning_solana.owner_side import wallet_of

    wallet = wallet_of(None if grantee == "everybody" else grantee)
    held = _do(coordinator, run_id, lambda admin: admin.authorization(wallet))
    if held is None:
        print(f"{grantee} has no authorization for run {run_id}")
        return
    print(f"{grantee}: {'active' if held.active else 'revoked'}, granted by {held.grantor}, in {held.place}")
    for delegate in held.delegates:
        print(f"delegated to {delegate}")


def delegate(
    run_id: RunId,
    wallets: Annotated[
        list[str] | None, typer.Argument(metavar="[WALLET]...", help="Who may join in its place.")
    ] = None,
    coordinator: Coordinator = "solana:localnet",
    clear: Annotated[bool, typer.Option("--clear", help="First take it from all former ones.")] = False,
) -> None:
    """Let other wallets join with this wallet's authorization; they name it with #grantee=ADDRESS."""
    from psyche_lightning.errors import ConfigError
    from psyche_lightning_solana.owner_side import address_of

    if not wallets and not clear:
        raise ConfigError("name wallets, or --clear")
    added = [address_of(text, "a wallet's address") for text in wallets or []]
    held = _do(coordinator, run_id, lambda admin: admin.delegate(added, clear=clear))
    print(f"{held.grantee} delegates its authorization to {', '.join(map(str, held.delegates)) or 'nobody'}")
    if held.delegates:
        print(f"they join with {coordinator}#grantee={held.grantee}")


def can_join(run_id: RunId, coordinator: Coordinator = "solana:localnet") -> None:
    """Say whether this wallet can join a run now; exit code 1 and the reason if not."""
    print(_do(coordinator, run_id, lambda admin: admin.can_join()))


def _do(coordinator: str, run_id: str, work: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
    from psyche_lightning_solana.client.admin import SolanaAdmin
    from psyche_lightning_solana.client.run import SolanaRun

    async def run() -> Any:
        async with SolanaAdmin(SolanaRun.at(coordinator, run_id)) as admin:
            return await work(admin)

    return asyncio.run(run())
