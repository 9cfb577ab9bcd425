"""Closed runs keep their history until it is deleted."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from psyche_lightning.cli import main
from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.state import Phase
from psyche_lightning.server import archive, store
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.server.store import SqliteStore
from psyche_lightning.wire.identity import Identity


def line(name: str, number: int = 0) -> dict[str, object]:
    return {"id": f"{name}#{number}", "run_id": name}


def test_a_closed_run_is_kept_with_its_history(served, walk, run, quick, tmp_path):
    node, kept = Identity.generate(), SqliteStore(tmp_path)

    async def main_():
        async with served(kept, events=tmp_path / "events") as (server, url), aiohttp.ClientSession() as session:

            async def get(path, status=200):
                async with session.get(f"{url}/v1/{path}") as answer:
                    assert answer.status == status, await answer.text()
                    return await answer.json()

            async def post(path, status=200):
                async with session.post(f"{url}/v1/runs/{path}", json={}) as answer:
                    assert answer.status == status, await answer.text()
                    return await answer.json()

            for _ in range(2):  # two runs of one name, one after the other
                body = {"run_id": "r", "config": {**quick, "total_steps": 4, "global_batch_size_start": 3}}
                assert (await session.post(f"{url}/v1/runs", json=body)).status == 201
                client = HttpCoordinator(url, "r", node)
                assert (await walk(client)).phase is Phase.FINISHED
                await client.close()
                scope = server.runs["r"].state.scope
                assert await post("r/close") == {"closed": "r", "archived": scope, "forgotten": []}
            found = await get("runs")
            assert found["runs"] == []
            assert [one["run_id"] for one in found["archived"]] == ["r", "r"]
            newest = found["archived"][0]
            assert newest["id"] == scope
            assert (newest["state"], newest["progress"]) == ("finished", 1.0)
            assert newest["archived"] >= newest["ended"] >= newest["started"] >= newest["created"] > 1e9
            status = await get(f"runs/{scope.replace('#', '%23')}")
            assert [row["step"] for row in status["metrics"]] == [1, 2, 3, 4]
            assert [row["marks"] for row in status["rounds"]] == ["d"] * 4
            assert status["nodes"][node.public.hex()]["status"] == "finished"
            assert status["manifest"] == await get(f"manifests/{status['manifest_digest']}")
            assert (await get("runs/r", 404))["code"] == "UnknownRun"
            assert (await post("r/delete", 409))["code"] == "SeveralRuns"
            assert await post(f"{scope.replace('#', '%23')}/delete") == {"deleted": scope}
            assert (tmp_path / "events" / "r").is_dir()  # the other run of that name has its events there, too
            other = (await get("runs"))["archived"][0]["id"]
            return other

    other = run(main_())
    kept.close()
    again = SqliteStore(tmp_path)
    assert [one["id"] for one in again.archived()] == [other]
    assert again.load() == []
    again.close()


def test_the_events_of_a_run_go_with_it(served, run, quick, tmp_path):
    async def main_():
        async with served(events=tmp_path) as (_, url), aiohttp.ClientSession() as session:
            assert (await session.post(f"{url}/v1/runs", json={"run_id": "r", "config": quick})).status == 201
            assert (tmp_path / "r").is_dir()
            for command in ("pause", "delete"):
                assert (await session.post(f"{url}/v1/runs/r/{command}", json={})).status == 200
            assert list(tmp_path.iterdir()) == []

    run(main_())


def test_a_run_that_never_trained_leaves_nothing_and_an_open_one_stays(served, run, quick):
    async def main_():
        async with served() as (server, url), aiohttp.ClientSession() as session:
            body = {"run_id": "r", "config": quick}
            assert (await session.post(f"{url}/v1/runs", json=body)).status == 201
            for command in ("close", "delete"):
                async with session.post(f"{url}/v1/runs/r/{command}", json={}) as answer:
                    assert (await answer.json())["code"] == "CloseCoordinatorNotHalted"
            assert (await session.post(f"{url}/v1/runs/r/pause", json={})).status == 200
            async with session.post(f"{url}/v1/runs/r/close", json={}) as answer:
                assert await answer.json() == {"closed": "r", "archived": None, "forgotten": []}
            assert server.archived == []

    run(main_())


def test_whose_history_is_deleted_is_said(served, walk, run, quick, monkeypatch, caplog, capsys):
    monkeypatch.setattr(store, "MAX_ARCHIVED", 1)

    async def main_():
        async with served() as (server, url), aiohttp.ClientSession() as session:
            scopes = []
            for _ in range(2):
                body = {"run_id": "r", "config": {**quick, "total_steps": 2, "global_batch_size_start": 1}}
                assert (await session.post(f"{url}/v1/runs", json=body)).status == 201
                client = HttpCoordinator(url, "r", Identity.generate())
                await walk(client)
                await client.close()
                scopes.append(server.runs["r"].state.scope)
                await asyncio.to_thread(main, ["run", "close", "r", "--coordinator", url])
            assert [one["id"] for one in server.archived] == scopes[1:]
            return scopes[0]

    gone = run(main_())
    assert f"the history of the closed run {gone} is deleted" in caplog.text
    first, *second = capsys.readouterr().out.splitlines()
    assert "deleted" not in first
    assert f"the history of the closed run {gone} is deleted there: only the newest ones are kept" in second


def test_only_the_newest_closed_runs_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MAX_ARCHIVED", 2)
    kept = SqliteStore(tmp_path)
    for number in range(4):
        kept.archive("r", {"line": line("r", number), "status": {"step": number}})
    assert [one["id"] for one in kept.archived()] == ["r#3", "r#2"]
    assert kept.archived_status("r#2") == {"step": 2}
    kept.forget("r#3")
    assert [one["id"] for one in kept.archived()] == ["r#2"]
    kept._database.execute("UPDATE archive SET status = ?", (b"no zlib",))
    with pytest.raises(CoordinatorError, match="the history of the closed run 'r#2' is damaged"):
        kept.archived_status("r#2")
    kept.close()


def test_a_closed_run_is_found_by_its_id_or_its_name():
    lines = [line("a"), line("b"), line("b", 1)]
    assert (archive.find(lines, "a"), archive.find(lines, "b#1")) == ("a#0", "b#1")
    with pytest.raises(CoordinatorError, match="several closed runs were named 'b'; give the id of one: b#0, b#1"):
        archive.find(lines, "b")
    with pytest.raises(CoordinatorError, match="open or closed; closed are: a, b"):
        archive.find(lines, "c")


def test_the_command_asks_first(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert main(["run", "delete", "r", "--coordinator", "http://127.0.0.1:1"]) == 1
    assert "for ever; if you want that, give --yes" in " ".join(capsys.readouterr().err.split())
