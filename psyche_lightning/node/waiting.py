"""Says in one line whom a node waits for (invariant I4), and decides when to say it."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from psyche_lightning.errors import counted
from psyche_lightning.logs import REMINDERS, duration, next_reminder
from psyche_lightning.node.agreement import EpochLog
from psyche_lightning.protocol.state import Phase, RunState
from psyche_lightning.wire.identity import short

FIRST = 2.0
"""Seconds of unreported waiting."""
COMPARED = 8
"""Past waits that define a usual wait."""


@dataclass(frozen=True)
class Awaited:
    """What a node waits for.

    Attributes:
        text: in one line.
        nodes: the nodes that it waits for, by node key; empty if it waits for something else.
    """

    text: str
    nodes: tuple[bytes, ...] = ()

    def __str__(self) -> str:
        return self.text


class Wait:
    """Measures a training thread's waits between rounds and decides when to report them.

    A wait is reported when it takes longer than usual, then at intervals, and when its cause changes.
    All times are seconds of one monotonic clock.
    """

    def __init__(self) -> None:
        self._past: deque[float] = deque(maxlen=COMPARED)
        self._since: float | None = None
        self._waited = 0.0
        self._due = FIRST
        self._told: tuple[float, str] | None = None

    def rest(self, now: float) -> None:
        """The thread has nothing to do."""
        self._since = now

    def resume(self, now: float) -> None:
        """The thread has work, perhaps not the next round."""
        if self._since is not None:
            self._waited += now - self._since
        self._since = None

    def over(self) -> None:
        """The next round has come: the next rest starts a new wait."""
        self._past.append(self._waited)
        self._waited, self._told = 0.0, None
        self._due = min(max(FIRST, 2.0 * statistics.median(self._past)), REMINDERS[-1])

    @property
    def resting(self) -> bool:
        """Whether the thread has nothing to do."""
        return self._since is not None

    def worth_a_line(self, now: float, what: str) -> float | None:
        """The seconds waited so far if they are due for a report, else None.

        Args:
            now: the time.
            what: the awaited thing; more of the same is no change.
        """
        if self._since is None:
            return None
        waited = self._waited + now - self._since
        changed = self._told is not None and what != self._told[1] and waited - self._told[0] >= REMINDERS[0]
        if waited < self._due and not changed:
            return None
        self._told = waited, what
        self._due = next_reminder(waited)
        return waited


def lacks(state: RunState) -> int:
    """How many members a run needs, besides those that stay from its last epoch, for the next one; 0 if unknown."""
    staying = len(state.healthy)
    if state.phase is not Phase.WAITING_FOR_MEMBERS or state.gathered_at is not None or not staying:
        return 0
    return max(0, state.config.init_min_clients - staying)


def describe(state: RunState | None, log: EpochLog | None, next_apply: int | None, delay: int, node: bytes) -> Awaited:
    """What the node waits for.

    Args:
        state: the node's view of the run.
        log: the epoch's known rounds.
        next_apply: next round to apply; None until the parameters are the epoch's.
        delay: rounds from training to applying.
        node: this node's key.
    """
    if state is None:
        return Awaited("waiting for the coordinator's state")
    if state.phase is Phase.WAITING_FOR_MEMBERS:
        needed, lacking = state.config.init_min_clients, lacks(state)
        text = f"epoch {state.epoch}: waiting for {needed} members"
        if needed == 1:
            text = f"epoch {state.epoch}: waiting for a member"
        if lacking:
            more = counted(lacking, "more member")
            text = f"epoch {state.epoch}: waits for {more} (has {needed - lacking} of {needed})"
        held = state.checkpoint
        if held.digest and node not in state.holders:
            text += f", and for a holder of the parameters {short(held.digest)} of step {held.step}"
        return Awaited(text)
    if state.phase is Phase.PAUSED:
        return Awaited("the run is paused; waiting for `psyche run resume`")
    if state.phase is Phase.WARMUP:
        ready = {record.proof.index for record in state.warmup_witnesses}
        unready = [client.node for i, client in enumerate(state.clients) if i not in ready]
        if node in unready and log is not None and log.epoch < state.epoch and next_apply is not None:
            what = f"this node lacks results of round {next_apply} of epoch {log.epoch}"
            return Awaited(f"epoch {state.epoch}: {what}; waiting for another member of that epoch")
        late = _names(unready) or "nobody"
        return Awaited(f"epoch {state.epoch}: waiting for {late} to hold the parameters", tuple(unready))
    if state.phase is Phase.FINISHED:
        return Awaited("the run is finished: waiting for its last parameters")
    current = state.current
    if current is None or log is None or current.height not in log.rounds:
        if current is not None and all(node != one.node for one in (*state.clients, *state.exited_clients)):
            long = duration(state.config.epoch_time)
            return Awaited(
                f"epoch {state.epoch} trains without this node, which joins the next one; an epoch takes {long}"
            )
        return Awaited(f"phase {state.phase.name}: waiting for the coordinator")
    if next_apply is None:
        return Awaited(f"round {current.height}: waiting for the epoch's parameters")
    if next_apply <= current.height - delay:
        return Awaited(f"round {current.height}: catching up, applying round {next_apply}")
    here, about = log.rounds[current.height], log.rounds.get(current.height - delay + 1)
    missing = sorted(about.missing) if about else []
    if about and missing:
        nodes = tuple(about.nodes[i] for i in missing)
        share = f"{len(missing)}/{len(about.batches)}"
        return Awaited(f"round {current.height}: waiting for results of {share} batches, from {_names(nodes)}", nodes)
    if state.draining:
        text = f"round {current.height}: waiting for a quorum to name the parameters after step {state.step - 1}"
        return Awaited(text)
    reported = {record.proof.index for record in current.witnesses}
    silent = [n for i, n in enumerate(here.nodes) if here.selection.is_witness(i) and i not in reported]
    if not silent:
        return Awaited(f"round {current.height}: waiting for the witnesses to agree; they verified different results")
    if node in silent:
        return Awaited(f"round {current.height}: waiting for the coordinator to take this node's report")
    return Awaited(f"round {current.height}: waiting for witnesses {_names(silent)}", tuple(silent))


def _names(nodes: Iterable[bytes]) -> str:
    return ", ".join(map(short, nodes))
