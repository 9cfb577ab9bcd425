"""What the live page is told over its websocket: all runs as lines, one of them in full, and then what changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import WSCloseCode, web

from psyche_lightning.coordinator.delivery import CHANGING_DELIVERIES
from psyche_lightning.coordinator.history import CHANGING_METRICS
from psyche_lightning.server.limits import MAX_ARCHIVED
from psyche_lightning.server.live import LiveRun
from psyche_lightning.server.nodes import everybody
from psyche_lightning.server.status import (
    delivery_lines,
    event_lines,
    metrics_rows,
    run_fields,
    run_line,
    stretch_lines,
)

logger = logging.getLogger(__name__)

LISTS = ("events", "metrics", "past", "rounds")
"""What grows at its end, in the status of a run."""
PAUSE = 0.25
"""Seconds between two messages at least."""
ALIVE = 10.0
"""Seconds after which a page hears that the server is there, if nothing changes."""


class Board:
    """What all pages are told alike, made a few times a second at most, however many watch.

    Args:
        runs: the server's runs by name, as they are at the moment.
        clock: seconds.
        closed: the lines of closed runs whose history is kept, newest first.
        record: returns the last status of such a run, by its id.
    """

    def __init__(
        self,
        runs: Mapping[str, LiveRun],
        clock: Callable[[], float],
        closed: Callable[[], list[dict[str, Any]]],
        record: Callable[[str], dict[str, Any]],
    ) -> None:
        self.runs = runs
        self.record = record
        self._closed = closed
        self._clock = clock
        self._made: dict[LiveRun | None, tuple[float, Any]] = {}

    def lines(self) -> dict[str, dict[str, Any]]:
        """All runs as lines of a table, by their ids; an open run's id is its name."""
        closed = {line["id"]: line for line in self._closed()}
        return self._recent(None, lambda: {**{name: run_line(run) for name, run in self.runs.items()}, **closed})

    def status(self, run: LiveRun) -> dict[str, Any]:
        """A run's fields, and its ``nodes`` by their keys."""
        return self._recent(run, lambda: {**run_fields(run), "nodes": everybody(run)})

    def _recent(self, key: LiveRun | None, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        now = self._clock()
        made = self._made.get(key)
        if made is None or now - made[0] >= PAUSE:
            self._made = {one: held for one, held in self._made.items() if now - held[0] < PAUSE}
            made = self._made[key] = now, make()
        return made[1]


class Feed:
    """Makes the messages for one page.

    Args:
        board: the runs.
        run_id: the run that the page shows; None if it shows the list alone.
    """

    def __init__(self, board: Board, run_id: str | None) -> None:
        self._board = board
        self._run_id = run_id
        self._run: LiveRun | None = None
        self._missing = False
        self._lines: dict[str, Any] = {}
        self._fields: dict[str, Any] = {}
        self._nodes: dict[str, Any] = {}
        self._lists: dict[str, _Known] = {}
        self._began = False

    def message(self) -> dict[str, Any]:
        """What has changed since the last message: everything at first, later often nothing."""
        lines = self._board.lines()
        message: dict[str, Any] = {}
        if (changed := changes(self._lines, lines)) or not self._began:
            message["runs"] = changed
        if not self._began:
            message["most_closed"] = MAX_ARCHIVED
        self._lines, self._began = lines, True
        return message if self._run_id is None else {**message, **self._run_message(self._run_id)}

    def _run_message(self, run_id: str) -> dict[str, Any]:
        run = self._board.runs.get(run_id)
        if run is None and run_id in self._lines:
            return self._closed_message(run_id)
        if run is None:
            told, self._missing, self._run = self._missing, True, None
            return {} if told else {"error": f"There is no run {run_id[:80]!r} on this coordinator (any more)."}
        if run is not self._run:  # the first time, or a new run of the same name
            self._run, self._missing, self._fields, self._lists = run, False, {}, {}
        status = self._board.status(run)
        nodes = status["nodes"]
        fields = {name: value for name, value in status.items() if name != "nodes"}
        grown = [(one.name, self._lists.setdefault(one.name, _Known()).news(one)) for one in growing(run)]
        found = {
            "run": changes(self._fields, fields),
            "nodes": changes(self._nodes, nodes),
            "lists": {name: news for name, news in grown if news is not None},
        }
        self._fields, self._nodes = fields, nodes
        return {name: value for name, value in found.items() if value}

    def _closed_message(self, run_id: str) -> dict[str, Any]:
        """All of a closed run, once, since nothing of it changes."""
        told, self._missing, self._run = self._missing, True, None
        if told:
            return {}
        status = self._board.record(run_id)
        lists = {name: {"first": 0, "kept": 0, "items": status.get(name, [])} for name in LISTS}
        fields = {name: value for name, value in status.items() if name not in (*LISTS, "nodes", "manifest")}
        return {"run": fields, "nodes": status.get("nodes", {}), "lists": lists}


@dataclass(frozen=True)
class Growing:
    """A list of a run that grows at its end.

    Attributes:
        name: the list's.
        kept: place of the oldest entry that is kept, counted over the whole run.
        count: number of entries over the whole run.
        changing: how many of the newest may still change.
        lines: the entries from a place on, as JSON values.
        form: what the entries are; if it changes, the list begins anew.
    """

    name: str
    kept: int
    count: int
    changing: int
    lines: Callable[[int], list[dict[str, Any]]]
    form: int = 0


def growing(run: LiveRun) -> list[Growing]:
    """The lists of a run that a page shows."""
    history = run.host.history
    events, metrics, past, rounds = history.events, history.metrics, history.past, history.deliveries
    return [
        Growing("events", events.first, events.count, 0, lambda place: event_lines(run, place)),
        Growing("metrics", metrics.first, metrics.count, CHANGING_METRICS, lambda place: metrics_rows(run, place)),
        Growing("past", 0, len(past.stretches), 1, lambda place: stretch_lines(run, place), past.width),
        Growing("rounds", rounds.first, rounds.count, CHANGING_DELIVERIES, lambda place: delivery_lines(run, place)),
    ]


class _Known:
    """What a page knows of a growing list: all entries before a place, and some after it that may still change."""

    def __init__(self) -> None:
        self._place: int | None = None
        self._after: list[dict[str, Any]] = []
        self._form = 0

    def news(self, now: Growing) -> dict[str, Any] | None:
        """The entries that are new or differ; None without any, but not the first time."""
        if now.form != self._form:
            self._place, self._after, self._form = None, [], now.form
        began = self._place is not None
        first = max(self._place or 0, now.kept)
        after = self._after if first == self._place else []
        items = now.lines(first)
        same = 0
        while same < min(len(after), len(items)) and after[same] == items[same]:
            same += 1
        self._place = max(first, now.count - now.changing)
        self._after = items[self._place - first :]
        return {"first": first + same, "kept": now.kept, "items": items[same:]} if items[same:] or not began else None


class Watcher:
    """Serves one page's websocket until it closes.

    Args:
        socket: the prepared websocket.
        feed: what it is told.
        wall: seconds since 1970.
    """

    member = False

    def __init__(self, socket: web.WebSocketResponse, feed: Feed, wall: Callable[[], float]) -> None:
        self._socket = socket
        self._feed = feed
        self._wall = wall
        self._closing: asyncio.Future[bool] | None = None

    async def serve(self) -> None:
        """Tell the page what changes; returns when the connection has ended."""
        sender = asyncio.ensure_future(self._push())
        try:
            async for _ in self._socket:  # a page has nothing to say
                await self._socket.close(code=WSCloseCode.POLICY_VIOLATION)
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    def turn_away(self) -> None:
        """End the connection, because there are too many of those who are no members."""
        self._closing = asyncio.ensure_future(self._socket.close(code=WSCloseCode.TRY_AGAIN_LATER))

    async def _push(self) -> None:
        try:
            await self._tell()
        except Exception:  # a fault of this program, which the page should not meet in silence: it comes again
            logger.exception("the live page cannot be told what changes")
            await self._socket.close(code=WSCloseCode.INTERNAL_ERROR)

    async def _tell(self) -> None:
        quiet = ALIVE
        while True:
            message = self._feed.message()
            if message or quiet >= ALIVE:
                try:
                    await self._socket.send_json({"now": self._wall(), **message})
                except (OSError, RuntimeError):  # it was closed meanwhile
                    return
                quiet = 0.0
            await asyncio.sleep(PAUSE)
            quiet += PAUSE


def changes(known: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are new or differ, and None for those that are gone."""
    gone = {name: None for name in known if name not in now}
    return {name: value for name, value in now.items() if name not in known or known[name] != value} | gone
