"""Grafana's dashboards: each query returns data from a real Prometheus while a run trains."""

from __future__ import annotations

import json
import math
import random
import re
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support.fleet import PATIENCE, POLL, Fleet
from support.tasks import sums

from psyche_lightning.deploy.template import template

PAGE = Path(__file__).parents[2] / "docs" / "monitoring.md"
BOARDS = ("run", "node")
SETTINGS = [
    "total_steps=1000000",
    "init_min_clients=2",
    "min_clients=1",
    "global_batch_size_start=4",
    "global_batch_size_end=4",
    "warmup_time=15",
    "cooldown_time=15",
    "max_round_train_time=12",
    "epoch_time=600",
    "waiting_for_members_extra_time=2",
    "trainer.validate_every=4",
    "trainer.log_every=4",
]


def board(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(template(f"monitoring/grafana/dashboards/{name}.json"))
    return loaded


def queries(name: str) -> dict[str, str]:
    """The queries of a dashboard, by panel and letter."""
    panels = [panel for panel in board(name)["panels"] if panel["type"] != "row"]
    return {f"{panel['id']} {one['refId']}": one["expr"] for panel in panels for one in panel["targets"]}


def filled(expression: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\$(\w+)", lambda match: values[match[1]], expression)


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_is_whole_and_its_metrics_are_documented(name: str) -> None:
    found, page = board(name), PAGE.read_text()
    panels = found["panels"]
    assert found["uid"] == f"psyche-{name}"
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    cells = [(place["x"] + x, place["y"] + y) for place in places for x in range(place["w"]) for y in range(place["h"])]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    named = {variable["name"] for variable in found["templating"]["list"]} | {"__rate_interval"}
    for expression in queries(name).values():
        assert set(re.findall(r"\$(\w+)", expression)) <= named
        for metric in set(re.findall(r"\b(?:psyche|process)_\w+", expression)):
            stem = "process_" if metric.startswith("process_") else metric
            assert f"`{stem}" in page or f"`{stem.removesuffix('_info')}" in page, metric


@contextmanager
def prometheus(folder: Path, targets: list[str]) -> Iterator[str]:
    """Debian's Prometheus, which reads these each second; gives its address."""
    folder.mkdir()
    config = folder / "prometheus.yml"
    jobs = [{"job_name": "psyche", "static_configs": [{"targets": targets}]}]
    config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}))
    subprocess.run(["promtool", "check", "config", str(config)], check=True, capture_output=True)
    address = f"127.0.0.1:{free_port()}"
    options = [f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
    with (folder / "log").open("wb") as log, subprocess.Popen(["prometheus", *options], stdout=log, stderr=log) as it:
        try:
            yield f"http://{address}"
        finally:
            it.terminate()


def free_port() -> int:
    """One that stays free: it is none of those that the system gives to whoever asks for any."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise AssertionError("a hundred ports are taken")


def answer(url: str, expression: str) -> list[float]:
    """The finite values that a query gives now; none while Prometheus starts."""
    path = f"{url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    try:
        with urllib.request.urlopen(path, timeout=10) as reply:
            found = json.load(reply)
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{expression}: {error.read().decode()}") from error
    except OSError:
        return []
    return [value for one in found["data"]["result"] if math.isfinite(value := float(one["value"][1]))]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_query_returns_data_from_a_real_prometheus(tmp_path: Path) -> None:
    tasks = [f"evals.tasks_from={sums(tmp_path / 'tasks')}", "evals.tasks=[sums]", "evals.every=4", "evals.limit=2"]
    with Fleet(tmp_path / "fleet", [*SETTINGS, *tasks]) as fleet:
        ports = [free_port(), free_port()]
        for port in ports:
            fleet.start("trainer.validate_every=4", f"--metrics-port={port}")
        targets = [fleet.url.removeprefix("http://"), *(f"127.0.0.1:{port}" for port in ports)]
        values = {"run": fleet.run, "instance": targets[1], "__rate_interval": "30s"}
        with prometheus(tmp_path / "prometheus", targets) as url:
            fleet.until(lambda found: found["step"] > 5, "five steps")
            values["node"] = fleet.key(0).hex()
            wanted = {f"{name} {place}": one for name in BOARDS for place, one in queries(name).items()}
            deadline = time.monotonic() + PATIENCE
            while wanted and time.monotonic() < deadline:
                fleet.status()
                wanted = {place: one for place, one in wanted.items() if not answer(url, filled(one, values))}
                time.sleep(POLL)
            assert not wanted
            up = answer(url, "up")
            assert up == [1.0, 1.0, 1.0]
