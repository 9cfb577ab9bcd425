"""``psyche checkpoints``: what lies at an address, whether it is whole, and copies of it elsewhere."""

from __future__ import annotations

from typing import Annotated

import typer


def checkpoints(
    address: Annotated[str, typer.Argument(help="A folder of checkpoints, or an address such as s3://bucket/run.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare its hash.")] = False,
    to: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Copy the newest one there; other addresses are copied first.")
    ] = None,
) -> None:
    """List the checkpoints of an address; copy the newest usable one to another."""
    import tempfile
    from pathlib import Path

    from rich.table import Table

    from psyche_lightning.checkpoints.address import open_place
    from psyche_lightning.checkpoints.folder import candidates, fetch
    from psyche_lightning.checkpoints.writer import copy_newest
    from psyche_lightning.cli.console import stdout
    from psyche_lightning.errors import CheckpointError

    found = candidates(open_place(address))
    table = Table("step", "epoch", "run", "files", "bytes", "parameters", *(["verified"] if verify else []))
    damaged = []
    with tempfile.TemporaryDirectory() as folder:
        for one in found:
            moment, manifest = one.manifest.moment, one.manifest
            row = [f"{moment.step:,}", f"{moment.epoch}", moment.run, f"{len(manifest.files)}", f"{manifest.size:,}"]
            if verify:
                try:
                    fetch(one, Path(folder))
                except CheckpointError as error:
                    damaged.append(str(error))
            whole = ["damaged" if damaged and damaged[-1].startswith(str(one)) else "yes"] if verify else []
            table.add_row(*row, manifest.digest[:12], *whole)
        stdout().print(table)
        if to is not None:
            print(f"copied to {copy_newest(address, to, Path(folder))}")
    if damaged:
        raise CheckpointError("\n".join(damaged))
