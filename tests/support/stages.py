"""Runs in every state that the page can show, made in a moment: their nodes train in a time of their own."""

from __future__ import annotations

import json
import math
import random
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.bloom import participants_bloom
from psyche_lightning.protocol.committee import round_selection
from psyche_lightning.protocol.evals import Measure
from psyche_lightning.protocol.requests import (
    Evaluated,
    Figure,
    Join,
    Report,
    WarmupWitness,
    Witness,
)
from psyche_lightning.protocol.state import CoordinatorConfig, Phase
from psyche_lightning.server.archive import record_of
from psyche_lightning.server.live import LiveRun
from psyche_lightning.server.server import CoordinatorServer
from psyche_lightning.server.store import MemoryStore
from psyche_lightning.wire.canonical import sha256

NOW = 1_773_484_920.0
"""The date of all stages: 14 March 2026, 10:42."""
REGIONS = ("eu-west", "eu-west", "us-east", "ap-south", "", "us-east", "eu-north")
CONFIG = CoordinatorConfig(
    warmup_time=300.0,
    cooldown_time=120.0,
    max_round_train_time=240.0,
    round_witness_time=30.0,
    epoch_time=6 * 3600.0,
    global_batch_size_start=96,
    global_batch_size_end=96,
    total_steps=4000,
    init_min_clients=3,
    min_clients=2,
)
MANIFEST: dict[str, Any] = {
    "run": {"overlap": False, "shares": "by speed"},
    "distro": {"chunk": 64, "k": 8, "local_steps": 4},
    "model": {"name": "demo", "dtype": "bfloat16", "parameters": [["embed", [512, 1024], "bfloat16", True]] * 40},
    "data": {"name": "fineweb", "seq_len": 1024},
    "evals": {"tasks": ["hellaswag", "arc_easy", "piqa"], "every": 100},
    "join": 1,
}
DIGEST = sha256(b"parameters")


def key(number: int) -> bytes:
    """The key of a node; keys look as different as real ones."""
    return sha256(b"node", bytes([number]))


@dataclass
class Stage:
    """One run and its nodes.

    Attributes:
        host: the run.
        now: its time.
        nodes: numbers of the nodes that are here.
    """

    host: RunHost
    now: float
    nodes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.host.state.run_id)  # figures for the eye
        self._sent: dict[int, int] = {}
        self.host.begin(self.now)

    def join(self, *numbers: int) -> Stage:
        """Nodes join, a few seconds apart."""
        for number in numbers:
            self.now += 2.0
            region = REGIONS[number % len(REGIONS)]
            self.host.handle(key(number), Join(f"198.51.100.{10 + number}:4{number:03}", MANIFEST, region), self.now)
            self.nodes.append(number)
        return self

    def warm_up(self, *silent: int) -> Stage:
        """The epoch is formed, and its nodes report the parameters, all but the silent ones."""
        self.now += 5.0
        self.host.tick(self.now)
        state = self.host.state
        for index, client in enumerate(state.clients):
            if client.signer not in {key(number) for number in silent}:
                self.now += 3.0
                self.host.handle(client.signer, WarmupWitness(state.epoch, index, DIGEST), self.now)
        return self

    def train(self, rounds: int, *, late: Collection[int] = (), absent: Collection[int] = ()) -> Stage:
        """So many rounds, each of about eleven seconds; the late ones report, but without their results.

        An epoch that ends is followed by the next one.
        """
        for _ in range(rounds):
            if self.host.state.phase in (Phase.WAITING_FOR_MEMBERS, Phase.WARMUP):
                self.warm_up()
            self._round(late, absent)
        return self

    def outage(self, seconds: float) -> Stage:
        """The coordinator is away so long, and comes back."""
        self.now += seconds
        self.host.restarted(self.now)
        return self

    def drain(self) -> Stage:
        """The drain rounds until the epoch has ended."""
        while self.host.state.phase.active:
            self._round((), ())
        return self

    def report(self, *numbers: int) -> Stage:
        """These nodes alone report in the round that is open."""
        for number in numbers:
            self._witness(number, self.nodes)
        return self

    def _round(self, late: Collection[int], absent: Collection[int]) -> None:
        height, began = self.host.rounds[-1].height, self.now
        times = {number: 9.0 + 0.4 * number + self._chance.random() for number in self.nodes if number not in absent}
        heard = [number for number in times if number not in late]
        for number in sorted(times, key=times.__getitem__):
            self.now = began + times[number]
            self.host.tick(self.now)
            if self.host.state.phase.active and self.host.rounds[-1].height == height:
                self._witness(number, heard)
        while self.host.state.phase.active and self.host.rounds[-1].height == height:
            self.now = max(self.now, self.host.deadline() or self.now)
            self.host.tick(self.now)

    def _witness(self, number: int, heard: Collection[int]) -> None:
        state, round_ = self.host.state, self.host.state.current
        assert round_ is not None
        if key(number) not in round_.clients:
            return
        proof = round_selection(round_, state.config).witness_proof(round_.clients.index(key(number)))
        bloom = participants_bloom(round_.seed, [key(one) for one in heard])
        named = {"step": state.step - 1, "digest": DIGEST} if state.draining or round_.height % 20 == 5 else {}
        root = sha256(b"root", round_.height.to_bytes(4, "little"))
        figures = self._figures(number, round_.step or state.step - 1)
        witness = Witness(state.epoch, round_.height, proof, root, bloom, bloom, report=figures)
        self.host.handle(key(number), replace(witness, **named), self.now)

    def _figures(self, number: int, step: int) -> Report:
        noise = self._chance.gauss
        self._sent[number] = self._sent.get(number, 0) + 410_000 + int(noise(0, 9_000))
        loss = 2.3 + 8.4 * math.exp(-step / 130) + 0.9 * math.exp(-step / 1400) + noise(0, 0.035)
        parts = {"compute": 7.6 + 0.3 * number, "encode": 0.35, "wait": max(0.2, 2.4 - 0.3 * number), "apply": 0.22}
        values = {f"seconds/{name}": value * (1 + noise(0, 0.05)) for name, value in parts.items()}
        values["learning_rate"] = 6e-4 * min(1, step / 200) * (0.55 + 0.45 * math.cos(math.pi * step / 4000))
        values["gradient_norm"] = 0.7 + 2.2 * math.exp(-step / 80) + abs(noise(0, 0.09))
        figures = [Figure(name, step, value) for name, value in values.items()]
        if step >= 50:
            at = step - step % 50
            figures.append(Figure("validation_loss", at, 2.34 + 8.4 * math.exp(-at / 130) + 0.9 * math.exp(-at / 1400)))
        return Report(
            step, loss, 8200 - 330 * number + noise(0, 120), self._sent[number], 4 * self._sent[number], tuple(figures)
        )

    def evaluate(self, step: int) -> Stage:
        """Three tasks are measured after a step."""
        for place, task in enumerate(("hellaswag", "arc_easy", "piqa")):
            accuracy = 0.26 + 0.06 * place + 0.12 * (1 - math.exp(-step / 500))
            for share in range(3):
                figures = (Measure("acc", 100 * accuracy, 100.0), Measure("acc_norm", 104 * accuracy, 100.0))
                self.host.handle(key(self.nodes[share]), Evaluated(task, step, 300, share, figures), self.now)
        return self


def stage(name: str, before: float = 3600.0, **config: Any) -> Stage:
    """A new run that began so many seconds before :data:`NOW`."""
    host = RunHost(name, replace(CONFIG, **config), seed=7, max_seq_len=1024, incarnation=sha256(name.encode())[:16])
    return Stage(host, NOW - before)


# --- a coordinator with a run in each state -------------------------------------------------------------------------


def before_the_start() -> Stage:
    """Nobody has joined yet."""
    return stage("before-start", 40.0)


def gathering() -> Stage:
    """Two nodes wait for a third."""
    return stage("gathering", 70.0).join(0, 1)


def warming_up() -> Stage:
    """One node has yet to report the parameters."""
    return stage("warming-up", 60.0).join(0, 1, 2, 3).warm_up(3)


def training() -> Stage:
    """Six nodes, of which one left, two were late at times and one was absent; an outage; three evaluations."""
    made = stage("training", 4755.0).join(0, 1, 2, 3).warm_up()
    made.train(30).train(2, late=[2]).train(20)
    made.join(4, 5)
    made.host.pause(made.now)
    made.drain()
    made.now += 20.0
    made.host.resume(made.now)
    made.train(50).evaluate(100).train(14, absent=[5]).train(3, late=[2]).train(10)
    made.host.disconnected(key(1), made.now, "its connection was closed")
    made.nodes.remove(1)
    made.train(40).outage(1200.0).train(35).evaluate(200).train(3, late=[2, 5]).train(95).evaluate(300)
    made.now = max(made.now, NOW - 9.0)
    return made.report(0, 2)


def first_rounds() -> Stage:
    """Two rounds are over."""
    return stage("first-rounds", 60.0).join(0, 1, 2).warm_up().train(2)


def ending() -> Stage:
    """The epoch drains before a pause; one node has reported."""
    made = stage("ending", 700.0).join(0, 1, 2).warm_up().train(45)
    made.host.pause(made.now)
    made.train(1)
    return made.report(0)


def paused() -> Stage:
    """Its owner paused it."""
    made = stage("paused", 3000.0).join(0, 1, 2).warm_up().train(80)
    made.host.pause(made.now)
    return made.drain()


def finished(name: str = "finished", steps: int = 300, before: float = 5400.0) -> Stage:
    """All steps are trained."""
    made = stage(name, before, total_steps=steps).join(0, 1, 2, 3).warm_up()
    while made.host.state.phase is not Phase.FINISHED:
        made.train(1)
    for number in made.nodes:
        made.host.disconnected(key(number), made.now, "")
    return made


def stalled() -> Stage:
    """Its changes cannot be stored."""
    return stage("stalled", 600.0).join(0, 1, 2).warm_up().train(25)


class StagedStore(MemoryStore):
    """A store of staged runs, one of which it cannot write."""

    def __init__(self, stages: Iterable[Stage], closed: Iterable[Stage] = ()) -> None:
        super().__init__()
        for made in closed:
            run = LiveRun(made.host, lambda: NOW)
            self.create(made.host, {})
            self.archive(made.host.state.run_id, json.loads(json.dumps(record_of(run, made.now + 600.0))))
        for made in stages:
            self.create(made.host, {})

    def save(self, host: RunHost) -> None:
        """Refuse for the run ``stalled``."""
        if host.state.run_id == "stalled":
            raise CoordinatorError("cannot write to /srv/psyche: the disk is full", code="StoreFailed", retryable=True)


@asynccontextmanager
async def still(store: MemoryStore) -> AsyncIterator[tuple[CoordinatorServer, str]]:
    """A server of a store's runs, whose time hardly goes on: no stage moves on by itself."""
    began = monotonic()

    def clock() -> float:
        return NOW + (monotonic() - began) / 1000

    server = CoordinatorServer(store, clock=clock, wall=clock, grace=1e6, heartbeat=1e6)
    url = await server.start("127.0.0.1", 0)
    try:
        yield server, url
    finally:
        await server.stop()


def every_state() -> StagedStore:
    """A run in each state, and one that is closed."""
    makers = (before_the_start, gathering, warming_up, first_rounds, training, ending, paused, stalled, finished)
    return StagedStore((make() for make in makers), iter([finished("closed-run", 120, 90_000.0)]))
