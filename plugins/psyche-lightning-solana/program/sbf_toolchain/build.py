"""Builds the programs from their C sources: the same bytes on every machine with the same clang.

The flags are fixed, paths are relative, the sources are taken in sorted order and nothing records a time. Other
versions of clang write other instructions, so the version is fixed too; Debian 12 and 13 have it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from sbf_toolchain.elf import ToolchainError
from sbf_toolchain.linker import Program, link

CLANG = "clang-19"
CLANG_VERSION = "19.1.7"
SUMS = "SHA256SUMS"

# Where the sources lie in a checkout, and where the built programs are kept.
SOURCES = Path(__file__).parents[1]
PROGRAMS = SOURCES.parent / "psyche_lightning_solana" / "programs"

# Program to the files and folders of *.c under `program/` that it consists of; what it does not use is not linked.
PARTS = {
    "coordinator": ("common", "machine", "coordinator"),
    "authorizer": ("common", "authorizer"),
    "treasurer": ("common", "coordinator/arguments.c", "treasurer"),
}

FLAGS = (
    *("-target", "bpfel", "-mcpu=v2", "-std=c11", "-O2"),
    *("-ffreestanding", "-fno-builtin", "-nostdlibinc", "-I."),
    *("-ffunction-sections", "-fdata-sections"),
    *("-Wall", "-Wextra", "-Wdate-time", "-Werror"),
    *("-mllvm", "-bpf-stack-size=4096"),
)


class BuildError(ToolchainError):
    """The programs cannot be built, or are not what their sources say."""


def find_clang(name: str = CLANG) -> str:
    """The compiler's path.

    Raises:
        BuildError: it is not installed, or of another version.
    """
    path = shutil.which(name)
    install = f"On Debian and Ubuntu: apt-get install {CLANG}."
    if path is None:
        raise BuildError(
            f"The compiler {name!r} is not installed; the programs are built with {CLANG_VERSION}. {install}"
        )
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"clang version (\S+)", said)
    version = found[1] if found else "unknown"
    if version != CLANG_VERSION:
        raise BuildError(
            f"{path} is clang {version}; the programs are built with {CLANG_VERSION}, since other versions write other "
            f"bytes. {install}"
        )
    return path


def compile_program(name: str, sources: Path = SOURCES, clang: str | None = None) -> Program:
    """Compile and link one program.

    Args:
        name: a key of :data:`PARTS`.
        sources: the folder ``program`` of a checkout.
        clang: the compiler's path; found if not given.

    Raises:
        BuildError: there are no sources or no compiler, or the compiler refuses.
        LinkError: the objects do not make a program.
    """
    found = (sources.glob(part if part.endswith(".c") else f"{part}/*.c") for part in PARTS[name])
    files = sorted(file.relative_to(sources) for part in found for file in part)
    if not files:
        raise BuildError(
            f"There are no sources of the program {name!r} in {sources}. Name the repository's folder `program` with "
            "--sources."
        )
    compiler = clang or find_clang()
    # Nothing else: variables such as CPATH change what a compiler finds.
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for number, file in enumerate(files):
            target = Path(folder, f"{number}.o")
            command = [compiler, *FLAGS, f"-ffile-prefix-map={sources}=.", "-c", str(file), "-o", str(target)]
            done = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise BuildError(f"clang refuses {sources / file}:\n{done.stderr.strip()}")
            objects.append((file.as_posix(), target.read_bytes()))
    return link(objects)


def build(sources: Path = SOURCES) -> dict[str, bytes]:
    """Build every program.

    Returns:
        Program name to the bytes of its shared object.

    Raises:
        BuildError: as :func:`compile_program`.
        LinkError: as :func:`compile_program`.
    """
    clang = find_clang()
    return {name: compile_program(name, sources, clang).image for name in PARTS}


def write(images: Mapping[str, bytes], folder: Path) -> None:
    """Write ``<name>.so`` for each program, and their digests in the form of ``sha256sum``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        (folder / f"{name}.so").write_bytes(image)
    (folder / SUMS).write_text(sums(images))


def check(images: Mapping[str, bytes], folder: Path = PROGRAMS) -> None:
    """Compare built programs with those that are kept.

    Raises:
        BuildError: names each that differs or is missing.
    """
    wrong = []
    for name, image in images.items():
        file = folder / f"{name}.so"
        kept = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else "missing"
        built = hashlib.sha256(image).hexdigest()
        if kept != built:
            wrong.append(f"{file}: kept {kept}, built {built}")
    listed = folder / SUMS
    if not wrong and (not listed.exists() or listed.read_text() != sums(images)):
        wrong.append(f"{listed} does not list these programs")
    if wrong:
        raise BuildError(
            "The kept programs are not what the sources make:\n  "
            + "\n  ".join(wrong)
            + "\nIf the sources are right, write them anew with `python -m sbf_toolchain`."
        )


def sums(images: Mapping[str, bytes]) -> str:
    """One line per program: its sha256, two spaces, its file name."""
    return "".join(f"{hashlib.sha256(image).hexdigest()}  {name}.so\n" for name, image in sorted(images.items()))
