"""``psyche solana deploy``."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from solana.rpc.async_api import AsyncClient

    from psyche_lightning_solana.client.cluster import Cluster
    from psyche_lightning_solana.client.wallet import Wallet
    from psyche_lightning_solana.deploy.deployer import Target


def deploy(
    program: Annotated[
        str,
        typer.Argument(help="coordinator, authorizer, treasurer, or a file of a built program.", show_default=False),
    ],
    url: Annotated[
        str, typer.Option("--url", help="localnet, devnet, mainnet, or the URL of an RPC service.")
    ] = "localnet",
    keypair: Annotated[
        Path | None,
        typer.Option(
            "--keypair",
            help="Wallet that pays and may upgrade; default: PSYCHE_WALLET, or a local chain's faucet.",
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--program",
            help="A key pair's file, or the address of a program to upgrade; default: the wallet's own.",
        ),
    ] = None,
    priority_fee: Annotated[
        int, typer.Option("--priority-fee", min=0, help="Micro-lamports offered for each compute unit.")
    ] = 0,
    parallel: Annotated[int, typer.Option(min=1, max=256, help="Parallel requests.")] = 16,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the cost.")] = False,
) -> None:
    """Put a program on a chain, or upgrade it.

    To continue an interrupted deployment, repeat the command: wallet, program and file give the buffer's address.
    """
    asyncio.run(_deploy(program, url, keypair, address, priority_fee, parallel, dry_run))


async def _deploy(
    program: str, url: str, keypair: Path | None, address: str | None, priority: int, parallel: int, dry_run: bool
) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from psyche_lightning.logs import redirections
    from psyche_lightning_solana.client import cluster as clusters
    from psyche_lightning_solana.client.rpc import connect
    from psyche_lightning_solana.deploy.deployer import LAMPORTS, Deployer

    cluster = clusters.parse(f"{clusters.SCHEME}:{url}")
    name, image = _image(program)
    payer = _payer(keypair, cluster)
    target = _target(name, address, payer, cluster, known=name == program)
    async with connect(cluster) as client:
        authority = await _authority(client, target, cluster)
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), **redirections()
        )
        task = bar.add_task("writing", total=len(image))
        deployer = Deployer(
            client,
            payer,
            target,
            image,
            authority=authority,
            priority=priority,
            parallel=parallel,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
        plan = await deployer.plan()
        if plan.same:
            print(f"{target.address}  {name} is there already, the same {len(image):,} bytes.")
            return
        print(
            f"{'Upgrading' if plan.upgrade else 'Deploying'} {name} ({len(image):,} bytes) on {cluster.name}"
            f"{', continuing the buffer ' + str(plan.buffer) if plan.resumed else ''}: {payer.public} needs "
            f"{plan.needed / LAMPORTS:.6f} SOL, of which {plan.kept / LAMPORTS:.6f} stay in the program's accounts; "
            f"it has {plan.balance / LAMPORTS:.6f}."
        )
        if dry_run:
            return
        with bar:
            await deployer.run(plan)
        print(f"{target.address}  {name}")


def _image(program: str) -> tuple[str, bytes]:
    """A program's name and content."""
    from psyche_lightning.errors import ConfigError
    from psyche_lightning_solana import programs

    if program in programs.NAMES:
        return program, programs.image(program)
    path = Path(program)
    try:
        return path.stem, path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"there is no program {program!r}; choose {', '.join(programs.NAMES)}, or name an .so file"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read the program {program}: {error.strerror or error}") from None


def _payer(keypair: Path | None, cluster: Cluster) -> Wallet:
    from psyche_lightning_solana.client.cluster import local_faucet
    from psyche_lightning_solana.client.wallet import PATH_VARIABLE, SECRET_VARIABLE, Wallet

    if keypair is None and cluster.local and not (os.environ.get(PATH_VARIABLE) or os.environ.get(SECRET_VARIABLE)):
        return Wallet(local_faucet(), "the local faucet")
    return Wallet.load(keypair)


def _target(name: str, address: str | None, payer: Wallet, cluster: Cluster, *, known: bool) -> Target:
    from solders.pubkey import Pubkey

    from psyche_lightning.errors import ConfigError
    from psyche_lightning_solana.client.cluster import local_program
    from psyche_lightning_solana.client.wallet import Wallet
    from psyche_lightning_solana.deploy.deployer import Target
    from psyche_lightning_solana.deploy.loader import seeded_address

    if address is not None:
        if Path(address).expanduser().exists():
            wallet = Wallet.load(Path(address).expanduser())
            return Target(wallet.public, wallet)
        try:
            return Target(Pubkey.from_string(address))
        except ValueError:
            raise ConfigError(f"--program is {address!r}; expected an address, or the file of a key pair") from None
    if cluster.local and known:
        wallet = Wallet(local_program(name))
        return Target(wallet.public, wallet)
    # This needs no file, which could be lost, and nobody else can take it first.
    place, seed = seeded_address(payer.public, b"program", name.encode())
    return Target(place, seed=seed)


async def _authority(client: AsyncClient, target: Target, cluster: Cluster) -> Wallet | None:
    """The faucet, if the program is one of a local chain's initial programs."""
    from psyche_lightning_solana.client.cluster import local_faucet
    from psyche_lightning_solana.client.wallet import Wallet
    from psyche_lightning_solana.deploy.loader import code_address, read_code

    if not cluster.local:
        return None
    code = read_code((await client.get_account_info(code_address(target.address))).value)
    faucet = Wallet(local_faucet(), "the local faucet")
    return faucet if code is not None and code.authority == faucet.public else None
