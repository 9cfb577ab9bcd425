"""``psyche solana keygen``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def keygen(file: Annotated[Path, typer.Argument(help="Where to; a file that exists is never overwritten.")]) -> None:
    """Write a new wallet to a file, in solana-cli's form, readable by you alone."""
    from psyche_lightning_solana.client.wallet import PATH_VARIABLE, create

    wallet = create(file)
    print(f"{wallet.public}\nkept in {file}; use it with {PATH_VARIABLE}={file}")
