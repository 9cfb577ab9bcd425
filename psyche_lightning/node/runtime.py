"""Carries out the node core's effects: transport, coordinator, blob store and journal on one asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

from psyche_lightning.errors import CoordinatorError, PayloadError, PsycheError, StoreError, TransportError, WireError
from psyche_lightning.logs import speaking
from psyche_lightning.node import events as ev
from psyche_lightning.node.core import STALE, NodeCore
from psyche_lightning.node.download import Downloads
from psyche_lightning.node.journal import SMALL, Journal, MemoryJournal
from psyche_lightning.node.ledger import Ledger
from psyche_lightning.node.news import news
from psyche_lightning.node.notices import (
    CannotGoOn,
    DifferenceNotFound,
    Finished,
    Joined,
    Left,
    MessageUnreadable,
    Notice,
    TensorDiffers,
    TrainingAway,
    Waits,
)
from psyche_lightning.node.recorder import Recorder
from psyche_lightning.node.replica import Replica
from psyche_lightning.node.settings import Settings
from psyche_lightning.node.snapshot import decode_index, first_difference
from psyche_lightning.node.spans import NoSpans
from psyche_lightning.node.status import StatusFile, progress
from psyche_lightning.node.store import BlobStore
from psyche_lightning.node.waiting import Awaited, Wait
from psyche_lightning.protocol.messages import Envelope, Message, Result, open_envelope, seal
from psyche_lightning.protocol.requests import (
    MAX_TOKENS,
    Coordinator,
    Figure,
    GetRounds,
    GetTerms,
    Join,
    Report,
    Request,
    Withdraw,
    Witness,
)
from psyche_lightning.protocol.state import scope_of
from psyche_lightning.transports.base import HandsOut, Transport, TransportContext
from psyche_lightning.wire.canonical import pack, sha256, unpack
from psyche_lightning.wire.identity import Identity, short

TICK = 0.25
FETCH_TIMEOUT = 60.0
ROUNDS_AWAY, LEAST_AWAY = 3.0, 60.0
"""A training thread is away after this many of a round's longest times, and after at least so many seconds."""
QUICK = 1 << 13
"""Bytes of a payload that takes no longer to check than to hand to another thread, within a millisecond or two."""
MAX_REMEMBERED = 1 << 26
"""Largest record of a round's announcements in the journal, in bytes."""

ReplicaTask = ev.Apply | ev.TakeSnapshot | ev.Load | ev.ShareBuffers | ev.LoadBuffers
TrainerTask = ReplicaTask | ev.Train | Finished | BaseException
"""A task of the training thread; an exception ends it."""


@dataclass(frozen=True, kw_only=True)
class NodeParts:
    """The parts of a node.

    Attributes:
        identity: its key.
        run_id: the run.
        coordinator: client of the run's coordinator.
        transport: the transport, not yet started.
        replica: the parameters; only the training thread touches them.
        manifest: the node's run configuration; the first node to join also fixes the sections that the run lacks.
        settings: the node core's settings.
        store: blobs.
        journal: promises.
        traffic: returns bytes ``(up, down)`` counted at the node's sockets.
        served: called with ``(blob size, bytes sent)`` after a peer got a blob or a part of one.
        ledger: the ledger for rounds that are certain, or None.
        status: the status file, or None.
        recorder: writes its event files, or None.
        spans: what traces its rounds.
        region: where it says that it is, for people; empty to say nothing.
    """

    identity: Identity
    run_id: str
    coordinator: Coordinator
    transport: Transport
    replica: Replica
    manifest: Mapping[str, Any]
    settings: Settings
    store: BlobStore
    journal: Journal | MemoryJournal
    traffic: Callable[[], tuple[int, int]] = lambda: (0, 0)
    served: Callable[[int, int], None] = lambda size, given: None
    ledger: Ledger | None = None
    status: StatusFile | None = None
    recorder: Recorder | None = None
    spans: NoSpans = field(default_factory=NoSpans)
    region: str = ""


class Runtime:
    """One node's loop. Every method runs on it unless the method says otherwise.

    Args:
        node: the node's parts.
        post: hands a task to the training thread; the loop may call it.

    Attributes:
        report: figures of the newest round that this node trained; the training thread writes them.
        figures: the newest named ones, likewise.
        written: tokens that the training thread added to texts, each with the text's number, and that no report had.
        busy_since: when the training thread took the round that it trains; None while it waits for one. It writes this.
        downloads: parameters that this node downloads.
        wait: the training thread's.
    """

    def __init__(self, node: NodeParts, post: Callable[[TrainerTask], None]) -> None:
        self.node = node
        self.report = Report()
        self.figures: tuple[Figure, ...] = ()
        self.written: deque[tuple[int, int]] = deque(maxlen=MAX_TOKENS)
        self.address = ""
        self._post = post
        self._refused: Counter[bytes] = Counter()
        self.downloads = Downloads(node.transport, node.store, self._say)
        self.wait = Wait()
        self.busy_since: float | None = None
        self._away = False
        self._asked = self._joined = False
        self._owed: set[bytes] = set()  # payloads that the journal names and that are not here
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scope = node.run_id  # until the coordinator tells the incarnation; nothing is signed before
        self.core = self._make_core({}, {}, set())

    def _make_core(
        self, promises: Mapping[str, Envelope], remembered: Mapping[str, Sequence[Envelope]], lost: Collection[bytes]
    ) -> NodeCore:
        node = self.node
        return NodeCore(
            node.identity.public,
            node.coordinator.signer,
            self._scope,
            node.settings,
            self._seal,
            promises,
            remembered,
            lost,
        )

    def _seal(self, message: Message) -> Envelope:
        return seal(self.node.identity, self._scope, message)

    def _promise(self, key: str) -> str:
        """The journal's key of a promise: a promise binds within one incarnation of a run."""
        return f"{self._scope}/{key}"

    def _kept(self) -> tuple[dict[str, Envelope], dict[str, list[Envelope]], set[bytes]]:
        """What this node stored before a restart: its promises, others' results, and the own payloads that it lost."""
        promises: dict[str, Envelope] = {}
        remembered: dict[str, list[Envelope]] = {}
        for name, raw in self.node.journal.load().items():
            key = name.removeprefix(self._promise(""))
            if key == name:
                continue  # of another run, or of a former one of this name
            try:
                if key.startswith("list/"):
                    parts = unpack(raw, max_size=MAX_REMEMBERED)
                    remembered[key] = [open_envelope(part, self._scope) for part in parts]
                    continue
                envelope = open_envelope(raw, self._scope)
            except (WireError, TypeError):
                continue
            promises[key] = envelope
        for data in self.node.journal.blobs():  # a file that was not synced may be torn
            if self.node.store.get(sha256(data)) is None:
                self.node.store.put(data, durable=False)
        own = {kept.message.payload for kept in promises.values() if isinstance(kept.message, Result)}
        others = {kept.message.payload for kept in chain(*remembered.values()) if isinstance(kept.message, Result)}
        apart = {payload for payload in own | others if not self.node.journal.carries(payload)}
        self._owed = {payload for payload in apart if self.node.store.get(payload) is None}
        return promises, remembered, self._owed & own

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, follow the coordinator and start to tick.

        Raises:
            PsycheError: the transport cannot listen, or the coordinator cannot be reached or refuses this node.
        """
        node, self._loop = self.node, asyncio.get_running_loop()
        self._scope = scope_of(node.run_id, (await node.coordinator.request(GetTerms())).incarnation)
        self.core = self._make_core(*self._kept())
        context = TransportContext(node.identity, self._scope, self._on_message, self._blob_for_peer, node.served)
        self.address = await self.node.transport.start(context)
        self._asked = True
        await self.node.coordinator.request(self._completed(Join()))
        self._joined = True
        self._say(Joined(self.node.identity.public, self.node.coordinator.signer, self.address))
        self._spawn(self._watch())
        self._spawn(self._tick())

    async def stop(self, why: str, *, withdraw: bool, linger: float) -> None:
        """Leave: wait for peers that still need this node, tell the coordinator, close everything."""
        if self._joined or (self._asked and withdraw):  # in time or not, the coordinator may have let it in
            self._say(Left(why))
        if self.core.finished:
            await self._see_peers_off(linger)
        self._stopping = True
        if withdraw:
            await self._withdraw()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for closing in (self.node.transport.stop(), self.node.coordinator.close()):
            with contextlib.suppress(PsycheError, asyncio.TimeoutError, OSError):
                await asyncio.wait_for(closing, 3.0)
        with contextlib.suppress(StoreError):  # a full disk is why it leaves
            if self.core.finished:
                await self._keep_the_last()
            self._tell_status(why)

    async def _keep_the_last(self) -> None:
        """Drop all blobs but the finished run's last parameters: the node serves those if it comes back."""
        assert self.core.state is not None
        last = self.core.state.checkpoint.digest
        if self._pieces(last) and not self.node.settings.buffers:  # buffers are blobs that the checkpoint does not name
            for _ in range(2):  # the first call spares what was written since the one before
                await self._clear(ev.Keep((last,), (), ()))
            self.node.journal.retain(self.node.journal.load())  # without the blobs, which would come back

    async def _withdraw(self) -> None:
        with contextlib.suppress(PsycheError, asyncio.TimeoutError, OSError):
            await asyncio.wait_for(self.node.coordinator.request(Withdraw()), 3.0)

    async def _see_peers_off(self, linger: float) -> None:
        """Serve peers until each has the finished run's last parameters, which its report or its leaving shows.

        The reports that come after the run is finished are not recorded: so who made none leaves before it serves.
        """
        me = self.node.coordinator.signer
        if me in self._without_last():
            await self._withdraw()
        deadline = time.monotonic() + linger
        while time.monotonic() < deadline and self._without_last() - {me}:
            await asyncio.sleep(0.05)

    def _without_last(self) -> set[bytes]:
        """The healthy clients of the finished run that have not reported its last parameters."""
        state = self.core.state
        assert state is not None
        last = state.checkpoint
        voters = {signer for signer, *held in state.checkpoint_votes if held == [last.step, last.digest]}
        return {client.signer for client in state.healthy} - voters

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """End the node with an error, wherever it arose: from now on it promises, sends and answers nothing.

        It leaves the run at once: the training thread may look much later, or never, as in a notebook.
        """
        if self._stopping and not isinstance(error, StoreError):
            return  # what is closed fails as it should
        with self.speaking():
            self._say(CannotGoOn(str(error) or type(error).__name__))
        if not self._stopping:
            self._stopping = True
            self._post(error)
            self._spawn(self._withdraw())

    async def _watch(self) -> None:
        async for state in self.node.coordinator.watch():
            for notice in news(self.core.state, state, self.node.coordinator.signer):
                notice.tell()  # the recorder finds it in the state
            self.handle(ev.StateSeen(state))

    def _mind_the_training(self, now: float) -> None:
        """Leave the run while the training thread is away: a program that lost its loop would be waited for forever."""
        state, since = self.core.state, self.busy_since
        if state is None or since is None:
            self._away = False
            return
        longest = max(LEAST_AWAY, ROUNDS_AWAY * state.config.max_round_train_time)
        if not self._away and now - since > longest:
            self._away = True
            self._say(TrainingAway(now - since))
            self._spawn(self._withdraw())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self._mind_the_training(time.monotonic())
            self.handle(ev.Tick())
            self._tell_wait()
            self._tell_status()

    def waiting(self) -> str:
        """Whom the node waits for, in one line."""
        return self._others().text

    def _tell_wait(self) -> None:
        transfer, what = self.downloads.transfer, self._awaited()
        waited = self.wait.worth_a_line(time.monotonic(), what.text)
        if waited is not None:
            self._say(Waits(what.text if transfer is None else f"{what}: {transfer}", waited))
        if self.node.recorder is not None:
            self.node.recorder.awaits(what if self.wait.resting else None)

    def _others(self) -> Awaited:
        away = self.node.coordinator.away
        return self.core.awaited() if away is None else Awaited(f"waiting for {away}")

    def _awaited(self) -> Awaited:
        transfer = self.downloads.transfer
        if transfer is None:
            return self._others()
        return Awaited(f"waiting for the parameters {transfer.digest.hex()[:12]}")

    def _tell_status(self, left: str | None = None) -> None:
        if self.node.status is None:
            return
        self.node.status.write(
            run=self.node.run_id,
            node=self.node.identity.public.hex(),
            **progress(self.core.state),
            waiting=None if left is not None or self.busy_since is not None else self._awaited().text,
            away=self.node.coordinator.away,
            left=left,
        )

    def _say(self, notice: Notice) -> None:
        notice.tell()
        if self.node.recorder is not None:
            self.node.recorder.notice(notice)

    def speaking(self) -> contextlib.AbstractContextManager[None]:
        """Attributes log lines inside to this node; other nodes of the process may call it."""
        return speaking(self.node.run_id, short(self.node.identity.public))

    def _on_message(self, peer: bytes, raw: bytes) -> bool:
        try:
            envelope = open_envelope(raw, self._scope)
        except WireError as error:
            self._refused[peer] += 1
            times = self._refused[peer]
            if times & (times - 1) == 0:  # 1, 2, 4, ...: a flood does not fill the log
                with self.speaking():
                    self._say(MessageUnreadable(peer, times, str(error)))
            return False
        self.handle(ev.Received(envelope))
        return True

    def handle(self, event: ev.Event) -> None:
        """Give the core an event and carry out its effects; an error ends the node on the training thread."""
        if self._stopping:
            return
        try:
            recorder = self.node.recorder
            with self.speaking():
                if recorder is not None:
                    recorder.event(event)
                for effect in self.core.handle(event, time.monotonic()):
                    if recorder is not None:
                        recorder.effect(effect, self.core.log)
                    self._carry_out(effect)
            if isinstance(event, ev.Trained) and event.result is not None:
                self.node.spans.end(event.result.step, "send")
                self.node.spans.begin(event.result.step, "collect")
        except Exception as error:  # the callers, such as transports and timers, would only log it
            self._fail(error)

    # --- effects ----------------------------------------------------------------------------------------------------

    def _carry_out(self, effect: ev.Effect) -> None:
        match effect:
            case ev.Broadcast(envelope):
                self._hand_out(envelope.message)
                self.node.transport.broadcast(envelope.raw)
            case ev.SendTo(peer, envelope):
                self.node.transport.send(peer, envelope.raw)
            case ev.Promise(key, envelope):
                self._write(key, envelope.raw, [envelope])
            case ev.Remember(key, envelopes):
                self._write(key, pack([each.raw for each in envelopes]), envelopes)
            case ev.SetPeers(peers):
                self.node.transport.set_peers(dict(peers))
            case ev.Fetch():
                self._spawn(self._fetch(effect))
            case ev.Load(digest, providers) | ev.LoadBuffers(digest, providers):
                self._spawn(self._load(effect, digest, providers))
            case ev.Train() | ev.Apply() | ev.TakeSnapshot() | ev.ShareBuffers() | Finished():
                self._post(effect)
            case ev.StartOver(state):
                self.core = self._make_core(*self._kept())
                self.handle(ev.StateSeen(state))
            case ev.Diagnose():
                self._spawn(self._diagnose(effect))
            case ev.Keep():
                self.node.journal.retain(set(map(self._promise, effect.promises)), set(effect.payloads))
                self._owed.intersection_update(effect.payloads)
                self._spawn(self._clear(effect))
            case ev.WriteDown(records):
                if self.node.ledger is not None:
                    self.node.ledger.append(self._scope, records)
            case Notice():
                effect.tell()  # the recorder has it
            case Join() if self._away:
                pass  # the core asks again
            case Request():
                self._spawn(self._ask(effect))

    def _hand_out(self, message: Message) -> None:
        """Send a small payload before its announcement, so that peers need not ask for it."""
        transport = self.node.transport
        if isinstance(message, Result) and message.size <= QUICK and isinstance(transport, HandsOut):
            data = self.node.store.get(message.payload)
            if data is not None:
                transport.hand_out(data)

    def _write(self, key: str, value: bytes, envelopes: Iterable[Envelope]) -> None:
        """Store a promise durably, and with it those of the small payloads that it names and that are here (I8).

        What is not here yet is made durable when it comes.
        """
        blobs = {}
        for message in (envelope.message for envelope in envelopes):
            if not isinstance(message, Result) or message.size > SMALL or self.node.journal.carries(message.payload):
                continue
            data = self.node.store.get(message.payload)
            if data is None:
                self._owed.add(message.payload)
            elif len(data) <= SMALL:  # else its message is wrong about it, and it is synced as a file
                blobs[message.payload] = data
        self.node.journal.append(self._promise(key), value, blobs)

    async def _clear(self, effect: ev.Keep) -> None:
        """Drop data no longer needed, on another thread: it may be a lot."""

        def clear() -> None:
            pieces = [piece for digest in effect.snapshots for piece in self._pieces(digest)]
            self.node.store.retain({*effect.snapshots, *effect.payloads, *pieces})

        await asyncio.get_running_loop().run_in_executor(None, clear)

    def _pieces(self, digest: bytes) -> list[bytes]:
        """The pieces of stored parameters; none if their index is missing."""
        index = self.node.store.get(digest)
        return [piece.digest for piece in decode_index(index).pieces] if index is not None else []

    def run_replica_task(self, task: ReplicaTask) -> ev.Event:
        """Do replica work; called on the training thread. Returns the event for :meth:`handle`."""
        match task:
            case ev.Apply():
                return self._apply(task)
            case ev.TakeSnapshot(open_ids):
                return ev.SnapshotTaken(self.node.replica.snapshot(self.node.store.put, open_ids))
            case ev.Load(digest):
                try:
                    self.node.replica.load(digest, self._blob)
                    return ev.Loaded(digest, open_ids=decode_index(self._blob(digest)).open_ids)
                except StoreError:
                    raise
                except PsycheError as error:
                    return ev.Loaded(digest, str(error))
            case ev.ShareBuffers(epoch):
                return ev.BuffersTaken(epoch, self.node.replica.snapshot_buffers(self.node.store.put))
            case ev.LoadBuffers(index):
                try:
                    self.node.replica.load_buffers(index, self._blob)
                    return ev.BuffersLoaded(index)
                except StoreError:
                    raise
                except PsycheError as error:
                    return ev.BuffersLoaded(index, str(error))

    def _apply(self, task: ev.Apply) -> ev.Applied:
        spans = self.node.spans
        if task.step:
            spans.end(task.step, "collect")
            spans.begin(task.step, "apply", **{"psyche.results": len(task.payloads)})
        blobs = [self._blob(payload) for payload in task.payloads]
        if blobs:
            self.node.replica.apply(blobs, task.lrs, task.step)
        digest = b""
        if task.digest_due:
            describe = self.node.replica.snapshot if task.snapshot else self.node.replica.digest
            digest = describe(self.node.store.put, task.open_ids)
        spans.over(task.step)
        return ev.Applied(task.epoch, task.height, digest, self.node.replica.prints() if task.prints else b"")

    def _blob_for_peer(self, digest: bytes) -> bytes | None:
        """A stored blob; transports call this from other threads, and only log its errors."""
        try:
            return self.node.store.get(digest)
        except StoreError as error:
            assert self._loop is not None  # since start
            self._loop.call_soon_threadsafe(self._fail, error)
            raise

    def _blob(self, digest: bytes) -> bytes:
        data = self.node.store.get(digest)
        if data is None:
            raise PsycheError(f"the blob {digest.hex()[:12]} vanished from this node's store; is its disk in order?")
        return data

    async def _fetch(self, effect: ev.Fetch) -> None:
        loop = asyncio.get_running_loop()
        try:
            data = None
            if self.node.store.has(effect.payload):
                data = await loop.run_in_executor(None, self.node.store.get, effect.payload)
            known = data is not None
            if data is None:
                data = await self.node.transport.fetch(
                    effect.payload, effect.providers, max_size=effect.size, timeout=FETCH_TIMEOUT
                )
            if effect.size <= QUICK:
                self._take(data, effect, known)
            else:
                await loop.run_in_executor(None, self._take, data, effect, known)
            if effect.payload in self._owed:  # the journal names it, and does not carry it
                await loop.run_in_executor(None, self.node.store.put, data)
        except PayloadError as error:
            self.handle(ev.Fetched(effect.payload, str(error), refused=True))
        except TransportError as error:
            self.handle(ev.Fetched(effect.payload, str(error)))
        else:
            self.handle(ev.Fetched(effect.payload))

    def _take(self, data: bytes, effect: ev.Fetch, known: bool) -> None:
        """Check a payload, and store it unless it is known; called on another thread if that may take long.

        Raises:
            PayloadError: it is malformed.
        """
        if len(data) != effect.size:
            raise PayloadError(f"{len(data)} bytes; {effect.size} were announced")
        with self.node.spans.part(effect.step, "verify", **{"psyche.bytes": effect.size}):
            self.node.replica.check(data, effect.step)
            if not known:
                self.node.store.put(data, len(data) > SMALL)

    async def _load(self, effect: ev.Load | ev.LoadBuffers, index: bytes, providers: tuple[bytes, ...]) -> None:
        """Bring index and pieces into the store, then let the training thread load them."""
        try:
            buffers = isinstance(effect, ev.LoadBuffers)
            check = partial(self.node.replica.check_index, buffers=buffers)
            await self.downloads.obtain(index, providers, check)
        except (TransportError, WireError) as error:
            failed = ev.Loaded if isinstance(effect, ev.Load) else ev.BuffersLoaded
            self.handle(failed(index, str(error)))
        else:
            self._post(effect)

    async def _diagnose(self, effect: ev.Diagnose) -> None:
        try:
            mine = await self.downloads.index(effect.mine, effect.providers)
            theirs = await self.downloads.index(effect.theirs, effect.providers)
        except (TransportError, WireError) as error:
            self._say(DifferenceNotFound(effect.round, str(error)))
            return
        self._say(TensorDiffers(first_difference(mine, theirs), effect.round))

    async def _ask(self, request: Request[Any]) -> None:
        """Ask the coordinator; a join that is refused for good ends the node, and the core repeats other requests."""
        try:
            answer = await self.node.coordinator.request(self._completed(request))
        except CoordinatorError as error:
            if isinstance(request, Join) and not error.retryable and error.code not in STALE:
                self._post(error)
            else:
                self.handle(ev.RequestFailed(request, error.code, str(error), error.retryable))
            return
        if isinstance(request, GetRounds):
            self.handle(ev.RoundsSeen(request.epoch, request.first, answer))

    def _completed(self, request: Request[Any]) -> Request[Any]:
        """Add the fields that the core does not know."""
        match request:
            case Join():
                return Join(self.address, self.node.manifest, self.node.region)
            case Witness():
                up, down = self.node.traffic()
                prompt, tokens = self._take_written()
                report = replace(
                    self.report, bytes_up=up, bytes_down=down, figures=self.figures, prompt=prompt, tokens=tokens
                )
                return replace(request, report=report)
        return request

    def _take_written(self) -> tuple[int, tuple[int, ...]]:
        """The text that was continued first since the last report, and what was added to it."""
        if not self.written:
            return 0, ()
        prompt, tokens = self.written[0][0], []
        while self.written and self.written[0][0] == prompt:
            tokens.append(self.written.popleft()[1])
        return prompt, tuple(tokens)
