"""``psyche solana keygen`` and ``psyche solana airdrop``: create and fund a wallet."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

LAMPORTS = 10**9


def keygen(file: Annotated[Path, typer.Argument(help="New file; existing files are never overwritten.")]) -> None:
    """Write a new wallet to a file, in solana-cli's form, readable by you alone."""
    from psyche_lightning_solana.client.wallet import PATH_VARIABLE, create

    wallet = create(file)
    print(f"{wallet.public}\nkept in {file}; use it with {PATH_VARIABLE}={file}")


def airdrop(
    amount: Annotated[float, typer.Argument(min=0.000000001, help="How many SOL.")] = 10.0,
    address: Annotated[str | None, typer.Argument(help="Receiver; the wallet by default.", show_default=False)] = None,
    url: Annotated[str, typer.Option("--url", help="localnet, devnet, or the URL of an RPC service.")] = "localnet",
    keypair: Annotated[
        Path | None, typer.Option("--keypair", help="Wallet; default: PSYCHE_WALLET, or solana-cli's.")
    ] = None,
) -> None:
    """Ask a faucet for SOL, which local and test clusters have."""
    asyncio.run(_airdrop(amount, address, url, keypair))


async def _airdrop(amount: float, address: str | None, url: str, keypair: Path | None) -> None:
    from solana.exceptions import SolanaRpcException
    from solana.rpc.commitment import Confirmed
    from solana.rpc.core import RPCException, UnconfirmedTxError
    from solders.pubkey import Pubkey

    from psyche_lightning.errors import ConfigError, PsycheError
    from psyche_lightning_solana.client import cluster as clusters
    from psyche_lightning_solana.client.rpc import connect
    from psyche_lightning_solana.client.wallet import Wallet

    cluster = clusters.parse(f"{clusters.SCHEME}:{url}")
    try:
        to = Pubkey.from_string(address) if address is not None else Wallet.load(keypair).public
    except ValueError:
        raise ConfigError(f"{address!r} is no address; expected 32 bytes in base58") from None
    async with connect(cluster) as client:
        try:
            signature = (await client.request_airdrop(to, round(amount * LAMPORTS), Confirmed)).value
            await client.confirm_transaction(signature, Confirmed, sleep_seconds=0.2)
            balance = (await client.get_balance(to, Confirmed)).value
        except RPCException as error:
            reason = getattr(error.args[0], "message", error)
            raise PsycheError(f"the faucet of {cluster.name} refuses: {reason}") from error
        except (SolanaRpcException, UnconfirmedTxError) as error:
            raise PsycheError(f"{cluster.name} does not answer: {error.__cause__ or error}") from error
    print(f"{to} has {balance / LAMPORTS:.9f} SOL.")
