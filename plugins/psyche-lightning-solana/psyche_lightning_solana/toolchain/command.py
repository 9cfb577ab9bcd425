"""``psyche solana build``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import typer

from psyche_lightning_solana.toolchain import build as builder


def build(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; compare with the kept programs.")] = False,
    output: Annotated[
        Path, typer.Option("--output", help="Folder of the built programs.", show_default=False)
    ] = builder.PROGRAMS,
    sources: Annotated[
        Path, typer.Option("--sources", help="Folder of the C sources.", show_default=False)
    ] = builder.SOURCES,
) -> None:
    """Build the on-chain programs from their C sources, byte for byte the same everywhere.

    Needs Debian's clang-19. With --check, exit code 1 says that the kept programs are not what the sources make.
    """
    images = builder.build(sources.resolve())
    if check:
        builder.check(images, output)
    else:
        builder.write(images, output)
    for name, image in sorted(images.items()):
        print(f"{hashlib.sha256(image).hexdigest()}  {name}.so  {len(image):,} bytes")
    print(f"{'The same as' if check else 'Written to'} {output}.")
