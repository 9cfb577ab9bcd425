"""``psyche solana mint``: make a token, with which a run may pay its points."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer


def mint(
    amount: Annotated[int, typer.Argument(min=1, max=(1 << 64) - 1, help="Base units that the wallet gets.")],
    url: Annotated[
        str, typer.Option("--url", help="localnet, devnet, mainnet, or the URL of an RPC service.")
    ] = "localnet",
    keypair: Annotated[
        Path | None, typer.Option("--keypair", help="Wallet; default: PSYCHE_WALLET, or solana-cli's.")
    ] = None,
) -> None:
    """Make a token without decimals, and give the wallet an amount of it; the wallet may make more."""
    print(asyncio.run(_mint(amount, url, keypair)))


async def _mint(amount: int, url: str, keypair: Path | None) -> str:
    from solders.system_program import CreateAccountParams, create_account
    from spl.token.instructions import InitializeMintParams, MintToParams, initialize_mint, mint_to

    from psyche_lightning_solana.client import cluster as clusters
    from psyche_lightning_solana.client.owner import MINT_SIZE, TOKEN_PROGRAM, make_token_account, token_account
    from psyche_lightning_solana.client.reader import Reader
    from psyche_lightning_solana.client.record import Log
    from psyche_lightning_solana.client.rpc import PoolProvider, RpcProblem, unreachable
    from psyche_lightning_solana.client.sender import Sender
    from psyche_lightning_solana.client.wallet import Wallet

    cluster, wallet, token = clusters.parse(f"{clusters.SCHEME}:{url}"), Wallet.load(keypair), Wallet.generate()
    me = wallet.public
    provider = PoolProvider(cluster.endpoints)
    reader, log = Reader(provider, cluster.options.commitment), Log(cluster.options.log)
    sender = Sender(reader, wallet, "", cluster.options, cluster.name, log)
    try:
        rent = await reader.rent(MINT_SIZE)
        parts = [
            create_account(
                CreateAccountParams(
                    from_pubkey=me, to_pubkey=token.public, lamports=rent, space=MINT_SIZE, owner=TOKEN_PROGRAM
                )
            ),
            initialize_mint(
                InitializeMintParams(decimals=0, mint=token.public, program_id=TOKEN_PROGRAM, mint_authority=me)
            ),
            make_token_account(me, me, token.public),
            mint_to(
                MintToParams(
                    program_id=TOKEN_PROGRAM,
                    mint=token.public,
                    dest=token_account(me, token.public),
                    mint_authority=me,
                    amount=amount,
                )
            ),
        ]
        await sender.send("mint", parts, units=200_000, signers=[token])
    except RpcProblem as problem:
        raise unreachable(problem, "the price of storage", cluster.name) from problem
    finally:
        await sender.close()
        await provider.close()
    return str(token.public)
