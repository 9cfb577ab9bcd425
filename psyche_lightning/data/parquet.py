"""The provider ``parquet``: prepared samples with labels and positions (Psyche's preprocessed.rs)."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from psyche_lightning.data.client import FetchOptions
from psyche_lightning.data.damage import is_damage
from psyche_lightning.data.named import TRAIN, of_split
from psyche_lightning.data.options import strings, whole
from psyche_lightning.data.order import in_passes, make_order, psyche_seed
from psyche_lightning.data.packed import intervals
from psyche_lightning.data.tokenizer import Encoder
from psyche_lightning.data.tokens import vocabulary
from psyche_lightning.errors import ConfigError, DataError, needing

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label without a loss."""
LABELS, POSITIONS, LENGTHS, MASK = "labels", "position_ids", "sequence_lengths", "attention_mask"
_INPUTS = ("inputs", "input_ids")
_EDGE = 1 << 16
_POSSIBLE = 1 << 31

Rows = dict[str, NDArray[np.int64]]


class _DamagedError(Exception):
    """A row group that will never be readable."""


class RowGroup(NamedTuple):
    """A row group, the unit in which parquet files are read.

    Attributes:
        file: number of its file.
        number: its number in the file.
        rows: number of rows.
    """

    file: int
    number: int
    rows: int


class PreparedData:
    """Rows of parquet files as samples: ``inputs`` (or ``input_ids``), and any ``labels`` and ``position_ids``.

    Each is a list of ``seq_len`` integers. What ``attention_mask`` marks as padding, at the end of a row, is not
    trained. If there are no ``position_ids`` but ``sequence_lengths`` (the lengths of the texts in a row), positions
    count from 0 in each text. The first token of each text but the row's first has the
    label -100, because the token before it belongs to another text. The last used row groups are kept, up to
    ``fetch.cache_mb``.

    Args:
        seed: the run's seed, for ``shuffle: true``.
        seq_len: tokens of a sample, at least 2, and of every row.
        path: a parquet file, a folder of them (in the order of their names) or with them in ``data``, or a list.
        split: the split of the files in folders, by their names; ``all`` for all. Without such names, all are
            ``train``.
        vocab_size: number of token ids; None for the tokenizer's.
        tokenizer: the tokenizer that made the samples, to save with checkpoints: ``"bytes"`` or a path.
        shuffle: true for an order by the run's seed, another one in each pass; ``"once"`` for the same in each pass;
            false for the order of the rows; or the 32 numbers of one of Psyche's
            seeds. A shuffled order reads row groups again and again unless all fit into memory.
        validation_samples: number of rows to hold out, at the end.
        fetch: see :class:`~psyche_lightning.data.client.FetchOptions`.

    Attributes:
        seq_len: tokens of a sample.
        vocab_size: number of token ids.
        fingerprint: lengths, beginnings and ends of the files.

    Raises:
        ConfigError: an option is wrong, or ``path`` does not lead to such rows.
    """

    def __init__(
        self,
        seed: int,
        seq_len: int,
        *,
        path: str | list[str],
        split: str = TRAIN,
        vocab_size: int | None = None,
        tokenizer: str | None = None,
        shuffle: Any = False,
        validation_samples: int = 0,
        fetch: Any = None,
    ) -> None:
        self.seq_len = whole("seq_len", seq_len, least=2)
        psyche_seed(shuffle)
        self._memory = FetchOptions.of(fetch).cache_mb << 20
        self._encoder = None if tokenizer is None else Encoder(tokenizer)
        self.vocab_size = vocabulary(vocab_size, self._encoder)
        places = strings("path", path)
        self._source = ", ".join(places)
        self._files = _find(places, split)
        self._looks = {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in self._files}
        self._damaged: set[int] = set()
        self._columns, self._groups = self._look()
        self.fingerprint = _fingerprint(self._files)
        self._ends = np.cumsum([group.rows for group in self._groups], dtype=np.int64)
        rows = int(self._ends[-1]) if self._groups else 0
        held_out = whole("validation_samples", validation_samples, least=0)
        self._length = rows - held_out
        if self._length < 1:
            raise ConfigError(
                f"There is too little data in {self._source}: {rows} rows, of which {held_out} are for validation; "
                "expected at least one more for training."
            )
        self._rows = rows
        self._order = make_order(self._length, shuffle=shuffle, seed=seed)
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Rows] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def __len__(self) -> int:
        """The number of training samples."""
        return self._length

    @property
    def tokenizer(self) -> Any:
        """The tokenizer as a ``transformers`` object, or None if no option names it."""
        return None if self._encoder is None else self._encoder.tokenizer

    @property
    def end_of_text(self) -> int | None:
        """The tokenizer's end-of-text id; None if it has none, or no option names it."""
        return None if self._encoder is None else self._encoder.end

    def samples(self, start: int, stop: int) -> list[dict[str, torch.Tensor]]:
        """Returns the training samples with ids from ``start`` up to, but not including, ``stop``; passes follow.

        Returns:
            For each id ``input_ids``, ``labels`` and, if the rows have positions, ``position_ids``, int64 of shape
            [seq_len].

        Raises:
            DataError: some samples are not available; it has their ids.
        """
        rows = in_passes(self._order, self._length, start, stop)
        return self._read(rows, range(start, stop), "samples")

    def validation(self) -> list[dict[str, torch.Tensor]]:
        """Returns the held-out rows, in the same form as training samples.

        Raises:
            DataError: some rows are not available.
        """
        return self._read(range(self._length, self._rows), range(self._rows - self._length), "validation samples")

    # --- reading ----------------------------------------------------------------------------------------------------

    def _read(self, rows: Sequence[int], ids: range, what: str) -> list[dict[str, torch.Tensor]]:
        import torch

        found: list[dict[str, torch.Tensor]] = []
        failed: dict[int, DataError] = {}
        lost: list[int] = []
        for one, row in zip(ids, rows, strict=True):
            number = int(np.searchsorted(self._ends, row, side="right"))
            try:
                if number in failed:
                    raise failed[number]
                group, place = self._row(row, number)
            except DataError as error:
                failed[number] = error
                lost.append(one)
                continue
            if group is not None:
                found.append({name: torch.from_numpy(values[place].copy()) for name, values in group.items()})
        if failed:
            reasons = "; ".join(dict.fromkeys(map(str, failed.values())))
            raise DataError(
                f"{what} {intervals(lost)} of {self._source} are not available: {reasons}",
                ids=lost,
                lasting=any(error.lasting for error in failed.values()),
            )
        return found

    def _row(self, row: int, number: int) -> tuple[Rows | None, int]:
        """The row group of a row and the row's place in it.

        If the group is damaged, a training row is replaced by one of the next sound group, the same on every node that
        has these files. A row for validation has no replacement, and no group.
        """
        group = self._group(number)
        if group is not None:
            return group, row - self._start(number)
        if row >= self._length:
            return None, 0
        for step in range(1, len(self._groups)):
            other = (number + step) % len(self._groups)
            usable = min(int(self._ends[other]), self._length) - self._start(other)
            if usable > 0 and (group := self._group(other)) is not None:
                return group, (row - self._start(number)) % usable
        raise DataError("all row groups are damaged", lasting=True)

    def _start(self, number: int) -> int:
        return int(self._ends[number - 1]) if number else 0

    def _group(self, number: int) -> Rows | None:
        """The rows of a group; None if it is damaged."""
        with self._lock:
            if number in self._damaged:
                return None
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
            group = self._groups[number]
            try:
                self._kept[number] = self._load(group)
            except _DamagedError as error:
                self._damaged.add(number)
                logger.warning(
                    "row group %d of %s is damaged (%s) and left out for good: for its %d rows, rows of the next "
                    "row group are trained", group.number, self._files[group.file], error, group.rows,
                )  # fmt: skip
                return None
            while len(self._kept) > 1 and sum(map(_size, self._kept.values())) > self._memory:
                self._kept.popitem(last=False)
            return self._kept[number]

    def _load(self, group: RowGroup) -> Rows:
        """Read and check one row group."""
        path = self._files[group.file]
        try:
            file = _library().ParquetFile(path, page_checksum_verification=True)
            table = file.read_row_group(group.number, columns=list(self._columns))
        except Exception as error:  # pyarrow raises errors of its own and of the system
            self._judge(path, error)
            raise DataError(f"row group {group.number} of {path} cannot be read ({error})") from error
        where = f"row group {group.number} of {path}"
        rows: Rows = {}
        for name in self._columns:
            lengths, values = _lists(table.column(name), where, name)
            if name == LENGTHS:
                rows["position_ids"] = self._positions(lengths, values, where)
                continue
            if len(lengths) != group.rows or (lengths != self.seq_len).any():
                wrong = int(lengths[lengths != self.seq_len][0]) if (lengths != self.seq_len).any() else len(lengths)
                raise DataError(
                    f"{where}: a row of {name!r} has {wrong} entries, not seq_len={self.seq_len}", lasting=True
                )
            rows["input_ids" if name in _INPUTS else name] = values.reshape(group.rows, self.seq_len)
        rows.setdefault("labels", rows["input_ids"])
        padding = rows.pop(MASK, None)
        self._check(rows, where)
        if padding is not None:
            if (np.diff(padding, axis=1) > 0).any() or not np.isin(padding, (0, 1)).all():
                raise DataError(
                    f"{where}: a row's {MASK} is not ones and then zeros; pad rows at their end", lasting=True
                )
            rows["labels"] = np.where(padding == 1, rows["labels"], IGNORED)
        if "position_ids" in rows:  # the last token of a text does not predict the next text
            begins = np.diff(rows["position_ids"], axis=1) != 1
            rows["labels"] = rows["labels"].copy()
            rows["labels"][:, 1:][begins] = IGNORED
        return rows

    def _judge(self, path: Path, error: Exception) -> None:
        """Tell damage, which stays, from what may pass, such as a file system that is away.

        Raises:
            _DamagedError: the bytes are there, and are as they were at the start, but cannot be decoded.
            DataError: the file has changed.
        """
        if not is_damage(error):
            return
        try:
            now = path.stat()
        except OSError:
            return
        if (now.st_size, now.st_mtime_ns) != self._looks[path]:
            raise DataError(
                f"{path} has changed since the start. A run needs the same samples from beginning to end: restore the "
                "old file, or start a new run",
                lasting=True,
            ) from error
        raise _DamagedError(str(error)) from error

    def _check(self, rows: Rows, where: str) -> None:
        for name, values in rows.items():
            limit = self.seq_len if name == "position_ids" else self.vocab_size
            bad = (values < 0) | (values >= limit)
            if name == "labels":
                bad &= values != IGNORED
            if ((values < -_POSSIBLE) | (values >= _POSSIBLE)).any():
                raise _DamagedError(f"{name} has values that no tokenizer has, such as {int(values[bad][0])}")
            if bad.any():
                raise DataError(
                    f"{where}: {name} has the value {int(values[bad][0])}, but "
                    + (
                        f"positions are below seq_len={limit}"
                        if name == "position_ids"
                        else f"the vocabulary has {limit}"
                    ),
                    lasting=True,
                )

    def _positions(self, counts: NDArray[np.int64], lengths: NDArray[np.int64], where: str) -> NDArray[np.int64]:
        """Positions that count from 0 in each text of a row."""
        positions = np.empty((len(counts), self.seq_len), np.int64)
        begin = 0
        for row, count in enumerate(counts.tolist()):
            texts = lengths[begin : begin + count]
            begin += count
            if (texts < 1).any() or int(texts.sum()) != self.seq_len:
                raise DataError(f"{where}: a row's {LENGTHS} do not add up to seq_len={self.seq_len}", lasting=True)
            starts = np.repeat(np.cumsum(texts) - texts, texts)
            positions[row] = np.arange(self.seq_len) - starts
        return positions

    def _look(self) -> tuple[tuple[str, ...], list[RowGroup]]:
        """The columns to read, and the row groups of all files."""
        columns: tuple[str, ...] | None = None
        groups = []
        for number, path in enumerate(self._files):
            try:
                file = _library().ParquetFile(path)
                names = file.schema_arrow.names
                metadata = file.metadata
            except Exception as error:  # as above
                if isinstance(error, ConfigError):
                    raise
                raise ConfigError(f"{path} is not a readable parquet file: {error}.") from error
            inputs = next((name for name in _INPUTS if name in names), None)
            if inputs is None:
                raise ConfigError(
                    f"{path} has no column {_INPUTS[0]!r} (or {_INPUTS[1]!r}) with the token ids; columns: "
                    f"{', '.join(names)}."
                )
            found = tuple(name for name in (inputs, LABELS, POSITIONS, MASK) if name in names)
            if LENGTHS in names and POSITIONS not in names:
                found = (*found, LENGTHS)
            if columns not in (None, found):
                raise ConfigError(f"{path} has the columns {found}, but earlier files have {columns}.")
            columns = found
            for index in range(metadata.num_row_groups):
                group = metadata.row_group(index)
                size = 8 * group.num_rows * self.seq_len * (len(found) + 1)
                if max(size, group.total_byte_size) > self._memory:
                    raise ConfigError(
                        f"Row group {index} of {path} has {group.num_rows} rows, which need {size >> 20} MiB; "
                        f"fetch.cache_mb allows {self._memory >> 20}. Write the file with a smaller row_group_size, or "
                        "raise fetch.cache_mb."
                    )
                groups.append(RowGroup(number, index, group.num_rows))
        assert columns is not None
        return columns, groups


def _lists(column: Any, where: str, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The length of each row's list, and the entries of all lists in a row."""
    import pyarrow
    from pyarrow import compute

    kind = column.type
    lists = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind)
    if not lists or not pyarrow.types.is_integer(kind.value_type):
        raise DataError(f"{where}: {name!r} is a column of {kind}, expected lists of integers", lasting=True)
    flat = compute.list_flatten(column)
    if column.null_count or flat.null_count:
        raise DataError(f"{where}: {name!r} has missing values", lasting=True)
    lengths = compute.list_value_length(column).to_numpy().astype(np.int64)
    return lengths, flat.to_numpy().astype(np.int64)


def _size(rows: Rows) -> int:
    return sum(values.nbytes for values in rows.values())


def _find(places: Sequence[str], split: str) -> list[Path]:
    found: dict[Path, None] = {}
    for place in places:
        path = Path(place).expanduser()
        folder = next((one for one in (path, path / "data") if any(one.glob("*.parquet"))), path)
        inside = [path] if path.is_file() else sorted(folder.glob("*.parquet"), key=lambda file: file.name)
        if not inside:
            raise ConfigError(
                f"The data path {place!r} is neither a parquet file nor a folder with parquet files (looked for "
                f"{path.absolute()})."
            )
        if not path.is_file():
            inside = [folder / name for name in of_split(folder, [file.name for file in inside], split)]
        found.update(dict.fromkeys(inside))
    return list(found)


def _fingerprint(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    total = 0
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            digest.update(size.to_bytes(8, "little"))
            for start in (0, max(0, size - _EDGE)):
                file.seek(start)
                digest.update(file.read(_EDGE))
        total += size
    return f"{len(files)} files, {total} bytes, {digest.hexdigest()}"


def _library() -> Any:
    with needing("pyarrow", "data", "The data provider 'parquet'"):
        from pyarrow import parquet
    return parquet
