"""A logger of Lightning that Prometheus reads: what a training logs, on a port of this machine."""

from __future__ import annotations

import argparse
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from prometheus_client import CollectorRegistry, Gauge, GCCollector, PlatformCollector, ProcessCollector, make_wsgi_app

from psyche_lightning.errors import ConfigError
from psyche_lightning.sites import Sites

NAMES = {
    "loss": ("psyche_training_loss", "Training loss of this node's samples."),
    "validation_loss": ("psyche_validation_loss", "Loss of samples that are not trained."),
    "lr": ("psyche_learning_rate", "Learning rate."),
    "tokens_per_second": ("psyche_tokens_per_second", "Tokens a second of this node."),
    "bytes_up": ("psyche_sent_bytes", "Bytes that this node sent since it started."),
    "bytes_down": ("psyche_received_bytes", "Bytes that it received since it started."),
    "seconds": ("psyche_training_seconds", "Seconds since training began."),
    "waited": ("psyche_waiting_seconds", "Seconds of them in which this node waited for others."),
}
"""Metrics of their own, by the name under which a figure is logged; named as Psyche's where it has them."""
EVALUATION = "eval/"
MAX_FIGURES = 1000
_StartResponse = Callable[..., Any]


class PrometheusLogger(Logger):
    """Shows the newest value of everything that is logged at ``/metrics`` of a port.

    ::

        Trainer(strategy="psyche", logger=[PrometheusLogger(9200), CSVLogger("logs")])

    Figures of recipes have metrics of their own (see :data:`NAMES`), results of tasks are
    ``psyche_eval_metrics{task,figure}``, and all others ``psyche_figure{figure}``. ``psyche_round_step`` is the step.
    The port is open until training ends. Of a node's ranks, which all make their logger, rank 0 alone listens.

    Args:
        port: port to listen on; 0 for any free one.
        host: address to listen on.
        run: the label ``run`` of all metrics; empty for none.

    Attributes:
        port: the port on which it listens; on ranks that do not listen, the one that was given.

    Raises:
        ConfigError: the port is taken, or the address is not this machine's.
    """

    _server: _Server | None = None

    def __init__(self, port: int, host: str = "127.0.0.1", run: str = "") -> None:
        super().__init__()
        self._registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)
        self._labels = {"run": run} if run else {}
        self._gauges: dict[str, Gauge] = {}
        self._figures: set[str] = set()
        self._host, self.port = host, port
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined] # from the environment, before ranks have met
            self._listen()

    def _listen(self) -> None:
        sites = Sites()
        show = make_wsgi_app(self._registry)

        def answer(environ: Mapping[str, Any], start: _StartResponse) -> Iterable[bytes]:
            names = {"Host": environ.get("HTTP_HOST"), "Origin": environ.get("HTTP_ORIGIN")}
            foreign = sites.refusal({name: value for name, value in names.items() if value is not None})
            if foreign is not None:
                start(f"{foreign.status} Refused", [("Content-Type", "text/plain")])
                return [foreign.text.encode()]
            shown: Iterable[bytes] = show(environ, start)
            return shown

        try:
            self._server = make_server(self._host, self.port, answer, _Server, _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot show metrics on {self._host}:{self.port}: {error}. Choose another port; 0 takes any."
            ) from error
        sites.listening([str(self._server.server_address[0])])
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, name="psyche-metrics", daemon=True).start()

    @property
    def name(self) -> str:
        """A name for folders of other loggers."""
        return "prometheus"

    @property
    def version(self) -> str:
        """The port."""
        return str(self.port)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | argparse.Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: metrics are numbers that change."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Show these values from now on; NaN is shown as such."""
        if self._server is None:  # such as in the second task of a SLURM job, if each is a node
            self._listen()
        if step is not None:
            self._set("psyche_round_step", "The newest optimizer step of which something was logged.", step)
        for name, value in metrics.items():
            if name in NAMES:
                self._set(*NAMES[name], value)
            elif name in self._figures or len(self._figures) < MAX_FIGURES:
                self._figures.add(name)
                task, _, figure = name.removeprefix(EVALUATION).rpartition("/")
                if name.startswith(EVALUATION) and task:
                    self._set("psyche_eval_metrics", "The newest evaluation.", value, task=task, figure=figure)
                else:
                    self._set("psyche_figure", "Further figures that were logged.", value, figure=name)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the port."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def __deepcopy__(self, memo: dict[int, Any]) -> PrometheusLogger:
        return self  # there is one port

    def _set(self, name: str, text: str, value: float, **labels: str) -> None:
        labels = {**self._labels, **labels}
        gauge = self._gauges.get(name)
        if gauge is None:
            gauge = self._gauges[name] = Gauge(name, text, list(labels), registry=self._registry)
        (gauge.labels(**labels) if labels else gauge).set(value if value is not None else math.nan)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    timeout = 10.0  # seconds for a request

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape is no news."""
