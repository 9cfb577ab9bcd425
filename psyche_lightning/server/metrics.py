"""The runs of a coordinator as Prometheus metrics; docs/monitoring.md lists them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from psyche_lightning.coordinator.metrics import Metrics
from psyche_lightning.protocol.state import Phase
from psyche_lightning.server.live import LiveRun
from psyche_lightning.server.nodes import members_of
from psyche_lightning.version import __version__


class Runs(Collector):
    """Reads the figures of runs at the moment of a scrape, so nothing is counted twice.

    Args:
        runs: returns the runs.
        connections: returns the number of open websockets.
    """

    def __init__(self, runs: Callable[[], Iterable[LiveRun]], connections: Callable[[], int]) -> None:
        self._runs = runs
        self._connections = connections

    def collect(self) -> Iterator[Metric]:
        """All metrics, each with the samples of all runs."""
        yield InfoMetricFamily("psyche_build", "The coordinator's release.", {"version": __version__})
        yield GaugeMetricFamily(
            "psyche_coordinator_connections", "Open websockets of nodes and other watchers.", self._connections()
        )
        families: dict[str, Metric] = {}
        for run in self._runs():
            for name, text, labels, value in _samples(run):
                kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
                family = families.setdefault(name, kind(name, text, labels=list(labels)))
                if value is not None:
                    family.add_metric(list(labels.values()), value)  # type: ignore[attr-defined] # both kinds have it
        yield from families.values()


Sample = tuple[str, str, dict[str, str], float | None]
"""Name, help, labels and value of a sample; None where there is no value yet."""


def _samples(run: LiveRun) -> Iterator[Sample]:
    host, state = run.host, run.state

    def gauge(name: str, text: str, value: float | None, /, **labels: str) -> Sample:
        return f"psyche_run_{name}", text, {"run": state.run_id, **labels}, value

    for phase in Phase:
        yield gauge("phase", "1 for the phase in which the run is.", state.phase is phase, phase=phase.name.lower())
    total = None if "total_steps" in host.unset else state.config.total_steps
    yield gauge("steps", "Optimizer steps that are decided.", state.step - 1)
    yield gauge("wanted_steps", "Optimizer steps of the whole run.", total)
    yield gauge("epoch", "The epoch, from 0.", state.epoch)
    yield gauge("waiting", "1 while the run waits for nodes or its owner.", bool(host.waits_for))
    text = "1 while the run's time stands still, since its store fails or no node is heard."
    yield gauge("stalled", text, bool(run.problem))
    yield gauge("events_total", "Notable events, as the page shows them.", host.history.events.count)
    members = list(chain(*members_of(run).values()))
    for status, nodes in Counter(status for _, status in members).items():
        yield gauge("nodes", "Nodes by their status.", nodes, status=status)
    rows = host.history.metrics.since(0)
    yield gauge("round_seconds", "Seconds between the beginnings of the two newest rounds.", _round_seconds(rows))
    row = next((row for row in reversed(rows) if row.reports), None)
    if row is not None:
        yield gauge("training_loss", "Training loss of the newest step, the mean over the nodes.", row.loss)
        yield gauge("tokens_per_second", "Tokens a second of all nodes together.", row.tokens_per_second)
        yield gauge("round_tokens", "Tokens of a round.", row.batch_size * state.max_seq_len)
        yield gauge("round_sent_bytes", "Bytes that a node sends in a round, the mean over the nodes.", row.bytes_up)
        yield gauge("round_received_bytes", "Bytes that a node receives in a round, likewise.", row.bytes_down)
    # A node tells them with its next report, so the newest step has none yet; and not each step has them.
    figures = {mean.name: mean.value for one in rows for mean in one.figures}
    for name, value in figures.items():
        yield gauge("figure", "Further figures of a step, means over the nodes.", value, figure=name)
    for one in {one.task: one for one in host.history.evaluations.since(0) if not one.undone}.values():
        for name, value in one.values.items():
            yield gauge("evaluation", "The newest evaluation of a task.", value, task=one.task, figure=name)
        yield gauge("evaluation_steps", "Steps in the parameters that it evaluates.", one.step, task=one.task)
    for client, _ in members:
        yield from _of_node(run, client.signer)


def _of_node(run: LiveRun, signer: bytes) -> Iterator[Sample]:
    labels = {"run": run.state.run_id, "node": signer.hex()}

    def node(name: str, text: str, value: float | None, /) -> Sample:
        return f"psyche_node_{name}", text, labels, value

    yield node("points_total", "Points that the node earned.", run.host.points.get(signer, 0))
    report = run.host.history.reports.get(signer)
    if report is not None:
        yield node("step", "The newest step of which the node reported.", report.step)
        loss = report.loss if math.isfinite(report.loss) else None
        yield node("training_loss", "The node's own training loss.", loss)
        yield node("tokens_per_second", "The node's own rate.", report.tokens_per_second)
        yield node("sent_bytes_total", "Bytes that the node sent since it started.", report.bytes_up)
        yield node("received_bytes_total", "Bytes that it received since it started.", report.bytes_down)


def _round_seconds(rows: Sequence[Metrics]) -> float | None:
    """None unless the two newest rounds are of one epoch."""
    if len(rows) < 2 or rows[-1].epoch != rows[-2].epoch:
        return None
    return max(0.0, rows[-1].time - rows[-2].time)


class Exposition:
    """What ``/metrics`` answers: the runs, and this process.

    Args:
        runs: as for :class:`Runs`.
        connections: likewise.
    """

    def __init__(self, runs: Callable[[], Iterable[LiveRun]], connections: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(Runs(runs, connections))
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The metrics in the form that an ``Accept`` header asks for, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type
