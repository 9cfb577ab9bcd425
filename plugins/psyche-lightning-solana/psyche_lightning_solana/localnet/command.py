"""``psyche solana localnet``."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Annotated, Any

import typer


def localnet(
    port: Annotated[
        int, typer.Option(min=0, max=65534, help="Port for requests, and the next one for subscriptions; 0 for any.")
    ] = 8899,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    ledger: Annotated[
        Path | None, typer.Option(help="Folder that keeps the chain; without, it is gone when this ends.")
    ] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Start over in that folder.")] = False,
    no_programs: Annotated[bool, typer.Option("--no-programs", help="An empty chain, without our programs.")] = False,
    slot_ms: Annotated[int, typer.Option(min=1, max=60_000, help="Milliseconds of a slot.")] = 400,
    confirmed_lag: Annotated[int, typer.Option(min=0, help="Slots until a transaction counts as confirmed.")] = 1,
    finalized_lag: Annotated[int, typer.Option(min=0, help="Slots until it counts as finalized.")] = 32,
    frozen: Annotated[
        bool, typer.Option("--frozen", help="No slot passes unless psyche_advanceClock says so.")
    ] = False,
    transactions: Annotated[int, typer.Option(min=1, help="How many transactions are remembered.")] = 20_000,
) -> None:
    """Serve a local chain, with the programs on it, for trying things out.

    Ordinary Solana clients talk to it as to a validator. Its keys are public: nothing on it is worth anything.
    """
    asyncio.run(
        _serve(
            host,
            port,
            ledger,
            reset=reset,
            programs=not no_programs,
            slot_ms=slot_ms,
            frozen=frozen,
            confirmed_lag=confirmed_lag,
            finalized_lag=finalized_lag,
            max_transactions=transactions,
        )
    )


async def _serve(
    host: str,
    port: int,
    folder: Path | None,
    *,
    reset: bool,
    programs: bool,
    slot_ms: int,
    frozen: bool,
    **settings: Any,
) -> None:
    from psyche_lightning_solana.localnet.clock import SlotClock
    from psyche_lightning_solana.localnet.faucet import FAUCET_LAMPORTS
    from psyche_lightning_solana.localnet.ledger import Ledger
    from psyche_lightning_solana.localnet.programs import fresh_chain, install_ours
    from psyche_lightning_solana.localnet.server import LocalServer

    # Before anything can go wrong with a half-started server, and before the URL invites a signal.
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    ledger = None if folder is None else Ledger(folder)
    try:
        clock = SlotClock(slot_ms, running=not frozen)
        if ledger is not None and reset:
            ledger.reset()
        chain = None if ledger is None else ledger.load(clock, **settings)
        if chain is None:
            chain, installed = fresh_chain(clock, programs=programs, **settings)
        else:
            installed = install_ours(chain) if programs else {}
        async with LocalServer(chain, host=host, port=port, ledger=ledger) as server:
            kept = "" if folder is None else f", kept in {folder}"
            print(
                f"psyche solana localnet on {server.url} (websocket {server.ws_url}{kept}; Ctrl-C stops it)\n"
                f"  slot         {chain.slot}, {'frozen' if frozen else f'every {slot_ms} ms'}",
                *(f"  {name:<12} {address}" for name, address in installed.items()),
                f"  faucet       {chain.faucet.pubkey()}, {FAUCET_LAMPORTS // 10**9:,} SOL at first; "
                f"`psyche solana airdrop 10 ADDRESS`",
                sep="\n",
                flush=True,
            )
            await stop.wait()
    finally:
        if ledger is not None:
            ledger.close()
