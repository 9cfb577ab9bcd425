"""The history that a coordinator keeps for people: notable events, and figures of each step. It decides nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from psyche_lightning.coordinator.machine import Ending, ending
from psyche_lightning.errors import CoordinatorError, WireError, counted
from psyche_lightning.protocol.codec import from_json, to_json
from psyche_lightning.protocol.committee import least_clients, members
from psyche_lightning.protocol.evals import MAX_TASKS, Evaluation
from psyche_lightning.protocol.requests import MAX_FIGURES, Evaluated, Figure, Report
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
_T = TypeVar("_T")


@dataclass(frozen=True)
class Event:
    """A notable event.

    Attributes:
        time: seconds since 1970, or the coordinator's where it has no wall clock.
        kind: ``joined``, ``left``, ``dropped`` or ``ejected`` for a node; ``epoch`` or ``run`` for the whole run.
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


@dataclass(frozen=True)
class Mean:
    """The mean of a named figure over the nodes that reported it.

    Attributes:
        name: as of a :class:`~psyche_lightning.protocol.requests.Figure`.
        value: the mean.
        nodes: how many reported it.
    """

    name: str
    value: float
    nodes: int


@dataclass(frozen=True)
class Metrics:
    """The figures of one training round, from the reports of the nodes that trained its step.

    Attributes:
        epoch: the round's epoch.
        height: the round's height.
        step: the optimizer step that it trained, from 1.
        time: when it began, as in :class:`Event`.
        clients: members at its start.
        batch_size: its samples.
        reports: nodes that reported figures of this step.
        losses: reports with a loss.
        loss: mean of those losses; None without any.
        tokens_per_second: sum over the reports.
        bytes_up: mean bytes that a reporter wrote since its previous report.
        bytes_down: mean bytes that it read.
        figures: means of named figures of this step.
    """

    epoch: int
    height: int
    step: int
    time: float
    clients: int
    batch_size: int
    reports: int = 0
    losses: int = 0
    loss: float | None = None
    tokens_per_second: float = 0.0
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    figures: tuple[Mean, ...] = ()

    def plus(self, report: Report, before: Report | None) -> Metrics:
        """The figures with one more report; ``before`` is the previous report of the same sender."""
        loss, losses = self.loss, self.losses
        if math.isfinite(report.loss):
            losses += 1
            loss = report.loss if loss is None else loss + (report.loss - loss) / losses
        reports = self.reports + 1

        def mean(old: float, total: int, seen: int) -> float:
            # A sender that has restarted counts from zero.
            return old + ((total - seen if total >= seen else total) - old) / reports

        return replace(
            self,
            reports=reports,
            losses=losses,
            loss=loss,
            tokens_per_second=self.tokens_per_second + report.tokens_per_second,
            bytes_up=mean(self.bytes_up, report.bytes_up, before.bytes_up if before else 0),
            bytes_down=mean(self.bytes_down, report.bytes_down, before.bytes_down if before else 0),
        )

    def also(self, figures: Collection[Figure]) -> Metrics:
        """The figures with those of a node that belong to this step."""
        means = {mean.name: mean for mean in self.figures}
        for figure in figures:
            if figure.step == self.step and (figure.name in means or len(means) < MAX_FIGURES):
                old = means.get(figure.name, Mean(figure.name, 0.0, 0))
                nodes = old.nodes + 1
                means[figure.name] = Mean(figure.name, old.value + (figure.value - old.value) / nodes, nodes)
        return replace(self, figures=tuple(means.values()))


class Tail(Generic[_T]):
    """The newest entries of a list that only grows; entries keep their places.

    Args:
        limit: number of entries to keep.
        items: the entries so far; the first one has place ``first``.
        first: number of entries before those.
    """

    def __init__(self, limit: int, items: list[_T] | None = None, first: int = 0) -> None:
        self._limit = limit
        self._items = items or []
        self._first = first

    @property
    def count(self) -> int:
        """The number of entries ever added."""
        return self._first + len(self._items)

    def add(self, item: _T) -> None:
        """Append an entry, and drop the oldest one beyond the limit."""
        self._items.append(item)
        excess = len(self._items) - self._limit
        if excess > 0:
            del self._items[:excess]
            self._first += excess

    def change(self, update: Callable[[_T], _T], newest: int) -> None:
        """Replace each of the newest entries by the result of ``update``."""
        self._items[-newest:] = map(update, self._items[-newest:])

    def since(self, place: int) -> list[_T]:
        """The entries from a place on, as far as they are kept."""
        return self._items[max(0, place - self._first) :]

    def dump(self, place: int = 0) -> dict[str, Any]:
        """The entries as JSON values, which :meth:`load` reads."""
        first = max(self._first, min(place, self.count))
        return {"first": first, "items": [to_json(item) for item in self.since(first)]}

    @classmethod
    def load(cls, limit: int, kind: type[_T], data: Any, **added: Any) -> Tail[_T]:
        """Read what :meth:`dump` wrote, or an earlier version without the fields ``added``, of which it gives values.

        Raises:
            WireError: it is something else.
        """
        if not (isinstance(data, dict) and type(data.get("first")) is int and isinstance(data.get("items"), list)):
            raise WireError(f"a list of {kind.__name__} must have a first place and items")
        items = [{**added, **item} if isinstance(item, dict) else item for item in data["items"]]
        return cls(limit, [from_json(kind, item) for item in items], data["first"])


class History:
    """Records what happens to a run.

    Attributes:
        events: the newest notable events.
        metrics: figures of the newest training rounds; the newest :data:`CHANGING_METRICS` may still change.
        reports: the latest report of each signer of the epoch.
        evaluations: what nodes measured within the run, in the order in which it began.
        ahead: seconds from the run's time to the date, which may step.
    """

    def __init__(self) -> None:
        self.ahead = 0.0
        self.events: Tail[Event] = Tail(MAX_EVENTS)
        self.metrics: Tail[Metrics] = Tail(MAX_METRICS)
        self.reports: dict[bytes, Report] = {}
        self.evaluations: Tail[Evaluation] = Tail(MAX_EVALUATIONS)

    def note(self, state: RunState, now: float, kind: str, text: str, signer: bytes = b"") -> None:
        """Add an event."""
        self.events.add(Event(now + self.ahead, kind, text, state.epoch, state.step, signer.hex()))

    def report(self, epoch: int, signer: bytes, report: Report) -> None:
        """Add a witness' figures to those of their step, once, if it is one of the newest steps.

        If results overlap training, that step is the one before the round in which the witness reports. The last step
        is reported while the epoch drains. Named figures may be of an earlier step than the report.
        """
        clean = replace(
            report,
            loss=report.loss if abs(report.loss) < _MOST else math.nan,
            tokens_per_second=report.tokens_per_second if abs(report.tokens_per_second) < _MOST else 0.0,
            figures=tuple(figure for figure in report.figures if abs(figure.value) < _MOST),
        )
        before = self.reports.get(signer)
        if repr(clean) == repr(before):  # equal values, even if the loss is NaN
            return
        self.reports[signer] = clean
        if before is None or before.step != clean.step:
            self._change(lambda row: row.plus(clean, before) if (row.epoch, row.step) == (epoch, clean.step) else row)
        told = {(figure.name, figure.step) for figure in before.figures} if before else set()
        new = [figure for figure in clean.figures if (figure.name, figure.step) not in told]
        if new:
            self._change(lambda row: row.also(new) if row.epoch == epoch else row)

    def _change(self, update: Callable[[Metrics], Metrics]) -> None:
        self.metrics.change(update, newest=CHANGING_METRICS)

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
        round_ = after.current
        known = before.current if before.phase.active else None
        began = after.phase.active and round_ is not None and (known is None or known.height != round_.height)
        if began and round_ is not None and round_.step:  # a drain round has no figures of its own
            self.metrics.add(
                Metrics(
                    after.epoch, round_.height, round_.step, now + self.ahead, len(round_.clients), round_.batch_size
                )
            )
        for kind, text in _notable(before, after, now):
            self.note(after, now, kind, text)
        if after.phase is Phase.WARMUP and before.phase is not Phase.WARMUP:
            members = {client.signer for client in after.clients}
            self.reports = {signer: report for signer, report in self.reports.items() if signer in members}

    def dump(self, events_from: int, metrics_from: int, evaluations_from: int) -> dict[str, Any]:
        """The history as JSON values, which :meth:`load` reads."""
        reports = {}
        for signer, report in self.reports.items():
            reports[signer.hex()] = to_json(report)
            if math.isnan(report.loss):
                reports[signer.hex()]["loss"] = None
        return {
            "events": self.events.dump(events_from),
            "metrics": self.metrics.dump(metrics_from),
            "evaluations": self.evaluations.dump(evaluations_from),
            "reports": reports,
        }

    @classmethod
    def load(cls, data: dict[str, Any]) -> History:
        """Read what :meth:`dump` wrote.

        Raises:
            WireError: it is something else.
        """
        history = cls()
        history.events = Tail.load(MAX_EVENTS, Event, data["events"])
        metrics = Tail.load(MAX_METRICS, Metrics, data["metrics"], figures=[])
        # Version 0.1 also kept rows of drain rounds.
        history.metrics = Tail(MAX_METRICS, [row for row in metrics.since(0) if row.step], data["metrics"]["first"])
        if "evaluations" in data:  # a run stored by an earlier version has none
            history.evaluations = Tail.load(MAX_EVALUATIONS, Evaluation, data["evaluations"])
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
