"""Several nodes over a real coordinator and real sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from psyche_lightning import PsycheStrategy
from psyche_lightning.lightning import session
from psyche_lightning.node.participant import Participant
from psyche_lightning.node.runtime import NodeParts, Runtime
from psyche_lightning.protocol.requests import Join, Request
from psyche_lightning.server.admin import CoordinatorAdmin
from psyche_lightning.server.client import HttpCoordinator

Make = Callable[..., Any]
SCRIPT = Path(__file__).with_name("user_script.py")
PATIENCE = 240.0


def start(url: str, run: str, *arguments: str, first: str = "") -> subprocess.Popen[str]:
    """Start the user's program; ``first`` is what it does before anything else."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PSYCHE_COORDINATOR": url, "PSYCHE_RUN": run}
    whole = f"{first}\nimport runpy; runpy.run_path({str(SCRIPT)!r})"
    return subprocess.Popen(
        [sys.executable, "-c", whole, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_unmodified_program_in_two_processes_ends_with_the_same_bytes(create_run: Make, tmp_path: Path) -> None:
    url, run = create_run(init_min_clients=2)
    outputs = [tmp_path / f"{seed}.json" for seed in (1, 2)]
    processes = [start(url, run, str(seed), str(output)) for seed, output in zip((1, 2), outputs, strict=True)]
    for process in processes:
        text, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, text
        assert "DisTrO replaces the step of AdamW" in text
    first, second = (json.loads(output.read_text()) for output in outputs)
    assert first["before"] != second["before"]
    assert first["parameters"] == second["parameters"]
    assert first["parameters"]["net.0.weight"] not in (
        first["before"]["net.0.weight"],
        second["before"]["net.0.weight"],
    )
    assert (first["steps"], second["steps"]) == (12, 12)
    assert (first["lr"], second["lr"]) == (0.0025, 0.0025)
    status = CoordinatorAdmin(url).status(run)
    assert status["phase"] == "finished"
    assert status["config"]["total_steps"] == 12, "the nodes' max_steps"
    assert status["config"]["global_batch_size_end"] == 16, "two nodes with batches of eight"


LOGGING = "import logging; logging.basicConfig(level={level!r}, format='MINE %(levelname)s %(message)s')"


def test_a_program_hears_its_node_and_its_own_logging_replaces_ours(create_run: Make, tmp_path: Path) -> None:
    url, run = create_run(init_min_clients=3)
    firsts = ["", LOGGING.format(level="INFO"), LOGGING.format(level="WARNING")]
    processes = [start(url, run, str(n), str(tmp_path / str(n)), first=first) for n, first in enumerate(firsts)]
    ours, mine, quiet = (process.communicate(timeout=PATIENCE)[0].splitlines() for process in processes)
    assert [process.returncode for process in processes] == [0, 0, 0], (ours, mine, quiet)
    for what in ("DisTrO replaces the step of AdamW", "joined the run as", "epoch 0 has 3 nodes", "leaves the run: "):
        (line,) = (line for line in ours if what in line)
        assert re.match(rf"\S+T\S+ INFO    {run} [0-9a-f]{{8}} ", line), line
        (line,) = (line for line in mine if what in line)
        assert line.startswith("MINE INFO "), line
        assert not [line for line in quiet if what in line]


def test_signals_while_waiting_for_others_leave_the_run(create_run: Make, tmp_path: Path) -> None:
    url, run = create_run(init_min_clients=3)
    admin = CoordinatorAdmin(url)
    processes = [start(url, run, "1", str(tmp_path / "out")) for _ in range(2)]
    try:
        until(lambda: len(admin.status(run)["pending"]) == 2)
        for process, number in zip(processes, (signal.SIGTERM, signal.SIGINT), strict=True):
            process.send_signal(number)
        for process in processes:
            process.wait(PATIENCE)
    finally:
        told = []
        for process in processes:
            process.kill()
            told.append(process.communicate()[0])
    assert [process.returncode for process in processes] == [143, 1], "as a shell says it, and as Trainer does"
    for text, reason in zip(told, ("SIGTERM", "Ctrl-C"), strict=True):
        assert text.count(f"leaves the run: {reason}\n") == 1, text
    # They said so themselves: who only vanishes is dropped.
    assert [event["kind"] for event in admin.status(run)["events"]].count("left") == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["about to join", "has a node", "joining", "let in", "joined", "a member"])
def test_there_is_no_bad_time_for_a_signal(
    moment: str,
    number: signal.Signals,
    create_run: Make,
    classifier: Make,
    loader: Make,
    trainer: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The run waits for a third node or has no end, so whoever overlooks the signal hangs."""
    caplog.set_level(logging.INFO, "psyche_lightning")
    url, run = create_run(init_min_clients=1 if moment == "a member" else 3, total_steps=10**6)
    run_start, ask = Runtime.start, HttpCoordinator.request

    class Signal(Callback):
        def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
            if moment == "a member":
                signal.raise_signal(number)

    class Signalled(Participant):
        def __init__(self, node: NodeParts, **options: Any) -> None:
            if moment == "about to join":
                signal.raise_signal(number)
            super().__init__(node, **options)
            if moment == "has a node":
                signal.raise_signal(number)

    async def start(runtime: Runtime) -> None:
        if moment == "joining":  # with a coordinator that does not answer
            os.kill(os.getpid(), number)
            await asyncio.Event().wait()
        await run_start(runtime)
        if moment == "joined":
            os.kill(os.getpid(), number)
            await asyncio.sleep(0.5)  # the training thread still waits for this

    async def request(client: HttpCoordinator, asked: Request[Any]) -> Any:
        answer = await ask(client, asked)
        if moment == "let in" and isinstance(asked, Join):  # which the node does not hear in time
            os.kill(os.getpid(), number)
            await asyncio.Event().wait()
        return answer

    monkeypatch.setattr(session, "Participant", Signalled)
    monkeypatch.setattr(Runtime, "start", start)
    monkeypatch.setattr(HttpCoordinator, "request", request)
    strategy = PsycheStrategy(coordinator=url, run=run)
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit):
        trainer(strategy=strategy, callbacks=[Signal()]).fit(classifier(), loader())
    assert signal.getsignal(number) is handler
    status = CoordinatorAdmin(url).status(run)
    assert not status["pending"]
    joined = moment in ("let in", "joined", "a member")
    assert [event["kind"] for event in status["events"]].count("left") == joined
    reason = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
    told = [record.getMessage() for record in caplog.records if "leaves the run" in record.getMessage()]
    assert told == [f"leaves the run: {reason}"] * joined, "the log gives the reason at whatever moment it came"


class Notes(Callback):
    """What one node saw."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.epochs: list[int] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.steps.append(trainer.global_step + 1)
        self.epochs.append(trainer.current_epoch)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        assert batch_idx == trainer.global_step % trainer.num_training_batches


def together(*nodes: Callable[[], None]) -> None:
    """Run nodes in threads of this process; each has its own sockets and its own Trainer."""
    errors: list[BaseException] = []

    def guarded(node: Callable[[], None]) -> None:
        try:
            node()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(node,), daemon=True) for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not errors, errors
    assert not any(thread.is_alive() for thread in threads)


def test_a_node_without_a_batch_applies_the_round_and_counts_it(
    classifier: Make, loader: Make, trainer: Make, create_run: Make, parameter_bytes: Make
) -> None:
    url, run = create_run(init_min_clients=2, global_batch_size_start=1, total_steps=12)

    class Scheduled(classifier):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    modules, notes = [Scheduled(), Scheduled()], [Notes(), Notes()]

    def node(number: int) -> None:
        fit = trainer(strategy=PsycheStrategy(url, run), limit_train_batches=5, max_epochs=9, callbacks=[notes[number]])
        fit.fit(modules[number], loader())
        assert fit.global_step == 12

    together(lambda: node(0), lambda: node(1))
    assert sorted(notes[0].steps + notes[1].steps) == list(range(1, 13)), "one sample a round goes to one of the two"
    for one in notes:
        assert one.epochs == [(step - 1) // 5 for step in one.steps]
        assert one.rates == pytest.approx([0.01 / step for step in one.steps])
    assert parameter_bytes(modules[0]) == parameter_bytes(modules[1])


def test_overlap_and_look_ahead_end_with_the_same_bytes_everywhere(
    classifier: Make, loader: Make, trainer: Make, create_run: Make, parameter_bytes: Make
) -> None:
    url, run = create_run({"run": {"overlap": True}, "distro": {"lookahead": True}}, init_min_clients=2)
    modules = [classifier(norm=True), classifier(norm=True)]
    strategies = [PsycheStrategy(url, run), PsycheStrategy(url, run)]

    def node(number: int) -> None:
        fit = trainer(strategy=strategies[number], max_steps=8)
        fit.fit(modules[number], loader())
        assert fit.global_step == 8

    together(lambda: node(0), lambda: node(1))
    assert strategies[0].session is not None
    assert strategies[0].session.entry.run.overlap
    assert strategies[0].session.entry.distro.lookahead
    assert parameter_bytes(modules[0]) == parameter_bytes(modules[1])


def test_buffers_are_those_of_one_node(classifier: Make, loader: Make, trainer: Make, create_run: Make) -> None:
    url, run = create_run(init_min_clients=2, total_steps=3)
    modules = [classifier(norm=True), classifier(norm=True)]
    for number, module in enumerate(modules):
        module.net[1].momentum = 0.0  # training leaves the running statistics as they were
        module.net[1].running_mean.fill_(number + 1.0)

    def node(number: int) -> None:
        trainer(strategy=PsycheStrategy(url, run)).fit(modules[number], loader())

    together(lambda: node(0), lambda: node(1))
    means = [module.net[1].running_mean for module in modules]
    assert torch.equal(*means)
    assert means[0].unique().tolist() in ([1.0], [2.0])


def test_a_node_that_wants_fewer_steps_leaves_and_the_others_go_on(
    classifier: Make, loader: Make, trainer: Make, create_run: Make
) -> None:
    url, run = create_run(init_min_clients=3, min_clients=1, total_steps=8)
    fits = [trainer(strategy=PsycheStrategy(url, run), max_steps=steps) for steps in (3, 50, -1)]
    together(*(lambda fit=fit: fit.fit(classifier(), loader()) for fit in fits))  # type: ignore[misc]
    assert [fit.global_step for fit in fits] == [3, 8, 8]
    assert CoordinatorAdmin(url).status(run)["phase"] == "finished"
