"""Who has no join link does not get in, and who listens to one who has it learns nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.errors import ConfigError, CoordinatorError
from psyche_lightning.protocol.link import JoinLink
from psyche_lightning.protocol.requests import GetTerms, Join
from psyche_lightning.server.admin import CoordinatorAdmin
from psyche_lightning.server.channel import seal_hello
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.server.server import CoordinatorServer
from psyche_lightning.server.store import MemoryStore, SqliteStore
from psyche_lightning.wire.identity import Identity

CONFIG = {"init_min_clients": 9, "total_steps": 9, "global_batch_size_start": 9}
OTHER = Identity(bytes(32))
MANIFEST: dict[str, Any] = {"run": {}}


@asynccontextmanager
async def served(store: Any = None) -> AsyncIterator[tuple[CoordinatorServer, CoordinatorAdmin]]:
    """A coordinator with an owner's token, which has nothing to do with this user's own coordinators."""
    server = CoordinatorServer(store or MemoryStore(), token="secret of the owner")
    url = await server.start(port=0)
    try:
        yield server, CoordinatorAdmin(url, token="secret of the owner")
    finally:
        await server.stop()


async def joins(link: JoinLink | str, run: str = "r", identity: Identity | None = None) -> str:
    """Empty if a node joins with that link, else the code of the refusal."""
    client = HttpCoordinator(str(link), run, identity or Identity.generate(), attempts=1)
    try:
        await client.request(Join("", MANIFEST))
    except CoordinatorError as error:
        return error.code
    finally:
        await client.close()
    return ""


def play(test: Any) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def test_only_the_link_lets_a_node_in() -> None:
    async def test() -> None:
        async with served() as (server, owner):
            for run in ("r", "s"):
                await asyncio.to_thread(owner.create, run, CONFIG, by_link=True)
            await asyncio.to_thread(owner.create, "open", CONFIG)
            link, other = [await asyncio.to_thread(owner.link, run) for run in ("r", "s")]
            assert (link.url, link.run, link.key, len(link.secret)) == (owner.url, "r", server.key, 16)
            assert JoinLink.parse(str(link)) == link
            assert await joins(owner.url) == "NotInvited"
            assert await joins(replace(link, secret=b"")) == "NotInvited"
            assert await joins(replace(link, secret=bytes(16))) == "NotInvited"
            assert await joins(replace(link, secret=other.secret)) == "NotInvited"
            assert await joins(replace(link, key=Identity.generate().public)) == "WrongCoordinator"
            assert server.runs["r"].host.membership.members == {}
            assert await joins(link) == ""
            assert (await asyncio.to_thread(owner.link, "open")).secret == b""
            assert await joins(owner.url, "open") == ""
            status = await asyncio.to_thread(owner.status, "r")
            assert (status["by_link"], str(link.secret.hex()) in str(status)) == (True, False)

    play(test())


def test_a_new_link_makes_the_former_one_worthless() -> None:
    async def test() -> None:
        async with served() as (server, owner):
            await asyncio.to_thread(owner.create, "r", CONFIG, by_link=True)
            former = await asyncio.to_thread(owner.link, "r")
            member, bad = Identity.generate(), Identity.generate()
            assert await joins(former, identity=member) == await joins(former, identity=bad) == ""
            lurking = HttpCoordinator(str(former), "r", Identity.generate())
            await lurking.request(GetTerms())  # it showed the link while that was worth something
            await asyncio.to_thread(owner.command, "r", "kick", node=bad.public.hex())
            fresh = await asyncio.to_thread(partial(owner.link, new=True), "r")
            assert await asyncio.to_thread(owner.link, "r") == fresh != former
            assert await joins(former) == await joins(owner.url) == "NotInvited"
            with pytest.raises(CoordinatorError) as caught:
                await lurking.request(Join("", MANIFEST))
            assert caught.value.code == "NotInvited"
            await lurking.close()
            assert await joins(fresh) == ""
            assert await joins(former, identity=member) == "", "members come back as they are"
            assert await joins(fresh, identity=bad) == "NotAuthorized"
            stored = RunHost.load(json.loads(json.dumps(server.runs["r"].host.dump())))
            assert stored.membership.links == 1
            await asyncio.to_thread(owner.create, "open", CONFIG)
            with pytest.raises(CoordinatorError, match="joined without a link"):
                await asyncio.to_thread(partial(owner.link, new=True), "open")

    play(test())


def test_a_proof_is_worth_nothing_to_others() -> None:
    link = JoinLink("http://127.0.0.1:1", "r", bytes(32), b"s" * 16)
    node, challenges = Identity.generate(), (bytes(32), b"c" * 32)
    proofs = {seal_hello(who, "r", challenge, link.secret)[96:] for who in (node, OTHER) for challenge in challenges}
    assert len(proofs) == 4
    assert not any(link.secret in proof for proof in proofs)
    assert "s" * 16 not in repr(link)
    assert link.secret.hex() not in repr(link)


def test_the_owner_changes_who_may_join() -> None:
    async def test() -> None:
        async with served() as (_, owner):
            await asyncio.to_thread(owner.create, "r", CONFIG, by_link=True)
            link = await asyncio.to_thread(owner.link, "r")
            named, holder = Identity.generate(), Identity.generate()
            await asyncio.to_thread(owner.command, "r", "authorize", node=named.public.hex())
            assert await joins(owner.url, identity=named) == ""
            assert await joins(link, identity=holder) == ""
            await asyncio.to_thread(owner.command, "r", "revoke", node=holder.public.hex())
            assert await joins(link, identity=holder) == "NotAuthorized"
            assert await joins(link) == ""  # with another key: only without the link is somebody out for good
            await asyncio.to_thread(owner.command, "r", "revoke", node=None)
            assert await joins(link) == "NotAuthorized"
            assert await joins(owner.url, identity=named) == ""
            await asyncio.to_thread(owner.command, "r", "authorize", node=None)
            assert await joins(owner.url) == ""

    play(test())


def test_the_link_outlives_a_restart_but_not_its_run(tmp_path: Any) -> None:
    async def test() -> None:
        links = []
        for restart in range(3):
            store = SqliteStore(tmp_path)
            async with served(store) as (_, owner):
                if restart != 1:
                    await asyncio.to_thread(owner.create, "r", CONFIG, by_link=True)
                links.append(replace(await asyncio.to_thread(owner.link, "r"), url=owner.url))
                assert await joins(links[-1]) == ""
                assert await joins(replace(links[0], url=owner.url)) == ("" if restart < 2 else "NotInvited")
                if restart == 1:
                    await asyncio.to_thread(owner.pause, "r")
                    await asyncio.to_thread(owner.command, "r", "close")
            store.close()
        assert (tmp_path / "coordinator.key").stat().st_mode & 0o077 == 0
        assert links[0].secret == links[1].secret != links[2].secret
        assert len({link.key for link in links}) == 1

    play(test())


def test_only_the_owner_gets_the_link() -> None:
    async def test() -> None:
        async with served() as (_, owner):
            await asyncio.to_thread(owner.create, "r", CONFIG, by_link=True)
            stranger = CoordinatorAdmin(owner.url, token="a guess")
            with pytest.raises(CoordinatorError, match="owner") as caught:
                await asyncio.to_thread(stranger.link, "r")
            assert caught.value.code == "Unauthorized"

    play(test())


def test_everybody_on_the_machine_owns_a_server_without_a_token() -> None:
    async def test() -> None:
        server = CoordinatorServer(MemoryStore())
        url = await server.start(port=0)
        await asyncio.to_thread(CoordinatorAdmin(url).create, "r", CONFIG, by_link=True)
        assert await joins(url) == ""
        await server.stop()

    play(test())


def test_terms_may_be_read_without_joining() -> None:
    async def test() -> None:
        async with served() as (_, owner):
            await asyncio.to_thread(owner.create, "r", CONFIG, by_link=True)
            client = HttpCoordinator(owner.url, "r", Identity.generate(), attempts=1)
            assert (await client.request(GetTerms())).config.total_steps == 9
            await client.close()

    play(test())


@pytest.mark.parametrize(
    "rest", ["", "r", "r:", "r:AAAA", f":{'A' * 43}:{'A' * 22}", f"r:{'A' * 43}:x", f"r:{'A' * 42}B", "r:ü"]
)
def test_a_damaged_link_is_named_and_not_shown(rest: str) -> None:
    with pytest.raises(ConfigError, match=r"the join link to http://h:1 is damaged") as caught:
        JoinLink.parse(f"http://h:1#{rest}")
    assert len(rest) < 3 or rest not in str(caught.value)


def test_a_link_is_of_one_run() -> None:
    link = JoinLink("http://127.0.0.1:1", "r", bytes(32), b"s" * 16)
    with pytest.raises(ConfigError, match="is of the run 'r', not of 'other'"):
        HttpCoordinator(str(link), "other", Identity.generate())
