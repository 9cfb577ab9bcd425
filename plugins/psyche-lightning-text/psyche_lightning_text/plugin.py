"""The plugin: registers the data provider ``text``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from psyche_lightning import hookimpl
from psyche_lightning.errors import ConfigError, nearest

if TYPE_CHECKING:
    from psyche_lightning_text.provider import TextData


@hookimpl
def register_data_providers(register: Callable[[str, Callable[..., Any]], None]) -> None:
    """Register the provider."""
    register("text", build)


def build(config: Mapping[str, Any], *, seed: int) -> TextData:
    """Open text files as training data.

    Args:
        config: the arguments of :class:`psyche_lightning_text.TextData`, except ``seed``.
        seed: the run's seed, which shuffles the samples.

    Raises:
        ConfigError: a key is unknown, missing or wrong, or there is no text where ``path`` points.
    """
    from psyche_lightning_text.provider import TextData

    known = [name for name in inspect.signature(TextData).parameters if name != "seed"]
    for key in config:
        if key not in known:
            raise ConfigError(
                f"The data provider 'text' has no option {key!r}.{nearest(key, known)} Options: {', '.join(known)}."
            )
    for key in ("path", "seq_len"):
        if key not in config:
            raise ConfigError(f"The data provider 'text' needs the option {key!r}. Options: {', '.join(known)}.")
    return TextData(**config, seed=seed)
