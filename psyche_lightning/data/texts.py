"""Text files for ``psyche data tokenize``: finds them in a fixed order, and reads their texts one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from psyche_lightning.data.named import ALL, of_split
from psyche_lightning.data.plain import COMPRESSED, explained, matches, open_text, read_text, suffix, what_else
from psyche_lightning.errors import ConfigError, counted

MAX_LINE = 64 << 20
"""The most bytes of a line in a ``.jsonl`` file."""
_BEGINNING = 1 << 16


def find_texts(paths: Sequence[Path], globs: Sequence[str], split: str = ALL) -> list[Path]:
    """The files in the order of ``paths``, those in folders sorted by their path below it; each once.

    Args:
        paths: files and folders. Files that are named here always belong.
        globs: patterns for names of files in folders; hidden files and folders are left out.
        split: the split of the files in folders, by the names of files and folders.

    Raises:
        ConfigError: a path does not exist, no file in a folder matches, or there is no such split.
    """
    found: dict[Path, None] = {}
    for path in paths:
        inside = [path]
        if path.is_dir():
            below = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
            kept = [name for name in below if not any(part.startswith(".") for part in name.split("/"))]
            fitting = [name for name in kept if matches(name.rpartition("/")[2], globs)]
            if not fitting:
                raise ConfigError(
                    f"There is no text in the folder {str(path)!r}: none of its {counted(len(kept), 'file')} matches "
                    f"{', '.join(globs)}; give other patterns with --glob."
                )
            inside = [path / name for name in of_split(path, fitting, split)]
        elif not path.is_file():
            raise ConfigError(f"The text {str(path)!r} does not exist (looked for {path.absolute()}).")
        found.update(dict.fromkeys(inside))
    return list(found)


def check_texts(files: Sequence[Path]) -> None:
    """Look at the beginning of each file.

    Raises:
        ConfigError: a file is not text.
    """
    for file in files:
        _check(file, read_text(file, _BEGINNING))


def read_texts(file: Path, column: str) -> Iterator[bytes]:
    """Yields the texts of a file: one, or one for each line of a ``.jsonl`` file. It may be compressed.

    Args:
        file: a file in UTF-8.
        column: the key of the text in each line.

    Raises:
        ConfigError: the file cannot be read or is not text, or a line is not an object with such a text.
    """
    if suffix(file) != ".jsonl":
        text = read_text(file)
        _check(file, text)
        yield text
        return
    with explained(file), open_text(file) as lines:
        number = 0
        while line := lines.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise ConfigError(f"Line {number} of {file} is longer than {MAX_LINE} bytes.")
            if line.strip():
                yield _text(line, column, f"Line {number} of {file}")


def _check(file: Path, data: bytes) -> None:
    if (other := what_else(data)) is not None:
        raise ConfigError(
            f"The file {str(file)!r} is not text, but {other}. Expected text in UTF-8, also compressed "
            f"({', '.join(COMPRESSED)}). Leave the file out (--glob); the data provider 'datasets' reads parquet, "
            "arrow, csv and json."
        )


def _text(line: bytes, column: str, where: str) -> bytes:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}.") from error
    text = row.get(column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        keys = f"it has the keys {', '.join(row)}" if isinstance(row, dict) else "it is not an object"
        raise ConfigError(f"{where} has no text under {column!r}: {keys}. Give the right key with --column.")
    return text.encode("utf-8", errors="replace")
