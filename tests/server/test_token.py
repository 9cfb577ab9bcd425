"""The owner's token: its file, and how commands on the same machine find it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from psyche_lightning.errors import ConfigError, CoordinatorError
from psyche_lightning.server.admin import CoordinatorAdmin
from psyche_lightning.server.token import announced, find_token, load_or_create, read_token
from psyche_lightning.sites import is_loopback


def write(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_the_first_start_makes_it_and_later_ones_read_it(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "owner.token"
    token, fresh = load_or_create(path)
    assert fresh
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_or_create(path) == (token, False)
    assert list(path.parent.iterdir()) == [path]
    assert load_or_create(tmp_path / "other")[0] != token


@pytest.mark.parametrize(
    ("content", "mode", "text"),
    [
        (b"", 0o600, "has no owner's token"),
        (b"two\nlines", 0o600, "has no owner's token"),
        (b"\xff\xfe", 0o600, "has no owner's token"),
        (b"a" * 600, 0o600, "has no owner's token"),
        (b"secret", 0o640, "other users can read"),
        (b"secret", 0o604, "other users can read"),
    ],
)
def test_what_is_no_private_token_is_refused_and_not_shown(
    tmp_path: Path, content: bytes, mode: int, text: str
) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        read_token(write(tmp_path / "token", content, mode))
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot read the owner's token"):
        read_token(tmp_path / "missing")


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "psyche-lightning" / "coordinators"


def test_commands_find_the_token_of_a_coordinator_that_runs(server_process: Callable[..., Any], state: Path) -> None:
    server = server_process()
    token = read_token(server.directory / "owner.token")
    assert [find_token(f"http://{host}:{server.port}") for host in ("127.0.0.1", "localhost")] == [token, token]
    assert find_token(f"http://127.0.0.1:{server.port + 1}") is None
    assert find_token(f"http://192.0.2.1:{server.port}") is None, "it is not this machine's"
    assert token.encode() not in b"".join(note.read_bytes() for note in state.iterdir())
    server.admin.create("r")
    server.end()  # kill -9 leaves the note
    assert list(state.iterdir())
    assert find_token(server.url) is None, "who listens there now must not get it"
    server.start()
    assert server.admin.pause("r")["phase"] == "paused"
    server.end(15)
    assert not list(state.iterdir())


def test_a_folder_that_takes_no_note_stops_nothing(
    state: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state.parent.mkdir(parents=True)
    state.write_text("a file")
    with announced("http://127.0.0.1:1", tmp_path / "owner.token") as found:
        assert not found
    assert "--token-file" in caplog.text
    assert find_token("http://127.0.0.1:1") is None


def test_a_user_without_a_home_names_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    with announced("http://127.0.0.1:1", tmp_path / "owner.token") as found:
        assert not found
    assert "--token-file" in caplog.text
    assert find_token("http://127.0.0.1:1") is None


def test_the_notes_folder_is_for_its_user_only(state: Path, tmp_path: Path) -> None:
    with announced("http://[::1]:8080", tmp_path / "owner.token") as found:
        assert found
        assert state.stat().st_mode & 0o777 == 0o700
        assert [os.fsdecode(note.read_bytes()) for note in state.iterdir()] == [str(tmp_path / "owner.token")]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost", "LOCALHOST.", "::ffff:127.0.0.1"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "10.0.0.1", "localhost.example", "127.0.0.1.example", "::ffff:10.0.0.1", "::"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_a_token_travels_with_changes_only_and_to_nobody_else(run: Callable[..., Any]) -> None:
    async def main() -> None:
        shown: list[tuple[str, str | None]] = []

        async def record(request: web.Request) -> web.Response:
            shown.append((request.path, request.headers.get("Authorization")))
            return web.json_response({})

        async def elsewhere(request: web.Request) -> web.Response:
            shown.append((request.path, request.headers.get("Authorization")))
            raise web.HTTPFound("/taken")

        application = web.Application()
        application.add_routes([web.post("/v1/runs/r/pause", elsewhere), web.get("/{any:.*}", record)])
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        admin = CoordinatorAdmin(f"http://127.0.0.1:{runner.addresses[0][1]}", token="s3cret")
        await asyncio.to_thread(admin.manifest, "00")
        with pytest.raises(CoordinatorError, match="another shape"):
            await asyncio.to_thread(admin.pause, "r")
        assert shown == [("/v1/manifests/00", None), ("/v1/runs/r/pause", "Bearer s3cret"), ("/taken", None)]
        await runner.cleanup()

    run(main())


def test_a_server_of_a_program_is_open_to_its_machine_only(served: Callable[..., Any], run: Callable[..., Any]) -> None:
    async def main() -> None:
        async with served() as (server, url):
            async with aiohttp.ClientSession() as session:
                for name in ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host"):  # a proxy that speaks for others
                    headers = {name: "for=192.0.2.7"}
                    async with session.post(f"{url}/v1/runs", json={"run_id": "r"}, headers=headers) as answer:
                        assert answer.status == 401
                        assert "no owner's token" in await answer.text()
            assert not server.runs
            assert (await asyncio.to_thread(CoordinatorAdmin(url).create, "r"))["run_id"] == "r"

    run(main())


def test_a_wrong_variable_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSYCHE_COORDINATOR_TOKEN", "schlüssel")
    with pytest.raises(ConfigError, match="PSYCHE_COORDINATOR_TOKEN has no owner's token"):
        CoordinatorAdmin("http://127.0.0.1:1", attempts=1).pause("r")
    with pytest.raises(CoordinatorError, match="cannot reach"):
        CoordinatorAdmin("http://127.0.0.1:1", attempts=1).runs()
