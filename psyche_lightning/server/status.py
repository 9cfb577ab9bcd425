"""A run as JSON, for people and their programs."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from typing import Any

from psyche_lightning.coordinator.metrics import Metrics, Stretch
from psyche_lightning.coordinator.settings import all_reduce
from psyche_lightning.coordinator.waiting import awaited_nodes
from psyche_lightning.protocol.evals import Evaluation
from psyche_lightning.protocol.state import Phase
from psyche_lightning.server.live import LiveRun
from psyche_lightning.server.nodes import OF_A_ROUND, PARTS, members_of, node_line

SHOWN_EVALUATIONS = 64
MOST_AWAITED = 16
"""Nodes that a status names as awaited, or as holders of other parameters."""
USUAL = 50
"""Newest rounds whose length is taken for that of the rounds to come."""
_STATES = {
    Phase.UNINITIALIZED: "waiting",
    Phase.WAITING_FOR_MEMBERS: "waiting",
    Phase.WARMUP: "warmup",
    Phase.ROUND_TRAIN: "training",
    Phase.ROUND_WITNESS: "training",
    Phase.FINISHED: "finished",
    Phase.PAUSED: "paused",
}


def run_line(run: LiveRun) -> dict[str, Any]:
    """A run in a list.

    Returns:
        ``run_id``, ``phase``, ``epoch``, ``height``, ``step`` (the next one), ``total_steps`` and ``clients``; ``id``
        (by which the run is asked for), ``state`` in a word, ``progress`` (0 to 1), ``nodes`` that are here, the newest
        ``loss``; ``created``, ``started``, ``ended`` and ``archived``, in seconds since 1970; ``seconds_left``,
        ``waits_for`` and ``problem``. What is unknown is null.
    """
    host, state = run.host, run.state
    total = None if "total_steps" in host.unset else state.config.total_steps
    state_word = "ending" if state.draining else _STATES[state.phase]
    newest = host.history.metrics.newest(USUAL)
    return {
        "run_id": state.run_id,
        "phase": state.phase.name.lower(),
        "epoch": state.epoch,
        "height": state.current.height if state.current and state.phase.active else None,
        "step": state.step,
        "total_steps": total,
        "clients": len(state.healthy),
        "id": state.run_id,
        "state": "stalled" if run.problem else state_word,
        "progress": None if total is None else min(1.0, (state.step - 1) / total),
        "nodes": len({client.signer for client in (*host.pending(), *(state.healthy if state.phase.active else ()))}),
        "loss": next((row.loss for row in reversed(newest) if row.loss is not None), None),
        **asdict(host.history.dates),
        "archived": None,
        "seconds_left": _seconds_left(run, total, newest),
        "waits_for": host.waits_for,
        "problem": run.problem,
    }


def _seconds_left(run: LiveRun, total: int | None, newest: list[Metrics]) -> float | None:
    """As long as the steps to come take if they are as long as the newest ones; None unless the run trains."""
    lengths = [row.seconds for row in newest if row.seconds is not None and row.epoch == run.state.epoch]
    if total is None or not lengths or not run.state.phase.active or run.problem:
        return None
    return sum(lengths) / len(lengths) * (total - run.state.step + 1)


def run_fields(run: LiveRun) -> dict[str, Any]:
    """The status of a run without its nodes and without the lists that grow.

    Returns:
        JSON values: the fields of :func:`run_line`, ``incarnation``, ``nonce``, ``config`` (null for what the first
        node will fix), ``pending_pause``, ``checkpoint``, ``manifest_digest``; ``points``; ``by_link`` (whether who
        joins needs the join link), ``allowed`` (node keys that may join, null for everyone) and ``revoked`` (node keys
        that may not in any case); ``evaluations``, the newest ones (see :func:`evaluation_line`); ``since`` and
        ``deadline`` of the phase, in seconds since 1970, ``awaited`` (keys of nodes) with ``awaited_count``, and
        ``wanted`` (further nodes); ``settings`` (what holds for this step), ``model``, ``data``, ``recipe``;
        ``allreduce_bytes`` (of a node and round); ``digests`` (who holds which parameters); ``node_numbers`` (keys by
        number); the number of each kind of entry.
    """
    host, state, history = run.host, run.state, run.host.history
    config = asdict(state.config)
    if "global_batch_size" in host.unset:
        config["global_batch_size_start"] = config["global_batch_size_end"] = None
    if "total_steps" in host.unset:
        config["total_steps"] = None
    pending = list(host.membership.members.values())
    awaited = awaited_nodes(state, pending)
    deadline = None if run.problem else host.deadline()
    waits = state.phase is Phase.WAITING_FOR_MEMBERS
    settings, parameters = host.settings, trained_parameters(run)
    return {
        **run_line(run),
        "incarnation": state.incarnation.hex(),
        "nonce": state.nonce,
        "pending_pause": state.pending_pause,
        "checkpoint": {"step": state.checkpoint.step, "digest": state.checkpoint.digest.hex()},
        "manifest_digest": run.manifest_digest.hex() or None,
        "config": config,
        "points": [
            {"node": signer.hex(), "earned": points, "slashed": 0, "claimed": 0}
            for signer, points in host.points.items()
        ],
        "by_link": host.membership.by_link,
        "allowed": None if host.membership.allowed is None else [key.hex() for key in host.membership.allowed],
        "revoked": sorted(key.hex() for key in host.membership.revoked),
        "evaluations": [
            evaluation_line(one) for one in history.evaluations.since(0)[-SHOWN_EVALUATIONS:] if not one.undone
        ],
        "since": state.phase_start + history.ahead,
        "deadline": None if deadline is None else deadline + history.ahead,
        "awaited": [signer.hex() for signer in awaited[:MOST_AWAITED]],
        "awaited_count": len(awaited),
        "wanted": max(0, state.config.init_min_clients - len(pending)) if waits else None,
        "settings": {**settings.at(state.step), "next": settings.after(state.step), "overlap": settings.overlap},
        "model": {"name": settings.model, "dtype": settings.dtype, "parameters": parameters},
        "data": {"name": settings.data, "seq_len": settings.seq_len},
        "recipe": settings.recipe,
        "allreduce_bytes": _all_reduce(run, parameters, len(state.healthy), state.step, _batch(run)),
        "digests": _digests(run),
        "node_numbers": {str(node.number): node.signer.hex() for node in history.nodes},
        "event_count": history.events.count,
        "metric_count": history.metrics.count,
        "past_count": len(history.past.stretches),
        "round_count": history.deliveries.count,
    }


def run_status(
    run: LiveRun, events_from: int = 0, metrics_from: int = 0, past_from: int = 0, rounds_from: int = 0
) -> dict[str, Any]:
    """The full status of a run.

    Args:
        run: the run.
        events_from: number of the first event to include; numbers count from 0 over the whole run.
        metrics_from: number of the first round whose figures to include.
        past_from: number of the first stretch of older rounds to include.
        rounds_from: number of the first round of which to include who delivered.

    Returns:
        JSON values: those of :func:`run_fields`; ``clients`` (of the epoch), ``exited`` and ``pending``, as of
        :func:`~psyche_lightning.server.nodes.node_line`; ``events``, ``metrics``, ``past`` and ``rounds``.
    """
    return {
        **run_fields(run),
        **{place: [node_line(run, *one) for one in found] for place, found in members_of(run).items()},
        "events": event_lines(run, events_from),
        "metrics": metrics_rows(run, metrics_from),
        "past": stretch_lines(run, past_from),
        "rounds": delivery_lines(run, rounds_from),
    }


# --- growing lists ----------------------------------------------------------------------------------------------------


def event_lines(run: LiveRun, place: int) -> list[dict[str, Any]]:
    """The events from a place on, each with its ``number``."""
    events = run.host.history.events
    first = max(place, events.first)
    return [{"number": number, **vars(event)} for number, event in enumerate(events.since(first), first)]


def metrics_rows(run: LiveRun, place: int) -> list[dict[str, Any]]:
    """The rows of figures from a place on, with the ratio to an all-reduce."""
    parameters = trained_parameters(run)
    return [
        {**metrics_row(row), "ratio": _ratio(run, parameters, row.clients, row.step, row.batch_size, row.bytes_up)}
        for row in run.host.history.metrics.since(place)
    ]


def metrics_row(row: Metrics) -> dict[str, Any]:
    """The figures of a training round in a status; ``figures`` has the means of the named ones."""
    return {**vars(row), **_named({mean.name: mean.value for mean in row.figures})}


def stretch_lines(run: LiveRun, place: int) -> list[dict[str, Any]]:
    """The stretches of older rounds from a place on, with the ratio to an all-reduce."""
    parameters = trained_parameters(run)
    return [_stretch_line(run, one, parameters) for one in run.host.history.past.stretches[place:]]


def _stretch_line(run: LiveRun, one: Stretch, parameters: int | None) -> dict[str, Any]:
    means = {mean.name: mean.value for mean in one.means}
    names = ("clients", "loss", "seconds", "tokens_per_second", "bytes_up", "bytes_down")
    clients, sent = round(means.get("clients", 0.0)), means.get("bytes_up", 0.0)
    return {
        "first_step": one.first_step,
        "step": one.step,
        "epoch": one.epoch,
        "time": one.time,
        "rounds": one.rounds,
        **{name: means.get(name) for name in names},
        **_named({mean.name: mean.value for mean in one.figures}),
        "ratio": _ratio(run, parameters, clients, one.step, _batch(run), sent),
    }


def delivery_lines(run: LiveRun, place: int) -> list[dict[str, Any]]:
    """Who delivered in the rounds from a place on."""
    return [dict(vars(one)) for one in run.host.history.deliveries.since(place)]


def _named(figures: dict[str, float]) -> dict[str, Any]:
    """The named figures of rounds, those apart that have a place of their own."""
    rate = figures.get("learning_rate", figures.get("learning_rate/0"))
    return {
        "validation_loss": figures.get("validation_loss"),
        "learning_rate": rate,
        "parts": {name: figures[f"seconds/{name}"] for name in PARTS if f"seconds/{name}" in figures},
        "figures": {name: value for name, value in figures.items() if name not in OF_A_ROUND},
    }


def evaluation_line(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation in a status: ``task``, ``step``, ``documents``, ``measured`` of them, and ``figures`` by name."""
    return {
        "task": evaluation.task,
        "step": evaluation.step,
        "documents": evaluation.documents,
        "measured": evaluation.measured,
        "figures": evaluation.values,
    }


# --- derived figures --------------------------------------------------------------------------------------------------


def trained_parameters(run: LiveRun) -> int | None:
    """How many parameters are trained: by the manifest, or as most nodes say."""
    if run.host.settings.parameters is not None:
        return run.host.settings.parameters
    said = Counter(
        int(one.value)
        for report in run.host.history.reports.values()
        for one in report.figures
        if one.name == "parameters" and 0 < one.value < 1e15
    )
    return said.most_common(1)[0][0] if said else None


def _batch(run: LiveRun) -> int:
    return run.state.config.global_batch_size_end


def _all_reduce(run: LiveRun, parameters: int | None, nodes: int, step: int, samples: int) -> float | None:
    """Bytes of an all-reduce at each optimizer step that a node makes in a round; None if unknown, or for one node."""
    if parameters is None or nodes < 2:
        return None
    steps = run.host.settings.at(step)["local_steps"] or 1
    return all_reduce(parameters, nodes, max(1, min(steps, math.ceil(samples / nodes))))


def _ratio(run: LiveRun, parameters: int | None, nodes: int, step: int, samples: int, sent: float) -> float | None:
    dense = _all_reduce(run, parameters, nodes, step, samples)
    return None if dense is None or sent <= 0 else dense / sent


def _digests(run: LiveRun) -> dict[str, Any]:
    """Who holds the run's newest named parameters, and who named others of the same step."""
    held, votes = run.state.checkpoint, run.host.history.votes
    others = [
        {"node": signer.hex(), "step": step, "digest": digest.hex()}
        for signer, (step, digest) in votes.items()
        if step == held.step and digest != held.digest
    ]
    return {
        "step": held.step,
        "digest": held.digest.hex(),
        "agreed": None if not held.digest else not others,
        "named_by": sum(vote == (held.step, held.digest) for vote in votes.values()),
        "others": others[:MOST_AWAITED],
    }
