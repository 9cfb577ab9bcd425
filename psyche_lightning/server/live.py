"""A live run: the pure :class:`RunHost` with a clock, a store, and watchers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

from psyche_lightning import aio
from psyche_lightning.chronicle.entry import Kind
from psyche_lightning.coordinator.recorder import RunRecorder
from psyche_lightning.errors import PsycheError
from psyche_lightning.logs import Outage, duration, speaking
from psyche_lightning.protocol.codec import diff, state_to_json
from psyche_lightning.protocol.manifest import manifest_digest
from psyche_lightning.protocol.requests import Answer, Request
from psyche_lightning.protocol.state import RunState
from psyche_lightning.version import __version__

if TYPE_CHECKING:
    from psyche_lightning.chronicle.writer import Chronicle
    from psyche_lightning.coordinator.host import RunHost
    from psyche_lightning.server.store import Store

logger = logging.getLogger(__name__)

T = TypeVar("T")
LOOK_AGAIN = 1.0
"""Seconds between looks whether the run can go on."""


MAX_MANIFESTS = 8
SILENCE = 25.0
"""Seconds without a word from any member after which a run's time stands still: more than between two pings."""
GATHER = 0.005
"""Seconds for which a change with which the run does not go on waits for others, to be stored and told with them."""
SHORTEST_WAIT = 0.001
"""Seconds. Timers may fire slightly early, and a slow clock must not turn the wait into a busy loop."""


class LiveRun:
    """Applies changes to a run one at a time, from any thread, and advances it as far as possible without waiting.

    A change is stored before it is visible anywhere (invariant I8): :attr:`state` is the last stored state. While the
    store fails, the run accepts no further change, its time stands still, and the change that is not stored yet is
    tried again first. So nothing that was announced is lost, and no member misses a deadline. The time also stands
    still while the run has members but nobody is heard from, because the silence may be the coordinator's own.

    Args:
        host: the run.
        clock: seconds; the run never sees them go back.
        store: where changes are kept; None for a run that ends with its process.
        wall: seconds since 1970, for the dates of what happens; None for the run's own time.
        silence: see :data:`SILENCE`; None if members are always heard.
        chronicle: the run's event files, or None.

    Attributes:
        state: the last stored state.
        manifests: some of the manifests with which nodes joined, by digest.
        last_heard: the clock's reading when a member was last heard from.
    """

    def __init__(
        self,
        host: RunHost,
        clock: Callable[[], float],
        store: Store | None = None,
        wall: Callable[[], float] | None = None,
        silence: float | None = None,
        chronicle: Chronicle | None = None,
    ) -> None:
        self._host = host
        self.state: RunState = host.state
        self._clock = clock
        self._store = store
        self._wall = wall
        self._reading: float | None = None
        self._now = 0.0
        self._unsaved = False
        self._unstorable: str | None = None
        self._silence = silence
        self._silent = False
        self.last_heard = clock() if silence is not None else 0.0
        self._outage = Outage(logger, "the coordinator's store")
        self._outage.works()
        self._lock = threading.RLock()
        self._listeners: list[Callable[[], None]] = []
        self._told = host.history.events.count
        self._chronicle = chronicle
        self._recorder: RunRecorder | None = None
        if chronicle is not None:
            self._recorder = RunRecorder(host.state.run_id, self._told, wall or clock, chronicle.add)
            self._recorder.note(Kind.START, f"release {__version__}")
            self._recorder.seen(host.state, host.history)
        self.manifests: dict[bytes, Mapping[str, Any]] = {}
        self._written: tuple[RunState | None, dict[str, Any]] = None, {}
        self._changed: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] = {}, {}, {}
        self._digested: tuple[Mapping[str, Any] | None, bytes] = None, b""

    @classmethod
    def of(cls, host: RunHost, clock: Callable[[], float]) -> LiveRun:
        """The one live run of a host without a store, for everybody in the process who shares the host."""
        with _sharing:
            run = _shared.get(id(host))  # the run holds the host, so the id stays valid
            if run is None:
                run = _shared[id(host)] = cls(host, clock)
            return run

    @property
    def host(self) -> RunHost:
        """The run, to read. What waits for others to be stored with them is stored first."""
        with self._lock, contextlib.suppress(PsycheError):
            if self._unstorable is None:
                self._save()
        return self._host

    @property
    def unstorable(self) -> str | None:
        """Why changes cannot be stored, for people; None if they can."""
        return self._unstorable

    @property
    def problem(self) -> str | None:
        """Why the run's time stands still at the moment, for people; None if it does not."""
        if self._unstorable is not None or not self._silent:
            return self._unstorable
        lasts = duration(self._clock() - self.last_heard)
        return f"no node has been heard from for {lasts}: the run waits until one is back"

    def heard(self) -> None:
        """A member was heard from; any thread may call it."""
        with self._lock:
            self._time()
            before, self.last_heard = self.last_heard, self._reading or 0.0
            if self._silent:
                self._silent = False
                with speaking(self.state.run_id, "-"):
                    logger.warning("a node is heard from again, after %s", duration(self.last_heard - before))

    def handle(self, signer: bytes, request: Request[Answer]) -> Answer:
        """Answer a member's request, and store what it changes before the answer is visible.

        Raises:
            PsycheError: the request is refused, or the store fails (see :meth:`act`).
        """
        with self._lock:
            if request.reads:
                self._save()
                return self._host.handle(signer, request, self._time())
            answer = self.act(lambda host, now: host.handle(signer, request, now))
            if signer in self._host.membership.members:
                self.heard()
            return answer

    async def answer(self, signer: bytes, request: Request[Answer]) -> Answer:
        """Like :meth:`handle`, but changes that come at about the same time are stored together, and told together.

        At the end of a round all members report, and then wait for the next one. The last report, with which that
        begins, waits for nothing.

        Raises:
            PsycheError: as of :meth:`handle`.
        """
        if request.reads:
            return self.handle(signer, request)
        with self._lock:
            if self._unstorable is not None:
                self._save()
            before = self._host.state.phase_start
            try:
                answer = self._host.handle(signer, request, self._time())
            except PsycheError:
                self._save()  # the refusal may follow from it
                raise
            self._unsaved = True
            pause = GATHER if self._host.state.phase_start == before else 0.0
            if signer in self._host.membership.members:
                self.heard()
        await asyncio.sleep(pause)
        with self._lock:
            self._advance()
        return answer

    @property
    def manifest_digest(self) -> bytes:
        """SHA-256 of the run's manifest, which is large; empty if there is none."""
        manifest = self._host.manifest
        if manifest is not self._digested[0]:
            self._digested = manifest, b"" if manifest is None else manifest_digest(manifest)
        return self._digested[1]

    @property
    def state_json(self) -> dict[str, Any]:
        """The state as JSON, made once for all who watch."""
        if self.state is not self._written[0]:
            self._written = self.state, state_to_json(self.state)
        return self._written[1]

    def change(self, known: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
        """The change from one :attr:`state_json` to another, made once for all who watch."""
        before, after, change = self._changed
        if before is not known or after is not current:
            change = diff(known, current)
            self._changed = known, current, change
        return change

    def keep_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Keep a manifest with which a node joined, so that it need not travel again; few differ within a run."""
        if len(self.manifests) < MAX_MANIFESTS and all(manifest is not held for held in self.manifests.values()):
            self.manifests[manifest_digest(manifest)] = manifest

    def act(self, action: Callable[[RunHost, float], T]) -> T:
        """Apply ``action(host, now)``, advance the run, store, announce, and return the action's result.

        Raises:
            PsycheError: the action's own error, after which nothing has changed; or the store's, after which the change
                is not announced and should be repeated.
        """
        with self._lock:
            self._save()
            result = action(self._host, self._time())
            self._unsaved = True
            self._advance()
            return result

    def tick(self) -> None:
        """Advance the run if the time has come, then store and announce the change; cheap if nothing is due.

        Raises:
            PsycheError: the store fails.
        """
        with self._lock:
            self._listen()
            self._save()
            self._advance()

    def wait_time(self) -> float | None:
        """Seconds until :meth:`tick` has something to do; None if only a change can advance the run."""
        with self._lock:
            if self._unsaved or self._silent:
                return LOOK_AGAIN
            deadline, now = self._host.deadline(), self._time()
            waits = [] if deadline is None else [deadline - now]
            if (until := self._heard_until()) < math.inf:
                waits.append(until - self._clock())
            return max(SHORTEST_WAIT, min(waits)) if waits else None

    def close(self) -> None:
        """Close the event files."""
        if self._chronicle is not None:
            self._chronicle.close()

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call ``listener()``, from any thread, after every change; returns a function that ends this."""
        with self._lock:
            self._listeners.append(listener)

        def end() -> None:
            with self._lock, contextlib.suppress(ValueError):
                self._listeners.remove(listener)

        return end

    def news(self) -> News:
        """A subscription for the running event loop."""
        return News(self)

    async def keep_time(self) -> None:
        """Tick at the run's deadlines until cancelled, on the running event loop."""
        with self.news() as news:
            while True:
                with contextlib.suppress(PsycheError):  # the store failed: wait_time() says when to try again
                    self.tick()
                await news.wait(self.wait_time())

    def _time(self) -> float:
        """The run's time: it begins as the clock's, never goes back, and stands still as the class describes."""
        reading = self._clock()
        if self._reading is None:
            self._now = reading
        elif self._unstorable is None:
            self._now += max(0.0, min(reading, self._heard_until()) - self._reading)
        self._reading = reading
        if self._wall is not None:
            self._host.history.ahead = self._wall() - self._now
        return self._now

    def _heard_until(self) -> float:
        """The clock's reading up to which silence is usual."""
        listens = self._silence is not None and bool(self._host.membership.members)
        return self.last_heard + self._silence if listens and self._silence is not None else math.inf

    def _listen(self) -> None:
        """Say so when nobody has been heard from for too long."""
        if not self._silent and self._clock() > self._heard_until():
            self._silent = True
            if self._recorder is not None:
                self._recorder.note(Kind.FAULT, str(self.problem))
            with speaking(self.state.run_id, "-"):
                logger.warning("%s", self.problem)

    def _advance(self) -> None:
        self._unsaved = self._host.tick(self._time()) or self._unsaved
        self._save()

    def _save(self) -> None:
        if not self._unsaved:
            return
        if self._store is not None:
            self._store_with(self._store)
            self._tell()
        self._unsaved = False
        self.state = self._host.state
        if self._recorder is not None:
            self._recorder.seen(self.state, self._host.history)
        for listener in list(self._listeners):
            listener()

    def _store_with(self, store: Store) -> None:
        self._time()  # what has passed since the last attempt counts only if that succeeded
        with speaking(self.state.run_id, "-"):
            try:
                store.save(self._host)
            except PsycheError as error:
                if self._unstorable is None and self._recorder is not None:
                    self._recorder.note(Kind.ERROR, str(error))
                self._unstorable = str(error)
                self._outage.fails(self._unstorable.removesuffix("."))
                raise
            self._unstorable = None
            self._outage.works()

    def _tell(self) -> None:
        """Log what has happened to the run; within a node's process the node tells."""
        events = self._host.history.events
        with speaking(self.state.run_id, "-"):
            for event in events.since(self._told):
                logger.info("%s", event.text)
        self._told = events.count


_sharing = threading.Lock()
_shared: WeakValueDictionary[int, LiveRun] = WeakValueDictionary()


class News:
    """Wakes one task of an event loop when a run has changed; a context manager."""

    def __init__(self, run: LiveRun) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._end = run.subscribe(self.wake)

    def __enter__(self) -> News:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def wake(self) -> None:
        """Wake the task; any thread may call it."""
        try:
            current = asyncio.get_running_loop()
        except RuntimeError:
            current = None
        if current is self._loop:
            self._event.set()
        else:
            with contextlib.suppress(RuntimeError):  # that loop was closed
                self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, timeout: float | None) -> None:
        """Wait for the next change, or ``timeout`` seconds; returns at once if one came since the last call."""
        await aio.wait_or_set(self._event, timeout)
        self._event.clear()


async def states(run: LiveRun) -> AsyncIterator[RunState]:
    """Yields the state now and after each change, newest only."""
    with run.news() as news:
        seen: RunState | None = None
        while True:
            if run.state is not seen:
                seen = run.state
                yield seen
            await news.wait(None)
