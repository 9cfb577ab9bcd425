"""The join link of a coordinator process: for strangers, for its owner's nodes on the same machine, in options."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from psyche_lightning.errors import ConfigError, CoordinatorError
from psyche_lightning.protocol.link import JoinLink
from psyche_lightning.protocol.requests import Join
from psyche_lightning.recipe.options import RunOptions
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
