"""The join link of a coordinator process: for strangers, for its owner's nodes on the same machine, in options."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from psyche_lightning.cli import main as cli
from psyche_lightning.errors import ConfigError, CoordinatorError
from psyche_lightning.lightning.entry import Entry
from psyche_lightning.plugins import load_plugins
from psyche_lightning.protocol.link import JoinLink
from psyche_lightning.protocol.requests import GetTerms, Join
from psyche_lightning.recipe.options import RunOptions
from psyche_lightning.server.admin import CoordinatorAdmin, check_url
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.wire.identity import Identity

CONFIG = {"init_min_clients": 9, "total_steps": 9, "global_batch_size_start": 9}
LINK = JoinLink("http://127.0.0.1:1", "lan", bytes(range(32)), bytes(range(16)))


def join(link, run="r"):
    async def ask():
        client = HttpCoordinator(str(link), run, Identity.generate(), attempts=1)
        try:
            await client.request(Join("", {"run": {}}))
        finally:
            await client.close()

    asyncio.run(asyncio.wait_for(ask(), 30))


def test_the_owner_s_nodes_on_the_same_machine_need_no_link(server_process, monkeypatch, tmp_path):
    server = server_process()
    server.admin.create("r", CONFIG, by_link=True)
    link = server.admin.link("r")
    join(server.url)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    with pytest.raises(CoordinatorError, match=r"this node has none.*psyche run link r") as caught:
        join(server.url)
    assert (caught.value.code, caught.value.retryable) == ("NotInvited", False)
    with pytest.raises(CoordinatorError, match="of another run, or of a former one"):
        join(replace(link, secret=bytes(16)))
    join(link)


def test_a_link_names_its_run():
    options = RunOptions(coordinator=str(LINK)).in_environment({})
    assert (options.coordinator, options.run) == (str(LINK), "lan")
    assert RunOptions().in_environment({"PSYCHE_COORDINATOR": str(LINK)}).run == "lan"
    assert RunOptions(coordinator=str(LINK), run="lan").in_environment({}).run == "lan"
    with pytest.raises(ConfigError, match=r"but not the run.s name"):
        RunOptions(coordinator=LINK.url).in_environment({})


@pytest.mark.parametrize(
    "link", [LINK, replace(LINK, secret=b""), JoinLink("https://h", key=bytes(32)), JoinLink("https://h/with/a/path?q")]
)
def test_a_link_is_read_as_it_is_written(link):
    assert JoinLink.parse(str(link)) == link


@pytest.mark.parametrize(
    ("typed", "url"),
    [
        ("127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("localhost:8080/", "http://localhost:8080/"),
        ("[::1]:8080", "http://[::1]:8080"),
        ("house-3.example.org:80/psyche", "http://house-3.example.org:80/psyche"),
        ("https://house:1", "https://house:1"),
        ("solana:localnet", "solana:localnet"),
        ("solana:https://house:1/KEY", "solana:https://house:1/KEY"),
        ("house", "house"),
        ("", ""),
    ],
)
def test_a_url_may_begin_with_its_host(typed, url):
    assert JoinLink.parse(typed).url == url


def test_commands_and_nodes_take_a_host_and_a_port(served, run, capsys):
    async def main():
        async with served() as (_, url):
            place = url.removeprefix("http://")
            await asyncio.to_thread(CoordinatorAdmin(place).create, "r")
            assert await asyncio.to_thread(cli, ["run", "list", "--coordinator", place]) == 0
            assert await asyncio.to_thread(cli, ["run", "status", "r", "--coordinator", place]) == 0
            client = load_plugins().coordinators()["http"].client(place, "r", Identity.generate(), {})
            assert (await client.request(GetTerms())).config is not None
            await client.close()
            options = RunOptions(run="r").in_environment({"PSYCHE_COORDINATOR": place})
            entry = await asyncio.to_thread(Entry, options)
            assert entry.terms.manifest is None

    run(main())
    assert "waiting for members" in capsys.readouterr().out


NO_URLS = [
    *("http://", "http://a b", "http://a\tb", "http://[::1", "http://a..b", f"http://{'a' * 64}", "http:/h", "ftp//h"),
    *("http://h:0", "http://h:70000", "http://user:word@h:1", "http://h/\u00fc", "http://h/a b", "h"),
    *("127.0.0.1:port", "localhost:port", "[::1]:port"),
]
COMMANDS = [
    *("run status r --coordinator", "run list --coordinator", "top", "join --run r", "doctor --coordinator"),
    *("train demo --run r --coordinator", "coordinator backup x --coordinator"),
]


PAIRS = [
    *((COMMANDS[0], url) for url in NO_URLS),
    *((command, url) for command in COMMANDS[1:] for url in ("http://a b", "http://[::1", "127.0.0.1:port")),
]


@pytest.mark.parametrize(("command", "url"), PAIRS)
def test_what_is_no_url_is_said_by_every_command(command, url, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CoordinatorAdmin, "_once", lambda *given: pytest.fail("it asks a server"))
    assert cli([*command.split(), url]) in (1, 2)
    told = capsys.readouterr()
    assert "is not a coordinator's URL; expected one such as http" in " ".join(told.err.split()), told


@pytest.mark.parametrize(
    "url", ["http://h", "https://h:1/with/a/path/", "http://b\u00fccher.example", "http://[::1]:8080"]
)
def test_urls_that_can_be(url):
    assert check_url(url) == url.rstrip("/")
