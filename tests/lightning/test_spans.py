"""The rounds of a run as OpenTelemetry spans."""

from __future__ import annotations

import http.server
import itertools
import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="traces need pip install 'psyche-lightning[otel]'")
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from psyche_lightning import PsycheStrategy
from psyche_lightning.errors import ConfigError
from psyche_lightning.lightning import session
from psyche_lightning.node.spans import OPEN_ROUNDS, NoSpans, RoundSpans, spans_of
from psyche_lightning.train.traces import traced

Make = Callable[..., Any]
PARTS = ["compute", "encode", "send", "collect", "apply"]
"""In the order in which a node does them without overlap; ``verify`` may come at any time."""
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    made = TracerProvider()
    made.add_span_processor(SimpleSpanProcessor(exporter))
    return made


def traces(spans: tuple[ReadableSpan, ...]) -> dict[tuple[str, int], dict[str, list[ReadableSpan]]]:
    """The spans of each round by name, by node and step; each must lie below and within its round."""
    rounds = {span.context.span_id: span for span in spans if span.name == "round"}
    found: dict[tuple[str, int], dict[str, list[ReadableSpan]]] = {}
    for number, span in rounds.items():
        assert span.parent is None
        parts = defaultdict(list)
        for part in spans:
            if part.parent is not None and part.parent.span_id == number:
                assert span.start_time <= part.start_time <= part.end_time <= span.end_time
                parts[part.name].append(part)
        key = span.attributes["psyche.node"], span.attributes["psyche.step"]
        assert key not in found
        found[key] = dict(parts)
    assert len(spans) == len(rounds) + sum(len(each) for parts in found.values() for each in parts.values())
    return found


@pytest.mark.parametrize("overlap", [False, True])
def test_each_round_of_each_node_is_a_trace_with_its_parts(
    classifier: Make,
    loader: Make,
    trainer: Make,
    create_run: Make,
    monkeypatch: pytest.MonkeyPatch,
    provider: TracerProvider,
    exporter: InMemorySpanExporter,
    overlap: bool,
) -> None:
    def made(run: str, node: str) -> RoundSpans:
        return RoundSpans(provider.get_tracer("test"), {"psyche.run": run, "psyche.node": node})

    monkeypatch.setattr(session, "spans_of", made)
    url, run = create_run({"run": {"overlap": overlap}}, init_min_clients=2, total_steps=4)
    strategies = [PsycheStrategy(url, run) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(lambda strategy: trainer(strategy=strategy, max_epochs=-1).fit(classifier(), loader()), strategies)
        )
    found = traces(exporter.get_finished_spans())
    nodes = [strategy.session.identity.hex() for strategy in strategies if strategy.session is not None]
    assert set(found) == set(itertools.product(nodes, range(1, 5)))
    for parts in found.values():
        assert set(parts) == {*PARTS, "verify"}
        assert [len(parts[name]) for name in PARTS] == [1] * len(PARTS)
        assert len(parts["verify"]) == 1
        for before, after in itertools.pairwise(PARTS):
            assert parts[before][0].end_time <= parts[after][0].start_time
        assert parts["compute"][0].attributes["psyche.samples"] > 0
        assert parts["apply"][0].attributes["psyche.results"] == 2
        assert parts["verify"][0].attributes["psyche.bytes"] == parts["send"][0].attributes["psyche.bytes"]


def test_rounds_that_never_end_are_bounded(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    clock = itertools.count(1)
    spans = RoundSpans(provider.get_tracer("test"), {"psyche.node": "a"}, now=lambda: next(clock))
    for step in range(1, 4 * OPEN_ROUNDS):
        spans.begin(step, "compute")
    found = traces(exporter.get_finished_spans())
    assert sorted(step for _, step in found) == list(range(1, 3 * OPEN_ROUNDS))
    with spans.part(2, "verify"):  # of a round that is over
        pass
    spans.end(2, "compute")
    spans.over(2)
    assert len(exporter.get_finished_spans()) == 2 * len(found)


def test_what_fails_is_in_its_span(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    spans = RoundSpans(provider.get_tracer("test"), {"psyche.node": "a"})
    with pytest.raises(ValueError, match="malformed"), spans.part(1, "verify"):
        raise ValueError("malformed")
    (span,) = exporter.get_finished_spans()
    assert span.events[0].attributes["exception.message"] == "malformed"


def test_a_program_without_opentelemetry_makes_no_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(spans_of("run", "node")) is RoundSpans
    monkeypatch.delitem(sys.modules, "opentelemetry.sdk.trace")
    assert type(spans_of("run", "node")) is NoSpans


def test_where_the_extra_is_missing_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(ConfigError, match=r"pip install 'psyche-lightning\[otel\]'"), traced():
        pass


def test_spans_reach_a_collector() -> None:
    """In a process of its own, as the provider is the program's."""
    got: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    program = (
        "from psyche_lightning.node.spans import spans_of\n"
        "from psyche_lightning.train.traces import traced\n"
        "with traced():\n"
        "    spans = spans_of('my-run', 'my-node')\n"
        "    spans.begin(7, 'compute')\n"
        "    spans.over(7)\n"
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {**os.environ, ENDPOINT: f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1"}
        subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)
        server.shutdown()
    ((path, body),) = got
    assert path == "/v1/traces"
    for text in (b"round", b"compute", b"my-run", b"my-node", b"psyche"):
        assert text in body
