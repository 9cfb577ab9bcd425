"""A run's nodes as JSON, for people and their programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from psyche_lightning.coordinator.nodes import Node
from psyche_lightning.protocol.requests import Figure, Report
from psyche_lightning.protocol.state import Client, ClientStatus, Phase, RunState
from psyche_lightning.server.live import LiveRun
from psyche_lightning.wire.identity import short

PARTS = ("compute", "encode", "wait", "apply")
"""The parts of a round's time that nodes report, as figures ``seconds/NAME``."""
OF_A_ROUND = {
    **{f"seconds/{name}": name for name in PARTS},
    "validation_loss": "",
    "learning_rate": "",
    "parameters": "",
}
"""Names of figures that have a place of their own, so that they are not among the others."""


def members_of(run: LiveRun) -> dict[str, list[tuple[Client, str]]]:
    """``clients`` of the epoch, ``exited`` and ``pending`` ones, each with its status in a word."""
    state = run.state
    # Between two epochs, the clients of the last one wait again as members, or have left.
    clients = () if state.phase in (Phase.WAITING_FOR_MEMBERS, Phase.PAUSED) else state.clients
    known = {client.signer for client in clients}
    return {
        "clients": [(client, standing(client, state)) for client in clients],
        "exited": [(client, _exited(run, client)) for client in state.exited_clients],
        "pending": [(client, "pending") for client in run.host.pending() if client.signer not in known],
    }


def standing(client: Client, state: RunState) -> str:
    """The status of a client in a word; a client that left the finished run counts as finished."""
    done = state.phase is Phase.FINISHED and client.status is ClientStatus.WITHDRAWN
    return "finished" if done else client.status.name.lower()


def _exited(run: LiveRun, client: Client) -> str:
    """That of a client that left the epoch; who had trained the last step of the finished run was done."""
    report = run.host.history.reports.get(client.signer)
    done = report is not None and report.step >= run.state.step - 1 > 0
    return standing(client, run.state) if done else client.status.name.lower()


def share(client: Client, state: RunState) -> float | None:
    """The part of the current round's samples that a client trains, by its weight; None if no round trains."""
    round_ = state.current
    if round_ is None or not state.phase.active or not round_.step or client.signer not in round_.clients:
        return None
    weights = round_.weights or (1,) * len(round_.clients)
    return weights[round_.clients.index(client.signer)] / sum(weights)


def member(client: Client, status: str, reports: Mapping[bytes, Report]) -> dict[str, Any]:
    """A member in a status: its key, address and status in a word, and the figures of its latest report.

    ``figures`` has the named ones, each as ``{"step": ..., "value": ...}``; ``parts`` the seconds of its newest round.
    """
    report = reports.get(client.signer)
    figures = {one.name: one for one in report.figures} if report else {}
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
        "figures": {
            name: {"step": one.step, "value": one.value} for name, one in figures.items() if name not in OF_A_ROUND
        },
        "parts": _parts(figures),
    }


def _parts(figures: Mapping[str, Figure]) -> dict[str, float]:
    found = {name: figures.get(f"seconds/{name}") for name in PARTS}
    return {name: one.value for name, one in found.items() if one is not None}


def node_line(run: LiveRun, client: Client, status: str) -> dict[str, Any]:
    """A node with all that is known of it: the fields of :func:`member`, its share, points, and history.

    ``region`` (as the node says; null if it does not), ``joined``, ``joins``, ``left``, ``reason``, ``seen``, ``link``
    (bytes a second ``up`` and ``down``), ``rounds`` (how many it delivered, was late for, and so on), and ``audits``:
    what was found out about it, newest last.
    """
    history = run.host.history
    node = history.nodes.get(client.signer) or Node(client.signer, -1, 0.0)
    return {
        **member(client, status, history.reports),
        "share": share(client, run.state),
        "points": run.host.points.get(client.signer, 0),
        "region": node.region,
        "joined": node.joined or None,
        "joins": node.joins,
        "left": node.left,
        "reason": node.reason or None,
        "seen": node.seen,
        "link": {"up": node.up, "down": node.down},
        "rounds": {name: getattr(node, name) for name in ("delivered", "late", "absent", "excluded", "rested")},
        "audits": [asdict(check) for check in node.checks],
    }


def everybody(run: LiveRun) -> dict[str, dict[str, Any]]:
    """All nodes that are or were in the run, by their keys in hex, as :func:`node_line` shows them."""
    present = {client.signer: (client, status) for found in members_of(run).values() for client, status in found}
    former = {
        node.signer: (Client(node.signer, node.signer, node.address), node.status or "left")
        for node in run.host.history.nodes
        if node.signer not in present
    }
    return {signer.hex(): node_line(run, *found) for signer, found in {**former, **present}.items()}
