"""The provider ``tokens``: token files of Psyche, Megatron, nanoGPT and their kin, on disk or over HTTP."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from psyche_lightning.data.client import FetchOptions
from psyche_lightning.data.description import MAX_SIZE, NAME, Description, read_description
from psyche_lightning.data.files import Files, LocalFiles, TokenBlocks, find_files
from psyche_lightning.data.named import TRAIN
from psyche_lightning.data.options import strings, whole
from psyche_lightning.data.order import make_order, psyche_seed
from psyche_lightning.data.packed import PackedData
from psyche_lightning.data.remote import RemoteFiles, numbered, read_text
from psyche_lightning.data.tokenizer import Encoder
from psyche_lightning.data.widths import SIZES
from psyche_lightning.errors import ConfigError


class TokenData(PackedData):
    """Token files as samples; sample i of a file is its i-th run of ``seq_len`` tokens.

    Args:
        seed: the run's seed, for ``shuffle: true``.
        seq_len: tokens of a sample, at least 2.
        path: a token file, a folder of them (``.bin``, ``.npy``, ``.ds``, in the order of their names), or a list.
        url: instead of ``path``: a file, a folder's ``dataset.json``, or with ``count`` numbered files, where ``{}``
            stands for the number.
        count: number of numbered files.
        start: number of the first file.
        pad: digits to which zeros fill up numbers.
        split: the split of the files in folders, by their names (``fineweb_train_000.bin``, ``val.bin``); ``all`` for
            all. Without such names, all files are ``train``.
        token_size: bytes of a token: 1, 2, 4 or 8; None for what ``dataset.json``, a header, an index beside the file
            (Megatron's), or a look at the tokens says.
        vocab_size: number of token ids; None for that of ``dataset.json`` or the tokenizer.
        tokenizer: the tokenizer that made the files, to save with checkpoints: ``"bytes"`` or a path.
        shuffle: true for an order by the run's seed, another one in each pass; ``"once"`` for the same in each pass;
            false for the order of the files; or the 32 numbers of one of Psyche's
            seeds, for Psyche's order.
        validation_samples: number of samples to hold out, spread evenly over the data.
        fetch: see :class:`~psyche_lightning.data.client.FetchOptions`.

    Raises:
        ConfigError: an option is wrong, or there is no such data.
        DataError: a server cannot be reached.
    """

    def __init__(
        self,
        seed: int,
        seq_len: int,
        *,
        path: str | list[str] | None = None,
        url: str | None = None,
        count: int | None = None,
        start: int = 0,
        pad: int = 0,
        split: str = TRAIN,
        token_size: int | None = None,
        vocab_size: int | None = None,
        tokenizer: str | None = None,
        shuffle: Any = True,
        validation_samples: int = 0,
        fetch: Any = None,
    ) -> None:
        whole("seq_len", seq_len, least=2)
        whole("validation_samples", validation_samples, least=0)
        psyche_seed(shuffle)
        check_token_size(token_size)
        fetching = FetchOptions.of(fetch)
        if (path is None) == (url is None):
            raise ConfigError(
                "The data provider 'tokens' needs either path (files on this machine) or url (files over HTTP); it "
                f"got {'neither' if path is None else 'both'}."
            )
        files: Files
        if path is not None:
            places = strings("path", path)
            description = read_description(Path(places[0]).expanduser()) if len(places) == 1 else None
            files = LocalFiles(find_files(places, split))
            source = ", ".join(places)
            if description is not None and tokenizer is None:
                tokenizer = description.tokenizer
                tokenizer = tokenizer if tokenizer == "bytes" else str(Path(places[0]).expanduser() / tokenizer)
        else:
            urls, description = _addresses(url, fetching, start=start, pad=pad, count=count)
            files = RemoteFiles(urls, fetching)
            source = str(url)
        if description is not None:
            _check_same("token_size", token_size, description.token_size)
            token_size = description.token_size
            vocab_size = description.vocab_size if vocab_size is None else vocab_size
        encoder = None if tokenizer is None else Encoder(tokenizer)
        size = vocabulary(vocab_size, encoder)
        super().__init__(
            TokenBlocks(files, seq_len, token_size, size if description is None else None),
            seq_len=seq_len,
            vocab_size=size,
            order=partial(make_order, shuffle=shuffle, seed=seed),
            encoder=encoder,
            validation_samples=validation_samples,
            source=source,
        )


def _addresses(
    url: Any, fetch: FetchOptions, *, start: int, pad: int, count: int | None
) -> tuple[list[str], Description | None]:
    """The URLs of the files behind ``url``, and their ``dataset.json``."""
    if count is not None:
        return numbered(url, start=start, pad=pad, count=count), None
    if not isinstance(url, str) or not url.endswith(f"/{NAME}"):
        return [url], None
    description = Description.parse(read_text(url, fetch, MAX_SIZE), url)
    return [url.removesuffix(NAME) + file.name for file in description.files], description


def check_token_size(token_size: object) -> None:
    """Check the size of a token.

    Raises:
        ConfigError: it is neither None nor a size that files may have.
    """
    if token_size is not None and token_size not in SIZES:
        raise ConfigError(f"token_size is {token_size!r}, expected {', '.join(map(str, SIZES))} bytes.")


def _check_same(name: str, given: object, described: object) -> None:
    if given is not None and given != described:
        raise ConfigError(f"{name} is {given!r}, but {NAME} of the data says {described!r}; remove {name}.")


def vocabulary(vocab_size: object, encoder: Encoder | None) -> int:
    """The number of token ids, which the files themselves do not contain.

    Raises:
        ConfigError: no option gives it, or the tokenizer has more ids.
    """
    if vocab_size is None and encoder is None:
        raise ConfigError(
            "Token files do not say how many token ids there are: set data.config.vocab_size, or data.config.tokenizer "
            "to the tokenizer that made them ('bytes' or a path)."
        )
    size = whole("vocab_size", vocab_size, least=1) if vocab_size is not None else 0
    if encoder is not None:
        if size and encoder.vocab_size > size:
            raise ConfigError(
                f"The tokenizer has {encoder.vocab_size} ids, but vocab_size is {size}: another tokenizer made the "
                "data, or vocab_size is too small."
            )
        size = size or encoder.vocab_size
    return size
