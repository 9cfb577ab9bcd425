"""A small run in one process: real participants, coordinator machine, transport and optimizer, on threads."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch

from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.distro import DisTrO, DistroConfig
from psyche_lightning.logs import Speaker
from psyche_lightning.node.journal import Journal, MemoryJournal
from psyche_lightning.node.ledger import Ledger
from psyche_lightning.node.notices import Notice
from psyche_lightning.node.parameters import ParameterReplica
from psyche_lightning.node.participant import Participant, RoundWork
from psyche_lightning.node.runtime import NodeParts
from psyche_lightning.node.settings import Settings
from psyche_lightning.node.status import StatusFile
from psyche_lightning.node.store import BlobStore, MemoryBlobStore
from psyche_lightning.protocol.state import CoordinatorConfig
from psyche_lightning.server.local import LocalCoordinator
from psyche_lightning.transports.base import Transport
from psyche_lightning.transports.memory import MemoryNetwork, MemoryTransport
from psyche_lightning.wire.identity import Identity, short


class Ear(logging.Handler):
    """Keeps the notices of all nodes, with who told them."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(Speaker())
        self.told: list[tuple[str, Notice]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.args and isinstance(record.args, tuple) and isinstance(record.args[0], Notice):
            self.told.append((record.node, record.args[0]))  # type: ignore[attr-defined] # by the filter


@dataclass
class Trainee:
    """A node that trains a linear layer towards its own noisy target."""

    number: int
    run: Run
    overlap: bool = False
    keep_bytes: int = 1 << 30
    steps: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    error: BaseException | None = None
    store: BlobStore = field(default_factory=MemoryBlobStore)
    journal: Journal | MemoryJournal = field(default_factory=MemoryJournal)
    ledger: Ledger | None = None
    status: StatusFile | None = None
    transport: Callable[[Run], Transport] = lambda run: MemoryTransport(run.network)
    config: DistroConfig = DistroConfig(k=8)  # noqa: RUF009 - it is frozen
    step_of: Callable[[RoundWork], int] = lambda work: work.step
    compute: Callable[[Trainee, RoundWork], None] = lambda trainee, work: None
    spoil: Callable[[Trainee, RoundWork], None] = lambda trainee, work: None

    def __post_init__(self) -> None:
        self.module = torch.nn.Linear(24, 12)
        generator = torch.Generator().manual_seed(self.number)
        for parameter in self.module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.optimizer = DisTrO(self.module.named_parameters(), lr=0.01, weight_decay=0.1, config=self.config)
        self.replica = ParameterReplica(self.optimizer, self.module)
        self.identity = Identity(bytes([self.number + 1]) * 32)
        self.participant = self.make()

    def make(self) -> Participant:
        return Participant(
            NodeParts(
                identity=self.identity,
                run_id="test",
                coordinator=LocalCoordinator(self.run.host, self.identity),
                transport=self.transport(self.run),
                replica=self.replica,
                manifest={"model": {"parameters": ["weight", "bias"]}},
                settings=Settings(
                    self.overlap,
                    2,
                    self.replica.layout,
                    self.replica.payload_size,
                    tensors=self.replica.tensors,
                    keep_bytes=self.keep_bytes,
                    retry=0.2,
                ),
                store=self.store,
                journal=self.journal,
                ledger=self.ledger,
                status=self.status,
            ),
            patience=60.0,
        )

    def train(self) -> None:
        try:
            self.participant.start()
            while (work := self.participant.next_round()) is not None:
                self.steps.append(work.step)
                for start, stop in work.batch:
                    self.ids.extend(range(start, stop))
                self.compute(self, work)
                start, stop = work.batch[0]
                inputs = torch.randn(stop - start, 24, generator=torch.Generator().manual_seed(start))
                loss = (self.module(inputs) - inputs[:, :12]).square().mean()
                self.optimizer.zero_grad()
                loss.backward()
                nonce = self.optimizer.nonce
                payload = self.optimizer.encode(self.step_of(work))
                self.participant.submit(
                    work, payload, nonce=nonce, lrs=self.optimizer.lr_bits(), loss=loss.item(), tokens=1
                )
                self.participant.wait_applied(work)
                self.spoil(self, work)
        except BaseException as error:
            self.error = error
        finally:
            self.participant.stop()

    @property
    def said(self) -> list[Notice]:
        """What this node told, of all that was told in the process."""
        return [notice for node, notice in self.run.told if node == short(self.identity.public)]

    @property
    def bytes(self) -> bytes:
        return b"".join(p.detach().numpy().tobytes() for p in self.module.parameters())


@dataclass
class Run:
    host: RunHost
    told: list[tuple[str, Notice]]
    network: MemoryNetwork = field(default_factory=MemoryNetwork)

    def go(self, *trainees: Trainee, but: Sequence[Trainee] = ()) -> None:
        """Have them train to the end, and those in ``but`` beside them, whose end does not matter."""
        threads = [threading.Thread(target=trainee.train, daemon=True) for trainee in (*trainees, *but)]
        for thread in threads:
            thread.start()
        others = threads[len(trainees) :]
        threads = threads[: len(trainees)]
        for thread in threads:
            thread.join(120.0)
            assert not thread.is_alive(), [trainee.participant.waiting() for trainee in trainees]
        for trainee in but:
            trainee.participant.interrupt(KeyboardInterrupt())
        for thread in others:
            thread.join(30.0)
        for trainee in trainees:
            if trainee.error is not None:
                raise trainee.error


MakeRun = Callable[..., Run]


@pytest.fixture
def make_run() -> Iterator[MakeRun]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ear = Ear()
    logger = logging.getLogger("psyche_lightning")
    level = logger.level
    logger.addHandler(ear)
    logger.setLevel(logging.INFO)

    def make(nodes: int, steps: int, **values: float) -> Run:
        config = CoordinatorConfig(
            total_steps=steps,
            init_min_clients=nodes,
            global_batch_size_start=6,
            global_batch_size_end=6,
            waiting_for_members_extra_time=0.2,
            **{"max_round_train_time": 10.0, "warmup_time": 10.0, "cooldown_time": 5.0, **values},  # type: ignore[arg-type]
        )
        host = RunHost("test", config, seed=7, incarnation=os.urandom(16))
        host.begin(0.0)
        return Run(host, ear.told)

    yield make
    logger.removeHandler(ear)
    logger.setLevel(level)
    torch.set_num_threads(threads)


@pytest.fixture
def make_trainee() -> type[Trainee]:
    return Trainee
