"""What people and their programs ask of the server over plain HTTP."""

from __future__ import annotations

import re

import aiohttp
import pytest

from psyche_lightning.protocol.manifest import manifest_digest, manifest_text
from psyche_lightning.protocol.requests import Join, Withdraw
from psyche_lightning.protocol.state import Phase
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.wire.identity import Identity

CONFIG = {"init_min_clients": 2, "total_steps": 5, "global_batch_size_start": 2}


async def ask(method, url, **options):
    async with aiohttp.ClientSession() as session, session.request(method, url, **options) as answer:
        assert answer.content_type == "application/json", await answer.text()
        return answer.status, await answer.json()


def test_several_runs_side_by_side(served, walk, run, quick):
    async def main():
        async with served() as (_, url):
            for name, steps in (("a", 3), ("b", 6), ("c.2", 4)):
                body = {"run_id": name, "config": {**quick, "total_steps": steps, "global_batch_size_start": 1}}
                assert (await ask("POST", f"{url}/v1/runs", json=body))[0] == 201
            ids = [Identity.generate() for _ in range(3)]
            for name, identity, steps in zip(("a", "b", "c.2"), ids, (3, 6, 4), strict=True):
                client = HttpCoordinator(url, name, identity)
                assert (await walk(client)).step == steps + 1
                await client.close()
            _, found = await ask("GET", f"{url}/v1/runs")
            assert [(row["run_id"], row["phase"], row["step"]) for row in found["runs"]] == [
                ("a", "finished", 4),
                ("b", "finished", 7),
                ("c.2", "finished", 5),
            ]

    run(main())


def test_creating_again_in_the_same_way_is_no_error(served, run):
    body = {"run_id": "r", "config": CONFIG, "seed": None, "manifest": {"model": {"n": 1}}, "max_seq_len": 16}

    async def main():
        async with served() as (server, url):
            assert (await ask("POST", f"{url}/v1/runs", json=body))[0] == 201
            assert (await ask("POST", f"{url}/v1/runs", json=body))[0] == 201
            status, problem = await ask("POST", f"{url}/v1/runs", json={**body, "max_seq_len": 17})
            assert (status, problem["code"]) == (409, "RunExists")
            assert server.runs["r"].state.max_seq_len == 16
            status, found = await ask("GET", f"{url}/v1/runs/r")
            digest = manifest_digest({"model": {"n": 1}}).hex()
            assert found["manifest_digest"] == digest
            assert await ask("GET", f"{url}/v1/manifests/{digest}") == (200, {"model": {"n": 1}})
            assert (await ask("GET", f"{url}/v1/manifests/{'0' * 64}"))[0] == 404

    run(main())


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "run_id is None"),
        ({"run_id": ""}, "1 to 32 letters"),
        ({"run_id": "x" * 33}, "1 to 32 letters"),
        ({"run_id": "r", "confg": {}}, "Did you mean 'config'"),
        ({"run_id": "r", "config": {"min_client": 1}}, "Did you mean 'min_clients'"),
        ({"run_id": "r", "config": {"min_clients": "1"}}, "expected a whole number"),
        ({"run_id": "r", "config": {"min_clients": True}}, "expected a whole number"),
        ({"run_id": "r", "config": {"warmup_time": "soon"}}, "expected a number of seconds"),
        ({"run_id": "r", "config": {"warmup_time": 1e9}}, "less than epoch_time"),
        ({"run_id": "r", "config": [1]}, "not a JSON object"),
        ({"run_id": "r", "manifest": [1]}, "not a JSON object"),
        ({"run_id": "r", "seed": -1}, "the seed is -1"),
        ({"run_id": "r", "seed": "1"}, "expected a whole number"),
        ({"run_id": "r", "max_seq_len": 0}, "max_seq_len is 0"),
        ([], "not a JSON object"),
    ],
)
def test_bad_creations_say_what_is_wrong(served, run, body, text):
    async def main():
        async with served() as (server, url):
            status, problem = await ask("POST", f"{url}/v1/runs", json=body)
            assert status == 400
            assert text in problem["error"]
            assert not server.runs

    run(main())


def test_refusals_are_json(served, run):
    async def main():
        async with served() as (_, url):
            await ask("POST", f"{url}/v1/runs", json={"run_id": "known"})
            json = {"Content-Type": "application/json"}
            for expected, text, method, path, options in (
                (404, "its runs are: known", "GET", "/v1/runs/nope", {}),
                (404, "its runs are: known", "GET", "/v1/runs/nope/watch", {}),
                (404, "GET / shows a page", "GET", "/v2", {}),
                (405, "Not Allowed", "DELETE", "/v1/runs", {}),
                (400, "not a number", "GET", "/v1/runs/known?events=x", {}),
                (400, "not JSON", "POST", "/v1/runs", {"data": b"{", "headers": json}),
                (400, "not JSON", "POST", "/v1/runs", {"data": b"\xff", "headers": json}),
                (400, "not JSON", "POST", "/v1/runs", {"data": b"[" * 10**6, "headers": json}),
                (400, "application/json", "POST", "/v1/runs/known/pause", {"data": b"{}"}),
                (413, "larger than", "POST", "/v1/runs", {"data": bytes(9 * 2**20), "headers": json}),
                (400, "only a paused run resumes", "POST", "/v1/runs/known/resume", {"json": {}}),
                (400, "", "GET", "/v1/runs/known/watch", {}),
            ):
                status, problem = await ask(method, url + path, **options)
                assert status == expected, (path, problem)
                assert text in problem["error"]
                assert problem["code"]

    run(main())


def test_the_token_guards_what_changes_runs(served, run):
    async def main():
        async with served(token="s3cret ü") as (server, url):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret ü"}):
                status, problem = await ask("POST", f"{url}/v1/runs", json={"run_id": "r"}, headers=headers)
                assert (status, problem["code"]) == (401, "Unauthorized")
            assert not server.runs
            right = {"Authorization": "Bearer s3cret ü"}
            assert (await ask("POST", f"{url}/v1/runs", json={"run_id": "r"}, headers=right))[0] == 201
            for command in ("pause", "resume", "start", "update", "authorize", "revoke", "close"):
                assert (await ask("POST", f"{url}/v1/runs/r/{command}", json={}))[0] == 401
            for command in ("pause", "resume"):
                assert (await ask("POST", f"{url}/v1/runs/r/{command}", json={}, headers=right))[0] == 200
            assert (await ask("GET", f"{url}/v1/runs/r"))[0] == 200  # looking is free

    run(main())


def test_pause_ends_the_epoch_and_resume_goes_on_from_its_parameters(served, walk, run, quick):
    async def main():
        async with served() as (server, url):
            body = {"run_id": "r", "config": {**quick, "total_steps": 10**6, "global_batch_size_start": 1}}
            await ask("POST", f"{url}/v1/runs", json=body)
            identity = Identity.generate()
            client = HttpCoordinator(url, "r", identity)
            live = server.runs["r"]

            async def walk_until(condition):
                return await walk(client, until=condition)

            await walk_until(lambda state: state.step > 5)
            await ask("POST", f"{url}/v1/runs/r/pause", json={})
            paused = await walk_until(lambda state: state.phase.name == "PAUSED")
            assert paused.checkpoint.step == paused.step - 1
            _, found = await ask("GET", f"{url}/v1/runs/r")
            assert (found["phase"], found["clients"]) == ("paused", [])
            assert [member["status"] for member in found["pending"]] == ["pending"]  # it waits, connected
            await ask("POST", f"{url}/v1/runs/r/resume", json={})
            again = await walk_until(lambda state: state.epoch == 1 and state.phase.name == "ROUND_TRAIN")
            assert again.epoch_digest == paused.checkpoint.digest
            assert any("paused" in event.text for event in live.host.history.events.since(0))
            await client.close()

    run(main())


def test_status_and_page_show_who_does_what(served, walk, run, quick):
    async def main():
        async with served() as (_, url):
            body = {"run_id": "r", "config": {**quick, "total_steps": 8, "global_batch_size_start": 1}}
            await ask("POST", f"{url}/v1/runs", json=body)
            identity = Identity.generate()
            client = HttpCoordinator(url, "r", identity)
            await walk(client)
            _, found = await ask("GET", f"{url}/v1/runs/r")
            assert [member["status"] for member in found["clients"]] == ["healthy"]
            await client.request(Withdraw())
            await client.close()
            _, found = await ask("GET", f"{url}/v1/runs/r")
            (member,) = found["clients"]
            assert member["status"] == "finished"  # it left, but not before its work was done
            assert member["key"] == identity.public[:4].hex()
            assert (member["step"], member["loss"]) == (8, pytest.approx(3.0 - 0.08))
            assert [row["loss"] for row in found["metrics"] if row["step"] == 3] == [pytest.approx(2.97)]
            assert [row["step"] for row in found["metrics"]] == list(range(1, 9))  # none of the round that drains
            assert found["metric_count"] == 8
            assert member["figures"] == {f"norm/{group}": {"step": 8, "value": 1.0 + group} for group in range(2)}
            assert [row["figures"] for row in found["metrics"]] == [{"norm/0": 1.0, "norm/1": 2.0}] * 8
            _, rest = await ask("GET", f"{url}/v1/runs/r?events={found['event_count'] - 1}&metrics=7")
            assert len(rest["events"]) == len(rest["metrics"]) == 1
            async with aiohttp.ClientSession() as session, session.get(url) as answer:
                page = await answer.text()
            assert answer.content_type == "text/html"
            assert set(re.findall(r"https?://([\w.:-]+)", page)) == {"www.w3.org"}  # names of XML, which nobody fetches

    run(main())


def test_a_run_may_leave_batch_and_steps_to_its_first_node(served, run):
    async def main():
        async with served() as (_, url):
            await ask("POST", f"{url}/v1/runs", json={"run_id": "r", "config": {"init_min_clients": 3}})
            _, found = await ask("GET", f"{url}/v1/runs/r")
            assert (found["total_steps"], found["config"]["global_batch_size_start"]) == (None, None)
            first, second = (HttpCoordinator(url, "r", Identity.generate()) for _ in range(2))
            with pytest.raises(Exception, match="run has no total_steps"):
                await first.request(Join("a", {"run": {"global_batch_size": 12}}))
            with pytest.raises(Exception, match="global_batch_size is 'x'"):
                await first.request(Join("a", {"run": {"global_batch_size": "x", "total_steps": 1}}))
            with pytest.raises(Exception, match="it must be 1 to"):
                await first.request(Join("a", {"run": {"global_batch_size": 0, "total_steps": 1}}))
            await first.request(Join("a", {"run": {"global_batch_size": 12, "total_steps": 40}}))
            with pytest.raises(Exception, match="total_steps: the run has 40, this node has 41") as caught:
                await second.request(Join("a", {"run": {"global_batch_size": 12, "total_steps": 41}}))
            assert caught.value.differences == [("run.total_steps", 40, 41)]
            await second.request(Join("a", {"run": {"global_batch_size": 12, "total_steps": 40}}))
            _, found = await ask("GET", f"{url}/v1/runs/r")
            config = found["config"]
            assert (config["global_batch_size_start"], config["global_batch_size_end"]) == (12, 12)
            assert config["total_steps"] == 40
            await first.close()
            await second.close()
            # What the creator said stands, whatever a node's own configuration says.
            body = {"run_id": "s", "config": {"total_steps": 9, "global_batch_size_start": 4}}
            await ask("POST", f"{url}/v1/runs", json=body)
            third = HttpCoordinator(url, "s", Identity.generate())
            await third.request(Join("a", {"run": {"global_batch_size": 12, "total_steps": 40}, "model": {}}))
            _, found = await ask("GET", f"{url}/v1/runs/s")
            assert (found["total_steps"], found["config"]["global_batch_size_end"]) == (9, 4)
            assert manifest_text({"model": {}}) == '{"model":{}}'
            await third.close()

    run(main())


def test_the_owner_goes_back_to_other_parameters(served, walk, run, quick):
    async def main():
        async with served() as (_, url):
            config = {**quick, "total_steps": 900, "global_batch_size_start": 1}
            await ask("POST", f"{url}/v1/runs", json={"run_id": "r", "config": config})
            client = HttpCoordinator(url, "r", Identity.generate())
            await walk(client, until=lambda state: state.step > 3)
            back = f"{url}/v1/runs/r/restart-from"
            chosen = {"digest": "cd" * 32, "step": 2}
            status, problem = await ask("POST", back, json=chosen)
            assert (status, problem["code"]) == (400, "InvalidRunState")
            assert "pause it first" in problem["error"]
            await ask("POST", f"{url}/v1/runs/r/pause", json={})
            await walk(client, until=lambda state: state.phase is Phase.PAUSED)
            for wrong, text in (
                ({}, "'None' is not a digest of parameters: expected 64 hexadecimal digits"),
                ({**chosen, "digest": "cd"}, "'cd' is not a digest"),
                ({**chosen, "step": "2"}, "'2' is not a number of steps"),
                ({**chosen, "step": True}, "'True' is not a number of steps"),
                ({**chosen, "step": 10**9}, "a checkpoint has a digest of 32 bytes and at most"),
                ({**chosen, "step": -1}, "a checkpoint has"),
            ):
                status, problem = await ask("POST", back, json=wrong)
                assert (status, text in problem["error"]) == (400, True), problem
            _, found = await ask("POST", back, json=chosen)
            assert (found["step"], found["checkpoint"]) == (3, {"step": 2, "digest": "cd" * 32})
            assert found["waits_for"] == "waiting to be resumed by its owner"
            _, found = await ask("POST", f"{url}/v1/runs/r/resume", json={})
            assert found["waits_for"] == "waiting for a holder of cdcdcdcd, step 2; 1 newcomer is here"
            await client.close()

    run(main())
