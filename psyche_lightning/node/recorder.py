"""Turns what goes into and comes out of a node's core into entries of its event files. It decides nothing.

The runtime and the simulator feed it, so that both write the same entries.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from psyche_lightning.chronicle.entry import Entry, Kind
from psyche_lightning.errors import WireError, counted
from psyche_lightning.logs import OURS, Aside, Speaker
from psyche_lightning.node import events as ev
from psyche_lightning.node.agreement import DecidedRound, EpochLog, float32
from psyche_lightning.node.news import news
from psyche_lightning.node.notices import Dropped, Finished, Notice, PeerLeft, Waits
from psyche_lightning.node.rounds import RoundLog
from psyche_lightning.node.waiting import FIRST, Awaited
from psyche_lightning.protocol.messages import Result, open_envelope
from psyche_lightning.protocol.requests import Accuse, HealthCheck
from psyche_lightning.protocol.state import ClientStatus, RunState
from psyche_lightning.wire.identity import short

CHECKPOINTS = f"{OURS}.checkpoints"
KNOWN_ROUNDS = 64
KNOWN_PAYLOADS = 4096
"""Announced results that it keeps, to name those whose payloads arrive."""
_LEFT = {ClientStatus.WITHDRAWN: Kind.LEAVE, ClientStatus.EJECTED: Kind.EJECT, ClientStatus.DROPPED: Kind.DROP}
_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass
class _Round:
    """What a recorder knows of a round.

    Attributes:
        step: the optimizer step; None in a drain round.
        began: when this node saw it.
        training: when this node began to train it.
        absent: the nodes without which it was decided, as far as they have not come late.
        decided: whether it was.
    """

    step: int | None = None
    began: float | None = None
    training: float | None = None
    absent: set[str] = field(default_factory=set)
    decided: bool = False


class Recorder:
    """Writes one node's entries.

    Args:
        node: its short key, or its name in a simulation.
        signer: its key at the coordinator.
        run: the run's name.
        now: seconds since 1970.
        write: takes each entry.
        name: how nodes are called, by key.
    """

    def __init__(
        self,
        node: str,
        signer: bytes,
        run: str,
        now: Callable[[], float],
        write: Callable[[Entry], None],
        name: Callable[[bytes], str] = short,
    ) -> None:
        self._node = node
        self._signer = signer
        self._run = run
        self._now = now
        self._write = write
        self._name = name
        self._state: RunState | None = None
        self._rounds: OrderedDict[tuple[int, int], _Round] = OrderedDict()
        self._announced: OrderedDict[bytes, tuple[int, int, str]] = OrderedDict()
        self._wait: tuple[float, Awaited, bool] | None = None

    def note(
        self,
        kind: Kind,
        text: str = "",
        place: tuple[int, int] | None = None,
        *,
        about: Iterable[bytes] = (),
        seconds: float | None = None,
    ) -> None:
        """Write an entry.

        Args:
            kind: what it is about.
            text: in words.
            place: epoch and height; None for the current round.
            about: keys of the nodes that it concerns.
            seconds: how long it took.
        """
        self._note(kind, text, place, tuple(map(self._name, about)), seconds)

    def _note(
        self, kind: Kind, text: str, place: tuple[int, int] | None, about: tuple[str, ...], seconds: float | None
    ) -> None:
        state = self._state
        if place is None and state is not None and state.phase.active and state.current is not None:
            place = state.epoch, state.current.height
        epoch, height = (None if state is None else state.epoch, None) if place is None else place
        known = None if place is None else self._rounds.get(place)
        step = None if known is None else known.step
        entry = Entry(self._now(), kind, text, epoch, height, step, about, seconds, self._node, self._run)
        self._write(entry)

    # --- what the core is told ----------------------------------------------------------------------------------------

    def event(self, event: ev.Event) -> None:
        """An event that the core is about to handle."""
        match event:
            case ev.StateSeen(state):
                self._see(state)
            case ev.Received(envelope) if isinstance(envelope.message, Result):
                self._hear(envelope.message, self._name(envelope.sender))
            case ev.Trained(epoch, height, result):
                known = self._round(epoch, height)
                took = None if known.training is None else self._now() - known.training
                text = "no usable update"
                if result is not None:
                    text = f"loss {float32(result.loss):.4g}, " if math.isfinite(float32(result.loss)) else ""
                    text += f"{result.tokens} tokens, payload of {result.size} bytes"
                self.note(Kind.TRAINED, text, (epoch, height), seconds=took)
            case ev.Fetched(payload, reason, refused) if not refused:  # a notice tells of those
                epoch, height, sender = self._announced.get(payload, (-1, -1, ""))
                place = (epoch, height) if sender else None
                if reason:
                    text = f"payload {payload.hex()[:8]} did not come: {reason}"
                    self._note(Kind.ERROR, text, place, (sender,) if sender else (), None)
                elif sender:
                    began = self._round(epoch, height).began
                    took = None if began is None else self._now() - began
                    self._note(Kind.RECEIVED, "", place, (sender,), took)
            case ev.Applied(epoch, height, digest):
                text = f"parameters {digest.hex()[:12]}" if digest else ""
                began = self._round(epoch, height).began
                self.note(Kind.APPLIED, text, (epoch, height), seconds=None if began is None else self._now() - began)
            case ev.Loaded(digest, reason) if not reason:
                self.note(Kind.SNAPSHOT, f"loaded the parameters {digest.hex()[:12]}")
            case ev.SnapshotTaken(digest):
                self.note(Kind.SNAPSHOT, f"stored the parameters {digest.hex()[:12]}")
            case ev.RequestFailed(request, code, text, retryable) if retryable:  # a notice tells of the others
                self.note(Kind.ERROR, f"{request.name}: {text or code}")

    def _see(self, state: RunState) -> None:
        before, self._state = self._state, state
        if before is not None and state.nonce < before.nonce and state.epoch <= before.epoch:
            return  # late, or the coordinator went back: a notice will tell
        if before is None or before.phase != state.phase or before.epoch != state.epoch:
            text = state.phase.name.lower().replace("_", " ")
            self.note(Kind.PHASE, text)
        for notice in news(before, state, self._signer):
            self.notice(notice)
        current = state.current
        if current is None or not state.phase.active:
            return
        known = self._round(state.epoch, current.height)
        if known.began is None:
            known.began, known.step = self._now(), current.step or None
            what = f"{current.batch_size} samples" if current.step else "a drain round"
            self.note(Kind.OPENED, f"{counted(len(current.clients), 'node')}, {what}")

    def _hear(self, result: Result, sender: str) -> None:
        _keep(self._announced, result.payload, (result.epoch, result.height, sender), KNOWN_PAYLOADS)
        known = self._rounds.get((result.epoch, result.height))
        if known is not None and sender in known.absent:
            known.absent.discard(sender)
            took = None if known.began is None else self._now() - known.began
            text = "its result came after the round was decided without it"
            self._note(Kind.LATE, text, (result.epoch, result.height), (sender,), took)

    # --- what the core says -------------------------------------------------------------------------------------------

    def effect(self, effect: ev.Effect, log: EpochLog | None) -> None:
        """An effect of the core that is about to be carried out; ``log`` is what the core knows of the epoch."""
        match effect:
            case ev.Promise(key) | ev.Remember(key):
                kind, _, rest = key.partition("/")
                self.note(Kind.PROMISE, f"{kind}/{'/'.join(part[:12] for part in rest.split('/'))}", _place(rest))
            case ev.Train(epoch, height):
                known = self._round(epoch, height)
                known.training = self._now()
                self._over()
            case ev.WriteDown(records):
                for record in records:
                    self._decided(record, log)
            case HealthCheck(epoch, height, signers):
                text = f"{counted(len(signers), 'node')} delivered nothing in the rounds before {height}"
                self.note(Kind.STRIKE, text, (epoch, height), about=self._nodes(signers))
            case Accuse(first):
                self.note(Kind.STRIKE, "shows two signed results for one batch", about=_senders(self._state, first))
            case Notice():
                self.notice(effect)

    def _decided(self, record: DecidedRound, log: EpochLog | None) -> None:
        place = record.epoch, record.round.height
        known = self._round(*place)
        if known.decided:
            return  # it is replayed
        known.decided, known.step = True, record.round.step or None
        took = None if known.began is None else self._now() - known.began
        if not record.round.step:
            self.note(Kind.DECIDED, "a drain round", place, seconds=took)
            return
        results = {envelope.sender for envelope in record.results}
        about = log.rounds.get(record.round.height) if log is not None and log.epoch == record.epoch else None
        owed = [about.nodes[index] for index in about.batches] if about is not None else []
        absent = [node for node in owed if node not in results]
        text = f"{len(results)} of {counted(max(len(owed), len(results)), 'result')}"
        self.note(Kind.DECIDED, text, place, seconds=took)
        if absent and about is not None:
            known.absent = set(map(self._name, absent))
            why = "; ".join(f"{self._name(node)} {_why(about, node)}" for node in absent[:8])
            self.note(Kind.ABSENT, why, place, about=absent)

    def notice(self, notice: Notice) -> None:
        """A notice to people."""
        if isinstance(notice, Waits):
            return  # awaits() writes these
        kind = _LEFT[notice.status] if isinstance(notice, (PeerLeft, Dropped)) else notice.kind
        named = (getattr(notice, name, None) for name in ("peer", "node", "trainer", "source", "first"))
        keys = [key for key in named if isinstance(key, bytes)]
        keys += [] if keys else getattr(notice, "nodes", ())
        height = getattr(notice, "round", None)
        place = None
        if height is not None and self._state is not None and not isinstance(notice, Finished):
            place = self._state.epoch, height
        self.note(kind, str(notice), place, about=keys)

    # --- waits --------------------------------------------------------------------------------------------------------

    def awaits(self, what: Awaited | None) -> None:
        """What the training thread waits for now; None while it works. Call it several times a second."""
        now = self._now()
        if self._wait is not None and (what is None or what.text != self._wait[1].text):
            self._over()
        if what is None:
            return
        if self._wait is None:
            self._wait = now, what, False
        began, _, told = self._wait
        if not told and now - began >= FIRST:  # so that it is known of a node that never comes back from it
            self._wait = began, what, True
            self.note(Kind.WAIT, what.text, about=what.nodes)

    def _over(self) -> None:
        if self._wait is not None:
            began, what, _ = self._wait
            self._wait = None
            self.note(Kind.WAIT, what.text, about=what.nodes, seconds=max(0.0, self._now() - began))

    # --- names --------------------------------------------------------------------------------------------------------

    def _round(self, epoch: int, height: int) -> _Round:
        place = epoch, height
        return self._rounds.get(place) or _keep(self._rounds, place, _Round(), KNOWN_ROUNDS)

    def _nodes(self, signers: Iterable[bytes]) -> list[bytes]:
        clients = self._state.clients if self._state is not None else ()
        nodes = {client.signer: client.node for client in clients}
        return [nodes.get(signer, signer) for signer in signers]


def _keep(kept: OrderedDict[_K, _V], key: _K, value: _V, most: int) -> _V:
    kept[key] = value
    while len(kept) > most:
        kept.popitem(last=False)
    return value


def _why(about: RoundLog, node: bytes) -> str:
    """Why a round has no result of a node, as far as this node knows."""
    index = about.index_of(node)
    if index in about.silent:
        return "announced nothing"
    if index in about.hopeless:
        return "signed two results, or its payload is malformed"
    return (
        "announced a result whose payload is not here" if index in about.missing else "was too late for the witnesses"
    )


def _place(rest: str) -> tuple[int, int] | None:
    """Epoch and height in a promise's key."""
    epoch, _, rest = rest.partition("/")
    height = rest.partition("/")[0]
    return (int(epoch), int(height)) if epoch.isdigit() and height.isdigit() else None


def _senders(state: RunState | None, raw: bytes) -> list[bytes]:
    try:
        return [] if state is None else [open_envelope(raw, state.scope).sender]
    except WireError:
        return []


class LogRecorder(Aside):
    """Also records the log's warnings that are no notices, such as of connections, and what it says of checkpoints.

    Args:
        recorder: where they go.
        node: the short key of the node that speaks; other nodes of the process have their own.
    """

    def __init__(self, recorder: Recorder, node: str) -> None:
        super().__init__(logging.INFO)
        self._recorder = recorder
        self._who = node
        self.addFilter(Speaker())

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear what our packages log."""
        logger = logging.getLogger(OURS)
        logger.addHandler(self)
        try:
            yield
        finally:
            logger.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one down."""
        arguments: Any = record.args
        told = isinstance(arguments, tuple) and any(isinstance(each, Notice) for each in arguments)
        if told or getattr(record, "node", "-") not in (self._who, "-"):  # threads of their own speak for no node
            return
        if record.levelno >= logging.WARNING:
            self._recorder.note(Kind.ERROR if record.levelno >= logging.ERROR else Kind.FAULT, record.getMessage())
        elif record.name.startswith(CHECKPOINTS):
            self._recorder.note(Kind.SAVE, record.getMessage())
