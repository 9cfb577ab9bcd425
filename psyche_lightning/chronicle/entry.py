"""The vocabulary of event files: what an entry says, and how it is written as a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from typing import Any

from psyche_lightning.errors import WireError

COORDINATOR = "coordinator"
"""Name of the coordinator among the sources; nodes have their short key."""
DEMO, SIMULATOR = "demo", "simulator"
"""Names of those who are no part of a run, and saw what happened to its nodes."""
MOST_NAMES = 16
"""Nodes that one entry names."""
MOST_TEXT = 500
"""Characters of an entry's text."""


class Kind(str, Enum):
    """What an entry is about."""

    START = "start"
    JOIN = "join"
    LEAVE = "leave"
    DROP = "drop"
    STRIKE = "strike"
    EJECT = "eject"
    PHASE = "phase"
    EPOCH = "epoch"
    OPENED = "opened"
    TRAINED = "trained"
    RECEIVED = "received"
    LATE = "late"
    ABSENT = "absent"
    DECIDED = "decided"
    APPLIED = "applied"
    PROMISE = "promise"
    WAIT = "wait"
    SNAPSHOT = "snapshot"
    SAVE = "save"
    NOTICE = "notice"
    FAULT = "fault"
    ERROR = "error"

    @property
    def meaning(self) -> str:
        """The kind in words."""
        return _MEANINGS[self]

    @property
    def bad(self) -> bool:
        """Whether something went wrong."""
        return self in (Kind.DROP, Kind.STRIKE, Kind.EJECT, Kind.FAULT, Kind.ERROR)

    @property
    def usual(self) -> bool:
        """Whether each round has such entries, and so many that a summary leaves them out."""
        return self in _USUAL


_MEANINGS = {
    Kind.START: "a node or coordinator starts",
    Kind.JOIN: "a node joins the run",
    Kind.LEAVE: "a node leaves, and says why",
    Kind.DROP: "a node is gone without a word, or delivered nothing",
    Kind.STRIKE: "a node reports others that delivered nothing or signed twice",
    Kind.EJECT: "a node is ejected",
    Kind.PHASE: "the run's phase changes",
    Kind.EPOCH: "an epoch has its nodes",
    Kind.OPENED: "a round begins",
    Kind.TRAINED: "a node hands in its result",
    Kind.RECEIVED: "a payload or report arrives",
    Kind.LATE: "a result arrives after its round was decided without it",
    Kind.ABSENT: "a round is decided without these nodes",
    Kind.DECIDED: "a round is decided",
    Kind.APPLIED: "a node applies a round",
    Kind.PROMISE: "a node writes a promise into its journal",
    Kind.WAIT: "the training thread waits, and for whom",
    Kind.SNAPSHOT: "parameters are stored or loaded",
    Kind.SAVE: "delta or a checkpoint is saved",
    Kind.NOTICE: "anything else worth a line",
    Kind.FAULT: "something is wrong, and the node goes on",
    Kind.ERROR: "a request or a download fails, or the node ends",
}
_USUAL = frozenset(
    {
        Kind.OPENED,
        Kind.TRAINED,
        Kind.RECEIVED,
        Kind.DECIDED,
        Kind.APPLIED,
        Kind.PROMISE,
        Kind.WAIT,
        Kind.SNAPSHOT,
        Kind.SAVE,
    }
)


@dataclass(frozen=True)
class Entry:
    """One thing that happened.

    Attributes:
        time: seconds since 1970 by the writer's clock, or virtual seconds of a simulation.
        kind: what it is about.
        text: more about it in words; may be empty.
        epoch: of the run; None if the entry belongs to no round, like the next two.
        round: height within the epoch.
        step: the optimizer step; None in a drain round, too.
        about: the nodes that it concerns, such as those that are waited for, by short key.
        seconds: how long it took; None if that is unknown, or not over yet.
        node: who wrote it: the short key of a node, :data:`COORDINATOR`, :data:`DEMO` or :data:`SIMULATOR`.
        run: the run's name.
    """

    time: float
    kind: Kind
    text: str = ""
    epoch: int | None = None
    round: int | None = None
    step: int | None = None
    about: tuple[str, ...] = ()
    seconds: float | None = None
    node: str = ""
    run: str = ""

    def values(self, *, whole: bool = True) -> dict[str, Any]:
        """The fields that say something, as JSON values.

        Args:
            whole: with ``node`` and ``run``, which a file says once.
        """
        found: dict[str, Any] = {"time": round(self.time, 4), "kind": self.kind.value}
        for name in ("epoch", "round", "step"):
            value = getattr(self, name)
            if value is not None:
                found[name] = value
        if self.about:
            found["about"] = self.about[:MOST_NAMES]
        if self.seconds is not None:
            found["seconds"] = round(self.seconds, 3)
        if self.text:
            found["text"] = self.text[:MOST_TEXT]
        if whole:
            found["node"], found["run"] = self.node, self.run
        return found


def line_of(values: dict[str, Any]) -> bytes:
    """JSON values as a line of an event file."""
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace") + b"\n"


_KINDS = {kind.value: kind for kind in Kind}


def entry_of(values: Any, node: str = "", run: str = "") -> Entry:
    """The entry that :meth:`Entry.values` gave; fields of a later release are left out.

    Args:
        values: JSON values of a line.
        node: who wrote the file, for lines that do not say it.
        run: the file's run, likewise.

    Raises:
        WireError: it is no entry.
    """
    try:
        kind, text, about = values["kind"], values.get("text", ""), values.get("about", ())
        entry = Entry(
            float(values["time"]),
            _KINDS.get(kind, Kind.NOTICE),
            text if kind in _KINDS else f"{kind}: {text}",
            _count(values.get("epoch")),
            _count(values.get("round")),
            _count(values.get("step")),
            tuple(map(str, about[:MOST_NAMES])),
            None if values.get("seconds") is None else float(values["seconds"]),
            str(values.get("node", node)),
            str(values.get("run", run)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WireError(f"no entry of an event file: {error}") from error
    return entry


def _count(value: Any) -> int | None:
    if value is not None and type(value) is not int:
        raise ValueError(f"{value!r} is no count")
    return value
