"""Turns a run's transitions and its history into entries of the coordinator's event files. It decides nothing."""

from __future__ import annotations

from collections.abc import Callable

from psyche_lightning.chronicle.entry import COORDINATOR, Entry, Kind
from psyche_lightning.coordinator.history import History
from psyche_lightning.errors import counted
from psyche_lightning.protocol.committee import decided_root
from psyche_lightning.protocol.merkle import EMPTY_ROOT
from psyche_lightning.protocol.state import Round, RunState
from psyche_lightning.wire.identity import short

_KINDS = {
    "joined": Kind.JOIN,
    "left": Kind.LEAVE,
    "dropped": Kind.DROP,
    "ejected": Kind.EJECT,
    "epoch": Kind.EPOCH,
}
"""Kinds of entries by those of the history's events; the others are notices."""


class RunRecorder:
    """Writes one run's entries.

    Args:
        run: the run's name.
        events: the number of events in its history that are written already.
        now: seconds since 1970.
        write: takes each entry.
        name: how nodes are called, by key.
    """

    def __init__(
        self,
        run: str,
        events: int,
        now: Callable[[], float],
        write: Callable[[Entry], None],
        name: Callable[[bytes], str] = short,
    ) -> None:
        self._run = run
        self._now = now
        self._write = write
        self._name = name
        self._state: RunState | None = None
        self._told = events
        self._opened: dict[int, float] = {}

    def note(self, kind: Kind, text: str) -> None:
        """Write an entry that concerns the whole run at this moment."""
        state = self._state
        self._add(kind, text, None if state is None or not state.phase.active else state.current)

    def seen(self, state: RunState, history: History) -> None:
        """Write what has changed since the last call."""
        before, self._state = self._state, state
        if before is not None and before.phase.active and before.current is not None:
            self._reports(before, state, before.current)
        if before is None or before.phase != state.phase or before.epoch != state.epoch:
            self._add(Kind.PHASE, state.phase.name.lower().replace("_", " "))
        for event in history.events.since(self._told):
            kind = _KINDS.get(event.kind, Kind.NOTICE)
            about = (self._node(bytes.fromhex(event.signer)),) if event.signer else ()
            self._add(kind, event.text, state.current if state.phase.active else None, about)
        self._told = history.events.count
        now = state.current
        if not state.phase.active or now is None:
            self._opened.clear()
        elif now.height not in self._opened:
            self._opened[now.height] = self._now()
            what = f"{now.batch_size} samples" if now.step else "a drain round"
            self._add(Kind.OPENED, f"{counted(len(now.clients), 'node')}, {what}", now)

    def _reports(self, before: RunState, state: RunState, round_: Round) -> None:
        """The reports that came for a round, and whether these decided it."""
        after = state.round_at(round_.height) if state.rounds_epoch == before.epoch else None
        if after is None or after.seed != round_.seed:
            return
        known = set(round_.witnesses)
        began = self._opened.get(round_.height)
        took = None if began is None else self._now() - began
        for record in after.witnesses:
            if record not in known:
                witness = self._node(after.clients[record.proof.index])
                text = f"reports {record.merkle[:4].hex()}"
                self._add(Kind.RECEIVED, text, after, (witness,), took, epoch=before.epoch)
        root, current = decided_root(after, state.needed), state.current
        if not state.phase.active or (current is not None and current.height != round_.height):
            self._opened.pop(round_.height, None)
            equal = sum(record.merkle == root for record in after.witnesses)
            text = "no root has a quorum: it ends without results"
            if root is not None:
                empty = ", which has no results" if root == EMPTY_ROOT else ""
                text = f"{counted(equal, 'report')} of {root[:4].hex()}{empty}"
            reported = {record.proof.index for record in after.witnesses}
            silent = [signer for index, signer in enumerate(after.clients) if index not in reported]
            self._add(Kind.DECIDED, text, after, seconds=took, epoch=before.epoch)
            if root is None and silent:
                about = tuple(map(self._node, silent))
                self._add(Kind.ABSENT, "did not report", after, about, epoch=before.epoch)

    def _node(self, signer: bytes) -> str:
        state = self._state
        clients = (*state.clients, *state.exited_clients) if state is not None else ()
        return self._name(next((client.node for client in clients if client.signer == signer), signer))

    def _add(
        self,
        kind: Kind,
        text: str,
        round_: Round | None = None,
        about: tuple[str, ...] = (),
        seconds: float | None = None,
        epoch: int | None = None,
    ) -> None:
        if epoch is None and self._state is not None:
            epoch = self._state.epoch
        height = None if round_ is None else round_.height
        step = None if round_ is None else round_.step or None
        self._write(Entry(self._now(), kind, text, epoch, height, step, about, seconds, COORDINATOR, self._run))
