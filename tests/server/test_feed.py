"""What the live page is told: everything at first, then what changes."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.server.feed import Feed, Growing, _Known, changes
from psyche_lightning.server.limits import MAX_FRAME_OF_PAGES
from psyche_lightning.wire.identity import Identity


def test_changes_are_what_is_new_differs_or_is_gone() -> None:
    assert changes({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 4, "d": 5}) == {"b": 4, "d": 5, "c": None}
    assert changes({"a": 1}, {"a": 1}) == {}


def test_a_list_that_grows_is_told_from_the_first_entry_that_differs() -> None:
    values: list[Any] = []
    dropped = 0

    def growing() -> Growing:
        def lines(place: int) -> list[Any]:
            return values[max(0, place - dropped) :]

        return Growing("rows", dropped, dropped + len(values), 2, lines)

    known = _Known()
    assert known.news(growing()) == {"first": 0, "kept": 0, "items": []}  # at first, to be whole
    assert known.news(growing()) is None
    values += [1, 2, 3]
    assert known.news(growing()) == {"first": 0, "kept": 0, "items": [1, 2, 3]}
    values[1] = 20  # one of the newest two
    assert known.news(growing()) == {"first": 1, "kept": 0, "items": [20, 3]}
    values.append(4)
    assert known.news(growing()) == {"first": 3, "kept": 0, "items": [4]}
    del values[:2]
    dropped = 2
    values += [5, 6, 7]
    assert known.news(growing()) == {"first": 4, "kept": 2, "items": [5, 6, 7]}
    assert known.news(growing()) is None
    del values[:4]  # more than was sure
    dropped = 6
    values += [8]
    assert known.news(growing()) == {"first": 6, "kept": 6, "items": [7, 8]}


def test_a_page_hears_of_a_run_until_it_is_closed(served: Any, walk: Any, run: Any, quick: dict[str, float]) -> None:
    async def told(socket: aiohttp.ClientWebSocketResponse, until: Any) -> dict[str, Any]:
        """All that is told until a message fits, in one."""
        found: dict[str, Any] = {"runs": {}, "run": {}, "nodes": {}, "metrics": []}
        async for message in socket:
            news = message.json()
            for part in ("runs", "run", "nodes"):
                found[part] |= news.get(part, {})
            rows = news.get("lists", {}).get("metrics", {"first": len(found["metrics"]), "items": []})
            found["metrics"][rows["first"] :] = rows["items"]
            if until(found, news):
                return found
        raise AssertionError("the feed ended")

    async def main() -> None:
        async with served() as (_, url), aiohttp.ClientSession() as session:
            body = {"run_id": "r", "config": {"global_batch_size_start": 1, "total_steps": 20, **quick}}
            async with session.post(f"{url}/v1/runs", json=body) as answer:
                assert answer.status == 201
            async with session.ws_connect(f"{url}/v1/feed?run=r") as socket:
                client = HttpCoordinator(url, "r", Identity.generate())
                _, found = await asyncio.gather(
                    walk(client), told(socket, lambda found, _: found["run"].get("phase") == "finished")
                )
                await client.close()
                assert [row["step"] for row in found["metrics"]] == list(range(1, 21))
                assert found["run"]["step"] == found["runs"]["r"]["step"] == 21
                assert list(found["nodes"]) == [client.signer.hex()]
                async with session.post(f"{url}/v1/runs/r/close", json={}) as answer:
                    assert answer.status == 200
                found = await told(socket, lambda _, news: "no run 'r'" in news.get("error", ""))
                assert found["runs"].pop("r") is None
                assert [line["run_id"] for line in found["runs"].values()] == ["r"]  # closed
                await socket.send_str("x" * (MAX_FRAME_OF_PAGES + 1))  # a page has nothing to say
                assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE

    run(main())


def test_a_fault_ends_the_connection_and_is_logged(served: Any, run: Any, monkeypatch: Any, caplog: Any) -> None:
    async def main() -> None:
        async with (
            served() as (_, url),
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{url}/v1/feed") as socket,
        ):
            assert (await socket.receive()).json()["runs"] == {}
            monkeypatch.setattr(Feed, "message", lambda _: {}["gone"])
            assert (await socket.receive()).data == aiohttp.WSCloseCode.INTERNAL_ERROR
        assert "the live page cannot be told what changes" in caplog.text

    run(main())
