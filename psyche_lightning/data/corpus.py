"""Finds and reads the files of a corpus, in a fixed order."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from psyche_lightning.data.named import ALL, of_split
from psyche_lightning.data.plain import matches, read_text, what_else
from psyche_lightning.errors import ConfigError, counted

STDLIB = "stdlib"
# First prose, then sources.
_SUFFIXES = """
txt text md rst tex org adoc
py pyi c h cc cpp cxx hpp rs go java kt scala swift js jsx ts tsx rb pl lua php sh sql r jl hs ml ex erl clj lisp
html css yaml yml toml ini cfg
"""
DEFAULT_PATTERNS = tuple(f"*.{suffix}" for suffix in _SUFFIXES.split())

# Tests are a third of the standard library and unlike the rest; the other folders do not belong to it.
_NOT_STDLIB_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
# These files describe one machine's build of Python.
_NOT_STDLIB_FILES = ("_sysconfigdata*", "sitecustomize.py", "usercustomize.py")


@dataclass(frozen=True)
class Corpus:
    """The content of a corpus.

    Attributes:
        texts: the contents of the files, in order.
        skipped: files in folders that are not text, in order.
    """

    texts: list[bytes]
    skipped: list[str]


def read_corpus(
    paths: Sequence[str], patterns: Sequence[str], max_bytes: int | None = None, split: str = ALL
) -> Corpus:
    """Read the files of a corpus, each once.

    Args:
        paths: files, folders, or `STDLIB` for the sources of the running Python's standard library; in this order.
        patterns: `fnmatch` patterns for files in folders. A pattern matches the file's name or, if it has a slash, the
            path below the folder (``*`` matches slashes, too). Files that ``paths`` names always belong.
        max_bytes: the most bytes to read, which may end within a file; None reads all.
        split: the split of the files in folders, by the names of files and folders.

    Returns:
        The texts. Files of a folder are sorted by their path below it, written with slashes, by code points. Hidden
        files and folders (``.git``), ``__pycache__``, and files that are not text are left out. Compressed files
            (``.gz``, ``.bz2``, ``.xz``) count as what they contain.

    Raises:
        ConfigError: a path does not exist, no file in a folder matches, a named file is not text or cannot be read, or
            all texts are empty.
    """
    texts: list[bytes] = []
    skipped: list[str] = []
    left = max_bytes
    for file, named in _find(paths, patterns, split).items():
        if left is not None and left <= 0:
            break
        data = read_text(file)
        if (other := what_else(data)) is not None:
            if named:
                raise ConfigError(f"The data file {str(file)!r} is not text, but {other}. Name a text file.")
            skipped.append(str(file))
            continue
        if left is not None:
            data = data[:left]
            left -= len(data)
        texts.append(data)
    if not any(texts):
        raise ConfigError(
            f"There is no text in {', '.join(paths)}: {len(texts)} empty and {len(skipped)} binary files match "
            f"{', '.join(patterns)}. Name another path, or set glob to other patterns."
        )
    return Corpus(texts, skipped)


def _find(paths: Sequence[str], patterns: Sequence[str], split: str) -> dict[Path, bool]:
    """The files of a corpus in order, and whether each is named in ``paths``."""
    found: dict[Path, bool] = {}
    for path in paths:
        place = Path(path).expanduser()
        if path == STDLIB:
            inside = _standard_library()
        elif place.is_file():
            found[place] = True
            continue
        elif place.is_dir():
            inside = _folder(place, patterns, split)
        else:
            raise ConfigError(
                f"The data path {path!r} does not exist (looked for {place.absolute()}). Expected a text file, a "
                f"folder, a list of these, or {STDLIB!r} for the sources of Python's standard library."
            )
        for file in inside:
            found.setdefault(file, False)
    return found


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in _walk(root, frozenset(_NOT_STDLIB_FOLDERS)) if fnmatchcase(file, "*.py")]
    kept = [file for file in files if not any(fnmatchcase(file, pattern) for pattern in _NOT_STDLIB_FILES)]
    if not kept:
        raise ConfigError(
            f"This Python has no sources of its standard library in {str(root)!r}. Name a folder of text as path."
        )
    return [root / file for file in sorted(kept)]


def _folder(root: Path, patterns: Sequence[str], split: str) -> list[Path]:
    def belongs(file: str) -> bool:
        name = file.rpartition("/")[2]
        return any(matches(file if "/" in pattern else name, [pattern]) for pattern in patterns)

    files = sorted(_walk(root, frozenset()))
    kept = [file for file in files if belongs(file)]
    if not kept:
        raise ConfigError(
            f"There is no text in the folder {str(root)!r}: none of its {counted(len(files), 'file')} matches "
            f"{', '.join(patterns)}. Name another path, or set glob to other patterns."
        )
    return [root / file for file in of_split(root, kept, split)]


def _walk(root: Path, skipped: frozenset[str]) -> Iterator[str]:
    """The files below ``root``, as relative paths with slashes, in any order."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in {*skipped, "__pycache__"}]
        below = Path(folder).relative_to(root)
        yield from ((below / name).as_posix() for name in files if not name.startswith("."))
