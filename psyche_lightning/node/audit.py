"""Audits a run from its nodes' ledgers: is each data id trained exactly once, and by which node?

The audit recomputes what it can: the round's seed and weights give the assignment, earlier agreed sets the ids to train
again, and each result carries its trainer's signature over ids, payload and round. Ledgers of several nodes
complete each other, because no node is always present, and must not contradict each other.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from psyche_lightning.errors import PsycheError, WireError
from psyche_lightning.node.ledger import Row
from psyche_lightning.node.rates import agreed_rates
from psyche_lightning.protocol.assignment import assign
from psyche_lightning.protocol.codec import check_weights
from psyche_lightning.protocol.committee import CommitteeSelection
from psyche_lightning.protocol.messages import Result, open_envelope
from psyche_lightning.protocol.open_ids import (
    Interval,
    OpenIds,
    batches,
    closed,
    count,
    half_open,
    merged,
    reopen,
    take,
)
from psyche_lightning.wire.identity import short

MAX_PROBLEMS = 20


@dataclass(frozen=True)
class Line:
    """Data ids that were trained together.

    Attributes:
        start: first id.
        stop: the id after the last.
        trainer: node key of the trainer.
        epoch: epoch of the round.
        height: its height.
        step: its optimizer step.
        commitment: of the agreed result.
        again: whether an earlier round had them without agreeing on a result.
    """

    start: int
    stop: int
    trainer: bytes
    epoch: int
    height: int
    step: int
    commitment: bytes
    again: bool


@dataclass
class Audit:
    """What the ledgers of a run show.

    Attributes:
        run: the run's name.
        lines: trained ids, ascending by data id.
        untrained: ids that no node trained: ids of the last rounds, due after the end.
        overdue: the untrained ids that were due: more ids were open than a round takes.
        missing: steps whose rounds no ledger has.
        rounds: training rounds that count.
        undone: training rounds that the owner undid; they were trained again.
        last_step: the newest optimizer step in the ledgers.
        deviating: in how many rounds each trainer, by node key, had other learning rates than the agreed ones.
        problems: missing or contradictory data; empty when nothing is missing.
    """

    run: str
    lines: list[Line] = field(default_factory=list)
    untrained: list[Interval] = field(default_factory=list)
    overdue: list[Interval] = field(default_factory=list)
    missing: list[Interval] = field(default_factory=list)
    rounds: int = 0
    undone: int = 0
    last_step: int = 0
    deviating: Counter[bytes] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def ids(self) -> int:
        """Trained data ids."""
        return count((line.start, line.stop) for line in self.lines)


def audit(rows: Iterable[Row]) -> Audit:
    """Combine the rows of one run's ledgers and check them.

    Raises:
        PsycheError: they are of several runs, or not rows of a ledger.
    """
    try:
        every, audited = _united(rows)
        found = {place: row for place, row in every.items() if row["step"]}
        open_ids: OpenIds = ()
        expected = _first_step(found)
        before: Row | None = None
        for row in _counted(found, audited):
            step = row["step"]
            if step != expected:
                audited.problems.append(f"no ledger has the rounds of steps {expected} to {step - 1}")
                audited.missing.append((expected, step))
                before, open_ids = None, ()
            if before is not None:
                position = before["data_index"] + before["batch_size"]
                if row["data_index"] != position:
                    audited.problems.append(f"step {step} begins at data id {row['data_index']} instead of {position}")
            open_ids = _enter(row, open_ids, audited)
            expected, before = step + 1, row
            audited.rounds, audited.last_step = audited.rounds + 1, step
    except (KeyError, TypeError, ValueError, WireError) as error:
        raise PsycheError(f"not a row of a ledger: {type(error).__name__}: {error}") from error
    audited.untrained = list(merged((start, stop) for _, start, stop in open_ids))
    audited.overdue = list(merged((start, stop) for due, start, stop in open_ids if due <= audited.last_step))
    audited.lines.sort(key=lambda line: line.start)
    _check_cover(found, audited)
    if audited.overdue:
        late = audited.overdue
        audited.problems.append(f"{count(late)} ids of earlier rounds were not trained in time, such as {late[0][0]}")
    del audited.problems[MAX_PROBLEMS:]
    return audited


def _united(rows: Iterable[Row]) -> tuple[dict[tuple[int, int], Row], Audit]:
    """The rounds of all ledgers by epoch and height."""
    found: dict[tuple[int, int], Row] = {}
    audited: Audit | None = None
    for row in rows:
        audited = audited or Audit(row["run"])
        if row["run"] != audited.run:
            raise PsycheError(f"the ledgers are of several runs, such as {audited.run!r} and {row['run']!r}; name one")
        place = (row["epoch"], row["height"])
        if found.setdefault(place, row) != row:
            audited.problems.append(f"two ledgers differ about round {place[1]} of epoch {place[0]}")
    return dict(sorted(found.items())), audited or Audit("")


def _first_step(found: Mapping[tuple[int, int], Row]) -> int:
    return min((row["step"] for row in found.values()), default=1)


def _counted(found: Mapping[tuple[int, int], Row], audited: Audit) -> list[Row]:
    """The rounds whose results are in the parameters: retraining a step undoes that step and later ones."""
    kept: list[Row] = []
    for (epoch, _), row in found.items():
        while kept and kept[-1]["step"] >= row["step"]:
            if kept[-1]["epoch"] == epoch:
                raise ValueError(f"epoch {epoch} has the step {row['step']} twice")
            kept.pop()
            audited.undone += 1
        kept.append(row)
    return kept


def _enter(row: Row, open_ids: OpenIds, audited: Audit) -> OpenIds:
    """Add one round to the audit; returns the ids open after it."""
    again, rest = take(open_ids, row["step"], row["batch_size"])
    where = f"round {row['height']} of epoch {row['epoch']}"
    if again != half_open(row["again"]):
        audited.problems.append(f"{where} trained {row['again']} again; {[list(i) for i in closed(again)]} was due")
        again = half_open(row["again"])
    nodes = [bytes.fromhex(node) for node in row["nodes"]]
    selection = CommitteeSelection(0, 0, 0, len(nodes), row["seed"])
    weights = row.get("weights", ())
    check_weights(weights, len(nodes))
    shares = assign(row["seed"], row["data_index"], row["batch_size"], selection, weights)
    assigned = batches(shares, again, weights)
    trained = set()
    rates: dict[bytes, tuple[int, ...]] = {}
    for text in row["results"]:
        try:
            envelope = open_envelope(base64.b64decode(text), audited.run)
        except WireError as error:
            audited.problems.append(f"{where} has a result that is not genuine: {error}")
            continue
        result, trainer = envelope.message, nodes.index(envelope.sender) if envelope.sender in nodes else -1
        place = (row["epoch"], row["height"], row["step"])
        fits = isinstance(result, Result) and (result.epoch, result.height, result.step) == place
        if not fits or not isinstance(result, Result) or assigned.get(trainer) != result.batch or trainer in trained:
            audited.problems.append(f"{where} has a result of {short(envelope.sender)} that was not assigned")
            continue
        rates[envelope.sender] = result.lrs
        if not result.tokens:  # an abstention
            continue
        trained.add(trainer)
        commitment = result.commitment(audited.run, envelope.sender)
        for number, (start, stop) in enumerate(result.batch):
            audited.lines.append(Line(start, stop, envelope.sender, *place, commitment, number > 0))
    agreed = agreed_rates(rates.values())
    audited.deviating.update(trainer for trainer, own in rates.items() if own != agreed)
    lost = [interval for trainer, batch in assigned.items() if trainer not in trained for interval in batch]
    return reopen(rest, row["step"], lost)


def _check_cover(found: Mapping[tuple[int, int], Row], audited: Audit) -> None:
    """Check that each id appears once, trained or untrained."""
    if audited.problems or not audited.rounds:
        return
    position = min(row["data_index"] for row in found.values())
    spans = sorted([*((line.start, line.stop) for line in audited.lines), *audited.untrained])
    for start, stop in spans:
        if start != position:
            what = f"{position} to {start - 1} are missing" if start > position else f"{start} appears twice"
            audited.problems.append(f"of the data ids, {what}")
            return
        position = stop
