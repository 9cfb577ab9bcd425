"""``python -m sbf_toolchain`` in the folder ``program``: builds the on-chain programs, or checks the kept ones."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from sbf_toolchain import build as builder
from sbf_toolchain.elf import ToolchainError


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, or check; the exit code is 1 when the kept programs are not what the sources make."""
    parser = argparse.ArgumentParser(
        "python -m sbf_toolchain",
        description="Build the on-chain programs from their C sources, byte for byte the same everywhere. Needs "
        "Debian's clang-19.",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; compare with the kept programs")
    parser.add_argument("--output", type=Path, default=builder.PROGRAMS, help="folder of the built programs")
    parser.add_argument("--sources", type=Path, default=builder.SOURCES, help="folder of the C sources")
    given = parser.parse_args(arguments)
    try:
        images = builder.build(given.sources.resolve())
        if given.check:
            builder.check(images, given.output)
        else:
            builder.write(images, given.output)
    except ToolchainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, image in sorted(images.items()):
        print(f"{hashlib.sha256(image).hexdigest()}  {name}.so  {len(image):,} bytes")
    print(f"{'The same as' if given.check else 'Written to'} {given.output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
