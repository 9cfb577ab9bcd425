"""The logger that Prometheus reads."""

from __future__ import annotations

import copy
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from prometheus_client.parser import text_string_to_metric_families

from psyche_lightning import PrometheusLogger
from psyche_lightning.errors import ConfigError
from psyche_lightning.recipe import load_recipe
from psyche_lightning.train import runner

Make = Callable[..., Any]


def read(port: int, **headers: str) -> dict[tuple[str, ...], float]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {(one.name, *sorted(one.labels.values())): one.value for family in families for one in family.samples}


@pytest.fixture
def shown() -> Iterator[PrometheusLogger]:
    logger = PrometheusLogger(0, run="r")
    yield logger
    logger.finalize("success")


def test_figures_have_their_names(shown: PrometheusLogger) -> None:
    shown.log_metrics(
        {"loss": 2.5, "lr": 1e-3, "gradient_norm": 0.5, "eval/arc/acc,none": 0.75, "psyche/clients": 3}, 7
    )
    shown.log_metrics({"loss": 2.0}, 8)
    found = read(shown.port)
    assert found["psyche_training_loss", "r"] == 2.0
    assert found["psyche_learning_rate", "r"] == 1e-3
    assert found["psyche_round_step", "r"] == 8
    assert found["psyche_figure", "gradient_norm", "r"] == 0.5
    assert found["psyche_figure", "psyche/clients", "r"] == 3
    assert found["psyche_eval_metrics", "acc,none", "arc", "r"] == 0.75
    assert found["process_open_fds",] > 0


@pytest.mark.parametrize("headers", [{"Host": "rebound.example"}, {"Origin": "https://page.example"}])
def test_pages_of_other_sites_read_nothing(shown: PrometheusLogger, headers: dict[str, str]) -> None:
    with pytest.raises(urllib.error.HTTPError, match="Refused"):
        read(shown.port, **headers)


def test_other_machines_read_it_where_asked(shown: PrometheusLogger) -> None:
    everywhere = PrometheusLogger(0, "0.0.0.0")
    try:
        assert read(everywhere.port, Host="node-1:9200")["process_open_fds",] > 0
        with pytest.raises(urllib.error.HTTPError, match="Refused"):
            read(everywhere.port, Host="node-1:9200", Origin="https://page.example")
    finally:
        everywhere.finalize("success")
    with pytest.raises(urllib.error.HTTPError, match="Refused"):  # on loopback other names are a trick
        read(shown.port, Host="node-1:9200")


def test_a_port_that_is_taken_is_said(shown: PrometheusLogger) -> None:
    with pytest.raises(ConfigError, match=f"cannot show metrics on 127.0.0.1:{shown.port}"):
        PrometheusLogger(shown.port)
    with pytest.raises(ConfigError, match="cannot show metrics"):
        PrometheusLogger(99999)


def test_of_the_ranks_of_a_node_the_first_one_listens(shown: PrometheusLogger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    second = PrometheusLogger(shown.port)  # as the other ranks make theirs
    second.log_metrics({"loss": 1.0}, 3)
    second.finalize("success")
    task = PrometheusLogger(0)  # a process that learns only later that its node has no other rank
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    task.log_metrics({"loss": 1.0}, 3)
    assert read(task.port)["psyche_round_step",] == 3
    task.finalize("success")


def test_a_trainer_shows_what_its_module_logs(classifier: Make, loader: Make, trainer: Make) -> None:
    seen: list[dict[tuple[str, ...], float]] = []
    logger = PrometheusLogger(0)

    class Read(Callback):
        def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
            seen.append(read(logger.port))

    fit = trainer(strategy="psyche", max_steps=4, logger=logger, log_every_n_steps=1, callbacks=[Read()])
    fit.fit(classifier(), loader())
    assert seen[0]["psyche_figure", "psyche/loss"] > 0
    assert copy.deepcopy(fit).logger is logger
    with pytest.raises(OSError, match="refused"):
        read(logger.port)


def test_the_demo_shows_its_figures(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Kept(PrometheusLogger):
        def finalize(self, status: str) -> None:
            seen.update(found=read(self.port), status=status)
            super().finalize(status)

    monkeypatch.setattr("psyche_lightning.lightning.prometheus.PrometheusLogger", Kept)
    result = runner.train_recipe(load_recipe("demo", twin=True), directory=tmp_path, metrics_port=0)
    assert seen["status"] == "success"
    assert seen["found"]["psyche_training_loss", "demo"] == pytest.approx(result["loss"]["train"][1])
    assert seen["found"]["psyche_round_step", "demo"] == 4
