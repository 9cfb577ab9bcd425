"""Splits by the names of files in a folder, as the ``datasets`` library resolves them, for other files."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from psyche_lightning.errors import ConfigError

logger = logging.getLogger(__name__)

TRAIN = "train"
ALL = "all"
_WORDS = {
    TRAIN: "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_APART = "[-._ 0-9]"
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")


def splits_of(names: Sequence[str]) -> dict[str, list[str]]:
    """The names of each split, in their order: ``train-0.bin``, ``my_val.bin``, ``extra-00000-of-00002.parquet``.

    Folders come first (``test/a.txt``). Without such names all are ``train``; names that belong to no split are left
    out.

    Args:
        names: names of files, or paths with slashes below a folder.
    """
    shards = {name: match[1] for name in names if (match := _SHARD.match(name))}
    if shards:
        return {split: [name for name in shards if shards[name] == split] for split in sorted(set(shards.values()))}
    for end in (f"(?:{_APART}[^/]*)?/", f"{_APART}[^/]*$"):  # of a folder, of a file
        found = {
            split: [name for name in names if re.search(f"(?:^|/|{_APART})(?:{words}){end}", name)]
            for split, words in _WORDS.items()
        }
        if named := {split: those for split, those in found.items() if those}:
            return named
    return {TRAIN: list(names)}


def of_split(folder: Path, names: Sequence[str], split: str) -> list[str]:
    """The names of one split; a warning says what is in none.

    Args:
        folder: where the files are, for messages.
        names: their names.
        split: a split, or ``all`` for every file.

    Raises:
        ConfigError: there is no such split.
    """
    splits = splits_of(names)
    if split == ALL:
        if len(splits) > 1 and sum(map(len, splits.values())) >= len(names):
            logger.warning(
                "%s: the names of the files tell the splits %s, and all of them are taken; set split to one of them",
                folder, ", ".join(splits),
            )  # fmt: skip
        return list(names)
    if split not in splits:
        raise ConfigError(
            f"The split {split!r} of {folder} does not exist. Splits: {', '.join(splits)}, by the names of the files; "
            f"{ALL!r} is all of them. Set split to one of these."
        )
    unused = [name for name in names if not any(name in those for those in splits.values())]
    if unused:
        logger.warning(
            "%s: the splits %s do not contain %d of the files, such as %s", folder, ", ".join(splits), len(unused),
            unused[0],
        )  # fmt: skip
    return splits[split]
