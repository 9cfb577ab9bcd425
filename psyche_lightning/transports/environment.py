"""Options of the network transports that a machine's environment variables set."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from psyche_lightning.errors import ConfigError

VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "PSYCHE_HOST": ("host", str),
    "PSYCHE_PORT": ("port", int),
    "PSYCHE_ADVERTISE": ("advertise", str),
    "PSYCHE_UPLOAD": ("upload", float),
    "PSYCHE_DOWNLOAD": ("download", float),
}
"""Variable: (option, type). The option of a recipe or strategy wins over the variable."""


def with_environment(options: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Add to the options those that environment variables set.

    Raises:
        ConfigError: a variable's text does not fit its option.
    """
    values = dict(options)
    for variable, (name, read) in VARIABLES.items():
        text = environment.get(variable, "")
        if text and values.get(name) is None:
            try:
                values[name] = read(text)
            except ValueError:
                raise ConfigError(f"{variable} is {text!r}; expected a number, for the transport's {name}") from None
    return values
