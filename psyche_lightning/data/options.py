"""Checks for options that several providers share."""

from __future__ import annotations

from psyche_lightning.errors import ConfigError


def whole(name: str, value: object, least: int) -> int:
    """Returns ``value`` if it is a whole number of at least ``least``.

    Raises:
        ConfigError: it is not.
    """
    if type(value) is not int or value < least:
        raise ConfigError(f"{name} is {value!r}, expected a whole number, {least} or more.")
    return value


def strings(name: str, value: object) -> list[str]:
    """Returns ``value``, a string or a list of strings, as a list.

    Raises:
        ConfigError: it is neither.
    """
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not values or not all(isinstance(x, str) and x for x in values):
        raise ConfigError(f"{name} is {value!r}, expected a string or a list of strings.")
    return list(values)
