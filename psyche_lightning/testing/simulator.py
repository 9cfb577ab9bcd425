"""Whole runs in virtual time: the real node core and coordinator machine under faults drawn from a seed.

The network loses, delays, reorders and duplicates messages; nodes and the coordinator are killed and restarted;
links are cut; some nodes cheat. The parameters are a hash chain instead of tensors, so that a node that applied
anything else than the others is seen at once. ``psyche sim --seed N`` replays one history exactly.
"""

from __future__ import annotations

import heapq
import multiprocessing
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.coordinator.open_ids import OpenIds, count
from psyche_lightning.coordinator.protocol import Report
from psyche_lightning.coordinator.state import CoordinatorConfig, Phase, RunState
from psyche_lightning.errors import CoordinatorError
from psyche_lightning.node.audit import Ledger, audit
from psyche_lightning.node.book import Row, row_of
from psyche_lightning.node.core import NodeCore
from psyche_lightning.node.events import (
    Accuse,
    Applied,
    Apply,
    AskRounds,
    Broadcast,
    Call,
    CallFailed,
    Diagnose,
    Effect,
    Event,
    Fetch,
    Fetched,
    Finish,
    HealthCheck,
    Join,
    Keep,
    Load,
    Loaded,
    Promise,
    Received,
    RoundsSeen,
    Say,
    SendTo,
    SetPeers,
    SnapshotTaken,
    StateSeen,
    TakeSnapshot,
    Tick,
    Train,
    Trained,
    Vote,
    WarmupWitness,
    Witness,
    WriteDown,
)
from psyche_lightning.node.settings import Settings
from psyche_lightning.testing.scenario import Outcome, Scenario, SimulationError
from psyche_lightning.wire.canonical import pack, unpack
from psyche_lightning.wire.hashing import sha256
from psyche_lightning.wire.identity import Identity, short
from psyche_lightning.wire.messages import Envelope, Result, seal

RUN = "sim"
LAYOUT = sha256(b"simulated layout")
TICK = 0.5
BAD = b"malformed"
HORIZON = 4000.0
"""Virtual seconds after which a history that has not finished counts as hanging."""


@dataclass
class SimNode:
    """A node: what survives a kill (identity, blobs, promises, chain head on disk) and what does not."""

    index: int
    identity: Identity
    cheat: str = ""
    blobs: dict[bytes, bytes] = field(default_factory=dict)
    promises: dict[str, Envelope] = field(default_factory=dict)
    core: NodeCore | None = None
    life: int = 0
    head: bytes = b""
    peers: tuple[bytes, ...] = ()
    queue: deque[Effect] = field(default_factory=deque)
    working: bool = False
    done: str = ""
    gone: bool = False
    flipped: bool = False
    open_ids: OpenIds = ()
    book: list[Row] = field(default_factory=list)
    young: set[bytes] = field(default_factory=set)

    @property
    def name(self) -> str:
        """Short key, as in the logs."""
        return short(self.identity.public)

    @property
    def digest(self) -> bytes:
        """Digest of its parameters, to which the open ids belong."""
        return sha256(pack([self.head, self.open_ids]))


class Simulation:
    """One history.

    Args:
        scenario: what may happen.
        trace: called with ``(virtual time, text)`` for everything worth reading.
    """

    def __init__(self, scenario: Scenario, trace: Callable[[float, str], None] | None = None) -> None:
        self.scenario = scenario
        self.rng = random.Random(f"history {scenario.seed}")
        self.now = 0.0
        self.faults = 0
        self._trace = trace
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._by_key: dict[bytes, SimNode] = {}
        self._cut: set[frozenset[int]] = set()
        self._applied: dict[tuple[int, int], dict[bytes, tuple[bytes, str]]] = {}
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
            init_min_clients=max(2, scenario.nodes - 2),
            min_clients=2,
            waiting_for_members_extra_time=3.0,
        )
        self.host: RunHost | None = RunHost(RUN, config, seed=scenario.seed, manifest={"run": {}})
        self.host.begin(0.0)
        self._disk: dict[str, Any] = {}
        self._announced = -1
        self.nodes: list[SimNode] = []
        for _ in range(scenario.nodes):
            self._new_node()
        self._taken = self._repaired = 0
        for node in self.nodes[: scenario.cheats]:
            node.cheat = self.rng.choice(["malformed", "equivocate"])

    # --- time -------------------------------------------------------------------------------------------------------

    def at(self, delay: float, action: Callable[[], None]) -> None:
        """Do something after ``delay`` virtual seconds."""
        self._count += 1
        heapq.heappush(self._queue, (self.now + delay, self._count, action))

    def trace(self, text: str) -> None:
        """Note something for whoever reads the history."""
        if self._trace:
            self._trace(self.now, text)

    def run(self) -> Outcome:
        """Play the history to its end.

        Raises:
            SimulationError: replicas differed, the run hung or ended without its steps.
        """
        for node in self.nodes:
            self.at(self.rng.uniform(0, 3), lambda node=node: self._start(node))  # type: ignore[misc]
        self._plan_faults()
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
            if all(node.done or node.gone for node in self.nodes):
                break
        return self._outcome()

    def _error(self, what: str) -> SimulationError:
        seed = self.scenario.seed
        return SimulationError(f"simulated history {seed}: {what}\n  replay it: psyche sim --seed {seed} --trace")

    def _outcome(self) -> Outcome:
        state = self._state()
        if state.phase is not Phase.FINISHED or state.step != self.scenario.steps + 1:
            raise self._error(f"it ended in {state.phase.name} at step {state.step} of {self.scenario.steps}")
        digest = state.checkpoint.digest
        wrong = [n.name for n in self.nodes if not n.gone and n.digest != digest and "nobody gave" not in n.done]
        if not digest or wrong:
            raise self._error(f"{', '.join(wrong) or 'everybody'} ended with other parameters than agreed")
        ledger = self._audit()
        return Outcome(
            self.scenario,
            self.now,
            len(self._applied),
            digest,
            state.epoch,
            self.faults,
            again=count((line.start, line.end) for line in ledger.lines if line.again),
            untrained=count(ledger.untrained),
            snapshots=self._taken,
            repaired=self._repaired,
        )

    def _audit(self) -> Ledger:
        """The run's ledger, from the books of all nodes that there ever were.

        Raises:
            SimulationError: it is not complete: an id was lost, or trained twice.
        """
        ledger = audit(row for node in self.nodes for row in node.book)
        if ledger.last_step != self.scenario.steps or ledger.rounds != self.scenario.steps:
            ledger.problems.append(f"{ledger.rounds} rounds up to step {ledger.last_step} of {self.scenario.steps}")
        if ledger.problems:
            raise self._error(f"the ledger is not complete: {'; '.join(ledger.problems[:3])}")
        return ledger

    # --- faults -----------------------------------------------------------------------------------------------------

    def _plan_faults(self) -> None:
        rng, calm = self.rng, self.scenario.calm
        for _ in range(self.scenario.kills):
            node = rng.choice(self.nodes)
            self.at(rng.uniform(5, calm), lambda node=node: self._kill(node))  # type: ignore[misc]
        for number in range(self.scenario.replacements):
            self.at(rng.uniform(20, calm), lambda node=self.nodes[-1 - number]: self._replace(node))  # type: ignore[misc]
        for _ in range(self.scenario.flips):
            node = rng.choice(self.nodes)
            self.at(rng.uniform(10, calm), lambda node=node: self._flip(node))  # type: ignore[misc]
        for _ in range(self.scenario.coordinator_kills):
            self.at(rng.uniform(5, calm), self._kill_coordinator)
        for _ in range(self.scenario.pauses):
            self.at(rng.uniform(3, 60), self._pause)
        for _ in range(self.scenario.cuts):
            pair = frozenset(rng.sample(range(self.scenario.nodes), 2))
            start = rng.uniform(5, calm)
            self.at(start, lambda pair=pair: self._cut.add(pair))  # type: ignore[misc]
            self.at(start + rng.uniform(5, 60), lambda pair=pair: self._cut.discard(pair))  # type: ignore[misc]
            self.faults += 1

    def _kill(self, node: SimNode) -> None:
        if node.core is None or node.done:
            return
        self._end(node)
        if self.rng.random() < 0.6:
            grace = self.rng.uniform(1, 6)
            self.at(grace, lambda life=node.life: self._vanished(node, life))  # type: ignore[misc]
        self.at(self.rng.uniform(0.5, 40), lambda: self._start(node))

    def _end(self, node: SimNode) -> None:
        self.faults += 1
        self.trace(f"kill {node.name}")
        node.core, node.working = None, False
        node.life += 1
        node.queue.clear()

    def _replace(self, node: SimNode) -> None:
        """A node goes for good, with its disk; another comes in its place."""
        if node.gone or node.done:
            return
        self._end(node)
        node.gone, node.blobs, node.promises = True, {}, {}
        self.at(self.rng.uniform(1, 6), lambda life=node.life: self._vanished(node, life))  # type: ignore[misc]
        fresh = self._new_node()
        self.at(self.rng.uniform(1, 30), lambda: self._start(fresh))

    def _new_node(self) -> SimNode:
        node = SimNode(len(self.nodes), Identity(sha256(b"node", len(self.nodes).to_bytes(2, "little"))))
        self.nodes.append(node)
        self._by_key[node.identity.public] = node
        return node

    def _flip(self, node: SimNode) -> None:
        """The parameters of a node change by themselves, if they are of consequence."""
        if node.core is not None and not node.done:
            self.faults += 1
            self.trace(f"the parameters of {node.name} change by themselves")
            node.head, node.flipped = sha256(node.head, b"flipped"), True

    def _vanished(self, node: SimNode, life: int) -> None:
        if self.host is not None and node.core is None and node.life == life:
            self.host.disconnected(node.identity.public, self.now, "no connection")
            self._changed()

    def _kill_coordinator(self) -> None:
        if self.host is None:
            return
        self.faults += 1
        self.trace("kill the coordinator")
        self._disk, self.host = self.host.dump(), None  # it had stored every change before it announced it
        self.at(self.rng.uniform(0.5, 15), self._restart_coordinator)

    def _pause(self) -> None:
        if self.host is None:
            self.at(1.0, self._pause)
        elif not self.host.state.phase.halted:
            self.faults += 1
            self.trace("pause")
            self.host.pause(self.now)
            self._changed()
            self.at(self.rng.uniform(1, 30), self._resume)

    def _resume(self) -> None:
        """Resume once the run has halted; nothing to do where it came to its end."""
        if self.host is None or self.host.state.pending_pause:
            self.at(1.0, self._resume)
        elif self.host.state.phase is Phase.PAUSED:
            self.trace("resume")
            self.host.resume(self.now)
            self._changed()

    def _restart_coordinator(self) -> None:
        self.trace("restart the coordinator")
        self.host = RunHost.load(self._disk)
        self.host.restarted(self.now)
        self._changed()

    def _lost(self) -> bool:
        lost = self.now < self.scenario.calm and self.rng.random() < self.scenario.loss
        self.faults += lost
        return lost

    def _latency(self) -> float:
        return self.rng.uniform(0.001, self.scenario.delay)

    # --- coordinator --------------------------------------------------------------------------------------------------

    def _state(self) -> RunState:
        return (self.host or RunHost.load(self._disk)).state

    def _tick_coordinator(self) -> None:
        if self.host is not None and self.host.tick(self.now):
            self._changed()
        self.at(TICK, self._tick_coordinator)

    def _changed(self) -> None:
        """Announce a change; what arrives late is skipped, as a websocket that sends the newest does."""
        assert self.host is not None
        if self.host.state.nonce == self._announced:
            return
        self._announced = self.host.state.nonce
        for node in self.nodes:
            if node.core is not None:
                self.at(self._latency(), lambda node=node, life=node.life: self._push(node, life))  # type: ignore[misc]

    def _push(self, node: SimNode, life: int) -> None:
        if (
            self.host is not None
            and node.life == life
            and not (self.now < self.scenario.calm and self.rng.random() < self.scenario.loss / 2)
        ):
            self._give(node, StateSeen(self.host.state))

    def _call(self, node: SimNode, call: Call, life: int) -> None:
        def fail(code: str, text: str, retryable: bool) -> None:
            self.at(self._latency(), lambda: self._give_if(node, life, CallFailed(call, code, text, retryable)))

        if self._lost() or self.host is None:
            fail("Unreachable", "the coordinator did not answer", True)
            return
        host, me = self.host, node.identity.public
        try:
            match call:
                case Join():
                    host.join(me, me, node.name, {"run": {}}, self.now)
                case WarmupWitness(epoch, index, digest):
                    host.warmup_witness(me, epoch, index, digest, self.now)
                case Witness(epoch, height, proof, merkle, participants, broadcasts):
                    report = Report()
                    host.witness(me, epoch, height, proof, merkle, participants, broadcasts, report, self.now)
                case HealthCheck(epoch, height, signers):
                    host.health_check(me, epoch, height, list(signers), self.now)
                case Vote(epoch, step, digest):
                    host.checkpoint(me, epoch, step, digest, self.now)
                case Accuse(first_result, second_result):
                    host.accuse(me, first_result.raw, second_result.raw, self.now)
                case AskRounds(epoch, first):
                    rounds = tuple(host.rounds(epoch, first))
                    self.at(self._latency(), lambda: self._give_if(node, life, RoundsSeen(epoch, first, rounds)))
        except CoordinatorError as error:
            if isinstance(call, Join) and not error.retryable:  # as the runtime does
                self._end(node)
                node.gone = True
            fail(error.code, str(error), error.retryable)
            return
        self._changed()
        self.at(self._latency(), lambda: self._push(node, life))

    # --- nodes --------------------------------------------------------------------------------------------------------

    def _start(self, node: SimNode) -> None:
        if node.gone or node.core is not None:
            return
        self.trace(f"start {node.name}")
        key = node.identity.public
        settings = Settings(
            self.scenario.overlap, 3, LAYOUT, 64, keep_bytes=self.scenario.keep_bytes, tensors=("head",)
        )
        seal_ = lambda message: seal(node.identity, RUN, message)  # noqa: E731 - a name would say no more
        kept = {
            key: envelope
            for key, envelope in node.promises.items()
            if not isinstance(envelope.message, Result) or envelope.message.payload in node.blobs
        }
        node.core = NodeCore(key, key, RUN, settings, seal_, kept)
        node.head, node.open_ids, node.flipped = sha256(b"initial", key, bytes([node.life])), (), False
        self._push_tick(node, node.life)
        self._push(node, node.life)

    def _push_tick(self, node: SimNode, life: int) -> None:
        if node.life == life and node.core is not None and not node.done:
            if self.host is not None and self.rng.random() < 0.2:
                self._push(node, life)  # a reconnect brings the newest state
            self._give(node, Tick())
            self.at(TICK, lambda: self._push_tick(node, life))

    def _give_if(self, node: SimNode, life: int, event: Event) -> None:
        if node.life == life:
            self._give(node, event)

    def _give(self, node: SimNode, event: Event) -> None:
        if node.core is None:
            return
        for effect in node.core.handle(event, self.now):
            self._carry_out(node, effect)

    def _carry_out(self, node: SimNode, effect: Effect) -> None:
        life = node.life
        match effect:
            case Broadcast(envelope):
                for index, peer in enumerate(node.peers):
                    self._send(node, peer, self._told(node, envelope, index))
            case SendTo(peer, envelope):
                self._send(node, peer, envelope)
            case Promise(key, envelope):
                if key in node.promises and node.promises[key] != envelope:
                    raise self._error(f"{node.name} signed twice for {key}")
                node.promises[key] = envelope
            case SetPeers(peers):
                node.peers = tuple(key for key, _ in peers)
            case Fetch(payload, _, providers):
                self.at(self._latency(), lambda: self._fetch(node, life, payload, list(providers)))
            case Train() | Apply() | TakeSnapshot() | Load():
                node.queue.append(effect)
                self._work(node)
            case Keep(snapshots, payloads, promises):
                kept = {*snapshots, *payloads, *node.young}
                node.young.clear()
                node.blobs = {key: blob for key, blob in node.blobs.items() if key in kept}
                node.promises = {key: node.promises[key] for key in promises}
            case WriteDown(records):
                node.book += [row_of(RUN, record) for record in records]
            case Say(_, text):
                node.flipped = node.flipped or text.startswith("nobody has the list")  # others may decide otherwise
                self._repaired += text.startswith("the first tensor that differed was 'head'")
                self.trace(f"{node.name}: {text}")
            case Finish(reason):
                node.done = reason
                self.trace(f"{node.name} leaves: {reason}")
            case Join() | WarmupWitness() | Witness() | HealthCheck() | Vote() | AskRounds() | Accuse():
                self.at(self._latency(), lambda: self._call(node, effect, life))
            case Diagnose():
                pass  # it is for people

    def _told(self, node: SimNode, envelope: Envelope, index: int) -> Envelope:
        """A cheat tells half of its peers of another result for the same batch."""
        message = envelope.message
        if node.cheat != "equivocate" or not isinstance(message, Result) or index % 2:
            return envelope
        other = Result(**{**message.__dict__, "nonce": message.nonce + 1})
        return seal(node.identity, RUN, other)

    def _send(self, node: SimNode, peer: bytes, envelope: Envelope) -> None:
        target = self._by_key.get(peer)
        if target is None or self._lost() or self._severed(node, target):
            return
        life = target.life
        copies = 2 if self.rng.random() < self.scenario.duplicate else 1
        for _ in range(copies):
            self.at(self._latency(), lambda: self._give_if(target, life, Received(envelope)))

    def _severed(self, a: SimNode, b: SimNode) -> bool:
        return frozenset((a.index, b.index)) in self._cut

    def _fetch(self, node: SimNode, life: int, digest: bytes, providers: list[bytes]) -> None:
        """Try one provider after another, each with its delay and chance of failure."""
        if node.life != life:
            return
        while providers:
            source = self._by_key[providers.pop(0)]
            if source.core is None or self._severed(node, source) or self._lost() or digest not in source.blobs:
                continue
            if self.rng.random() < self.scenario.payload_loss:
                self.faults += 1
                continue
            data = source.blobs[digest]
            if data.startswith(BAD):
                self._give(node, Fetched(digest, "a malformed payload", refused=True))
                return
            self._put(node, data)
            self._give(node, Fetched(digest))
            return
        self._give(node, Fetched(digest, "nobody has it"))

    # --- the training thread ------------------------------------------------------------------------------------------

    def _work(self, node: SimNode) -> None:
        if node.working or not node.queue:
            return
        node.working = True
        task, life = node.queue.popleft(), node.life
        seconds = self.rng.uniform(0.2, 3.0) if isinstance(task, Train) else 0.02
        self.at(seconds, lambda: self._worked(node, life, task))

    def _worked(self, node: SimNode, life: int, task: Effect) -> None:
        if node.life != life:
            return
        node.working = False
        event: Event
        match task:
            case Train(epoch, height, step, batch):
                prefix = BAD if node.cheat == "malformed" else b"ok"
                blob = prefix + sha256(node.identity.public, node.head, f"{epoch} {height}".encode())
                digest = self._put(node, blob)
                start, end = batch[0]
                tokens = 0 if self.rng.random() < 0.01 else count(batch)  # at times a node abstains
                result = Result(
                    epoch, height, step, start, end, 0, digest, len(blob), LAYOUT, (1,), 0, tokens, batch[1:]
                )
                event = Trained(epoch, height, result)
            case Apply(epoch, height, payloads, lrs, due, _, prints, open_ids):
                if payloads:  # as in the runtime, an empty set leaves the parameters alone
                    node.head = sha256(node.head, *(node.blobs[payload] for payload in payloads), repr(lrs).encode())
                node.open_ids = open_ids
                if not node.flipped:
                    self._check(node, epoch, height)
                digest = self._store(node) if due else b""
                event = Applied(epoch, height, digest, node.head[:8] if prints else b"")
            case TakeSnapshot(open_ids):
                node.open_ids = open_ids
                event = SnapshotTaken(self._store(node))
            case Load(digest):
                event = Loaded(digest, self._load(node, digest), node.open_ids)
            case _:
                raise AssertionError(task)
        self._give(node, event)
        self._work(node)

    def _put(self, node: SimNode, blob: bytes) -> bytes:
        digest = sha256(blob)
        node.blobs[digest] = blob
        node.young.add(digest)
        return digest

    def _store(self, node: SimNode) -> bytes:
        return self._put(node, pack([node.head, node.open_ids]))

    def _load(self, node: SimNode, digest: bytes) -> str:
        sources: list[Any] = [node, *(self._by_key[key] for key in node.peers)]
        for source in sources:
            reachable = source is node or (source.core is not None and not self._severed(node, source))
            if reachable and digest in source.blobs and (source is node or not self._lost()):
                node.head, open_ids = unpack(source.blobs[digest], max_size=1 << 20)
                node.open_ids, node.flipped = tuple(map(tuple, open_ids)), False
                self._put(node, source.blobs[digest])
                self._taken += source is not node
                return ""
        return "nobody has it"

    def _check(self, node: SimNode, epoch: int, height: int) -> None:
        seen = self._applied.setdefault((epoch, height), {})
        seen[node.digest] = (node.identity.public, node.name)
        if len(seen) > 1:
            names = " and ".join(f"{name} ({head.hex()[:8]})" for head, (_, name) in seen.items())
            raise self._error(f"after round {height} of epoch {epoch} the parameters differ: {names}")


def _attempt(seed: int) -> Outcome | SimulationError:
    try:
        return simulate(seed)
    except SimulationError as error:
        return error


def simulate_all(seeds: Iterable[int], workers: int) -> Iterator[Outcome | SimulationError]:
    """Play many histories in that many processes; yields outcomes and failures in the order of the seeds."""
    if workers == 1:
        yield from map(_attempt, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(_attempt, seeds, chunksize=4)


def simulate(seed: int, trace: Callable[[float, str], None] | None = None) -> Outcome:
    """Play the history of a seed.

    Raises:
        SimulationError: a promise was broken.
    """
    return Simulation(Scenario.draw(seed), trace).run()
