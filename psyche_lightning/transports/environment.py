"""Options of the network transports that a machine sets once, in its environment."""

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
"""Variable: the option that it gives, unless the recipe or the strategy does, and how its text is read."""


def with_environment(options: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The options, completed from the environment.

    Raises:
        ConfigError: a variable is not what its option takes.
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
