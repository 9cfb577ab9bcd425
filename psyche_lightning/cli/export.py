"""``psyche export``: writes a checkpoint in another format, for other programs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A folder in Hugging Face format, a folder of checkpoints, or an address."),
    ],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="The format; `psyche plugins` lists them.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The folder to write, CHECKPOINT-FORMAT by default.")
    ] = None,
) -> None:
    """Write a checkpoint, by default the newest, in a format that other programs load.

    Examples:
        psyche export psyche-demo/nodes/0/checkpoint --to deepseek_v3 --output exported
    """
    from psyche_lightning.checkpoints.folder import local_model
    from psyche_lightning.cli.console import say
    from psyche_lightning.errors import CheckpointError, ConfigError
    from psyche_lightning.plugins import load_plugins

    write = load_plugins().exports()[to]
    source = Path(local_model(checkpoint)).expanduser()
    if not (source / "config.json").is_file():
        raise ConfigError(f"{checkpoint!r} is not a checkpoint: expected a folder in Hugging Face format.")
    target = output or Path(f"{Path(checkpoint).name}-{to}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{str(target)!r} exists already; name a new folder with --output.")
    fresh = target.with_name(f".{target.name}.new")  # what is interrupted leaves nothing that looks whole
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        write(source, fresh)
        if target.exists():
            target.rmdir()
        fresh.replace(target)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    say(f"exported to {target}")
