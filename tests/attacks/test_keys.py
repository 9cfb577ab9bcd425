"""A node's key that other users can read is none: whoever reads it signs as the node."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from psyche_lightning.errors import ConfigError
from psyche_lightning.wire.identity import Identity

pytestmark = pytest.mark.skipif(os.name != "posix", reason="files have no modes for other users here")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o602])
def test_a_key_that_is_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a folder" / "node.key"
    key = Identity.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(mode)
    with pytest.raises(ConfigError, match="other users can read the node key") as refused:
        Identity.load_or_create(path)
    assert key.secret_bytes().hex() not in str(refused.value)
    command = str(refused.value).split("`")[1]
    assert shlex.split(command) == ["chmod", "600", str(path)]
    subprocess.run(shlex.split(command), check=True)  # what the message says mends it
    assert Identity.load_or_create(path).public == key.public


def test_a_key_with_more_bytes_is_none(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(bytes(33))
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="32 secret bytes"):
        Identity.load_or_create(path)
