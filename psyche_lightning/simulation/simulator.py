"""Whole runs in virtual time: the real node core and coordinator machine under faults drawn from a seed.

The network loses, delays, reorders and duplicates messages; nodes and the coordinator are killed and restarted;
links are cut; some nodes cheat. The parameters are a hash chain instead of tensors, so that a node that applied
anything else than the others is seen at once. ``psyche sim --seed N`` replays one history exactly.
"""

from __future__ import annotations

import base64
import heapq
import multiprocessing
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from psyche_lightning.chronicle.entry import SIMULATOR, Entry, Kind
from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.coordinator.recorder import RunRecorder
from psyche_lightning.distro import DistroConfig
from psyche_lightning.errors import CoordinatorError, StoreError, TransportError, WireError
from psyche_lightning.node import events as ev
from psyche_lightning.node.audit import Audit, audit
from psyche_lightning.node.core import STALE, NodeCore
from psyche_lightning.node.ledger import Row, row_of
from psyche_lightning.node.notices import (
    Finished,
    KeepsOwnBuffers,
    Notice,
    Outcome,
    TensorDiffered,
    TwoResults,
)
from psyche_lightning.node.rates import Rates
from psyche_lightning.node.recorder import Recorder
from psyche_lightning.node.settings import Settings
from psyche_lightning.node.witness import list_promise
from psyche_lightning.protocol.committee import decided_root
from psyche_lightning.protocol.manifest import BY_SPEED, EQUAL
from psyche_lightning.protocol.merkle import EMPTY_ROOT, merkle_root
from psyche_lightning.protocol.messages import Envelope, Result, commitments, open_envelope, seal
from psyche_lightning.protocol.open_ids import count, half_open
from psyche_lightning.protocol.requests import GetRounds, Join, Report, Request, Witness
from psyche_lightning.protocol.state import INCARNATION_SIZE, CoordinatorConfig, Phase, RunState
from psyche_lightning.simulation.faults import Faults
from psyche_lightning.simulation.node import BAD, LAYOUT, RATE, SimNode
from psyche_lightning.simulation.roles import ROLES, SIGN_TWICE, Role
from psyche_lightning.simulation.scenario import History, Scenario, SimulationError
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import Identity, short

RUN = "sim"
TICK = 0.5
SPEEDS = (4.0, 1.0, 3.0, 4.0)
"""Samples a second of the first nodes, and so on, where nodes differ."""
BOAST = 1e9
"""Samples a second that cheats claim."""
PATIENCE = 60.0
"""Virtual seconds within which a proof reaches the coordinator."""
HORIZON = 4000.0
"""Virtual seconds after which a history that has not finished counts as hanging."""


class Simulation:
    """One history.

    Args:
        scenario: what may happen.
        trace: called with each event, at virtual times: those that real nodes and coordinators write, and the faults.
    """

    def __init__(self, scenario: Scenario, trace: Callable[[Entry], None] | None = None) -> None:
        self.scenario = scenario
        self.rng = random.Random(f"history {scenario.seed}")
        self.now = 0.0
        self._trace = trace
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._by_key: dict[bytes, SimNode] = {}
        self._applied: dict[tuple[int, int], dict[bytes, tuple[bytes, str]]] = {}
        self._trained: dict[tuple[int, int], bytes] = {}
        self._buffers: dict[int, bytes] = {}
        self._restless: set[int] = set()
        self._opened: dict[str, Envelope] = {}
        self._lost = False
        self._proofs: dict[bytes, list[tuple[SimNode, int, float]]] = {}
        self.faults = Faults(self)
        batch = scenario.nodes * 2
        config = CoordinatorConfig(
            warmup_time=20.0,
            cooldown_time=20.0,
            max_round_train_time=20.0,
            round_witness_time=5.0,
            epoch_time=90.0,
            global_batch_size_start=batch,
            global_batch_size_end=batch,
            total_steps=scenario.steps,
            init_min_clients=scenario.init_min_clients,
            min_clients=1,
            waiting_for_members_extra_time=3.0,
        )
        self._manifest = {"run": {"shares": BY_SPEED if scenario.speeds else EQUAL}}
        self.host: RunHost | None = RunHost(
            RUN,
            config,
            seed=scenario.seed,
            manifest=self._manifest,
            incarnation=random.Random(scenario.seed).randbytes(INCARNATION_SIZE),
        )
        self.scope = self.host.state.scope
        self.clock = self.rng.uniform(0, 1e6)
        self.host.begin(self.host_time)
        self.disk: dict[str, Any] = {}
        self._announced = -1
        self._step = 0
        self._record: dict[tuple[int, int], bytes | None] = {}
        self._distro = _distro(scenario)
        self._recorder: RunRecorder | None = None
        self.begin_record("begins")
        self.nodes: list[SimNode] = []
        for _ in range(scenario.nodes):
            self.add_node()
        self._taken = self._repaired = 0
        # Whoever is ejected does not come back: the others must be able to form an epoch then.
        roles = [role for role in ROLES if scenario.ejects or role not in SIGN_TWICE]
        for node in self.nodes[: scenario.cheats]:
            node.role = self.rng.choice(roles)

    # --- time -------------------------------------------------------------------------------------------------------

    def at(self, delay: float, action: Callable[[], None]) -> None:
        """Do something after ``delay`` virtual seconds."""
        self._count += 1
        heapq.heappush(self._queue, (self.now + delay, self._count, action))

    @property
    def host_time(self) -> float:
        """What the coordinator's clock says."""
        return self.now + self.clock

    def trace(self, text: str, node: SimNode | None = None) -> None:
        """Notes a fault, perhaps of a node, for the reader of the history."""
        if self._trace:
            about = (node.name,) if node is not None else ()
            self._trace(Entry(self.now, Kind.FAULT, text, about=about, node=SIMULATOR, run=RUN))

    def begin_record(self, text: str) -> None:
        """Has the coordinator, which begins or is back, write its events."""
        if self._trace and self.host is not None:
            self._recorder = RunRecorder(RUN, self.host.history.events.count, lambda: self.now, self._trace)
            self._recorder.note(Kind.START, text)
            self._recorder.seen(self.host.state, self.host.history)

    def run(self) -> History:
        """Play the history to its end.

        Raises:
            SimulationError: replicas differed, the run hung or ended without its steps.
        """
        for node in self.nodes:
            self.at(self.rng.uniform(0, 3), lambda node=node: self.start(node))  # type: ignore[misc]
        self.faults.plan()
        self._tick_coordinator()
        while self._queue:
            self.now, _, action = heapq.heappop(self._queue)
            if self.now > HORIZON:
                waits = "; ".join(f"{n.name} {n.core.waiting()}" for n in self.nodes if n.core and not n.done)
                raise self._error(f"it hangs: {waits}")
            try:
                action()
            except SimulationError:
                raise
            except Exception as error:
                raise self._error(f"{type(error).__name__}: {error}") from error
            if all(node.done or node.gone or node.role for node in self.nodes):
                break
        return self._history()

    def _error(self, what: str) -> SimulationError:
        seed = self.scenario.seed
        return SimulationError(f"simulated history {seed}: {what}\n  replay it: psyche sim --seed {seed} --trace")

    def _history(self) -> History:
        state = self.state()
        if state.phase is not Phase.FINISHED or state.step != self.scenario.steps + 1:
            raise self._error(f"it ended in {state.phase.name} at step {state.step} of {self.scenario.steps}")
        self._check_ejected()
        digest = state.checkpoint.digest
        honest = [node for node in self.nodes if not node.role]
        held = [n for n in honest if n.done is None or n.done.outcome is not Outcome.OTHER_PARAMETERS]
        wrong = [node.name for node in held if not node.gone and node.digest != digest]
        if not digest or wrong:
            raise self._error(f"{', '.join(wrong) or 'everybody'} ended with other parameters than agreed")
        ledger = self._audit()
        return History(
            self.scenario,
            self.now,
            len(self._applied),
            digest,
            state.epoch,
            self.faults.count,
            again=count((line.start, line.stop) for line in ledger.lines if line.again),
            untrained=count(ledger.untrained),
            snapshots=self._taken,
            repaired=self._repaired,
        )

    def _check_ejected(self) -> None:
        """Checks that who signed two results is ejected, and nobody else.

        Raises:
            SimulationError: it is not so, though a node that is still there saw the proof long ago.
        """
        ejected = (self.host or RunHost.load(self.disk)).membership.ejected
        innocent = [node.name for node in self.nodes if node.identity.public in ejected and not node.role]
        if innocent:
            raise self._error(f"{', '.join(innocent)} kept the rules and is ejected")
        for culprit, seen in self._proofs.items():
            stayed = any(node.life == life and self.now - at > PATIENCE for node, life, at in seen)
            if stayed and culprit not in ejected:
                raise self._error(f"{short(culprit)} signed two results and is not ejected")

    def _audit(self) -> Audit:
        """Audits the ledgers of all nodes, also of those that are gone.

        Raises:
            SimulationError: it is not complete, though faults do not excuse that: an id was lost, or trained twice.
        """
        rows = [row for node in self.nodes if not node.role for row in node.ledger]
        if self._lost:  # what a coordinator lost that was restored from a copy stays in some books
            rows = [row for row in rows if self._listed(row) == self._recorded(row)]
        self._check_books(rows)
        ledger = audit(rows)
        seen = ledger.rounds + count(ledger.missing)
        if ledger.last_step != self.scenario.steps or seen != self.scenario.steps:
            ledger.problems.append(f"{seen} rounds up to step {ledger.last_step} of {self.scenario.steps}")
        last = [row for row in rows if row["step"] == ledger.last_step]
        # The last round took as many as it may, as more had failed before.
        full = all(count(half_open(row["again"])) == row["batch_size"] for row in last)
        excused = bool(ledger.overdue) and full
        if len(ledger.problems) > excused:
            raise self._error(f"the ledger is not complete: {'; '.join(ledger.problems[:3])}")
        return ledger

    def _check_books(self, rows: Sequence[Row]) -> None:
        """Checks that what nodes applied is what the coordinator recorded, round by round.

        Raises:
            SimulationError: a book has other results than those that a quorum reported.
        """
        for row in rows:
            listed, recorded = self._listed(row), self._recorded(row)
            if listed != recorded:
                raise self._error(
                    f"round {row['height']} of epoch {row['epoch']} was decided as {recorded.hex()[:8]} and written "
                    f"down as {listed.hex()[:8]}"
                )

    def _recorded(self, row: Row) -> bytes:
        """The root that the coordinator recorded for a round in a book."""
        delay = 2 if self.scenario.overlap else 1
        return self._record.get((row["epoch"], row["height"] + delay - 1)) or EMPTY_ROOT

    def _listed(self, row: Row) -> bytes:
        """The root over the results in a book."""
        for text in row["results"]:
            if text not in self._opened:
                self._opened[text] = open_envelope(base64.b64decode(text), self.scope)
        return merkle_root(commitments(self.scope, [self._opened[text] for text in row["results"]]))

    def _observe(self, state: RunState) -> None:
        """Notes what the coordinator decided.

        Raises:
            SimulationError: it takes a step or a decision back.
        """
        if state.step < self._step:
            raise self._error(f"the run went back from step {self._step} to {state.step}")
        self._step = state.step
        for round_ in state.rounds:
            over = not state.phase.active or (state.current is not None and round_.height < state.current.height)
            root = decided_root(round_, state.needed)
            if over and self._record.setdefault((state.rounds_epoch, round_.height), root) != root:
                raise self._error(f"the decision on round {round_.height} of epoch {state.rounds_epoch} changed")

    def _latency(self) -> float:
        return self.rng.uniform(0.001, self.scenario.delay)

    # --- coordinator --------------------------------------------------------------------------------------------------

    def state(self) -> RunState:
        """The run's state, which outlives the coordinator."""
        return (self.host or RunHost.load(self.disk)).state

    def _tick_coordinator(self) -> None:
        if self.host is not None and self.host.tick(self.host_time):
            self.changed()
        self.faults.go_on()
        self._go_back()
        self.at(TICK, self._tick_coordinator)

    def _go_back(self) -> None:
        """Lets the owner go back to the checkpoint if nobody is left for good who can show what was decided since.

        Nodes that keep the rules and hold a decided round promise to bring it back. Here all of them were replaced.
        """
        host = self.host
        if host is None or host.state.phase is not Phase.WAITING_FOR_MEMBERS or host.state.settled:
            return
        stay = [node for node in self.nodes if not node.gone and not node.role]
        delay = 2 if self.scenario.overlap else 1
        epoch, held = host.rounds_epoch, host.state.checkpoint
        for round_ in host.rounds:
            root = decided_root(round_, host.state.needed)
            about = round_.height - delay + 1
            if root in (None, EMPTY_ROOT) or about < held.step + 1 - host.state.start_step:
                continue
            if not any(list_promise(epoch, about, root) in node.remembered for node in stay):
                self.trace(f"nobody is left who holds round {about}: the owner goes back to step {held.step}")
                host.restart_from(held.digest, held.step, self.host_time)
                self._step = host.state.step
                self.changed()
                return

    def go_back(self) -> None:
        """Forgets what the coordinator's disk does not have any more; nodes that know it do not follow for a while."""
        state = self.state()
        assert state.current is not None
        epoch, height = state.epoch, state.current.height
        first = (epoch, height - 2)  # with overlap, the rounds before may be decided in other ways, too
        self._step, self._announced = state.step, -1
        self._record = {place: root for place, root in self._record.items() if place < (epoch, height)}
        self._applied = {place: seen for place, seen in self._applied.items() if place < first}
        self._trained = {place: digest for place, digest in self._trained.items() if place < first}
        self._restless.add(epoch)
        self._lost = True
        for node in self.nodes:
            seen = node.core.state if node.core is not None else None
            node.follows = seen is None or seen.nonce <= state.nonce

    def changed(self) -> None:
        """Announces a change; late ones are skipped, as by a websocket that sends only the newest."""
        assert self.host is not None
        if self.host.state.nonce == self._announced:
            return
        self._observe(self.host.state)
        if self._recorder is not None:
            self._recorder.seen(self.host.state, self.host.history)
        self._announced = self.host.state.nonce
        for node in self.nodes:
            if node.core is not None:
                self.at(self._latency(), lambda node=node, life=node.life: self._push(node, life))  # type: ignore[misc]

    def _push(self, node: SimNode, life: int) -> None:
        if (
            self.host is not None
            and node.life == life
            and not self.faults.outage
            and not (self.now < self.scenario.calm and self.rng.random() < self.scenario.loss / 2)
        ):
            self._give(node, ev.StateSeen(self.host.state))

    def _ask(self, node: SimNode, request: Request[Any], life: int) -> None:
        def fail(code: str, text: str, retryable: bool) -> None:
            failed = ev.RequestFailed(request, code, text, retryable)
            self.at(self._latency(), lambda: self._give_if(node, life, failed))

        if self.faults.lost() or self.faults.outage or self.host is None:
            fail("Unreachable", "the coordinator did not answer", True)
            return
        sent: Request[Any] = request
        if isinstance(request, Join):
            sent = Join(node.name, self._manifest)
        elif isinstance(request, Witness):
            sent = replace(request, report=node.report)
        try:
            answer = self.host.handle(node.identity.public, sent, self.host_time)
        except CoordinatorError as error:
            if isinstance(request, Join) and not error.retryable and error.code not in STALE:  # as the runtime does
                self.faults.end(node)
                node.gone = True
            fail(error.code, str(error), error.retryable)
            return
        if isinstance(request, GetRounds):
            seen = ev.RoundsSeen(request.epoch, request.first, answer)
            self.at(self._latency(), lambda: self._give_if(node, life, seen))
        self.changed()
        self.at(self._latency(), lambda: self._push(node, life))

    # --- nodes --------------------------------------------------------------------------------------------------------

    def add_node(self) -> SimNode:
        """A new node, which is not running yet."""
        number = len(self.nodes)
        identity = Identity(sha256(b"node", number.to_bytes(2, "little")))
        node = SimNode(number, identity, speed=SPEEDS[number % 4], distro=self._distro)
        self.nodes.append(node)
        self._by_key[node.identity.public] = node
        return node

    def start(self, node: SimNode) -> None:
        """Starts a node that is not running, unless it is gone for good."""
        if node.gone or node.core is not None:
            return
        if self._trace:
            node.recorder = Recorder(node.name, node.identity.public, RUN, lambda: self.now, self._trace)
            node.recorder.note(Kind.START, f"as a node that is {node.role}" if node.role else "")
        node.begin(self._core(node))
        state = self.state()
        if state.phase is not Phase.WAITING_FOR_MEMBERS:
            self._restless.add(state.epoch)  # the buffers of a node that was killed are lost
        self._push_tick(node, node.life)
        self._push(node, node.life)

    def _core(self, node: SimNode) -> NodeCore:
        """A core that knows what the node stored."""
        key = node.identity.public
        settings = Settings(
            self.scenario.overlap,
            3,
            LAYOUT,
            node.payload_size,
            True,
            keep_bytes=self.scenario.keep_bytes,
            rates=Rates(1, (lambda step: RATE) if self.scenario.schedule else None),
            tensors=("head",),
        )
        seal_ = lambda message: seal(node.identity, self.scope, message)  # noqa: E731 - a name would say no more
        own = {kept.message.payload for kept in node.promises.values() if isinstance(kept.message, Result)}
        lost = own - node.blobs.keys()
        node.clock = self.rng.uniform(0, 1e6)
        former = tuple(each.identity for each in self.nodes) if node.role == "stale" else ()
        node.plays = Role(node.role, node.identity, self.scope, self.rng, node.put, former)
        return NodeCore(key, key, self.scope, settings, seal_, node.promises, node.remembered, lost)

    def _push_tick(self, node: SimNode, life: int) -> None:
        if node.life == life and node.core is not None and not node.done:
            if self.host is not None and self.rng.random() < 0.2:
                self._push(node, life)  # a reconnect brings the newest state
            self._give(node, ev.Tick())
            if node.recorder is not None and node.core is not None:
                node.recorder.awaits(None if node.working or node.queue else node.core.awaited())
            self.at(TICK, lambda: self._push_tick(node, life))

    def _give_if(self, node: SimNode, life: int, event: ev.Event) -> None:
        if node.life == life:
            self._give(node, event)

    def _give(self, node: SimNode, event: ev.Event) -> None:
        if node.core is None:
            return
        life = node.life
        if isinstance(event, ev.Received):
            node.plays.hear(event.envelope)
        if node.recorder is not None:
            node.recorder.event(event)
        try:
            for effect in node.core.handle(event, self.now + node.clock):
                if node.recorder is not None and node.core is not None:
                    node.recorder.effect(effect, node.core.log)
                for played in node.plays.play(effect):
                    if node.life == life:
                        self._carry_out(node, played)
        except StoreError:
            self.faults.disk_failed(node)

    def _carry_out(self, node: SimNode, effect: ev.Effect) -> None:
        life = node.life
        match effect:
            case ev.Broadcast(envelope):
                for peer in node.peers:
                    self._send(node, peer, envelope)
            case ev.SendTo(peer, envelope):
                self._send(node, peer, envelope)
            case ev.Promise(key, envelope):
                if isinstance(envelope.message, Result) and node.promises.get(key, envelope) != envelope:
                    raise self._error(f"{node.name} signed twice for {key}")
                node.promise(key, envelope)
            case ev.Remember(key, envelopes):
                node.remember(key, envelopes)
            case ev.SetPeers(peers):
                node.peers = tuple(key for key, _ in peers)
            case ev.Fetch(payload, _, step, providers):
                self.at(self._latency(), lambda: self._fetch(node, life, payload, step, list(providers)))
            case ev.Train() | ev.Apply() | ev.TakeSnapshot() | ev.Load() | ev.ShareBuffers() | ev.LoadBuffers():
                node.queue.append(effect)
                self._work(node)
            case ev.Keep(snapshots, payloads, promises):
                node.keep({*snapshots, *payloads}, promises)
            case ev.WriteDown(records):
                node.write_down([row_of(self.scope, record) for record in records])
            case Finished():
                node.done = effect
            case Notice():
                self._notice(node, effect)
            case Request():
                self.at(self._latency(), lambda: self._ask(node, effect, life))
            case ev.StartOver(state):
                node.core, node.follows = self._core(node), True
                self._give(node, ev.StateSeen(state))
            case ev.Diagnose():
                pass  # it is for people

    def _notice(self, node: SimNode, notice: Notice) -> None:
        """Notes from a node's notices what it need not hold from now on."""
        match notice:
            case KeepsOwnBuffers():
                self._restless.add(self.state().epoch)
            case TensorDiffered(tensor="head"):
                self._repaired += 1
            case TwoResults(trainer) if not node.role:
                self._proofs.setdefault(trainer, []).append((node, node.life, self.now))

    def _send(self, node: SimNode, peer: bytes, envelope: Envelope) -> None:
        target = self._by_key.get(peer)
        if target is None or self.faults.lost() or self.faults.severed(node, target):
            return
        if node.role == "stale":  # all that others send is what they sign for this run
            try:
                envelope = open_envelope(envelope.raw, self.scope)
            except WireError:
                return
        life = target.life
        copies = 2 if self.rng.random() < self.scenario.duplicate else 1
        for _ in range(copies):
            self.at(self._latency(), lambda: self._give_if(target, life, ev.Received(envelope)))

    def _fetch(self, node: SimNode, life: int, digest: bytes, step: int, providers: list[bytes]) -> None:
        """Tries the providers in turn, each with its delay and chance of failure."""
        if node.life != life:
            return
        while providers:
            source = self._by_key[providers.pop(0)]
            if not self._lets_in(source, node) or self.faults.lost():
                continue
            data = source.serve(digest)
            if data is None or self.faults.payload_lost() or sha256(data) != digest:
                continue
            if data.startswith(BAD) or len(data) != node.payload_size(step):
                self._give(node, ev.Fetched(digest, "a malformed payload", refused=True))
                return
            try:
                node.put(data)
            except StoreError:
                self.faults.disk_failed(node)
            else:
                self._give(node, ev.Fetched(digest))
            return
        self._give(node, ev.Fetched(digest, "nobody has it"))

    def _lets_in(self, source: SimNode, node: SimNode) -> bool:
        """Whether a node can fetch from another node, which serves only its peers."""
        known = source.core is not None and node.identity.public in source.peers
        return known and not self.faults.severed(node, source) and not self.faults.severed(source, node)

    # --- the training thread ------------------------------------------------------------------------------------------

    def _work(self, node: SimNode) -> None:
        if node.working or not node.queue:
            return
        node.working = True
        task, life = node.queue.popleft(), node.life
        seconds = 0.02
        if isinstance(task, ev.Train):
            seconds = self.rng.uniform(0.2, 3.0) * max(1, self._distro.at(task.step).local_steps)
        if self.scenario.speeds and isinstance(task, ev.Train):
            samples = count(task.batch)
            seconds = samples / (node.speed * self.rng.uniform(0.9, 1.1))
            node.report = Report(task.step, tokens_per_second=BOAST if node.role else samples / seconds)
        self.at(seconds, lambda: self._worked(node, life, task))

    def _worked(self, node: SimNode, life: int, task: ev.Effect) -> None:
        if node.life != life:
            return
        node.working = False
        try:
            event = self._perform(node, task)
        except StoreError:
            self.faults.disk_failed(node)
            return
        if isinstance(task, ev.Apply) and node.follows and not node.flipped and not node.role:
            self._check(node, task.epoch, task.height)
        self._give(node, event)
        self._work(node)

    def _perform(self, node: SimNode, task: ev.Effect) -> ev.Event:
        match task:
            case ev.Load(digest, providers):
                blob, reason = self._find(node, digest, providers), ""
                try:
                    if blob is None:
                        raise TransportError("nobody has it")
                    node.load(blob)
                except (TransportError, WireError) as error:
                    reason = str(error)
                return ev.Loaded(digest, reason, node.open_ids)
            case ev.LoadBuffers(index, providers):
                blob = self._find(node, index, providers)
                node.buffers = blob or node.buffers
                return ev.BuffersLoaded(index, "" if blob else "nobody has it")
            case ev.Train(epoch, height):
                self._check_training(node, epoch, height)
        return node.perform(task, self.rng)

    def _find(self, node: SimNode, digest: bytes, providers: Sequence[bytes]) -> bytes | None:
        """A blob of parameters or buffers, from the node's disk or from a peer."""
        if digest in node.blobs:
            return node.blobs[digest]
        for source in (self._by_key[key] for key in providers):
            if not self._lets_in(source, node) or self.faults.lost():
                continue
            blob = source.serve(digest)
            if blob is not None and sha256(blob) == digest:
                self._taken += 1
                return blob
        return None

    def _check_training(self, node: SimNode, epoch: int, height: int) -> None:
        """Checks that all nodes train a round with equal parameters, and an epoch's first round with equal buffers."""
        if node.role or not node.follows:
            return
        if not node.flipped and self._trained.setdefault((epoch, height), node.digest) != node.digest:
            raise self._error(f"{node.name} trains round {height} of epoch {epoch} with other parameters than others")
        if (
            height == 0
            and epoch not in self._restless
            and self._buffers.setdefault(epoch, node.buffers) != node.buffers
        ):
            raise self._error(f"{node.name} begins epoch {epoch} with other buffers than others")

    def _check(self, node: SimNode, epoch: int, height: int) -> None:
        seen = self._applied.setdefault((epoch, height), {})
        seen[node.digest] = (node.identity.public, node.name)
        if len(seen) > 1:
            names = " and ".join(f"{name} ({head.hex()[:8]})" for head, (_, name) in seen.items())
            raise self._error(f"after round {height} of epoch {epoch} the parameters differ: {names}")


def _distro(scenario: Scenario) -> DistroConfig:
    """The configuration of a history, with a schedule of k and local steps if these change."""
    rng = random.Random(f"distro {scenario.seed}")
    firsts = sorted(rng.sample(range(1, scenario.steps + 1), scenario.changes))
    schedule = [
        {"from_step": first, "k": rng.choice([2, 6, 24, 96]), "local_steps": rng.choice([1, 2, 4])} for first in firsts
    ]
    return DistroConfig(local_steps=1, schedule=schedule) if schedule else DistroConfig()


def _leave_ctrl_c_to_the_first() -> None:
    """A terminal sends Ctrl-C to all processes; the one that began the others ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _attempt(seed: int) -> History | SimulationError:
    try:
        return simulate(seed)
    except SimulationError as error:
        return error


def simulate_all(seeds: Iterable[int], workers: int) -> Iterator[History | SimulationError]:
    """Plays many histories in ``workers`` processes; yields histories and failures in the order of the seeds."""
    if workers == 1:
        yield from map(_attempt, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(workers, _leave_ctrl_c_to_the_first) as pool:
        yield from pool.imap(_attempt, seeds, chunksize=4)


def simulate(seed: int, trace: Callable[[Entry], None] | None = None) -> History:
    """Play the history of a seed.

    Raises:
        SimulationError: a promise was broken.
    """
    return Simulation(Scenario.draw(seed), trace).run()
