"""The local chain with our programs on it. Only this module needs the chain's own distribution."""

from __future__ import annotations

import functools
from typing import Any

from psyche_lightning.errors import ConfigError, PsycheError
from psyche_lightning_solana import programs
from psyche_lightning_solana.client.cluster import local_program

__all__ = ["LocalChain", "SlotClock", "local_chain", "localnet"]

try:
    from psyche_lightning_localnet import LocalChain, LocalnetError, SlotClock
    from psyche_lightning_localnet import cli as _cli
except ModuleNotFoundError as _missing:
    if (_missing.name or "").partition(".")[0] != "psyche_lightning_localnet":
        raise
    raise ConfigError(
        "the local chain is a separate distribution and is not installed: pip install psyche-lightning-localnet"
    ) from None


def local_chain(clock: SlotClock, **settings: Any) -> LocalChain:
    """A new chain with our programs at the addresses that clients use on a local chain.

    Args:
        clock: its slots and time.
        settings: further arguments of ``LocalChain``.
    """
    images = {local_program(name).pubkey(): programs.image(name) for name in programs.NAMES}
    return LocalChain(clock, programs=images, **settings)


def _ours() -> list[_cli.Program]:
    return [_cli.Program(name, str(local_program(name).pubkey()), programs.image(name)) for name in programs.NAMES]


_command = _cli.command("psyche solana localnet", _ours)


@functools.wraps(_command)
def localnet(**given: Any) -> None:
    """The command ``psyche solana localnet``; typer reads the wrapped function's options."""
    try:
        _command(**given)
    except LocalnetError as error:
        raise PsycheError(str(error)) from error
