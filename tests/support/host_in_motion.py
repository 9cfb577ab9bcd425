"""A run's host in motion: nodes that join, and rounds in which they report, without anything that trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.protocol.bloom import participants_bloom
from psyche_lightning.protocol.committee import round_selection
from psyche_lightning.protocol.limits import Limits
from psyche_lightning.protocol.requests import Join, Report, WarmupWitness, Witness
from psyche_lightning.protocol.state import CoordinatorConfig, Phase, RunState

CONFIG = CoordinatorConfig(
    warmup_time=10.0,
    cooldown_time=10.0,
    max_round_train_time=10.0,
    round_witness_time=10.0,
    epoch_time=1000.0,
    global_batch_size_start=6,
    global_batch_size_end=6,
    total_steps=3,
    init_min_clients=3,
    min_clients=2,
    waiting_for_members_extra_time=5.0,
)
DIGEST = b"d" * 32
ROOT = b"r" * 32


def key(i: int) -> bytes:
    return bytes([i + 1]) * 32


def make(seed: int = 7, limits: Limits | None = None, manifest: dict[str, Any] | None = None, **config: Any) -> RunHost:
    return RunHost("run", replace(CONFIG, **config), seed=seed, manifest=manifest, limits=limits)


def join(host: RunHost, who: Iterable[int], now: float = 0.0) -> None:
    for i in who:
        host.handle(key(i), Join(f"host:{i}", {"model": {"width": 8}}), now)


def training(count: int = 3, **arguments: Any) -> RunHost:
    host = make(**{"init_min_clients": count, **arguments})
    join(host, range(count))
    host.tick(5.0)
    for i in range(count):
        host.handle(key(i), WarmupWitness(0, i, DIGEST), 5.0)
    assert host.state.phase is Phase.ROUND_TRAIN
    return host


def report(host: RunHost, i: int, now: float, figures: Report | None = None, **changes: Any) -> None:
    """Client ``i`` reports as a witness."""
    host.handle(key(i), witness(host.state, i, figures, **changes), now)


def witness(state: RunState, i: int, figures: Report | None = None, **changes: Any) -> Witness:
    """The report of client ``i``; while the epoch drains, it also names the last parameters."""
    round_ = state.current
    assert round_ is not None
    proof = round_selection(round_, state.config).witness_proof(round_.clients.index(key(i)))
    heard = changes.pop("heard", range(3))
    bloom = participants_bloom(round_.seed, [key(j) for j in heard])
    named = {"step": state.step - 1, "digest": DIGEST} if state.draining else {}
    made = Witness(state.epoch, round_.height, proof, ROOT, bloom, bloom, report=figures or Report(round_.step))
    return replace(made, **{**named, **changes})


def play(host: RunHost, now: float, who: Iterable[int] = (0, 1), **changes: Any) -> None:
    """One round in which ``who`` report at once, and the others not in time."""
    height = host.rounds[-1].height
    for i in who:
        if host.state.phase.active and host.rounds[-1].height == height:
            report(host, i, now, **changes)
    if host.state.phase.active and host.rounds[-1].height == height:
        host.tick(host.deadline() or now)


def finished(**arguments: Any) -> RunHost:
    host = training(**arguments)
    while host.state.phase.active:
        play(host, 6.0)
    return host
