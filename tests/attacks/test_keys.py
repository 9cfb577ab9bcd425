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


@pytest.mark.parametrize("size", [0, 31, 33, 63, 65, 5000])
def test_a_key_with_other_bytes_is_none(tmp_path: Path, size: int) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(bytes(size))
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=rf"node key .* is damaged: it has ({size}|more) bytes, not 64"):
        Identity.load_or_create(path)
    assert path.stat().st_size == size


def test_a_key_of_which_a_bit_has_changed_is_no_other_key(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    key = Identity.load_or_create(path)
    assert Identity.load_or_create(path).public == key.public
    good = path.read_bytes()
    for place in range(8 * len(good)):
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        path.write_bytes(bad)
        with pytest.raises(ConfigError, match="damaged: its secret and its public half") as refused:
            Identity.load_or_create(path)
        assert key.secret_bytes().hex()[:8] not in str(refused.value)


def test_a_key_that_version_0_1_wrote_is_read(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    key = Identity.generate()
    path.write_bytes(key.secret_bytes())
    path.chmod(0o600)
    assert Identity.load_or_create(path).public == key.public
    assert path.read_bytes() == key.secret_bytes()
