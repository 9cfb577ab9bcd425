"""The live page in a browser: what it shows in each state of a run, and that it asks nothing it should not."""

from __future__ import annotations

import asyncio
import re
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from support.browser import AXE, CHROMIUM, DESK, PHONE, TABLET, browsing, proxied
from support.stages import Stage, before_the_start, ending, finished, key, stalled, training, warming_up
from support.training import train_all

from psyche_lightning.protocol.evals import Measure
from psyche_lightning.protocol.requests import Evaluated, WarmupWitness
from psyche_lightning.protocol.state import Phase
from psyche_lightning.recipe import load_recipe
from psyche_lightning.server import feed
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.server.store import MemoryStore
from psyche_lightning.testing.walking import report, walk
from psyche_lightning.wire.identity import Identity

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed: apt-get install chromium")


async def create(url: str, run_id: str, manifest: dict[str, Any] | None = None, **config: Any) -> None:
    async with aiohttp.ClientSession() as session:
        body = {
            "run_id": run_id,
            "config": {"global_batch_size_start": 1, **config},
            **({"manifest": manifest} if manifest else {}),
        }
        async with session.post(f"{url}/v1/runs", json=body) as answer:
            assert answer.status == 201, await answer.text()


async def ask(url: str, path: str, body: dict[str, Any] | None = None) -> None:
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/runs/{path}", json=body or {}) as answer:
        assert answer.status == 200, await answer.text()


async def drawn(visited: Any, steps: int) -> None:
    """The loss is one curve over all steps."""
    await visited.until(f"document.querySelector('#loss .plot')?.uplot?.data[0].length === {steps}")
    assert await visited.steps() == list(range(1, steps + 1))
    assert await visited.one_curve()


@pytest.mark.parametrize("prefix", ["", "/house/psyche"], ids=["at the root", "below a proxy's path"])
def test_three_epochs_from_before_the_start_to_the_end(served, run, quick, prefix):
    async def main():
        async with served() as (_, url), proxied(url, prefix) as (address, strays), browsing() as visit:
            await create(url, "r", **quick, total_steps=60)
            visited = await visit(address if prefix else url)  # without the slash at its end
            await visited.shows("h1", "r")  # the only run is shown at once
            assert await visited.text(".run-head .tag") == ["waiting for nodes"]
            assert await visited.text("#steps") == ["0 / 60"]
            assert await visited.text("#loss .empty") == ["The curve begins with the second step."]
            client = HttpCoordinator(address, "r", Identity.generate())  # nodes take the same way

            for epoch in (1, 2):
                await walk(client, until=lambda state, least=15 * epoch: state.step > least)
                await ask(url, "r/pause")
                paused = await walk(client, until=lambda state: state.phase is Phase.PAUSED)
                await visited.shows(".run-head .tag", "paused")
                await drawn(visited, paused.step - 1)
                await ask(url, "r/resume")

            await walk(client)
            await client.close()
            await visited.shows(".run-head .tag", "finished")
            await drawn(visited, 60)
            assert await visited.text("#steps") == ["60 / 60"]
            assert "2.4000" in await visited.text(".figure b")
            assert "Norm" in await visited.text("figcaption h2")
            await visited.go("/runs/r/nodes")
            await visited.shows("table.nodes .tag", "finished")
            again = await visit(address + "/")  # who comes when all is over sees the same
            await drawn(again, 60)
            assert strays == visited.wrong == again.wrong == []
            assert len(visited.sockets) == 2  # the list's, then the run's, which holds all the time

    run(main())


def test_an_epoch_that_drains_is_seen_and_whom_it_waits_for(served, run, quick):
    """Each end of an epoch is held: while it drains, with one of two reports, and when it has ended."""

    async def main():
        async with served() as (_, url), browsing() as visit:
            await create(url, "r", **{**quick, "cooldown_time": 60}, total_steps=40, init_min_clients=2, min_clients=2)
            visited = await visit(f"{url}/#/runs/r")
            both = [HttpCoordinator(url, "r", Identity.generate()) for _ in range(2)]
            await asyncio.gather(*(walk(one, until=lambda state: state.step > 12) for one in both))
            await ask(url, "r/pause")
            held = await asyncio.gather(*(walk(one, until=lambda state: state.draining) for one in both))
            await visited.shows(".run-head .tag", "epoch is ending")
            await visited.shows(".phase .what", "The epoch ends: what is under way is exchanged")
            await visited.shows(".countdown", "at most")
            steps = held[0].step - 1
            assert await visited.text("#steps") == [f"{steps} / 40"]
            await drawn(visited, steps)  # a drain round is no step, and leaves no gap
            assert "off" not in await visited.text("#loss .readout b")
            await report(both[0], held[0])
            await visited.shows(".phase .waits", f"waits for {both[1].signer.hex()[:8]}")
            assert await visited.text(".phase .waits a") == [both[1].signer.hex()[:8]]

            walks = [walk(one, until=lambda state: state.phase is Phase.PAUSED) for one in both]
            await asyncio.gather(*walks)
            await visited.shows(".run-head .tag", "paused")
            assert await visited.text("#steps") == [f"{steps} / 40"]
            await drawn(visited, steps)
            await visited.shows("#digests", "agreed")

            await ask(url, "r/resume")
            await asyncio.gather(*(walk(one, until=lambda state: state.draining) for one in both))
            await visited.shows(".run-head .tag", "epoch is ending")  # the last one: all steps are trained
            assert await visited.text("#steps") == ["40 / 40"]
            await drawn(visited, 40)
            await asyncio.gather(*(walk(one) for one in both))
            await asyncio.gather(*(one.close() for one in both))
            await visited.shows(".run-head .tag", "finished")
            await drawn(visited, 40)
            assert visited.wrong == []

    run(main())


@pytest.mark.parametrize("size", [DESK, TABLET, PHONE, {"width": 320, "height": 700}], ids=lambda size: size["width"])
def test_nothing_lies_over_anything_before_the_start(served, run, size):
    async def main():
        async with served() as (_, url), browsing() as visit:
            await create(url, "a-run-with-a-name-of-32-letters-", init_min_clients=3, total_steps=200_000)
            visited = await visit(url, size)
            await visited.shows("#steps", "0 / 200 k")
            assert await visited.text(".run-head .tag") == ["waiting for nodes"]
            await visited.until("document.querySelector('#link.live')")
            assert await visited.page.locator("#link").evaluate("one => one.clientHeight") < 20, "live: in one line"
            assert await visited.overlaps() == []
            assert await visited.fits()
            assert visited.wrong == []

    run(main())


def test_a_node_that_is_killed_is_seen_to_be_gone_and_why(served, run, quick):
    async def main():
        async with served() as (_, url), browsing() as visit:
            await create(url, "r", **quick, total_steps=200, init_min_clients=2, min_clients=1)
            visited = await visit(f"{url}/#/runs/r")
            one, other = (HttpCoordinator(url, "r", Identity.generate()) for _ in range(2))
            walks = [walk(client, until=lambda state: state.step > 5) for client in (one, other)]
            await asyncio.gather(*walks)
            await visited.go("/runs/r/nodes")
            await visited.until("document.querySelectorAll('table.nodes tbody tr').length === 2")
            await other.close()  # its connection breaks without a word
            await visited.go(f"/runs/r/nodes/{other.signer.hex()}")
            await visited.shows(".node .tag", "dropped")
            await visited.shows(".node .reason", "its connection was closed")
            await visited.go("/runs/r/events?kind=dropped")
            await visited.shows(".event .bad", "dropped")
            assert len(await visited.text(".event")) == 1
            await one.close()
            assert visited.wrong == []

    run(main())


def test_26_runs_are_a_table_that_can_be_filtered_on_a_phone(served, run):
    async def main():
        async with served() as (_, url), browsing() as visit:
            for number in range(26):
                await create(url, f"run-{number}", total_steps=100)
            visited = await visit(url, PHONE, has_touch=True, is_mobile=True)
            await visited.shows("h1", "Runs")
            assert len(await visited.text("table.runs tbody tr")) == 26
            assert await visited.fits()
            first = "document.querySelector('table.runs tbody tr').getBoundingClientRect()"
            assert await visited.page.evaluate(f"{first}.top") < 220  # the table is in sight at once
            assert await visited.page.evaluate(f"{first}.height") < 100
            await visited.page.get_by_label("Filter by name or state").fill("run-25")
            await visited.until("document.querySelectorAll('table.runs tbody tr').length === 1")
            await visited.page.locator("table.runs a").click()
            await visited.shows("h1", "run-25")
            assert urlsplit(visited.page.url).fragment == "/runs/run-25"
            await visited.page.get_by_label("Run", exact=True).select_option("run-3")
            await visited.shows("h1", "run-3")
            assert visited.wrong == []

    run(main())


def test_the_newest_evaluation_of_each_task_is_shown(served, run, quick):
    async def main():
        async with served() as (_, url), browsing() as visit:
            await create(url, "r", {"evals": {"tasks": ["<b>sums</b>"], "every": 10}}, **quick, total_steps=60)
            visited = await visit(url)
            client = HttpCoordinator(url, "r", Identity.generate())
            await walk(client, until=lambda state: state.step > 20)
            assert await visited.text("#tasks td") == []
            for step, share in ((10, 0), (20, 0), (20, 2)):
                await client.request(Evaluated("<b>sums</b>", step, 3, share, (Measure("acc", 0.5 * share, 1.0),)))
            await visited.shows("#tasks", "2 of 3")  # all that was sent
            assert await visited.text("#tasks tbody th") == ["<b>sums</b>"]
            assert await visited.text("#tasks td") == ["acc 0.5000", "20", "2 of 3"]
            await client.close()
            assert visited.wrong == []

    run(main())


def test_a_disk_that_is_full_is_seen(served, run):
    async def main():
        async with served() as (server, url), browsing() as visit:
            await create(url, "r")
            visited = await visit(url)
            await visited.shows("h1", "r")
            assert await visited.text(".problem") == []
            server.runs["r"]._unstorable = "cannot write <b>runs</b>: disk is full"
            await visited.shows(".problem", "cannot write <b>runs</b>: disk is full")
            server.runs["r"]._unstorable = None
            await visited.until("!document.querySelector('.problem')")
            assert visited.wrong == []

    run(main())


def test_figures_of_steps_that_the_owner_undid_are_not_drawn(served, run, quick):
    """After `psyche run restart-from` steps are trained again; the newest figures count."""

    async def main():
        async with served() as (server, url), browsing() as visit:
            await create(url, "r", **quick, total_steps=30)
            client = HttpCoordinator(url, "r", Identity.generate())
            await walk(client, until=lambda state: state.step > 20)
            await ask(url, "r/pause")
            state = await walk(client, until=lambda state: state.phase is Phase.PAUSED)
            await ask(url, "r/restart-from", {"digest": "ab" * 32, "step": 5})
            await ask(url, "r/resume")
            visited = await visit(url)
            await visited.shows(".waits", "waiting for a holder of abababab, step 5; 1 newcomer is here")
            await client.request(WarmupWitness(state.epoch, 0, bytes.fromhex("ab" * 32)))
            await walk(client)
            await client.close()
            await visited.shows(".run-head .tag", "finished")
            assert server.runs["r"].host.history.metrics.count > 40
            await drawn(visited, 30)
            assert visited.wrong == []

    run(main())


def test_a_closed_run_keeps_its_history(served, run, quick):
    async def main():
        async with served() as (_, url), browsing() as visit:
            await create(url, "r", **quick, total_steps=30)
            client = HttpCoordinator(url, "r", Identity.generate())
            await walk(client)
            await client.close()
            visited = await visit(f"{url}/#/runs")
            await visited.shows("table.runs .of-state", "finished")
            watching = await visit(f"{url}/#/runs/r/events?kind=epoch")
            await watching.shows(".event", "is formed")
            await ask(url, "r/close")
            await watching.shows(".run-head", "closed")  # who looked at the run goes on to see it, from the archive
            await watching.shows(".event", "is formed")
            assert re.fullmatch(r"/runs/r%23[0-9a-f]+/events\?kind=epoch", urlsplit(watching.page.url).fragment)
            assert watching.wrong == []
            await visited.shows("table.runs .of-state", "finished closed")
            assert await visited.text("table.runs td.of-nodes") == ["0"]  # whoever was there has left
            await visited.page.locator("table.runs a").click()
            await visited.shows(".run-head", "closed")
            await drawn(visited, 30)
            await visited.shows("#rounds .heat-names", client.signer.hex()[:8])
            await visited.go(visited.page.url.partition("#")[2] + "/nodes")
            await visited.shows("table.nodes .tag", "finished")
            assert visited.wrong == []

    run(main())


def test_a_coordinator_that_comes_back_is_found_again(served, run):
    async def main():
        store = MemoryStore()
        async with browsing() as visit:
            async with served(store=store) as (_, url):
                await create(url, "a-run-with-a-long-name", total_steps=10)
                visited = await visit(url, PHONE)
                await visited.shows("h1", "a-run")
                switcher = visited.page.get_by_label("Run", exact=True)
                width = (await switcher.bounding_box())["width"]
            await visited.shows("#link", "the coordinator does not answer")
            assert (await switcher.bounding_box())["width"] >= width  # the message takes a line of its own
            assert await visited.fits()
            await visited.shows("h1", "a-run")  # what was known stays in sight
            async with served(port=urlsplit(url).port, store=store):
                await visited.until("document.querySelector('#link').textContent === 'live'")
                await visited.go("/runs/other")
                await visited.shows("h1", "No such run")

    run(main())


def test_the_legend_switches_curves_also_in_a_link(staged, run):
    async def main():
        async with staged(training()) as url, browsing() as visit:
            visited = await visit(f"{url}/#/runs/training")
            series = "document.querySelector('#loss .plot').uplot.series.length"
            await visited.until("document.querySelector('#loss .plot')?.uplot")
            assert await visited.page.evaluate(series) == 3
            legend = visited.page.locator("#loss .readout button")
            await legend.filter(has_text="training").press("Enter")
            await visited.shows("#loss [aria-pressed=false]", "training off")
            assert await visited.page.evaluate(series) == 2
            assert urlsplit(visited.page.url).fragment.endswith("?hide=training")
            again = await visit(visited.page.url)
            await again.shows("#loss [aria-pressed=false]", "training off")
            assert await again.page.evaluate(series) == 2
            await legend.filter(has_text="training").click()
            assert await visited.page.evaluate(series) == 3
            assert urlsplit(visited.page.url).fragment == "/runs/training"
            assert visited.wrong == again.wrong == []

    run(main())


def test_a_round_of_an_outage_does_not_press_the_others_flat(staged, run):
    async def main():
        async with staged(training()) as url, browsing() as visit:
            visited = await visit(f"{url}/#/runs/training")
            chart = visited.page.locator("figure", has=visited.page.get_by_text("Round time", exact=True))
            await chart.get_by_text("1 value above").wait_for()
            most = "element => element.querySelector('.plot').uplot.scales.y.max"
            assert 11 < await chart.evaluate(most) < 60
            await visited.page.get_by_role("button", name="Log scale").click()
            await visited.until("!document.body.textContent.includes('1 value above')")
            assert await chart.evaluate(most) > 1200
            assert visited.wrong == []

    run(main())


def test_regions_are_shown_where_nodes_say_so(staged, run):
    async def main():
        async with staged(training(), finished(), before_the_start()) as url, browsing() as visit:
            visited = await visit(f"{url}/#/runs/training/nodes")
            await visited.shows(".regions h2", "1 node does not say")
            assert await visited.text(".regions b") == ["us-east", "ap-south", "eu-west"]
            await visited.page.locator(".regions button", has_text="us-east").click()
            await visited.until("document.querySelectorAll('table.nodes tbody tr').length === 2")
            assert set(await visited.text("table.nodes td[data-label=Region]")) == {"us-east"}
            await visited.go(f"/runs/training/nodes/{key(2).hex()}")
            await visited.shows(".facts", "us-east")
            assert visited.wrong == []

    run(main())


def test_what_is_kept_of_closed_runs_is_said(staged, run, monkeypatch):
    monkeypatch.setattr(feed, "MAX_ARCHIVED", 1)

    async def main():
        async with staged(before_the_start(), closed=[finished()]) as url, browsing() as visit:
            visited = await visit(f"{url}/#/runs")
            await visited.shows(".kept", "the newest 1 are kept; the histories of older ones are deleted.")
            assert visited.wrong == []

    run(main())


def everywhere(stages: list[Stage]) -> list[str]:
    """Every view of these runs, of which one trains."""
    runs = [f"/runs/{made.host.state.run_id}" for made in stages]
    nodes = [f"/runs/training/nodes/{key(number).hex()}" for number in (1, 2)]
    views = ["/runs", *runs, "/runs/training?hide=training&log=1", "/runs/training/nodes", *nodes]
    return [*views, "/runs/training/events?kind=late", "/runs/training/about", "/runs/nothing"]


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed: npm ci --prefix psyche_lightning/page")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_view_has_a_barrier(staged, run, theme):
    async def main():
        stages = [before_the_start(), warming_up(), training(), stalled()]
        async with staged(*stages) as url, browsing() as visit:
            visited = await visit(f"{url}/#/runs", color_scheme=theme, reduced_motion="reduce")
            for view in everywhere(stages):
                await visited.go(view)
                await visited.until("document.querySelector('.headline, .nothing')")
                assert await visited.barriers() == [], view
            await visited.go("/runs/training")
            await visited.shows(".run-head .tag", "training")
            moving = "document.getAnimations().filter(one => one.playState === 'running').length"
            assert await visited.page.evaluate(moving) == 0
            assert visited.wrong == []

    run(main())


def test_every_view_fits_on_a_phone(staged, run):
    async def main():
        stages = [before_the_start(), warming_up(), training(), ending(), stalled(), finished()]
        async with staged(*stages) as url, browsing() as visit:
            visited = await visit(f"{url}/#/runs", PHONE)
            for view in everywhere(stages):
                await visited.go(view)
                await visited.until("document.querySelector('.headline, .nothing')")
                assert await visited.fits(), view
                assert await visited.overlaps() == [], view
            await visited.go("/runs/warming-up")
            await visited.shows(".phase .what", "Waiting for 1 of 4 members to report the parameters")
            assert await visited.text(".phase .waits a") == [key(3).hex()[:8]]
            assert visited.wrong == []

    run(main())


def test_charts_are_read_and_zoomed_by_keyboard_and_by_link(served, run, quick):
    async def main():
        async with served() as (_, url), browsing() as visit:
            await create(url, "r", **quick, total_steps=40)
            client = HttpCoordinator(url, "r", Identity.generate())
            await walk(client)
            await client.close()
            visited = await visit(f"{url}/#/runs/r?smooth=0.5&from=10&to=20")
            plot = visited.page.locator("#loss .plot")
            await plot.wait_for()
            assert await visited.page.evaluate("document.querySelector('#loss .plot').uplot.scales.x.min") == 10
            await plot.focus()
            await visited.page.keyboard.press("Home")
            assert re.fullmatch(r"step 1: training 2\.99.*", await plot.get_attribute("aria-valuetext"))
            await visited.page.keyboard.press("Escape")
            await visited.until("!location.hash.includes('from')")
            await visited.page.locator("#rounds .heat-scroll").focus()
            await visited.page.keyboard.press("End")
            await visited.shows("#rounds .told", f"{client.signer.hex()[:8]}: delivered")
            await visited.page.locator("#theme").click()  # as the system has it, then light, then dark
            await visited.page.locator("#theme").click()
            assert await visited.page.evaluate("document.documentElement.dataset.theme") == "dark"
            assert visited.wrong == []

    run(main())


def test_a_real_run_of_two_nodes(create_run, run, tmp_path):
    text = tmp_path / "text"
    text.write_text("to and fro, one and all. " * 400)
    given = [f"data.config.path={text}", "micro_batch_size=2", "init_min_clients=2", "total_steps=8"]
    given += ["global_batch_size_start=4", "global_batch_size_end=4", "trainer.validate_every=4", "trainer.log_every=2"]
    recipe = load_recipe("demo", given, twin=True)
    url, name = create_run(init_min_clients=2, total_steps=8, global_batch_size_start=4)

    async def main():
        async with browsing() as visit:
            visited = await visit(f"{url}/#/runs/{name}")
            await visited.shows(".run-head .tag", "waiting for nodes")
            folders = [tmp_path / "0", tmp_path / "1"]
            first, second = await asyncio.to_thread(train_all, [recipe] * 2, url, name, folders)
            assert first["digest"] == second["digest"]
            await visited.shows(".run-head .tag", "finished")
            await drawn(visited, 8)
            assert await visited.text("#steps") == ["8 / 8"]
            await visited.go(f"/runs/{name}/nodes")
            await visited.until("document.querySelectorAll('table.nodes tbody tr').length === 2")
            assert set(await visited.text("table.nodes tbody th")) == {first["id"][:8], second["id"][:8]}
            await visited.go(f"/runs/{name}/about")
            await visited.shows("pre", '"vocab_size"')
            assert visited.wrong == []

    run(main())
