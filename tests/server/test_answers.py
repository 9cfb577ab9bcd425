"""Commands that read a server's answers, against one that answers something else."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from psyche_lightning.cli import main
from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.protocol.requests import Figure, Join, Report, WarmupWitness
from psyche_lightning.protocol.state import CoordinatorConfig
from psyche_lightning.server.answers import STATUS, misfit
from psyche_lightning.server.live import LiveRun
from psyche_lightning.server.status import run_line, run_status

KEY = b"k" * 32
Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def live() -> LiveRun:
    """A run with a member, an event and a row of figures."""
    config = CoordinatorConfig(
        init_min_clients=1, min_clients=1, total_steps=4, global_batch_size_start=1, global_batch_size_end=1
    )
    host = RunHost("r", config, seed=1, incarnation=b"i" * 16)
    host.handle(KEY, Join("host:1", {}), 0.0)
    host.tick(100.0)
    host.handle(KEY, WarmupWitness(0, 0, b"d" * 32), 100.0)
    host.points[KEY] = 3
    host.history.report(0, KEY, Report(1, 2.5, figures=(Figure("norm", 1, 0.5),)))
    return LiveRun(host, lambda: 100.0)


@pytest.fixture
def says() -> Iterator[dict[str, Any]]:
    """What the server answers to everything: ``status`` and ``body``; ``url`` is its own."""
    given: dict[str, Any] = {"status": 200, "body": {}}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = json.dumps(given["body"]).encode()
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(given["status"])
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            """Be quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    given["url"] = f"http://127.0.0.1:{server.server_address[1]}"
    yield given
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def psyche(
    says: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    monkeypatch.setenv("PSYCHE_COORDINATOR", says["url"])
    monkeypatch.setenv("PSYCHE_COORDINATOR_TOKEN", "t" * 43)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out + err

    return call


COMMANDS = [
    "status r", "watch r", "points r", "list", "start r", "pause r", "resume r", "create r", "link r",
    "update r total_steps=9", f"kick r {KEY.hex()}", f"revoke r {KEY.hex()}", f"restart-from r {'ab' * 32} 1",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_an_answer_of_another_shape(
    says: dict[str, Any], psyche: Command, live: LiveRun, command: str
) -> None:
    whole = run_status(live)
    lists = {**whole, "runs": [{**run_line(live), "clients": None}], "key": 1, "secret": []}
    for body in ({}, {"run_id": 7}, {"runs": {}}, {**lists, "config": None, "clients": None, "phase": None}):
        says["body"] = body
        code, text = psyche("run", *command.split())
        assert code == 1, text
        assert ("another shape" in text) or ("gave no join link" in text), text
        assert says["url"] in text
    says.update(status=404, body={"detail": "Not Found"})
    code, text = psyche("run", *command.split())
    assert code == 1
    assert "answered 404 with JSON of another shape: it has no 'error'. It is not a psyche coordinator" in text


def test_whatever_field_a_status_lacks_or_has_wrong_it_is_shown_or_refused(
    says: dict[str, Any], psyche: Command, live: LiveRun
) -> None:
    whole = run_status(live)
    assert misfit(whole, STATUS) == ""
    assert whole["clients"]
    assert whole["events"]
    assert whole["metrics"][0]["figures"] == {"norm": 0.5}

    def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        yield path
        children = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
        for name, child in children:
            yield from places(child, (*path, name))

    def put(into: Any, path: tuple[Any, ...], wrong: Any) -> None:
        for name in path[:-1]:
            into = into[name]
        into[path[-1]] = wrong

    refused = set()
    for wrong in ([], {}, "\x1b[2J", 1e300, None):
        says["body"] = shown = copy.deepcopy(whole)
        for path in list(places(whole))[:0:-1]:  # inner places first
            body = copy.deepcopy(whole)
            put(body, path, wrong)
            if misfit(body, STATUS):
                refused.add(path[0])
            else:
                put(shown, path, wrong)
        code, text = psyche("run", "status", "r")
        assert code == 0, text
        assert "\x1b[2J" not in text
    assert refused >= {"phase", "step", "clients", "events", "metrics", "points", "waits_for", "problem"}
