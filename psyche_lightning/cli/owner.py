"""Finds the plugin that manages a run for its owner, and the plugin that reads the accounts of runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from psyche_lightning.errors import ConfigError
from psyche_lightning.plugins import load_plugins
from psyche_lightning.protocol.link import whole_url
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
    url = url or os.environ.get(URL_VARIABLE)
    if not url:
        raise ConfigError(f"no coordinator given: pass --coordinator URL or set {URL_VARIABLE}")
    url = whole_url(url)
    scheme, colon, _ = url.partition(":")
    if not colon:
        raise ConfigError(f"{url!r} is not a coordinator's URL; expected one such as http://127.0.0.1:8080")
    found = load_plugins().coordinators()
    owner = found[scheme].owner
    if owner is None:
        raise ConfigError(f"a run of the coordinator {scheme!r} exists within one process, so it has no owner's side")
    return owner(url, run_id, None if token_file is None else read_token(token_file))


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
