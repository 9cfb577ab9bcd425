"""Audits a run from its nodes' ledgers: is each data id trained exactly once, and by which node?

The audit recomputes what it can: the round's seed and weights give the assignment, earlier agreed sets the ids to train
again, and each result carries its trainer's signature over ids, payload and round. Ledgers of several nodes
complete each other, because no node is always present, and must not contradict each other.
"""

from __future__ import annotations

import base64
import contextlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from psyche_lightning.errors import PsycheError, WireError
from psyche_lightning.node.ledger import Row, read_ledger
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
from psyche_lightning.wire.identity import KEY_SIZE, short

MAX_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
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
        lines: trained ids, ascending by data id; perhaps only the newest.
        untrained: ids that no node trained: ids of the last rounds, due after the end.
        overdue: the untrained ids that were due: more ids were open than a round takes.
        missing: steps whose rounds no ledger has.
        rounds: training rounds that count.
        undone: training rounds that the owner undid; they were trained again.
        last_step: the newest optimizer step in the ledgers.
        ids: trained data ids.
        ids_again: those of them that a later round than their own trained.
        trained: how many lines there are with those that are not kept.
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
    ids: int = 0
    ids_again: int = 0
    trained: int = 0
    deviating: Counter[bytes] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def audit(rows: Iterable[Row], newest: int = 0) -> Audit:
    """Combine the rows of one run's ledgers and check them.

    Args:
        rows: the rows of one ledger after the other, all of which are held in memory.
        newest: how many of the newest trained ids' lines to keep; 0 for all.

    Raises:
        PsycheError: they are of several runs, or not rows of a ledger.
    """
    held = list(rows)
    with _understood():
        held.sort(key=_place)
    return _audit(lambda: iter(held), newest)


def audit_files(ledgers: Sequence[Path], wanted: Callable[[Row], bool] = lambda row: True, newest: int = 0) -> Audit:
    """As :func:`audit`, for files of any size: they are read twice, and what is held of a round is a few numbers.

    Args:
        ledgers: the files.
        wanted: whether a row is of the run that is audited.
        newest: as of :func:`audit`; all lines need more memory.

    Raises:
        PsycheError: as of :func:`audit`, or a file cannot be read.
    """

    def read(ledger: Path) -> Iterator[Row]:
        return (row for row in read_ledger(ledger) if wanted(row))

    try:
        return _audit(lambda: heapq.merge(*map(read, ledgers), key=_place), newest)
    except _UnorderedError:  # a coordinator that was restored from a copy had some rounds again
        return audit((row for ledger in ledgers for row in read(ledger)), newest)


class _UnorderedError(Exception):
    """The rounds do not ascend."""


@contextlib.contextmanager
def _understood() -> Iterator[None]:
    """Turn the errors of reading rows of another shape into one that says so."""
    try:
        yield
    except (KeyError, TypeError, ValueError, WireError) as error:
        raise PsycheError(f"not a row of a ledger: {type(error).__name__}: {error}") from error


def _place(row: Row) -> tuple[int, int]:
    return row["epoch"], row["height"]


def _audit(again: Callable[[], Iterator[Row]], newest: int) -> Audit:
    """Audit rows that ascend by epoch and height, which ``again`` reads from the first one on."""
    audited = Audit("")
    open_ids: OpenIds = ()
    before: Row | None = None
    with _understood():
        counted, expected, position = _counted(_training(again(), audited), audited)
        cover = _Cover(position)
        places = iter(counted)
        due = next(places, None)
        for row in _training(again(), Audit("")):
            if _place(row) != due:
                continue
            due = next(places, None)
            step = row["step"]
            if step != expected:
                audited.problems.append(f"no ledger has the rounds of steps {expected} to {step - 1}")
                audited.missing.append((expected, step))
                before, open_ids = None, ()
            if before is not None:
                follows = before["data_index"] + before["batch_size"]
                if row["data_index"] != follows:
                    audited.problems.append(f"step {step} begins at data id {row['data_index']} instead of {follows}")
            known = len(audited.lines)
            open_ids = _enter(row, open_ids, audited)
            expected, before = step + 1, row
            audited.rounds, audited.last_step = audited.rounds + 1, step
            for line in audited.lines[known:]:
                audited.trained += 1
                audited.ids += line.stop - line.start
                audited.ids_again += (line.stop - line.start) * line.again
                if not audited.problems:
                    cover.add(line.start, line.stop)
            if newest and len(audited.lines) > 2 * newest + MAX_PROBLEMS:
                _keep(audited, newest)
    audited.untrained = list(merged((start, stop) for _, start, stop in open_ids))
    last = audited.last_step
    audited.overdue = list(merged((start, stop) for since, start, stop in open_ids if since <= last))
    _keep(audited, newest)
    if not audited.problems and audited.rounds:
        for interval in audited.untrained:
            cover.add(*interval)
        audited.problems += cover.faults()
    if audited.overdue:
        late = audited.overdue
        audited.problems.append(f"{count(late)} ids of earlier rounds were not trained in time, such as {late[0][0]}")
    del audited.problems[MAX_PROBLEMS:]
    return audited


def _keep(audited: Audit, newest: int) -> None:
    """Bring the lines into the order of their ids, and drop those before the newest; none if 0."""
    audited.lines.sort(key=lambda line: line.start)
    if newest:
        del audited.lines[:-newest]


def _training(rows: Iterator[Row], audited: Audit) -> Iterator[Row]:
    """The training rounds of all ledgers, each once; notes where ledgers differ."""
    known: Row | None = None
    for row in rows:
        audited.run = audited.run or row["run"]
        if row["run"] != audited.run:
            raise PsycheError(f"the ledgers are of several runs, such as {audited.run!r} and {row['run']!r}; name one")
        if known is not None and _place(row) == _place(known):
            if not _agree(known, row) and len(audited.problems) < MAX_PROBLEMS:
                audited.problems.append(f"two ledgers differ about round {row['height']} of epoch {row['epoch']}")
            continue
        if known is not None and _place(row) < _place(known):
            raise _UnorderedError
        known = row
        if row["step"]:
            yield row


def _agree(one: Row, two: Row) -> bool:
    """Whether two rows say the same of what was trained.

    A coordinator that was restored from a copy may have measured other speeds, and so given a round other weights. It
    is the same round as long as these give everyone in its results the same ids: the rest is what nobody trained.
    """
    if one == two:
        return True
    if {**one, "weights": ()} != {**two, "weights": ()}:
        return False
    senders = {base64.b64decode(text)[:KEY_SIZE].hex() for text in one["results"]}
    found = [{who: ids for who, ids in _shares(row).items() if row["nodes"][who] in senders} for row in (one, two)]
    return found[0] == found[1]


def _shares(row: Row) -> dict[int, tuple[Interval, ...]]:
    """The ids of each trainer of a round, by its place in the list of nodes."""
    selection = CommitteeSelection(0, 0, 0, len(row["nodes"]), row["seed"])
    weights = row.get("weights", ())
    check_weights(weights, len(row["nodes"]))
    shares = assign(row["seed"], row["data_index"], row["batch_size"], selection, weights)
    return batches(shares, half_open(row["again"]), weights)


def _counted(rows: Iterable[Row], audited: Audit) -> tuple[list[tuple[int, int]], int, int]:
    """The rounds whose results are in the parameters: retraining a step undoes that step and later ones.

    Returns:
        Epoch and height of these rounds, ascending; the first step and the first data id of all rounds.
    """
    kept: list[tuple[int, int, int]] = []
    first, position = None, None
    for row in rows:
        epoch, step, start = row["epoch"], row["step"], row["data_index"]
        first = step if first is None else min(first, step)
        position = start if position is None else min(position, start)
        while kept and kept[-1][2] >= step:
            if kept[-1][0] == epoch:
                raise ValueError(f"epoch {epoch} has the step {step} twice")
            kept.pop()
            audited.undone += 1
        kept.append((epoch, row["height"], step))
    return [(epoch, height) for epoch, height, _ in kept], first or 1, position or 0


class _Cover:
    """Checks that each id appears once, trained or untrained.

    Args:
        position: the first id.
    """

    def __init__(self, position: int) -> None:
        self._position = position
        self._ahead: list[Interval] = []  # a heap of what begins behind an id that is not there yet
        self._fault = ""

    def add(self, start: int, stop: int) -> None:
        """Add ids ``start`` to ``stop - 1``."""
        heapq.heappush(self._ahead, (start, stop))
        while self._ahead and self._ahead[0][0] <= self._position and not self._fault:
            start, stop = heapq.heappop(self._ahead)
            if start < self._position:
                self._fault = f"of the data ids, {start} appears twice"
            self._position = stop

    def faults(self) -> list[str]:
        """What is wrong once everything is added: at most one line."""
        if not self._fault and self._ahead:
            self._fault = f"of the data ids, {self._position} to {self._ahead[0][0] - 1} are missing"
        return [self._fault] if self._fault else []


def _enter(row: Row, open_ids: OpenIds, audited: Audit) -> OpenIds:
    """Add one round to the audit; returns the ids open after it."""
    again, rest = take(open_ids, row["step"], row["batch_size"])
    where = f"round {row['height']} of epoch {row['epoch']}"
    if again != half_open(row["again"]):
        audited.problems.append(f"{where} trained {row['again']} again; {[list(i) for i in closed(again)]} was due")
    nodes = [bytes.fromhex(node) for node in row["nodes"]]
    assigned = _shares(row)
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
