"""Opens data sets of the ``datasets`` library: files, folders, saved ones and those of the Hub, and parts of them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from glob import escape, glob
from pathlib import Path
from typing import Any

from psyche_lightning.data.damage import sound_rows
from psyche_lightning.data.options import strings
from psyche_lightning.errors import ConfigError, needing

logger = logging.getLogger(__name__)

_BUILDERS: dict[str, tuple[str, dict[str, str]]] = {
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".txt": ("text", {}),
}
"""The library's builder for the files of a suffix, and its options."""
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
_WHOLE = sys.maxsize


@dataclass
class DataSet:
    """A part of a data set, on this machine or on the Hub. The options of every provider of its rows; opened once.

    Args:
        path: a folder of ``save_to_disk`` or as on the Hub, a file, a pattern, or a list of files of jsonl, json, csv,
            tsv, parquet, arrow or txt (also compressed).
        dataset: instead of ``path``, the name of a data set on the Hugging Face Hub.
        name: its configuration, if it has several.
        revision: its commit on the Hub, so that all nodes use the same.
        split: the part, as for ``load_dataset``: ``train``, ``train[:90%]``, ``train+validation``. Files that ``path``
            names are all ``train``.
        data_files: patterns of files below the folder or in the data set, or such patterns for each split.
    """

    path: str | Sequence[str] | None = None
    dataset: str | None = None
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    data_files: Any = None
    _rows: Any = field(default=None, init=False, repr=False)

    @classmethod
    def options(cls) -> list[str]:
        """The names of its options."""
        return [one.name for one in fields(cls) if one.init]

    @property
    def where(self) -> str:
        """Where the rows come from, for messages."""
        return str(self.dataset) if self.path is None else ", ".join(strings("path", self.path))

    def rows(self, *, streaming: bool = False) -> Any:
        """The rows, as a data set of the ``datasets`` library; nothing of this machine is copied to its cache.

        Args:
            streaming: whether those of the Hub are read as they are needed.

        Raises:
            ConfigError: both or none of ``path`` and ``dataset`` are given, or the data set or the part does not exist
                or cannot be opened.
        """
        if self._rows is None:
            self._rows = self._open(streaming)
        return self._rows

    def _open(self, streaming: bool) -> Any:
        if (self.path is None) == (self.dataset is None):
            raise ConfigError(
                "The data provider 'datasets' needs either path (on this machine) or dataset (a name on the Hugging "
                f"Face Hub); it got {'neither' if self.path is None else 'both'}."
            )
        if self.path is not None:
            return _open_local(self.path, self.name, self.split, self.data_files)
        datasets = library()
        try:
            return datasets.load_dataset(
                self.dataset, self.name, split=self.split, revision=self.revision, streaming=streaming,
                data_files=self.data_files,
            )  # fmt: skip
        except Exception as error:  # as below
            raise ConfigError(
                f"The data set {self.dataset!r} (configuration {self.name or 'default'}, split {self.split!r}, "
                f"revision {self.revision or 'newest'}) cannot be opened: {type(error).__name__}: {error}. Check the "
                "names and the network; give path instead for a data set on this machine's disk."
            ) from error


def _open_local(path: str | Sequence[str], name: str | None, split: str, data_files: Any) -> Any:
    places = strings("path", path)
    where = ", ".join(places)
    folder = Path(places[0]).expanduser()
    try:
        if len(places) > 1 or not folder.is_dir():
            if data_files is not None or name is not None:
                raise ConfigError(f"data_files and name choose within a folder, but path is {where!r}.")
            found: Mapping[str, Any] = _files(places)
        else:
            found = _folder(folder, name, data_files)
    except ConfigError:
        raise
    except Exception as error:  # the library's errors have no common type
        reason = "it has no rows" if isinstance(error, StopIteration) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"The data set {where!r} cannot be opened: {reason}.") from error
    return part(found, split, where)


def library() -> Any:
    """The ``datasets`` library.

    Raises:
        ConfigError: it is not installed.
    """
    with needing("datasets", "data", "The data provider 'datasets'"):
        import datasets
    return datasets


def part(splits: Mapping[str, Any], split: str, where: str) -> Any:
    """The part of a data set that ``split`` describes in the library's notation.

    A slice of a data set without a known length (files that are read as they come) first counts its rows.

    Args:
        splits: the data set's splits.
        split: such as ``train``, ``train[:90%]``, ``train[100:]+test``, or ``all``.
        where: where the data comes from, for messages.

    Raises:
        ConfigError: it describes none, or nothing.
    """
    datasets = library()
    wanted = "+".join(splits) if split == "all" else split
    lengths = _Lengths(splits) if "[" in str(wanted) else dict.fromkeys(splits, _WHOLE)
    try:
        slices = datasets.ReadInstruction.from_spec(wanted).to_absolute(lengths)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"The split {split!r} of {where} does not exist ({error}). Splits: {', '.join(splits)}; a part is written "
            "as train[:90%] or train[100:], several as train+validation. Set data.config.split."
        ) from error
    parts = [_slice(splits[one.splitname], one.from_, one.to) for one in slices if one.from_ < one.to]
    if not parts:
        raise ConfigError(f"The split {split!r} of {where} has no rows.")
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


class _Lengths(Mapping[str, int]):
    """The rows of each split, counted when they are asked for."""

    def __init__(self, splits: Mapping[str, Any]) -> None:
        self._splits = splits
        self._counted: dict[str, int] = {}

    def __getitem__(self, name: str) -> int:
        if name not in self._counted:
            split = self._splits[name]
            self._counted[name] = len(split) if hasattr(split, "__len__") else _count(split)
        return self._counted[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._splits)

    def __len__(self) -> int:
        return len(self._splits)


def _count(rows: Any) -> int:
    try:
        return sum(len(next(iter(batch.values()))) for batch in rows.iter(batch_size=1000))
    except Exception as error:  # as above
        raise ConfigError(f"The rows cannot be counted for the split: {type(error).__name__}: {error}.") from error


def _slice(rows: Any, first: int, end: int) -> Any:
    if end == _WHOLE:
        return rows
    return rows.skip(first).take(end - first)


def _files(places: Sequence[str]) -> Mapping[str, Any]:
    """The split of files: as for ``load_dataset``, they are ``train``, whatever their names are."""
    found: dict[Path, None] = {}
    for place in places:
        path = Path(place).expanduser()
        inside = [path] if path.is_file() else [Path(file) for file in sorted(glob(str(path), recursive=True))]
        if not inside:
            raise ConfigError(
                f"The data path {place!r} does not exist (looked for {path.absolute()}). Expected a folder written by "
                f"save_to_disk, a folder as on the Hub, or files of {', '.join(_BUILDERS)} (also compressed)."
            )
        found.update(dict.fromkeys(inside))
    builders = {_BUILDERS.get(_kind(file) or "", ("", {}))[0] for file in found}
    if len(builders) != 1 or "" in builders:
        suffixes = ", ".join(sorted({file.suffix or file.name for file in found}))
        raise ConfigError(
            f"The data path {', '.join(places)!r} has files of {suffixes}, expected files of one kind with one of the "
            f"suffixes {', '.join(_BUILDERS)} (also compressed: {', '.join(_COMPRESSED)})."
        )
    options = _BUILDERS[_kind(next(iter(found))) or ""][1]
    if builders == {"parquet"}:
        return {"train": _parquet([str(file.absolute()) for file in found])}
    files = [escape(str(file.absolute())) for file in found]
    opened: Mapping[str, Any] = library().load_dataset(builders.pop(), data_files=files, streaming=True, **options)
    return opened


def _parquet(files: Sequence[str]) -> Any:
    """The rows of parquet files, without damaged row groups, with which the library would fail."""
    return library().IterableDataset.from_generator(sound_rows, gen_kwargs={"files": list(files)})


def _folder(folder: Path, name: str | None, data_files: Any) -> Mapping[str, Any]:
    """The splits of a folder, as the library finds them in names of files and folders, and in README.md."""
    datasets = library()
    if (folder / _SAVED_SPLITS).is_file():
        saved: Mapping[str, Any] = datasets.load_from_disk(str(folder))
        return saved
    if (folder / _SAVED).is_file():
        alone = datasets.load_from_disk(str(folder))
        split = str(alone.split or "train")
        return {split if split.isidentifier() else "train": alone}
    present = [file for file in folder.rglob("*") if _kind(file) is not None and not _hidden(file, folder)]
    if not present:
        raise ConfigError(
            f"The data path {str(folder)!r} has no data files, expected files with one of the suffixes "
            f"{', '.join(_BUILDERS)} (also compressed: {', '.join(_COMPRESSED)})."
        )
    builder = datasets.load_dataset_builder(str(folder.absolute()), name, data_files=data_files)
    found: Mapping[str, Any] = builder.as_streaming_dataset()
    used = {Path(file).resolve() for files in (builder.config.data_files or {}).values() for file in files}
    unused = sorted(file.relative_to(folder).as_posix() for file in present if file.resolve() not in used)
    if unused and data_files is None and len(builder.builder_configs) < 2:
        logger.warning(
            "%s: the splits %s do not contain %d of the data files, such as %s (the splits follow from the names of "
            "files and folders, as for load_dataset)", folder, ", ".join(found), len(unused), unused[0],
        )  # fmt: skip
    if any(kind.__name__ == "Parquet" for kind in type(builder).__mro__):
        return {split: _parquet(builder.config.data_files[split]) for split in found}
    return found


def _kind(file: Path) -> str | None:
    """The suffix that says how a file is read; None for files that are not data."""
    suffix = Path(file.stem).suffix if file.suffix in _COMPRESSED else file.suffix
    return suffix if suffix in _BUILDERS else None


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "__")) for part in file.relative_to(folder).parts) or file.name in (
        "config.json", "dataset_info.json", "dataset_infos.json",
    )  # fmt: skip
