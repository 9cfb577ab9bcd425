"""The history that a coordinator keeps for people: notable events, and figures of each step. It decides nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from psyche_lightning.coordinator.delivery import CHANGING_DELIVERIES, MAX_DELIVERIES, Delivery, Mark, marks_of
from psyche_lightning.coordinator.machine import Ending, ending
from psyche_lightning.coordinator.metrics import Metrics, Past
from psyche_lightning.coordinator.nodes import Check, Node, Nodes
from psyche_lightning.coordinator.tail import Tail
from psyche_lightning.errors import CoordinatorError, counted
from psyche_lightning.protocol.codec import from_json, to_json
from psyche_lightning.protocol.committee import least_clients, members
from psyche_lightning.protocol.evals import MAX_TASKS, Evaluation
from psyche_lightning.protocol.requests import Evaluated, Report
from psyche_lightning.protocol.state import Phase, Round, RunState
from psyche_lightning.wire.identity import short

MAX_EVENTS = 500
MAX_METRICS = 2000
CHANGING_METRICS = 4
"""The newest rows of figures, which may still change: results may overlap training, and reports come late."""
MAX_EVALUATIONS = 512
CHANGING_EVALUATIONS = 2 * MAX_TASKS
"""Evaluations that may still change: the newest ones."""
_MOST = 1e30
"""Figures of this size and more are no measurements, and sums of them might not be finite."""
_LEAVING = ("left", "dropped", "ejected", "kicked")
"""Kinds of events after which a node is no member; its status is so called then."""


@dataclass(frozen=True)
class Event:
    """A notable event.

    Attributes:
        time: seconds since 1970, or the coordinator's where it has no wall clock.
        kind: ``joined``, ``left``, ``dropped``, ``kicked``, ``ejected``, ``late`` or ``digest`` for a node; ``epoch``,
            ``run``, ``owner`` or ``settings`` for the whole run.
        text: the event in words.
        epoch: the run's epoch at that time.
        step: the next optimizer step at that time.
        signer: the node that the event concerns, in hex; empty if it concerns the run.
    """

    time: float
    kind: str
    text: str
    epoch: int
    step: int
    signer: str = ""


@dataclass
class Dates:
    """When a run reached what everybody asks about, as in :class:`Event`; None for what it did not reach.

    Attributes:
        created: it was opened to nodes.
        started: its first epoch began to train.
        ended: it was finished.
    """

    created: float | None = None
    started: float | None = None
    ended: float | None = None


class History:
    """Records what happens to a run.

    Attributes:
        events: the newest notable events.
        metrics: figures of the newest training rounds; the newest :data:`CHANGING_METRICS` may still change.
        past: means over the rounds before those.
        deliveries: who delivered in the newest training rounds.
        nodes: who is and was in the run.
        reports: the latest report of each signer of the epoch.
        votes: the step and digest of the newest parameters that each client of the epoch named.
        evaluations: what nodes measured within the run, in the order in which it began.
        dates: when the run was created, started and ended.
        ahead: seconds from the run's time to the date, which may step.
    """

    def __init__(self) -> None:
        self.ahead = 0.0
        self.events: Tail[Event] = Tail(MAX_EVENTS)
        self.metrics: Tail[Metrics] = Tail(MAX_METRICS)
        self.past = Past()
        self.deliveries: Tail[Delivery] = Tail(MAX_DELIVERIES)
        self.nodes = Nodes()
        self.reports: dict[bytes, Report] = {}
        self.votes: dict[bytes, tuple[int, bytes]] = {}
        self.evaluations: Tail[Evaluation] = Tail(MAX_EVALUATIONS)
        self.dates = Dates()
        self._late: set[bytes] = set()  # who was said to be late in this epoch

    def note(self, state: RunState, now: float, kind: str, text: str, signer: bytes = b"") -> None:
        """Add an event; one of a node that joins or leaves also counts for the node."""
        time = now + self.ahead
        self.events.add(Event(time, kind, text, state.epoch, state.step, signer.hex()))
        if kind == "joined":
            self.nodes.joined(signer, time)
        elif kind in _LEAVING:
            status = "finished" if kind == "left" and state.phase is Phase.FINISHED else kind
            reason = text.removeprefix(f"{short(signer)} ")
            self.nodes.change(signer, lambda node: replace(node, left=time, status=status, reason=reason))

    def check(self, signer: bytes, now: float, kind: str, good: bool, text: str, by: bytes = b"") -> None:
        """Note what was found out about a node; see :class:`~psyche_lightning.coordinator.nodes.Check`."""
        check = Check(now + self.ahead, kind, good, text, by.hex())
        self.nodes.change(signer, lambda node: node.checked(check))

    def report(self, epoch: int, signer: bytes, report: Report, now: float | None = None) -> None:
        """Add a witness' figures to those of their step, once, if it is one of the newest steps.

        If results overlap training, that step is the one before the round in which the witness reports. The last step
        is reported while the epoch drains. Named figures may be of an earlier step than the report. A report of step 0
        is of a node that has trained nothing yet, or of a drain round: only its bytes count.

        Args:
            epoch: the epoch of its round.
            signer: the witness.
            report: its figures.
            now: the coordinator's seconds, if they are known.
        """
        clean = replace(
            report,
            loss=report.loss if abs(report.loss) < _MOST else math.nan,
            tokens_per_second=report.tokens_per_second if abs(report.tokens_per_second) < _MOST else 0.0,
            figures=tuple(figure for figure in report.figures if abs(figure.value) < _MOST),
        )
        before = self.reports.get(signer)
        if not clean.step and before is not None:
            clean = replace(before, bytes_up=clean.bytes_up, bytes_down=clean.bytes_down)
        if repr(clean) == repr(before):  # equal values, even if the loss is NaN
            return
        self.reports[signer] = clean
        if now is not None:
            self._seen(signer, clean, before, now + self.ahead)
        if before is None or before.step != clean.step:
            self._change(lambda row: row.plus(clean, before) if (row.epoch, row.step) == (epoch, clean.step) else row)
        told = {(figure.name, figure.step) for figure in before.figures} if before else set()
        new = [figure for figure in clean.figures if (figure.name, figure.step) not in told]
        if new:
            self._change(lambda row: row.also(new) if row.epoch == epoch else row)
        node = self.nodes.get(signer)
        if node is not None and now is not None and math.isfinite(clean.loss):
            self._trained(epoch, clean.step, node, now + self.ahead)

    def _change(self, update: Callable[[Metrics], Metrics]) -> None:
        self.metrics.change(update, newest=CHANGING_METRICS)

    def _seen(self, signer: bytes, report: Report, before: Report | None, time: float) -> None:
        """Note when a node reported, and how much went over its link since its report before."""

        def seen(node: Node) -> Node:
            if node.seen is None or before is None or time <= node.seen:
                return replace(node, seen=time)
            up, down = report.bytes_up - before.bytes_up, report.bytes_down - before.bytes_down
            if min(up, down) < 0:  # it has restarted
                return replace(node, seen=time, up=None, down=None)
            return replace(node, seen=time, up=up / (time - node.seen), down=down / (time - node.seen))

        self.nodes.change(signer, seen)

    def _trained(self, epoch: int, step: int, node: Node, time: float) -> None:
        """A node that counted as absent trained its part after all: it was late."""

        def late(delivery: Delivery) -> Delivery:
            if (delivery.epoch, delivery.step) != (epoch, step) or node.number not in delivery.nodes:
                return delivery
            place = delivery.nodes.index(node.number)
            if delivery.marks[place] != Mark.ABSENT.value:
                return delivery
            self.nodes.change(node.signer, lambda one: one.marked(Mark.ABSENT, -1).marked(Mark.LATE))
            self._tell_late(epoch, step, node.signer, time)
            marks = delivery.marks[:place] + Mark.LATE.value + delivery.marks[place + 1 :]
            return replace(delivery, marks=marks)

        self.deliveries.change(late, newest=CHANGING_DELIVERIES)

    def _tell_late(self, epoch: int, step: int, signer: bytes, time: float) -> None:
        """Add an event, once an epoch."""
        if signer not in self._late:
            self._late.add(signer)
            text = f"{short(signer)} was too late with its result of step {step}"
            self.events.add(Event(time, "late", text, epoch, step, signer.hex()))

    def delivered(
        self, state: RunState, round_: Round, attesting: Round, needed: int, shares: dict[bytes, int], now: float
    ) -> None:
        """Record which nodes delivered in a training round that is over; see :func:`marks_of` for the arguments."""
        trained = {
            signer for signer, one in self.reports.items() if one.step >= round_.step and math.isfinite(one.loss)
        }
        decided, marks = marks_of(round_, attesting, needed, shares, trained)
        known = [(node, mark) for node, mark in zip(map(self.nodes.get, round_.clients), marks, strict=True) if node]
        numbers = tuple(node.number for node, _ in known)
        letters = "".join(mark.value for _, mark in known)
        epoch, time = state.rounds_epoch, now + self.ahead
        self.deliveries.add(Delivery(epoch, round_.height, round_.step, time, decided, numbers, letters))
        for node, mark in known:
            self.nodes.change(node.signer, lambda one, mark=mark: one.marked(mark))  # type: ignore[misc] # a default binds it
            if mark is Mark.LATE:
                self._tell_late(epoch, round_.step, node.signer, time)

    def evaluated(self, request: Evaluated) -> Evaluation:
        """Add a share to the evaluation of its task and step, which begins with its first share.

        Raises:
            CoordinatorError: the share does not fit what others measured (``InvalidRequest``).
        """
        recent = self.evaluations.since(self.evaluations.count - CHANGING_EVALUATIONS)
        place = (request.task, request.step, False)
        known = next((one for one in recent if (one.task, one.step, one.undone) == place), None)
        before = known or Evaluation(request.task, request.step, request.documents)
        if before.documents != request.documents:
            raise CoordinatorError(
                f"{request.task} has {request.documents} documents here and {before.documents} on other nodes; use the "
                "same release of lm-eval and the same files",
                code="InvalidRequest",
            )
        after = before.plus(request.share, request.figures)
        if known is None:
            self.evaluations.add(after)
        else:
            self.evaluations.change(lambda one: after if one is known else one, newest=len(recent))
        return after

    def undo(self, step: int) -> None:
        """Mark the evaluations of the parameters after a step, since the run has gone back to it."""
        kept = len(self.evaluations.since(0))
        self.evaluations.change(lambda one: replace(one, undone=True) if one.step > step else one, newest=kept)

    def observe(self, before: RunState, after: RunState, now: float) -> None:
        """Record a transition, as far as it matters to people."""
        round_, time = after.current, now + self.ahead
        known = before.current if before.phase.active else None
        goes_on = after.phase.active and round_ is not None
        if known is not None and not (goes_on and round_ is not None and known.height == round_.height):
            place = (before.epoch, known.height)
            self._change(
                lambda row: replace(row, seconds=max(0.0, time - row.time)) if (row.epoch, row.height) == place else row
            )
        began = goes_on and round_ is not None and (known is None or known.height != round_.height)
        if began and round_ is not None and round_.step:  # a drain round has no figures of its own
            row = Metrics(after.epoch, round_.height, round_.step, time, len(round_.clients), round_.batch_size)
            for old in self.metrics.add(row):
                self.past.add(old)
        if after.phase is not before.phase:
            self._date(before.phase, after.phase, time)
        for kind, text in _notable(before, after, now):
            self.note(after, now, kind, text)
        if after.phase is Phase.WARMUP and before.phase is not Phase.WARMUP:
            members = {client.signer for client in after.clients}
            self.reports = {signer: report for signer, report in self.reports.items() if signer in members}
            self.votes, self._late = {}, set()
        self._named(before, after, now)

    def _date(self, before: Phase, after: Phase, time: float) -> None:
        dates = self.dates
        if before is Phase.UNINITIALIZED:
            dates.created = time
        if after is Phase.ROUND_TRAIN and dates.started is None:
            dates.started = time
        if after is Phase.FINISHED:
            dates.ended = time

    def _named(self, before: RunState, after: RunState, now: float) -> None:
        """Note which parameters nodes named, and who named others than the run's."""
        if after.phase is Phase.WARMUP and after.warmup_witnesses is not before.warmup_witnesses:
            for record in after.warmup_witnesses:
                self.votes[after.clients[record.proof.index].signer] = after.step - 1, record.merkle
        elif after.phase.active and before.phase is Phase.WARMUP:
            text = f"held the parameters {after.epoch_digest[:4].hex()} of step {after.step - 1} at the epoch's start"
            for signer, (_, digest) in self.votes.items():
                if digest == after.epoch_digest:
                    self.check(signer, now, "warmup", True, text)
            return
        if after.checkpoint_votes is before.checkpoint_votes and after.checkpoint is before.checkpoint:
            return
        for signer, step, digest in after.checkpoint_votes:
            self.votes[signer] = step, digest
        held = after.checkpoint
        if after.checkpoint == before.checkpoint or not after.phase.active:
            return
        for signer, (step, digest) in self.votes.items():
            if step == held.step:
                good, name = digest == held.digest, digest[:4].hex()
                text = f"holds the run's parameters {name} of step {step}"
                if not good:
                    text = f"holds other parameters than the run's of step {step}: {name} instead of "
                    text += held.digest[:4].hex()
                    self.note(after, now, "digest", f"{short(signer)} {text}", signer)
                self.check(signer, now, "digest", good, text)

    def dump(self, since: Mapping[str, int]) -> dict[str, Any]:
        """The history as JSON values, which :meth:`load` reads.

        Args:
            since: the first place of ``events``, ``metrics``, ``past``, ``deliveries`` and ``evaluations``, and the
                version of ``nodes``, from which on they are wanted; all of those that are not named.
        """
        reports = {}
        for signer, report in self.reports.items():
            reports[signer.hex()] = to_json(report)
            if math.isnan(report.loss):
                reports[signer.hex()]["loss"] = None
        return {
            "events": self.events.dump(since.get("events", 0)),
            "metrics": self.metrics.dump(since.get("metrics", 0)),
            "past": self.past.dump(since.get("past", 0)),
            "deliveries": self.deliveries.dump(since.get("deliveries", 0)),
            "evaluations": self.evaluations.dump(since.get("evaluations", 0)),
            "nodes": self.nodes.dump(since.get("nodes", -1)),
            "dates": to_json(self.dates),
            "reports": reports,
        }

    @classmethod
    def load(cls, data: dict[str, Any]) -> History:
        """Read what :meth:`dump` wrote; earlier versions knew less.

        Raises:
            WireError: it is something else.
        """
        history = cls()
        history.events = Tail.load(MAX_EVENTS, Event, data["events"])
        metrics = Tail.load(MAX_METRICS, Metrics, data["metrics"], figures=[])
        # Version 0.1 also kept rows of drain rounds.
        history.metrics = Tail(MAX_METRICS, [row for row in metrics.since(0) if row.step], data["metrics"]["first"])
        if "evaluations" in data:
            history.evaluations = Tail.load(MAX_EVALUATIONS, Evaluation, data["evaluations"])
        if "past" in data:
            history.past = Past.load(data["past"])
        if "deliveries" in data:
            history.deliveries = Tail.load(MAX_DELIVERIES, Delivery, data["deliveries"])
        if "nodes" in data:
            history.nodes = Nodes.load(data["nodes"])
        if "dates" in data:
            history.dates = from_json(Dates, data["dates"])
        for signer, values in data["reports"].items():
            lossless = values["loss"] is None
            report = from_json(Report, {"figures": [], **values, **({"loss": 0.0} if lossless else {})})
            history.reports[bytes.fromhex(signer)] = replace(report, loss=math.nan) if lossless else report
        return history


def _names(signers: list[bytes]) -> str:
    return ", ".join(short(signer) for signer in signers[:8]) + (", ..." if len(signers) > 8 else "")


def _notable(before: RunState, after: RunState, now: float) -> list[tuple[str, str]]:
    """Kinds and texts of the events of a transition."""
    notes: list[tuple[str, str]] = []
    drains = after.draining and not before.draining
    if after.pending_pause and not before.pending_pause and not drains:
        notes.append(("run", "a pause was asked for; the epoch ends first"))
    round_ = after.current
    if drains and before.current is not None:
        # As it was decided: before the drain round began.
        then = replace(after, rounds=before.rounds, head=before.head, pending_pause=before.pending_pause)
        reason = _reason(then, before.current, now)
        notes.append(("epoch", f"epoch {after.epoch} ends: {reason}; up to two rounds exchange what is under way"))
    if after.phase is before.phase:
        return notes
    if after.phase is Phase.WARMUP:
        signers = [client.signer for client in after.clients]
        notes.append(("epoch", f"epoch {after.epoch} is formed by {counted(len(signers), 'node')}: {_names(signers)}"))
    elif before.phase is Phase.WARMUP and after.phase is Phase.ROUND_TRAIN:
        digest = after.epoch_digest[:4].hex()
        notes.append(("epoch", f"epoch {after.epoch} begins with step {after.step} from the parameters {digest}"))
    elif before.phase is Phase.WARMUP and after.phase is Phase.WAITING_FOR_MEMBERS:
        left, least = len(after.clients), least_clients(after)
        why = f"the parameters were reported by {len(before.warmup_witnesses)} of {counted(left, 'node')} in time"
        if left < least:
            why = f"only {counted(left, 'node')} {'is' if left == 1 else 'are'} left, and {least} are needed"
        notes.append(("epoch", f"epoch {after.epoch} could not begin: {why}"))
    elif before.phase.active and not after.phase.active and round_ is not None:
        notes.append(("epoch", f"epoch {before.epoch} has ended: {_outcome(before, after, round_, now)}"))
    if after.phase is Phase.FINISHED:
        notes.append(("run", f"the run has finished after {counted(after.step - 1, 'step')}"))
    elif after.phase is Phase.PAUSED:
        notes.append(("run", "the run is paused"))
    elif before.phase is Phase.PAUSED:
        notes.append(("run", "the run is resumed"))
    return notes


def _reason(state: RunState, round_: Round, now: float) -> str:
    """Why an epoch ends after this round."""
    match ending(state, round_, now):
        case Ending.FEW_CLIENTS:
            left = len(state.clients)
            are = "is" if left == 1 else "are"
            return f"{counted(left, 'node')} of {members(state)} {are} left, and {least_clients(state)} are needed"
        case Ending.FEW_REPORTS:
            return f"{counted(len(round_.witnesses), 'witness', 'witnesses')} reported, and {state.needed} are needed"
        case Ending.NOTHING_APPLIED:
            return f"no result was agreed in the last {len(state.rounds)} rounds; the run pauses then"
        case Ending.TIME_OVER:
            return "its time is over"
        case Ending.ALL_TRAINED:
            return "all steps are trained"
        case Ending.PAUSE:
            return "a pause was asked for"
        case None:
            return ""


def _outcome(before: RunState, after: RunState, round_: Round, now: float) -> str:
    held = after.checkpoint
    name = f"the parameters {held.digest[:4].hex()} of step {held.step}"
    if after.settled:
        return f"{name} are agreed"
    why = "" if before.draining else f"{_reason(after, round_, now)}; "
    return f"{why}the run goes on from step {after.step - 1}, which the decided rounds after {name} give"


def plain_round(round_: Round) -> Round:
    """The round without its witnesses' Bloom filters."""
    return replace(
        round_, witnesses=tuple(replace(record, participants=b"", broadcasts=b"") for record in round_.witnesses)
    )
