"""``solana-localnet``: serves a local chain."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from psyche_lightning_localnet.errors import LocalnetError


@dataclass(frozen=True)
class Program:
    """A chain's initial program.

    Attributes:
        name: the name to display.
        address: the address in base58.
        image: the ELF shared object.
    """

    name: str
    address: str
    image: bytes


def command(name: str, programs: Callable[[], Sequence[Program]] = tuple) -> Callable[..., None]:
    """Build the command: a function with typer's annotations.

    Args:
        name: the command's name, for the first line of its output.
        programs: returns the initial programs of every chain of this command.
    """

    def localnet(
        port: Annotated[
            int, typer.Option(min=0, max=65534, help="Port for requests; the next one is for subscriptions. 0 for any.")
        ] = 8899,
        host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all interfaces.")] = "127.0.0.1",
        ledger: Annotated[
            Path | None, typer.Option(help="Folder that keeps the chain; without one, the chain is lost at the end.")
        ] = None,
        reset: Annotated[bool, typer.Option("--reset", help="Start a new chain in that folder.")] = False,
        program: Annotated[
            list[str] | None,
            typer.Option(
                metavar="ADDRESS=FILE",
                help="An initial program: its address or the file of its key pair, and its .so file; repeatable.",
            ),
        ] = None,
        slot_ms: Annotated[int, typer.Option(min=1, max=60_000, help="Milliseconds of a slot.")] = 400,
        confirmed_lag: Annotated[int, typer.Option(min=0, help="Slots until a transaction counts as confirmed.")] = 1,
        finalized_lag: Annotated[int, typer.Option(min=0, help="Slots until a transaction counts as finalized.")] = 32,
        frozen: Annotated[bool, typer.Option("--frozen", help="Slots pass only by psyche_advanceClock.")] = False,
        transactions: Annotated[int, typer.Option(min=1, help="The most transactions to remember.")] = 20_000,
        allow_host: Annotated[
            list[str] | None,
            typer.Option(metavar="NAME", help="A name under which it is reached, such as a proxy's; repeatable."),
        ] = None,
    ) -> None:
        """Serve a local Solana chain, for tests and experiments.

        Ordinary Solana clients use it like a validator. Its keys are public, so nothing on it has any value.
        """
        given = [*programs(), *(_program(text) for text in program or ())]
        settings = {
            "confirmed_lag": confirmed_lag,
            "finalized_lag": finalized_lag,
            "max_transactions": transactions,
        }
        asyncio.run(_serve(name, host, port, allow_host or (), ledger, reset, given, slot_ms, frozen, settings))

    return localnet


def main() -> None:
    """The command ``solana-localnet``."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command("solana-localnet"))
    try:
        app()
    except LocalnetError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _program(text: str) -> Program:
    """Read ``ADDRESS=FILE``.

    Raises:
        LocalnetError: the text has another form, or a file cannot be read.
    """
    from solders.keypair import Keypair
    from solders.pubkey import Pubkey

    where, equals, file = text.partition("=")
    if not equals:
        raise LocalnetError(f"--program is {text!r}; expected ADDRESS=FILE")
    try:
        if Path(where).is_file():
            address = Keypair.from_bytes(bytes(json.loads(Path(where).read_text()))).pubkey()
        else:
            address = Pubkey.from_string(where)
        return Program(Path(file).stem, str(address), Path(file).read_bytes())
    except OSError as error:
        raise LocalnetError(f"cannot read {error.filename}: {error.strerror}") from None
    except (ValueError, TypeError):
        raise LocalnetError(
            f"--program names {where!r}; expected an address, 32 bytes in base58, or the file of a key pair"
        ) from None


async def _serve(
    name: str,
    host: str,
    port: int,
    hosts: Sequence[str],
    folder: Path | None,
    reset: bool,
    programs: Sequence[Program],
    slot_ms: int,
    frozen: bool,
    settings: dict[str, Any],
) -> None:
    from solders.pubkey import Pubkey

    from psyche_lightning_localnet.chain import FAUCET_LAMPORTS, LocalChain
    from psyche_lightning_localnet.clock import SlotClock
    from psyche_lightning_localnet.ledger import Ledger
    from psyche_lightning_localnet.server import LocalServer

    # Install the handlers before the server starts, and before its URL is printed.
    stop = asyncio.Event()
    _on_signal(stop.set)
    images = {Pubkey.from_string(program.address): program.image for program in programs}
    ledger = None if folder is None else Ledger(folder)
    try:
        clock = SlotClock(slot_ms, running=not frozen)
        if ledger is not None and reset:
            ledger.reset()
        chain = None if ledger is None else ledger.load(clock, **settings)
        if chain is None:
            chain = LocalChain(clock, programs=images, **settings)
        elif any([chain.add_program(address, image) for address, image in images.items()]):
            chain.advance()
        async with LocalServer(chain, host=host, port=port, ledger=ledger, hosts=hosts) as server:
            kept = "" if folder is None else f", kept in {folder}"
            print(
                f"{name} on {server.url} (websocket {server.ws_url}{kept}; Ctrl-C stops it)",
                f"  slot         {chain.slot}, {'frozen' if frozen else f'every {slot_ms} ms'}",
                *(f"  {program.name:<12} {program.address}" for program in programs),
                f"  faucet       {chain.faucet.pubkey()}, {FAUCET_LAMPORTS // 10**9:,} SOL at first",
                sep="\n",
                flush=True,
            )
            await stop.wait()
    finally:
        if ledger is not None:
            ledger.close()


def _on_signal(stop: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, stop)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))
