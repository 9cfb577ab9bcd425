"""The built-in data providers: ``text``, ``tokens``, ``mix``, ``datasets`` and ``parquet``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from psyche_lightning.hookspecs import DataProviderFactory, Register, hookimpl
from psyche_lightning.plugins import build

if TYPE_CHECKING:
    from psyche_lightning.hookspecs import DataProvider


@hookimpl
def register_data_providers(register: Register[DataProviderFactory]) -> None:
    """Register the data providers that every installation has."""
    register("text", text)
    register("tokens", tokens)
    register("mix", mix)
    register("datasets", datasets)
    register("parquet", parquet)


def text(config: Mapping[str, Any], *, seed: int) -> DataProvider:
    """Text and source files on disk, tokenized in memory."""
    from psyche_lightning.data.text import TextData

    return build("data provider 'text'", partial(TextData, seed), config)


def tokens(config: Mapping[str, Any], *, seed: int) -> DataProvider:
    """Token files in Psyche's formats, on disk or over HTTP."""
    from psyche_lightning.data.tokens import TokenData

    return build("data provider 'tokens'", partial(TokenData, seed), config)


def mix(config: Mapping[str, Any], *, seed: int) -> DataProvider:
    """A weighted mix of token files, described by a JSON index."""
    from psyche_lightning.data.mix import MixedData

    return build("data provider 'mix'", partial(MixedData, seed), config)


def datasets(config: Mapping[str, Any], *, seed: int) -> DataProvider:
    """The texts or conversations of a Hugging Face data set, tokenized and packed."""
    from psyche_lightning.data.conversations import ConversationData, holds_conversations
    from psyche_lightning.data.documents import DocumentData
    from psyche_lightning.data.splits import DataSet

    shared = DataSet.options()
    data = DataSet(**{name: config[name] for name in shared if name in config})
    rest = {name: value for name, value in config.items() if name not in shared}
    kind = ConversationData if holds_conversations(data, rest) else DocumentData
    return build("data provider 'datasets'", partial(kind, seed, data), rest, besides=shared)


def parquet(config: Mapping[str, Any], *, seed: int) -> DataProvider:
    """Prepared samples with labels and positions."""
    from psyche_lightning.data.parquet import PreparedData

    return build("data provider 'parquet'", partial(PreparedData, seed), config)
