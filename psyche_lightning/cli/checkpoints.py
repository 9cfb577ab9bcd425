"""``psyche checkpoints``: lists, checks and copies the checkpoints of an address."""

from __future__ import annotations

from typing import Annotated

import typer


def checkpoints(
    address: Annotated[
        str, typer.Argument(help="A node's folder, one of checkpoints, or an address such as s3://bucket/run.")
    ],
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare its hash.")] = False,
    to: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Copy the newest usable checkpoint to this address.")
    ] = None,
) -> None:
    """List the checkpoints of an address, check them, or copy the newest usable one.

    Examples:
        psyche checkpoints psyche-demo/node-0 --verify
        psyche checkpoints s3://bucket/run --to copies
    """
    import tempfile
    from pathlib import Path

    from rich.table import Table

    from psyche_lightning.checkpoints.address import open_storage
    from psyche_lightning.checkpoints.folder import complete_checkpoints, fetch, scan
    from psyche_lightning.checkpoints.manifest import NAME, folder_name
    from psyche_lightning.checkpoints.writer import FOLDER, copy_newest
    from psyche_lightning.cli.console import say, stdout
    from psyche_lightning.errors import CheckpointError

    if (Path(address) / "node.key").is_file():
        address = str(Path(address) / FOLDER)
    storage = open_storage(address)
    found = complete_checkpoints(storage)
    table = Table("step", "epoch", "run", "files", "bytes", "parameters", *(["verified"] if verify else []))
    damaged = []
    if verify and found[0].path:  # an address of many; those whose manifest cannot be read are not among the found
        read = {one.manifest.metadata.step for one in found}
        unread = sorted(step for step, whole in scan(storage).items() if whole and step not in read)
        damaged += [f"{storage.name(folder_name(step))} is damaged: its {NAME} cannot be read" for step in unread]
    with tempfile.TemporaryDirectory() as folder:
        for one in found:
            metadata, manifest = one.manifest.metadata, one.manifest
            row = [
                f"{metadata.step:,}",
                f"{metadata.epoch}",
                metadata.run,
                f"{len(manifest.files)}",
                f"{manifest.size:,}",
            ]
            if verify:
                try:
                    fetch(one, Path(folder))
                except CheckpointError as error:
                    damaged.append(str(error))
            whole = ["damaged" if damaged and damaged[-1].startswith(str(one)) else "yes"] if verify else []
            table.add_row(*row, manifest.digest[:12], *whole)
        stdout().print(table)
        if to is not None:
            say(f"copied to {copy_newest(address, to, Path(folder))}")
    if damaged:
        raise CheckpointError("\n".join(damaged))
