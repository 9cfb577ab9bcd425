"""A run of this process alone leaves what a run of one node with a coordinator leaves."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.distro import DisTrO, DistroConfig
from psyche_lightning.errors import CoordinatorError, WireError
from psyche_lightning.lightning.alone import Alone, AloneParts
from psyche_lightning.node.events import Apply
from psyche_lightning.node.journal import MemoryJournal
from psyche_lightning.node.ledger import Ledger, read_ledger
from psyche_lightning.node.parameters import ParameterReplica
from psyche_lightning.node.participant import Participant, RoundWork
from psyche_lightning.node.rates import Rates
from psyche_lightning.node.runtime import NodeParts
from psyche_lightning.node.settings import Settings
from psyche_lightning.node.status import StatusFile
from psyche_lightning.node.store import MemoryBlobStore
from psyche_lightning.protocol.evals import Measure
from psyche_lightning.protocol.requests import Evaluated
from psyche_lightning.protocol.state import CoordinatorConfig
from psyche_lightning.server.local import LocalCoordinator
from psyche_lightning.transports.memory import MemoryTransport
from psyche_lightning.wire.identity import Identity

STEPS, EPOCH = 13, 5
LOST = (4, 8)
"""Steps of which the node gives nothing, so that their ids are trained again."""


class Node:
    """A node that trains a linear layer, alone or with a coordinator."""

    def __init__(self, folder: Path, overlap: bool = False, rates: Rates | None = None) -> None:
        folder.mkdir()
        self.folder = folder
        self.works: list[RoundWork] = []
        self.losses: list[float | None] = []
        self.module = torch.nn.Linear(24, 12)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
        self.optimizer = DisTrO(self.module.named_parameters(), lr=0.01, weight_decay=0.1, config=DistroConfig(k=8))
        self.replica = ParameterReplica(self.optimizer, self.module)
        self.identity = Identity(bytes([1]) * 32)
        config = CoordinatorConfig(
            total_steps=STEPS,
            epoch_time=EPOCH,
            max_round_train_time=EPOCH / 2,
            warmup_time=EPOCH / 2,
            global_batch_size_start=2,
            global_batch_size_end=6,
            global_batch_size_warmup_tokens=20,
        )
        self.host = RunHost("test", config, seed=7, incarnation=bytes(16))
        self.settings = Settings(
            overlap,
            2,
            self.replica.layout,
            self.replica.payload_size,
            rates=rates or Rates(),
            tensors=self.replica.tensors,
        )

    def alone(self, manifest: dict[str, Any] | None = None) -> Alone:
        return Alone(
            AloneParts(
                host=self.host,
                identity=self.identity,
                replica=self.replica,
                manifest=manifest or {"model": {}},
                settings=self.settings,
                epoch=EPOCH,
                ledger=Ledger(self.folder / "ledger.jsonl"),
                status=StatusFile(self.folder / "status.json"),
            ),
            applied=self.note,
        )

    def coordinated(self) -> Participant:
        return Participant(
            NodeParts(
                identity=self.identity,
                run_id="test",
                coordinator=LocalCoordinator(self.host, self.identity, clock=self.steps),
                transport=MemoryTransport(),
                replica=self.replica,
                manifest={"model": {}},
                settings=self.settings,
                store=MemoryBlobStore(),
                journal=MemoryJournal(),
                ledger=Ledger(self.folder / "ledger.jsonl"),
                status=StatusFile(self.folder / "status.json"),
            ),
            applied=self.note,
        )

    def steps(self) -> float:
        """The run's clock: the steps trained when its round is decided; the training thread's count would race it."""
        state = self.host.state
        trains = state.current is not None and state.current.step > 0
        return float(state.step - 1 + (trains and not self.settings.overlap))

    def note(self, task: Apply) -> None:
        if task.payloads:  # drain rounds have none
            self.losses.append(task.loss)

    def train(self, participant: Participant | Alone) -> None:
        participant.start()
        try:
            while (work := participant.next_round()) is not None:
                self.step(participant, work)
        finally:
            participant.stop()
        self.state = participant.state
        self.finished = participant.finished

    def step(self, participant: Participant | Alone, work: RoundWork) -> None:
        self.works.append(work)
        inputs = torch.cat(
            [
                torch.randn(stop - start, 24, generator=torch.Generator().manual_seed(start))
                for start, stop in work.batch
            ]
        )
        loss = (self.module(inputs) - inputs[:, :12]).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        lost, nonce = work.step in LOST, self.optimizer.nonce
        payload = self.optimizer.abstention() if lost else self.optimizer.encode()
        figures = {"loss": math.nan if lost else loss.item(), "tokens": 0 if lost else len(inputs)}
        participant.submit(work, payload, nonce=nonce, lrs=self.optimizer.lr_bits(), **figures)  # type: ignore[arg-type]
        assert participant.wait_applied(work)

    def left(self) -> dict[str, Any]:
        """All that the run leaves."""
        assert self.state is not None
        names = (
            "phase",
            "epoch",
            "step",
            "start_step",
            "last_step",
            "checkpoint",
            "checkpoint_votes",
            "holders",
            "head",
        )
        status = json.loads((self.folder / "status.json").read_text())
        return {
            "parameters": b"".join(p.detach().numpy().tobytes() for p in self.module.parameters()),
            "works": self.works,
            "losses": self.losses,
            "rows": list(read_ledger(self.folder / "ledger.jsonl")),
            "finished": self.finished,
            "rounds": [replace(round_, witnesses=()) for round_ in self.state.rounds],
            "status": {name: value for name, value in status.items() if name != "since"},
            **{name: getattr(self.state, name) for name in (*names, "epoch_start_data_index", "epoch_digest")},
        }


@pytest.mark.parametrize("overlap", [False, True])
def test_what_a_run_alone_leaves_is_what_a_coordinator_and_its_node_leave(tmp_path: Path, overlap: bool) -> None:
    alone, coordinated = Node(tmp_path / "alone", overlap), Node(tmp_path / "coordinated", overlap)
    alone.train(alone.alone())
    coordinated.train(coordinated.coordinated())
    left, expected = alone.left(), coordinated.left()
    assert left.keys() == expected.keys()
    for name, value in expected.items():
        assert left[name] == value, name
    assert [work.step for work in alone.works] == list(range(1, STEPS + 1))
    assert any(len(work.batch) > 1 for work in alone.works), "lost ids come again"


def test_rates_that_are_not_the_schedules_end_the_training(tmp_path: Path) -> None:
    node = Node(tmp_path / "node", rates=Rates(planned=lambda step: 0.5))
    with pytest.raises(WireError, match=r"learning rate 0\.01; the run has 0\.5"):
        node.train(node.alone())


def test_an_interruption_ends_the_round_before_its_results_are_applied(tmp_path: Path) -> None:
    node = Node(tmp_path / "node")
    alone = node.alone()
    alone.start()
    work = alone.next_round()
    assert work is not None
    alone.interrupt(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        node.step(alone, work)
    assert node.losses == []
    alone.stop("Ctrl-C")
    assert json.loads((node.folder / "status.json").read_text())["left"] == "Ctrl-C"


def test_spare_work_gets_a_small_share_of_the_time(tmp_path: Path) -> None:
    node, done = Node(tmp_path / "node"), []

    class Work:
        def estimate(self) -> float | None:
            return 0.0 if len(done) < 2 * len(node.works) else None

        def work(self) -> None:
            done.append(len(node.works))

    alone = node.alone()
    alone.spare.give(Work())
    node.train(alone)
    assert done == [step for step in range(1, STEPS + 1) for _ in range(2)]


def test_the_run_itself_answers_what_its_node_asks(tmp_path: Path) -> None:
    node = Node(tmp_path / "node")
    alone = node.alone({"model": {}, "evals": {"tasks": ["arc"], "every": 1}})
    alone.start()
    work = alone.next_round()
    assert work is not None
    node.step(alone, work)
    known = alone.ask(Evaluated("arc", 1, 1, 0, (Measure("acc", 1.0, 1.0),))).result()
    assert (known.task, known.step, known.measured) == ("arc", 1, 1)
    with pytest.raises(CoordinatorError, match="not among its tasks"):
        alone.ask(Evaluated("other", 1, 1, 0, ())).result()
