"""A run as JSON, for people and their programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from psyche_lightning.coordinator.history import Metrics
from psyche_lightning.protocol.evals import Evaluation
from psyche_lightning.protocol.requests import Report
from psyche_lightning.protocol.state import Client, ClientStatus, Phase, RunState
from psyche_lightning.server.live import LiveRun
from psyche_lightning.wire.identity import short

SHOWN_EVALUATIONS = 64


def run_line(run: LiveRun) -> dict[str, Any]:
    """A run in a list: ``run_id``, ``phase``, ``epoch``, ``height``, ``step``, ``total_steps``, ``clients``."""
    state = run.state
    return {
        "run_id": state.run_id,
        "phase": state.phase.name.lower(),
        "epoch": state.epoch,
        "height": state.current.height if state.current and state.phase.active else None,
        "step": state.step,
        "total_steps": None if "total_steps" in run.host.unset else state.config.total_steps,
        "clients": len(state.healthy),
    }


def run_status(run: LiveRun, events_from: int = 0, metrics_from: int = 0) -> dict[str, Any]:
    """The full status of a run.

    Args:
        run: the run.
        events_from: number of the first event to include; numbers count from 0 over the whole run.
        metrics_from: number of the first round whose figures to include.

    Returns:
        JSON values: the fields of :func:`run_line`, ``incarnation``, ``nonce``, ``config`` (null for what the first
        node will fix), ``pending_pause``, ``waits_for`` (in a line, empty if the run waits for nothing), ``problem``
        (why changes cannot be stored, null if they can), ``checkpoint``, ``manifest_digest``; ``clients`` (of the
        epoch), ``exited`` and ``pending``, each with key, status, latest figures and ``share``
        of the round's samples (null without one); ``points``; ``by_link`` (whether who joins needs the join link),
        ``allowed`` (node keys that may join, null for everyone) and ``revoked`` (node keys that may not in any case);
        ``events`` and ``metrics``, and the number of each; ``evaluations``, the newest ones (see
        :func:`evaluation_line`).
    """
    host, state = run.host, run.state
    reports = host.history.reports
    config = asdict(state.config)
    if "global_batch_size" in host.unset:
        config["global_batch_size_start"] = config["global_batch_size_end"] = None
    if "total_steps" in host.unset:
        config["total_steps"] = None
    return {
        **run_line(run),
        "incarnation": state.incarnation.hex(),
        "nonce": state.nonce,
        "pending_pause": state.pending_pause,
        "waits_for": host.waits_for,
        "problem": run.problem,
        "checkpoint": {"step": state.checkpoint.step, "digest": state.checkpoint.digest.hex()},
        "manifest_digest": run.manifest_digest.hex() or None,
        "config": config,
        **{
            place: [{**member(client, status, reports), "share": share(client, state)} for client, status in found]
            for place, found in members_of(run).items()
        },
        "points": [
            {"node": signer.hex(), "earned": points, "slashed": 0, "claimed": 0}
            for signer, points in host.points.items()
        ],
        "by_link": host.membership.by_link,
        "allowed": None if host.membership.allowed is None else [key.hex() for key in host.membership.allowed],
        "revoked": sorted(key.hex() for key in host.membership.revoked),
        "event_count": host.history.events.count,
        "metric_count": host.history.metrics.count,
        "evaluations": [
            evaluation_line(one) for one in host.history.evaluations.since(0)[-SHOWN_EVALUATIONS:] if not one.undone
        ],
        "events": [asdict(event) for event in host.history.events.since(events_from)],
        "metrics": [metrics_row(row) for row in host.history.metrics.since(metrics_from)],
    }


def members_of(run: LiveRun) -> dict[str, list[tuple[Client, str]]]:
    """``clients`` of the epoch, ``exited`` and ``pending`` ones, each with its status in a word."""
    state = run.state
    # Between two epochs, the clients of the last one wait again as members, or have left.
    clients = () if state.phase in (Phase.WAITING_FOR_MEMBERS, Phase.PAUSED) else state.clients
    known = {client.signer for client in clients}
    return {
        "clients": [(client, standing(client, state)) for client in clients],
        "exited": [(client, client.status.name.lower()) for client in state.exited_clients],
        "pending": [(client, "pending") for client in run.host.pending() if client.signer not in known],
    }


def metrics_row(row: Metrics) -> dict[str, Any]:
    """The figures of a training round in a status; ``figures`` has the means of the named ones."""
    return {**asdict(row), "figures": {mean.name: mean.value for mean in row.figures}}


def evaluation_line(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation in a status: ``task``, ``step``, ``documents``, ``measured`` of them, and ``figures`` by name."""
    return {
        "task": evaluation.task,
        "step": evaluation.step,
        "documents": evaluation.documents,
        "measured": evaluation.measured,
        "figures": evaluation.values,
    }


def standing(client: Client, state: RunState) -> str:
    """The status of a client in a word; a client that left the finished run counts as finished."""
    done = state.phase is Phase.FINISHED and client.status is ClientStatus.WITHDRAWN
    return "finished" if done else client.status.name.lower()


def share(client: Client, state: RunState) -> float | None:
    """The part of the current round's samples that a client trains, by its weight; None if no round trains."""
    round_ = state.current
    if round_ is None or not state.phase.active or not round_.step or client.signer not in round_.clients:
        return None
    weights = round_.weights or (1,) * len(round_.clients)
    return weights[round_.clients.index(client.signer)] / sum(weights)


def member(client: Client, status: str, reports: Mapping[bytes, Report]) -> dict[str, Any]:
    """A member in a status: its key, address and status in a word, and the figures of its latest report.

    ``figures`` has the named ones, each as ``{"step": ..., "value": ...}``.
    """
    report = reports.get(client.signer)
    return {
        "key": short(client.signer),
        "signer": client.signer.hex(),
        "address": client.address,
        "status": status,
        "step": report.step or None if report else None,  # 0 means that it has trained nothing yet
        "loss": report.loss if report and math.isfinite(report.loss) else None,
        "tokens_per_second": report.tokens_per_second if report else None,
        "bytes_up": report.bytes_up if report else None,
        "bytes_down": report.bytes_down if report else None,
        "figures": {one.name: {"step": one.step, "value": one.value} for one in report.figures} if report else {},
    }
