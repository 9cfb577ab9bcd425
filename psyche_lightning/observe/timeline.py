"""The time line of a run, put together from the event files of its nodes and its coordinator."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntFlag, auto
from operator import attrgetter

from psyche_lightning.chronicle.entry import COORDINATOR, DEMO, SIMULATOR, Entry, Kind
from psyche_lightning.chronicle.reader import Book
from psyche_lightning.errors import ConfigError, nearest
from psyche_lightning.text import plain

RECENT = 20_000
"""Entries that are read at first, the newest ones; older files are read later, or when they are looked at."""
AROUND = 15.0
"""Seconds before and after a moment that count as around it."""

Place = tuple[int, int]
"""Epoch and height of a round."""


class Mark(IntFlag):
    """What is known of a node in a round."""

    OPENED = auto()
    TRAINED = auto()
    DECIDED = auto()
    APPLIED = auto()
    ABSENT = auto()
    LATE = auto()
    TROUBLE = auto()
    GONE = auto()

    @property
    def state(self) -> str:
        """In words."""
        if self & Mark.GONE:
            return "gone"
        if self & Mark.LATE:
            return "late"
        if self & Mark.ABSENT:
            return "absent"
        if self & Mark.APPLIED:
            return "applied"
        if self & Mark.DECIDED:
            return "decided"
        return "handed in" if self & Mark.TRAINED else "under way" if self & Mark.OPENED else ""


_MARKS: dict[Kind, int] = {
    Kind.OPENED: Mark.OPENED.value,
    Kind.TRAINED: Mark.TRAINED.value,
    Kind.DECIDED: Mark.DECIDED.value,
    Kind.APPLIED: Mark.APPLIED.value,
    Kind.ABSENT: Mark.ABSENT.value,
    Kind.LATE: Mark.LATE.value,
    Kind.RECEIVED: Mark.TRAINED.value,
    Kind.DROP: Mark.GONE.value,
    Kind.EJECT: Mark.GONE.value,
    Kind.FAULT: Mark.TROUBLE.value,
    Kind.ERROR: Mark.TROUBLE.value,
}
_OF_OTHERS = (Kind.ABSENT, Kind.LATE, Kind.RECEIVED, Kind.DROP, Kind.EJECT)


@dataclass
class Moment:
    """A round on the time line.

    Attributes:
        place: which one.
        step: the optimizer step; None in a drain round.
        began: when the first writer saw it.
    """

    place: Place
    step: int | None
    began: float


class Timeline:
    """Everything that some books say of one run, the newest first.

    Args:
        books: the event files.
        run: the run; None for the one with the newest entry.
        recent: see :data:`RECENT`.

    Attributes:
        run: the run's name; empty without any entry.
        runs: the names of all runs in the books, as far as they were read.
        entries: what was read so far, in the order of time.
        moments: the rounds, in their order.
        ends: the moments at which nodes ended without leaving, each as an entry that says what is known of it; a node
            that is killed has no time to say so.

    Raises:
        ConfigError: a file cannot be read, or there is no such run.
    """

    def __init__(self, books: Sequence[Book], run: str | None = None, *, recent: int = RECENT) -> None:
        self._books = books
        self._all: list[Entry] = []
        read = [entry for book in books for entry in book.news()]
        while len(read) < recent and (older := self._older()):
            read = [*older, *read]
        if not read and self.damaged:
            files = ", ".join(str(book.current) for book in books if book.damaged)
            raise ConfigError(f"{files} holds no events; give folders of nodes, a folder that holds them, or a trace")
        self._kept = read
        self.runs = sorted({entry.run for entry in read})
        newest = max(read, key=attrgetter("time"), default=None)
        self.run = run if run is not None else newest.run if newest is not None else ""
        self.entries: list[Entry] = []
        self.moments: list[Moment] = []
        self.ends: list[Entry] = []
        self._writers: dict[str, float] = {}
        self._named: dict[str, float] = {}
        self._marks: dict[tuple[str, Place], int] = {}  # of Mark, whose operators take ten times as long
        self._by_place: dict[Place, Moment] = {}
        self._add(read)
        if run is not None and not self.entries:
            raise ConfigError(f"there are no events of run {run!r}.{nearest(run, self.runs)} Runs: {self._runs()}.")

    def _runs(self) -> str:
        return ", ".join(self.runs) or "none"

    def _older(self) -> list[Entry]:
        return [entry for book in self._books for entry in book.back()]

    # --- reading ------------------------------------------------------------------------------------------------------

    @property
    def whole(self) -> bool:
        """Whether nothing older is left to read."""
        return not any(book.older for book in self._books)

    @property
    def damaged(self) -> int:
        """Lines that are no entries."""
        return sum(book.damaged for book in self._books)

    def more(self) -> bool:
        """Read the next older file of each writer; returns whether there was one."""
        older = self._older()
        self._add(older)
        return bool(older)

    def news(self) -> bool:
        """Read what was written since the last look; returns whether there is anything."""
        fresh = [entry for book in self._books for entry in book.news()]
        self._add(fresh)
        return bool(fresh)

    def _add(self, read: Iterable[Entry]) -> None:
        fresh = [entry for entry in read if entry.run == self.run]
        if not fresh:
            return
        self.entries += fresh
        self.entries.sort(key=attrgetter("time"))  # both parts nearly are, which is cheap
        for entry in fresh:
            if entry.epoch is not None and entry.round is not None:
                self._meet(entry, (entry.epoch, entry.round))
            self._writers[entry.node] = min(entry.time, self._writers.get(entry.node, entry.time))
            for name in entry.about:
                self._named[name] = min(entry.time, self._named.get(name, entry.time))
        self.moments = sorted(self._by_place.values(), key=attrgetter("place"))
        for entry in fresh:
            self._mark(entry)
        self._find_ends()

    def _meet(self, entry: Entry, place: Place) -> None:
        known = self._by_place.get(place)
        if known is None:
            self._by_place[place] = Moment(place, entry.step, entry.time)
        elif entry.kind is Kind.OPENED:
            known.step = known.step or entry.step
            known.began = min(known.began, entry.time)

    def _mark(self, entry: Entry) -> None:
        mark = _MARKS.get(entry.kind)
        place = None if mark is None else self.place_of(entry)
        if mark is None or place is None:
            return
        for name in self.concerned(entry):
            self._marks[name, place] = self._marks.get((name, place), 0) | mark

    def concerned(self, entry: Entry) -> tuple[str, ...]:
        """The nodes with which an entry deals: the writer, or those that it names."""
        if entry.kind in _OF_OTHERS:
            return entry.about
        return entry.about if self.outside(entry.node) and entry.about else (entry.node,)

    def outside(self, name: str) -> bool:
        """Whether a writer is no part of the run, but saw what happened to nodes."""
        return name in (DEMO, SIMULATOR)

    @property
    def nodes(self) -> list[str]:
        """The coordinator, then the nodes in the order in which they appeared."""
        known = {**self._named, **{name: time for name, time in self._writers.items() if not self.outside(name)}}
        return sorted(known, key=lambda name: (name != COORDINATOR, known[name], name))

    # --- looking ------------------------------------------------------------------------------------------------------

    def place_of(self, entry: Entry) -> Place | None:
        """The round to which an entry belongs, by its time if it does not say."""
        if entry.epoch is not None and entry.round is not None:
            return entry.epoch, entry.round
        return self._at(entry.time)

    def _at(self, time: float) -> Place | None:
        at = bisect_right(self.moments, time, key=lambda moment: moment.began) - 1
        return self.moments[at].place if at >= 0 else None

    def mark(self, node: str, place: Place) -> Mark:
        """What is known of a node in a round."""
        return Mark(self._marks.get((node, place), 0))

    def of_round(self, place: Place, node: str | None = None) -> list[Entry]:
        """What happened in a round, of a node or by it, or of all."""
        at = bisect_left(self.moments, place, key=attrgetter("place"))
        if at == len(self.moments) or self.moments[at].place != place:
            return []
        # Results of a round come up to two rounds later.
        begin = self.moments[at].began
        after = self.moments[at + 3 :][:1]
        end = after[0].began if after else float("inf")
        found = [entry for entry in self.between(begin - 1.0, end) if self.place_of(entry) == place]
        return [entry for entry in found if node is None or node == entry.node or node in entry.about]

    def between(self, begin: float, end: float) -> list[Entry]:
        """The entries of a time."""
        first = bisect_left(self.entries, begin, key=attrgetter("time"))
        return self.entries[first : bisect_right(self.entries, end, key=attrgetter("time"))]

    def waits(self, node: str, place: Place | None = None) -> list[Entry]:
        """A node's queue of waits, those that are over and the one that may not be; up to the end of a round."""
        found: list[Entry] = []
        for entry in self.entries:
            if entry.node == node and entry.kind is Kind.WAIT:
                if found and found[-1].seconds is None and found[-1].text == entry.text:
                    found.pop()  # it is over now
                found.append(entry)
        return [entry for entry in found if place is None or (self.place_of(entry) or place) <= place]

    def faults(self) -> list[Entry]:
        """What went wrong, and how nodes ended that did not leave."""
        found = [entry for entry in self.entries if entry.kind.bad]
        return sorted([*found, *self.ends], key=attrgetter("time"))

    def _find_ends(self) -> None:
        """Find the moments at which nodes ended without leaving: they started again, or others lost them."""
        last: dict[str, Entry] = {}
        found = []
        for entry in self.entries:
            before = last.get(entry.node)
            if entry.kind is Kind.START and before is not None and not _own_end(before):
                found.append(self._end(before, entry))
            last[entry.node] = entry
        found += [self._end(entry, None) for entry in last.values() if not _own_end(entry)]
        self.ends = sorted((end for end in found if end.text), key=attrgetter("time"))
        for end in self.ends:
            place = self.place_of(end)
            if place is not None:
                self._marks[end.node, place] = self._marks.get((end.node, place), 0) | Mark.GONE.value

    def _end(self, last: Entry, again: Entry | None) -> Entry:
        """The end of a life whose last entry this is; without a text if it may still go on."""
        until = float("inf") if again is None else again.time
        said = [
            entry
            for entry in self.between(last.time, until)
            if last.node in entry.about
            and entry.node != last.node
            and (entry.kind in (Kind.DROP, Kind.EJECT) or (entry.kind is Kind.FAULT and self.outside(entry.node)))
        ]
        kinds = Counter(entry.kind for entry in said)
        seen = [
            entry for entry in said if kinds[entry.kind] == 1 or entry.node == COORDINATOR or self.outside(entry.node)
        ]
        why = "; ".join(f"{entry.node}, {entry.time - last.time:.1f} s later: {entry.text}" for entry in seen[:4])
        text = ""
        if last.node == COORDINATOR:
            text = f"ends here without a word, and starts again {until - last.time:.1f} s later" if again else ""
        elif not self.outside(last.node) and (said or again):
            doing = last.kind.value + (f" ({last.text})" if last.text else "")
            text = f"ends here without leaving: killed, or its machine failed. Its last event: {doing}"
            text += f". {why}" if why else ""
        place = self._at(last.time)  # its last event may be of an earlier round
        epoch, height, step = (last.epoch, None, None) if place is None else (*place, self._by_place[place].step)
        return Entry(last.time, Kind.FAULT, text, epoch, height, step, (last.node,), None, last.node, last.run)


def _own_end(entry: Entry) -> bool:
    """Whether a node says that it leaves."""
    return entry.kind is Kind.LEAVE and entry.about in ((), (entry.node,))


def chosen(
    entries: Iterable[Entry], *, round_: str | None = None, node: str | None = None, kinds: Sequence[Kind] = ()
) -> list[Entry]:
    """The entries that match all filters.

    Args:
        entries: all of them.
        round_: a height, or ``EPOCH/HEIGHT``.
        node: the beginning of a node's key, of who writes or is named.
        kinds: any of these; empty for all.

    Raises:
        ConfigError: a round is no number.
    """
    epoch, _, height = (round_ or "").rpartition("/")
    if round_ is not None and not (height.isdecimal() and (not epoch or epoch.isdecimal())):
        raise ConfigError(f"{round_!r} is no round; give its number, or its epoch and number, such as 0/12")
    return [
        entry
        for entry in entries
        if (round_ is None or (entry.round == int(height) and (not epoch or entry.epoch == int(epoch))))
        and (node is None or any(name.startswith(node) for name in (entry.node, *entry.about)))
        and (not kinds or entry.kind in kinds)
    ]


def clock(seconds: float) -> str:
    """A time of day to the millisecond; of a simulation, its seconds."""
    if seconds < 1e6:
        return f"{seconds:.2f}"
    return datetime.fromtimestamp(seconds).strftime("%H:%M:%S.%f")[:-3]


def what(entry: Entry) -> str:
    """An entry's text, with the nodes that it does not name itself."""
    names = [name for name in entry.about if name not in entry.text]
    return plain(": ".join(part for part in (", ".join(names), entry.text) if part))
