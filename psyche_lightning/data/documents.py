"""The provider ``datasets``: the texts of a Hugging Face data set, tokenized and packed into samples."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from psyche_lightning.data.client import FetchOptions
from psyche_lightning.data.options import whole
from psyche_lightning.data.order import make_order, psyche_seed
from psyche_lightning.data.packed import PackedData
from psyche_lightning.data.spool import Spool
from psyche_lightning.data.tokenizer import Encoder
from psyche_lightning.errors import ConfigError

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_ROWS = 16
_SAVED = "state.json"
_SAVED_SPLITS = "dataset_dict.json"


class DocumentData(PackedData):
    """The texts of a data set as samples.

    The tokens of all texts, in order and with an end-of-text id after each, are cut into blocks of ``seq_len``. An
    incomplete last block is dropped. The tokens are in a temporary file (in ``TMPDIR``), so memory is bounded. With
    ``streaming`` nothing is downloaded in advance: texts are fetched and tokenized, in the order of the data set, up to
    the requested sample.

    Args:
        seed: the run's seed, for ``shuffle: true``.
        seq_len: tokens of a sample, at least 2.
        path: a folder of ``save_to_disk``, or a file or folder of jsonl, json, csv, parquet or arrow files.
        dataset: instead of ``path``, the name of a data set on the Hugging Face Hub.
        name: its configuration, if it has several.
        revision: its commit, so that all nodes use the same.
        split: the part of the data set.
        text: the column with the texts.
        tokenizer: ``"bytes"``, a path, or the name of a tokenizer on the Hub.
        streaming: whether to read the data set during the run.
        max_samples: the most samples to make; required for streaming.
        shuffle: true for an order by the run's seed, false for the data set's order, or the 32 numbers of one of
            Psyche's seeds. The default is true, or false with streaming.
        validation_samples: number of samples to hold out, spread evenly over the data; none with streaming.
        fetch: see :class:`~psyche_lightning.data.client.FetchOptions`.

    Raises:
        ConfigError: an option is wrong, or the data set or the column does not exist.
        DataError: the data set cannot be read, or there is no space for its tokens.
    """

    def __init__(
        self,
        seed: int,
        seq_len: int,
        *,
        path: str | None = None,
        dataset: str | None = None,
        name: str | None = None,
        revision: str | None = None,
        split: str = "train",
        text: str = "text",
        tokenizer: str = "bytes",
        streaming: bool = False,
        max_samples: int | None = None,
        shuffle: Any = None,
        validation_samples: int = 0,
        fetch: Any = None,
    ) -> None:
        whole("seq_len", seq_len, least=2)
        whole("validation_samples", validation_samples, least=0)
        if max_samples is not None:
            whole("max_samples", max_samples, least=1)
        shuffle = not streaming if shuffle is None else shuffle
        psyche_seed(shuffle)
        if streaming and (max_samples is None or shuffle is not False or validation_samples):
            raise ConfigError(
                "A streamed data set is read in its own order: set max_samples to the samples that the run may use, "
                "and remove shuffle and validation_samples."
            )
        if (path is None) == (dataset is None):
            raise ConfigError(
                "The data provider 'datasets' needs either path (on this machine) or dataset (a name on the Hugging "
                f"Face Hub); it got {'neither' if path is None else 'both'}."
            )
        fetching = FetchOptions.of(fetch)
        encoder = Encoder(tokenizer, download=True)
        source = str(path or dataset)
        if path is None:
            opened = _open_hub(source, name, split, revision, streaming)
        else:
            opened = _open_local(Path(source).expanduser(), split)
        spool = Spool(
            Column(opened, text, source),
            encoder,
            seq_len,
            most=max_samples,
            lazily=streaming,
            retry_seconds=0.0 if path is not None else fetching.retry_seconds,
        )
        super().__init__(
            spool,
            seq_len=seq_len,
            vocab_size=encoder.vocab_size,
            order=partial(make_order, shuffle=shuffle, seed=seed),
            encoder=encoder,
            validation_samples=validation_samples,
            source=source,
        )


class Column:
    """The texts in a column of a data set, as :data:`~psyche_lightning.data.spool.Documents`.

    Args:
        dataset: a data set of the ``datasets`` library, iterable or not.
        name: the column.
        source: where the data comes from, for messages.
    """

    def __init__(self, dataset: Any, name: str, source: str) -> None:
        self._dataset = dataset
        self._name = name
        self._source = source

    def __call__(self, first: int) -> Iterator[bytes]:
        """Yields the texts from number ``first`` on.

        Raises:
            ConfigError: the column does not exist, or contains something other than text.
        """
        rest = self._dataset.skip(first) if first else self._dataset
        number = first
        for rows in rest.iter(batch_size=_ROWS):  # in batches, because __iter__ divides the rows among workers
            if self._name not in rows:
                raise ConfigError(
                    f"{self._source} has no column {self._name!r}. Columns: {', '.join(rows)}. Set data.config.text to "
                    "the column with the texts."
                )
            for text in rows[self._name]:
                if not isinstance(text, str):
                    raise ConfigError(
                        f"Row {number} of {self._source} has {str(text)[:40]!r} in the column {self._name!r}, expected "
                        "a text."
                    )
                yield text.encode("utf-8", errors="replace")
                number += 1


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            "The data provider 'datasets' needs the package datasets: pip install 'psyche-lightning[data]'."
        ) from error
    return datasets


def _open_hub(dataset: str, name: str | None, split: str, revision: str | None, streaming: bool) -> Any:
    datasets = _library()
    try:
        return datasets.load_dataset(dataset, name, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # the library's errors have no common type
        raise ConfigError(
            f"The data set {dataset!r} (configuration {name or 'default'}, split {split!r}, revision "
            f"{revision or 'newest'}) cannot be opened: {type(error).__name__}: {error}. Check the names and the "
            "network; give path instead for a data set on this machine's disk."
        ) from error


def _open_local(place: Path, split: str) -> Any:
    datasets = _library()
    try:
        if (place / _SAVED).is_file():
            return datasets.load_from_disk(str(place))
        if (place / _SAVED_SPLITS).is_file():
            return datasets.load_from_disk(str(place))[split]
        files = _files(place)
        builder = _BUILDERS[files[0].suffix]
        # Stream from disk, so that nothing goes to the library's cache and memory stays small.
        return datasets.load_dataset(builder, data_files=[str(file) for file in files], split="train", streaming=True)
    except ConfigError:
        raise
    except Exception as error:  # as above
        raise ConfigError(f"The data set {str(place)!r} cannot be opened: {type(error).__name__}: {error}.") from error


def _files(place: Path) -> list[Path]:
    """The files of a data set, sorted by name; all have the same suffix."""
    suffixes = ", ".join(_BUILDERS)
    if not place.exists():
        raise ConfigError(
            f"The data path {str(place)!r} does not exist (looked for {place.absolute()}). Expected a folder written "
            f"by save_to_disk, or a file or folder of {suffixes}."
        )
    files = [place]
    if place.is_dir():
        files = sorted((file for file in place.iterdir() if file.suffix in _BUILDERS), key=lambda file: file.name)
    kinds = sorted({file.suffix for file in files})
    if len(kinds) != 1 or kinds[0] not in _BUILDERS:
        raise ConfigError(
            f"The data path {str(place)!r} has {'files of ' + ', '.join(kinds) if kinds else 'no data files'}, "
            f"expected files with one of the suffixes {suffixes}."
        )
    return files
