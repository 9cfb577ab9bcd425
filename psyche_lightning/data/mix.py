"""The provider ``mix``: a weighted mix of token files, described by a JSON index."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from psyche_lightning.data.client import FetchOptions, check_url
from psyche_lightning.data.files import Files, LocalFiles, TokenBlocks, find_files
from psyche_lightning.data.options import strings, whole
from psyche_lightning.data.order import Order, Table, check_table, make_order, psyche_seed
from psyche_lightning.data.packed import PackedData, Unavailable
from psyche_lightning.data.remote import RemoteFiles, numbered, read_text
from psyche_lightning.data.shuffle import shuffle_from_top, weighted_order
from psyche_lightning.data.tokenizer import Encoder
from psyche_lightning.data.tokens import vocabulary
from psyche_lightning.errors import ConfigError

MAX_INDEX = 1 << 20
"""The most bytes of an index."""
MAX_SOURCES = 1000
_SIZES = {"TwoBytes": 2, "FourBytes": 4}
_LOCATIONS = ("SingleUrl", "NumberedFiles", "Local")


class Source(NamedTuple):
    """One source of a mix.

    Attributes:
        blocks: its tokens.
        order: the order of its blocks.
    """

    blocks: TokenBlocks
    order: Order


class MixedData(PackedData):
    """A weighted mix of token files, in Psyche's order; the mix is as long as all sources together.

    Args:
        seed: the run's seed, which is not used: the index has the seeds.
        seq_len: tokens of a sample, at least 2.
        path: path of the JSON index.
        url: instead of ``path``, URL of the JSON index.
        vocab_size: number of token ids; None for the tokenizer's.
        tokenizer: the tokenizer that made the files, to save with checkpoints: ``"bytes"`` or a path.
        validation_samples: number of samples to hold out, spread evenly over the mix.
        fetch: see :class:`~psyche_lightning.data.client.FetchOptions`; the sources share the memory.

    Raises:
        ConfigError: an option or the index is wrong, or it points to missing data.
        DataError: a server cannot be reached.
    """

    def __init__(
        self,
        seed: int,
        seq_len: int,
        *,
        path: str | None = None,
        url: str | None = None,
        vocab_size: int | None = None,
        tokenizer: str | None = None,
        validation_samples: int = 0,
        fetch: Any = None,
    ) -> None:
        whole("seq_len", seq_len, least=2)
        whole("validation_samples", validation_samples, least=0)
        fetching = FetchOptions.of(fetch)
        if (path is None) == (url is None):
            raise ConfigError(
                "The data provider 'mix' needs either path or url of a JSON index; it got "
                f"{'neither' if path is None else 'both'}."
            )
        where = str(path or url)
        index = Index(_read(path, url, fetching), where, base=None if path is None else Path(path).expanduser().parent)
        encoder = None if tokenizer is None else Encoder(tokenizer)
        size = vocabulary(vocab_size, encoder)
        share = replace(fetching, cache_mb=max(1, fetching.cache_mb // len(index.entries)))
        sources = [index.open(entry, seq_len, share, size) for entry in index.entries]
        super().__init__(
            MixedBlocks(sources, index.weights),
            seq_len=seq_len,
            vocab_size=size,
            order=index.order,
            encoder=encoder,
            validation_samples=validation_samples,
            source=f"the mix {where}",
        )


class MixedBlocks:
    """The blocks of several sources, mixed by weights.

    Args:
        sources: the sources.
        weights: weights of the sources; None for their lengths.

    Attributes:
        count: blocks of all sources together.
        fingerprint: fingerprint of sources and weights.

    Raises:
        ConfigError: there are too many blocks, or no source with a weight has a block.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None) -> None:
        sizes = [source.blocks.count for source in sources]
        self.count = sum(sizes)
        check_table(self.count)
        used = [float(size) for size in sizes] if weights is None else list(weights)
        text = json.dumps([used, [source.blocks.fingerprint for source in sources]])
        self.fingerprint = f"{len(sources)} sources, {hashlib.sha256(text.encode()).hexdigest()}"
        self._sources = list(sources)
        # Without a block there is no order; the caller reports that there is too little data.
        self._which: NDArray[Any]
        self._block: NDArray[Any]
        self._which, self._block = weighted_order(used, sizes) if self.count else (np.empty(0), np.empty(0))

    def read(self, numbers: Sequence[int]) -> list[NDArray[Any]]:
        """Returns the blocks at these places of the mix.

        Raises:
            Unavailable: some of them cannot be read.
        """
        found: dict[int, NDArray[Any]] = {}
        lost: list[int] = []
        reasons: list[str] = []
        lasting = False
        for source, places, blocks in self._split(numbers):
            try:
                found.update(zip(places, source.blocks.read(blocks), strict=True))
            except Unavailable as error:
                lost += [place for place, block in zip(places, blocks, strict=True) if block in error.numbers]
                reasons.append(str(error))
                lasting = lasting or error.lasting
        if lost:
            raise Unavailable("; ".join(reasons), lost, lasting=lasting)
        return [found[number] for number in numbers]

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Start to fetch blocks that will be read soon."""
        for source, _, blocks in self._split(numbers):
            source.blocks.prefetch(blocks)

    def _split(self, numbers: Sequence[int]) -> list[tuple[Source, list[int], list[int]]]:
        """For each source the places that it fills, and its blocks for them."""
        places = np.asarray(sorted(set(numbers)), dtype=np.int64)
        which = self._which[places]
        parts = []
        for number, source in enumerate(self._sources):
            mine = places[which == number]
            if len(mine):
                blocks = source.order(self._block[mine].astype(np.int64))
                parts.append((source, mine.tolist(), blocks.tolist()))
        return parts


class Index:
    """The JSON index: Psyche's ``{"shuffle": ..., "providers": [[location, weight], ...]}``.

    Args:
        text: the index.
        where: where it comes from, for messages.
        base: its folder, to resolve local paths. None for an index from elsewhere, which may not name files of this
            machine.

    Attributes:
        entries: the sources.
        weights: one for each source, or None for their lengths.

    Raises:
        ConfigError: it does not have this form.
    """

    def __init__(self, text: bytes, where: str, *, base: Path | None) -> None:
        self._where = where
        self._base = base
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._wrong(f"it is not JSON ({error})") from error
        self._keys(values, ("shuffle", "providers"))
        self._seed = self._shuffle(values["shuffle"])
        providers = values["providers"]
        if not isinstance(providers, list) or not 0 < len(providers) <= MAX_SOURCES:
            raise self._wrong(f"'providers' is not a list of 1 to {MAX_SOURCES}")
        weighted = [isinstance(entry, list) for entry in providers]
        if any(weighted) and not all(weighted):
            raise self._wrong("some of 'providers' have a weight and others do not")
        self.weights: list[float] | None = None
        self.entries: list[Any] = providers
        if all(weighted):
            if any(len(entry) != 2 for entry in providers):
                raise self._wrong("an entry of 'providers' does not have the form [location, weight]")
            self.entries = [entry for entry, _ in providers]
            self.weights = [self._weight(weight) for _, weight in providers]

    def order(self, length: int) -> Order:
        """The order of the places of the mix."""
        if self._seed is None:
            return make_order(length, shuffle=False, seed=0)
        return Table(shuffle_from_top(length, self._seed))

    def open(self, entry: Any, seq_len: int, fetch: FetchOptions, vocab_size: int) -> Source:
        """Open one source.

        Raises:
            ConfigError: the entry is wrong, or it points to missing data.
            DataError: a server cannot be reached.
        """
        self._keys(entry, ("location", "token_size_in_bytes", "shuffle"))
        size = _SIZES.get(entry["token_size_in_bytes"]) if isinstance(entry["token_size_in_bytes"], str) else None
        if size is None:
            raise self._wrong(f"'token_size_in_bytes' is {entry['token_size_in_bytes']!r}, not {' or '.join(_SIZES)}")
        seed = self._shuffle(entry["shuffle"])
        blocks = TokenBlocks(self._files(entry["location"], fetch), seq_len, size, vocab_size)
        order = make_order(blocks.count, shuffle=False if seed is None else list(seed), seed=0)
        return Source(blocks, order)

    def _files(self, location: Any, fetch: FetchOptions) -> Files:
        if not isinstance(location, dict) or len(location) != 1 or next(iter(location)) not in _LOCATIONS:
            raise self._wrong(f"a 'location' is {str(location)[:80]}, expected one of {', '.join(_LOCATIONS)}")
        ((kind, value),) = location.items()
        if kind == "SingleUrl":
            return RemoteFiles([check_url(value)], fetch)
        if kind == "NumberedFiles":
            self._keys(value, ("url_template", "start_index", "n_left_pad_zeros", "num_files"))
            start, pad, count = value["start_index"], value["n_left_pad_zeros"], value["num_files"]
            return RemoteFiles(numbered(value["url_template"], start=start, pad=pad, count=count), fetch)
        if self._base is None:
            raise self._wrong("it comes from elsewhere and names files of this machine ('Local')")
        return LocalFiles(find_files([str(self._base / place) for place in strings("Local", value)]))

    def _keys(self, values: Any, keys: tuple[str, ...]) -> None:
        if not isinstance(values, dict) or set(values) != set(keys):
            raise self._wrong(f"expected the keys {', '.join(keys)} in {str(values)[:80]}")

    def _shuffle(self, value: Any) -> bytes | None:
        if value == "DontShuffle":
            return None
        if isinstance(value, dict) and set(value) == {"Seeded"} and not isinstance(value["Seeded"], bool):
            return psyche_seed(value["Seeded"])
        raise self._wrong(f'a \'shuffle\' is {str(value)[:80]}, expected "DontShuffle" or {{"Seeded": [32 numbers]}}')

    def _weight(self, value: Any) -> float:
        if type(value) not in (int, float) or not (0 < value < math.inf):
            raise self._wrong(f"a weight is {value!r}, expected a number above 0")
        return float(value)

    def _wrong(self, problem: str) -> ConfigError:
        return ConfigError(f"The index {self._where} does not describe a mix: {problem}.")


def _read(path: str | None, url: str | None, fetch: FetchOptions) -> bytes:
    if path is None:
        return read_text(check_url(url), fetch, MAX_INDEX)
    place = Path(strings("path", path)[0]).expanduser()
    try:
        with place.open("rb") as file:
            text = file.read(MAX_INDEX + 1)
    except OSError as error:
        raise ConfigError(f"The index {path!r} cannot be read: {error.strerror}.") from error
    if len(text) > MAX_INDEX:
        raise ConfigError(f"The index {path!r} is larger than {MAX_INDEX} bytes, which is too large for an index.")
    return text
