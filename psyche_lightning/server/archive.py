"""What stays of a run that was closed: its last status with its whole history, for people."""

from __future__ import annotations

from typing import Any

from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.state import Phase
from psyche_lightning.server.live import LiveRun
from psyche_lightning.server.nodes import everybody
from psyche_lightning.server.status import run_line, run_status


def record_of(run: LiveRun, date: float) -> dict[str, Any]:
    """What is kept of a run that is closed at ``date``, in seconds since 1970.

    Returns:
        ``line`` as of :func:`~psyche_lightning.server.status.run_line`, and ``status`` as of
        :func:`~psyche_lightning.server.status.run_status` with ``nodes`` (everybody who was there) and ``manifest``.
        ``id`` is the run's scope, which no other run has.
    """
    place = {"id": run.state.scope, "archived": date, "seconds_left": None, "problem": None}
    status = {**run_status(run), **place, "manifest": run.host.manifest}
    # Who was still there leaves with the run.
    ending = "finished" if run.state.phase is Phase.FINISHED else "left"
    status["nodes"] = {
        signer: {**node, "status": ending} if node["status"] in ("healthy", "pending") else node
        for signer, node in everybody(run).items()
    }
    status.update({"deadline": None, "awaited": [], "awaited_count": 0})
    line = {**run_line(run), **place, "manifest_digest": status["manifest_digest"]}
    return {"line": line, "status": status}


def find(lines: list[dict[str, Any]], run: str) -> str:
    """The id of an archived run by its id or its name.

    Raises:
        CoordinatorError: there is none (``UnknownRun``), or several runs had that name (``SeveralRuns``).
    """
    found = [line["id"] for line in lines if run in (line["id"], line["run_id"])]
    if run in found or len(found) == 1:
        return run if run in found else str(found[0])
    if found:
        raise CoordinatorError(
            f"several closed runs were named {run!r}; give the id of one: {', '.join(found[:10])}", code="SeveralRuns"
        )
    known = ", ".join(sorted({line["run_id"] for line in lines})[:20]) or "none"
    text = f"no run {run[:80]!r} on this coordinator, open or closed; closed are: {known}"
    raise CoordinatorError(text, code="UnknownRun")
