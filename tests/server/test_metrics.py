"""What Prometheus reads from a coordinator."""

from __future__ import annotations

import aiohttp
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as classic
from support.disk import small_disk

from psyche_lightning.errors import PsycheError
from psyche_lightning.protocol.evals import Measure
from psyche_lightning.protocol.requests import Evaluated, Figure, Report
from psyche_lightning.protocol.state import Phase
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.server.server import CoordinatorServer
from psyche_lightning.server.store import SqliteStore
from psyche_lightning.testing.walking import MANIFEST
from psyche_lightning.wire.identity import Identity

OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


async def scrape(url, accept=""):
    async with aiohttp.ClientSession() as session, session.get(url + "/metrics", headers={"Accept": accept}) as answer:
        assert answer.status == 200
        return await answer.text(), answer.content_type


def samples(text, parse=classic):
    return {(one.name, *sorted(one.labels.items())): one.value for family in parse(text) for one in family.samples}


def of_run(found, name, **labels):
    return found.get((name, *sorted({"run": "r", **labels}.items())))


def test_a_scrape_has_the_figures_that_the_status_has(served, walk, run, quick):
    node = Identity.generate()
    body = {"run_id": "r", "config": {**quick, "total_steps": 6, "global_batch_size_start": 3}, "max_seq_len": 16}

    async def main():
        async with served() as (server, url), aiohttp.ClientSession() as session:
            assert (await session.post(f"{url}/v1/runs", json=body)).status == 201
            before = samples((await scrape(url))[0])
            assert of_run(before, "psyche_run_phase", phase="waiting_for_members") == 1
            assert of_run(before, "psyche_run_waiting") == 1
            assert of_run(before, "psyche_run_training_loss") is None
            client = HttpCoordinator(url, "r", node)
            manifest = {**MANIFEST, "evals": {"tasks": ["arc"], "every": 2}}
            await walk(client, manifest=manifest, until=lambda state: state.phase.active and state.step > 3)
            host = server.runs["r"].host
            row = host.history.metrics.since(0)[-1]
            report = Report(row.step, 2.5, 100.0, 4000, 5000, (Figure("grad_norm", row.step - 1, 0.25),))
            host.history.report(host.state.epoch, node.public, report)
            await client.request(Evaluated("arc", row.step, 8, 0, (Measure("acc", 3.0, 4.0),)))
            text, kind = await scrape(url)
            now = samples(text)
            assert kind == "text/plain"
            name = node.public.hex()
            assert of_run(now, "psyche_run_phase", phase="waiting_for_members") == 0
            assert of_run(now, "psyche_run_steps") == server.runs["r"].state.step - 1
            assert of_run(now, "psyche_run_wanted_steps") == 6
            assert of_run(now, "psyche_run_nodes", status="healthy") == 1
            assert of_run(now, "psyche_run_training_loss") == 2.5
            assert of_run(now, "psyche_run_round_tokens") == 48
            assert of_run(now, "psyche_run_figure", figure="grad_norm") == 0.25
            assert of_run(now, "psyche_run_evaluation", task="arc", figure="acc") == 0.75
            assert of_run(now, "psyche_run_evaluation_steps", task="arc") == row.step
            assert of_run(now, "psyche_run_stalled") == 0
            assert of_run(now, "psyche_node_training_loss", node=name) == 2.5
            assert of_run(now, "psyche_node_sent_bytes_total", node=name) == 4000
            assert now[("psyche_coordinator_connections",)] == 1
            assert now[("process_open_fds",)] > 0
            text, kind = await scrape(url, OPEN_METRICS)
            assert kind == "application/openmetrics-text"
            assert of_run(samples(text, open_metrics), "psyche_run_training_loss") == 2.5
            assert (await walk(client, manifest=manifest)).phase is Phase.FINISHED
            await client.close()
            after = samples((await scrape(url))[0])
            assert of_run(after, "psyche_run_phase", phase="finished") == 1
            assert of_run(after, "psyche_node_points_total", node=name) == 18

    run(main())


def test_two_runs_share_each_metric(served, run, quick):
    async def main():
        async with served() as (_, url), aiohttp.ClientSession() as session:
            for name in ("a", "b"):
                body = {"run_id": name, "config": {**quick, "total_steps": 4, "global_batch_size_start": 1}}
                assert (await session.post(f"{url}/v1/runs", json=body)).status == 201
            text, _ = await scrape(url)
            assert text.count("# HELP psyche_run_steps ") == 1
            assert {key[1][1] for key in samples(text) if key[0] == "psyche_run_steps"} == {"a", "b"}

    run(main())


def test_health_says_when_changes_cannot_be_stored(tmp_path, walk, run, quick):
    async def health(url):
        async with aiohttp.ClientSession() as session, session.get(url + "/healthz") as answer:
            return answer.status, await answer.json()

    async def main(disk):
        store = SqliteStore(disk.path / "runs")
        server = CoordinatorServer(store)
        url = await server.start("127.0.0.1", 0)
        try:
            assert await health(url) == (200, {"healthy": True, "problems": {}})
            async with aiohttp.ClientSession() as session:
                body = {"run_id": "r", "config": {**quick, "total_steps": 9, "global_batch_size_start": 1}}
                assert (await session.post(f"{url}/v1/runs", json=body)).status == 201
            disk.fill()
            live = server.runs["r"]
            with pytest.raises(PsycheError, match="disk is full"):
                live.act(lambda host, now: host.pause(now))
            status, found = await health(url)
            assert status == 503
            assert "disk is full" in found["problems"]["r"]
            assert of_run(samples((await scrape(url))[0]), "psyche_run_stalled") == 1
            disk.free()
            live.tick()
            assert await health(url) == (200, {"healthy": True, "problems": {}})
        finally:
            await server.stop()
            store.close()

    with small_disk(tmp_path / "disk") as disk:
        run(main(disk))
