"""Finds the plugin that manages a run for its owner, and the plugin that reads the accounts of runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from psyche_lightning.errors import ConfigError
from psyche_lightning.hookspecs import CoordinatorKind
from psyche_lightning.plugins import load_plugins
from psyche_lightning.protocol.link import split_url
from psyche_lightning.protocol.owner import RunAdmin
from psyche_lightning.server.admin import URL_VARIABLE
from psyche_lightning.server.token import read_token


def administer(url: str | None, run_id: str, token_file: Path | None = None) -> RunAdmin:
    """Find the owner's side of a run by the coordinator's URL.

    Args:
        url: URL of the coordinator; its scheme names the plugin, as for nodes. None for the environment's.
        run_id: the run.
        token_file: the owner's token, for a server; None for that of the environment, or of a server that this user
            runs on this machine.

    Raises:
        ConfigError: the URL is wrong, such runs have no owner's side, or the file has no token.
        PluginError: no plugin registers the scheme.
    """
    url, scheme, kind = _kind(url)
    if kind.owner is None:
        raise ConfigError(f"a run of the coordinator {scheme!r} exists within one process, so it has no owner's side")
    return kind.owner(url, run_id, None if token_file is None else read_token(token_file))


def runs_at(url: str | None) -> list[dict[str, Any]]:
    """The runs of a coordinator: ``run_id``, ``phase``, ``epoch``, ``step``, ``total_steps`` and ``clients`` of each.

    Args:
        url: as in :func:`administer`.

    Raises:
        ConfigError: the URL is wrong, or such coordinators do not list their runs.
        PluginError: no plugin registers the scheme.
    """
    url, scheme, kind = _kind(url)
    if kind.runs is None:
        raise ConfigError(f"a coordinator {scheme!r} does not list its runs; name the run: `psyche run status RUN`")
    return kind.runs(url)


def coordinator_url(url: str | None) -> str:
    """The whole URL of a coordinator; None for the environment's.

    Raises:
        ConfigError: there is none.
    """
    return _kind(url)[0]


def _kind(url: str | None) -> tuple[str, str, CoordinatorKind]:
    """The whole URL, its scheme, and what its plugin registers."""
    url = url or os.environ.get(URL_VARIABLE)
    if not url:
        raise ConfigError(f"no coordinator given: pass --coordinator URL or set {URL_VARIABLE}")
    url, scheme = split_url(url)
    return url, scheme, load_plugins().coordinators()[scheme]


def read_account_file(path: Path) -> dict[str, Any]:
    """The status in a dump of a run's account, read by the plugin that knows its format.

    Raises:
        ConfigError: the file cannot be read, or no plugin knows its format.
    """
    readers = (kind.account for kind in load_plugins().coordinators().values())
    read = next((reader for reader in readers if reader is not None), None)
    if read is None:
        raise ConfigError("no plugin reads account files; pip install psyche-lightning-solana")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return read(data, path.name)
