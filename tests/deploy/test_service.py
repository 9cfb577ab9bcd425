"""``psyche join --service``: the unit means what was asked for, and is put where systemd takes it."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from psyche_lightning.deploy.service import Service, install, node_service
from psyche_lightning.errors import ConfigError

LINK = "https://train.example.org:8080#my-run:" + "A" * 43 + ":AAECAwQFBgcICQoLDA0ODw"


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    folder = tmp_path / "a folder with 100% $HOME"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("PSYCHE_HOST", "0.0.0.0")
    monkeypatch.setenv("PSYCHE_COORDINATOR_TOKEN", "a secret")
    return node_service("my-run", LINK, Path("psyche-my-run"), ['data.config.path="$x" 5%'])


def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, fails_at: str = "") -> Path:
    """A stand-in for ``systemctl``, whose manager no test can start; it notes how it is called."""
    said = tmp_path / "calls"
    program = tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    refuses = f'case "$*" in *{fails_at}*) echo "no bus" >&2; exit 1;; esac\n' if fails_at else ""
    program.write_text(f'#!/bin/sh\necho "$*" >> {shlex.quote(str(said))}\n{refuses}')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return said


@pytest.mark.parametrize("owner", [None, "psyche"])
def test_systemd_understands_the_unit(service: Service, owner: str | None, tmp_path: Path) -> None:
    unit = tmp_path / service.name
    unit.write_text(replace(service, owner=owner).unit)
    scope = "--system" if owner else "--user"
    own = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(
        ["systemd-analyze", scope, "verify", unit], capture_output=True, text=True, check=False, env=own
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_has_no_secret_and_says_everything_else(service: Service) -> None:
    [line] = [line for line in service.unit.splitlines() if line.startswith("ExecStart=")]
    file = Path.cwd() / "psyche-my-run" / "join-link"
    words = [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(line.removeprefix("ExecStart="))]
    assert words == [
        sys.executable, "-m", "psyche_lightning", "join", f"@{file}", 'data.config.path="$x" 5%', "--run", "my-run",
    ]  # fmt: skip
    assert file.read_text() == f"{LINK}\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert 'Environment="PSYCHE_HOST=0.0.0.0"' in service.unit.splitlines()
    assert f"WorkingDirectory={str(Path.cwd()).replace('%', '%%')}" in service.unit.splitlines()
    assert LINK[-22:] not in service.unit
    assert "a secret" not in service.unit


def test_it_is_put_in_place_enabled_and_started(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, user = manager(tmp_path, monkeypatch), replace(service, owner=None)
    install(user)
    assert (tmp_path / "config" / "systemd" / "user" / "psyche-my-run.service").read_text() == user.unit
    assert said.read_text().splitlines() == [
        "--user show --property=Version",
        "--user daemon-reload",
        "--user enable psyche-my-run.service",
        "--user restart psyche-my-run.service",
    ]


@pytest.mark.parametrize("fails_at", ["show", "nothing there"])
def test_without_systemd_the_unit_is_shown_with_its_place(
    service: Service, fails_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fails_at == "show":
        manager(tmp_path, monkeypatch, fails_at=fails_at)
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    user = replace(service, owner=None)
    with pytest.raises(ConfigError, match="systemd") as caught:
        install(user)
    assert user.unit in str(caught.value)
    assert str(user.path) in str(caught.value)
    assert "systemctl --user enable --now psyche-my-run.service" in str(caught.value)
    assert not user.path.exists()


def test_a_manager_that_refuses_is_quoted(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager(tmp_path, monkeypatch, fails_at="enable")
    with pytest.raises(ConfigError, match=r"enable psyche-my-run\.service` failed: no bus"):
        install(replace(service, owner=None))


def test_the_service_of_another_folder_is_not_replaced(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager(tmp_path, monkeypatch)
    service = replace(service, owner=None)
    install(service)
    install(service)
    written = service.path.read_text()
    with pytest.raises(ConfigError, match=r"already, and a machine has one service for each run(.|\n)*disable --now"):
        install(replace(service, folder=tmp_path / "another"))
    assert service.path.read_text() == written


def test_root_s_service_runs_as_the_folder_s_owner(service: Service) -> None:
    if os.geteuid():
        assert service.owner is None
    else:
        import pwd

        assert service.owner == pwd.getpwuid(Path.cwd().stat().st_uid).pw_name
        assert service.path == Path("/etc/systemd/system/psyche-my-run.service")
        assert f"User={service.owner}" in service.unit.splitlines()
