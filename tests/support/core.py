"""One node core among peers that do what a test says: real states, messages and signatures, and time that is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.errors import CoordinatorError
from psyche_lightning.node import events as ev
from psyche_lightning.node.agreement import AgreedSet, EpochLog, Unknown, agreed_set
from psyche_lightning.node.core import NodeCore
from psyche_lightning.node.rounds import RoundLog
from psyche_lightning.node.settings import Settings
from psyche_lightning.node.witness import witness_report
from psyche_lightning.protocol.merkle import merkle_root
from psyche_lightning.protocol.messages import Attest, Envelope, Message, Result, seal
from psyche_lightning.protocol.open_ids import OpenIds, closed
from psyche_lightning.protocol.requests import GetRounds, Join, Request, WarmupWitness
from psyche_lightning.protocol.state import ClientStatus, CoordinatorConfig, Phase, Round, RunState
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import Identity

RUN = "run"
LAYOUT = b"L" * 32
NODES = [Identity(bytes([n + 1]) * 32) for n in range(8)]
KEYS = tuple(node.public for node in NODES)
STRANGER = Identity(b"\xff" * 32)
RETRY = 2.0
RATES = (7,)
SIZE = 10
"""Bytes of a payload."""

_T = TypeVar("_T")


def parameters(steps: int) -> bytes:
    """The digest of the run's parameters after so many training rounds."""
    return sha256(b"parameters", bytes([steps]))


def commitments(*envelopes: Envelope) -> list[bytes]:
    """The commitments of these results, in ascending order."""
    results = [(one.sender, one.message) for one in envelopes]
    return sorted(each.commitment(RUN, sender) for sender, each in results if isinstance(each, Result))


def of(effects: Iterable[object], kind: type[_T]) -> list[_T]:
    """The effects of a kind, in order."""
    return [effect for effect in effects if isinstance(effect, kind)]


def one(effects: Iterable[object], kind: type[_T]) -> _T:
    """The only effect of a kind."""
    (found,) = of(effects, kind)
    return found


def sent(effects: Iterable[object], kind: type[_T]) -> list[_T]:
    """The messages of a kind that are sent, to one peer or to all."""
    messages = [effect.envelope.message for effect in effects if isinstance(effect, (ev.Broadcast, ev.SendTo))]
    return of(messages, kind)


def brief(effects: Iterable[ev.Effect], *kinds: type) -> list[str]:
    """Effects in short, such as ``Train 3``, ``Ask to 2`` or ``Result to all``; of these kinds, or all."""
    return [_brief(effect) for effect in effects if not kinds or isinstance(effect, kinds)]


def _brief(effect: ev.Effect) -> str:
    match effect:
        case ev.Train(height=height) | ev.Apply(height=height):
            return f"{type(effect).__name__} {height}"
        case ev.Broadcast(envelope):
            return f"{type(envelope.message).__name__} to all"
        case ev.SendTo(peer, envelope):
            return f"{type(envelope.message).__name__} to {KEYS.index(peer)}"
        case ev.Load(digest):
            steps = _steps(digest)
            return "Load others" if steps is None else f"Load {steps}"
    return type(effect).__name__


def _steps(digest: bytes) -> int | None:
    return next((steps for steps in range(64) if parameters(steps) == digest), None)


class Scene:
    """A run with a real coordinator, in which the core under test is one node.

    Nothing happens unless a test asks for it. Methods that give the core an event return the effects.

    Args:
        nodes: of the run.
        me: which of them the core is.
        promises: the promises that the core finds in its journal.
        remembered: the announcements that it finds there.
        config: of the run, beside what the scene sets.
        settings: of the core, beside what the scene sets.

    Attributes:
        now: the time of core and coordinator, in seconds.
        host: the coordinator.
        core: what is tested.
        log: the epoch as somebody knows it who hears everything.
        head: training steps that are in the core's parameters; None when they are others.
        written: what the core wrote into its ledger.
        kept: what it wanted to keep last.
        promises: the promises in its journal.
        remembered: the announcements in its journal.
    """

    def __init__(
        self,
        nodes: int = 3,
        *,
        me: int = 0,
        promises: Mapping[str, Envelope] | None = None,
        remembered: Mapping[str, Sequence[Envelope]] | None = None,
        settings: Mapping[str, Any] | None = None,
        **config: Any,
    ) -> None:
        values = {"warmup_time": 20.0, "cooldown_time": 20.0, "max_round_train_time": 40.0, "round_witness_time": 5.0}
        sizes = {"global_batch_size_start": 2 * nodes, "global_batch_size_end": 2 * nodes, "init_min_clients": nodes}
        chosen = {
            "overlap": False,
            "digest_every": 2,
            "layout": LAYOUT,
            "payload_size": lambda step: 64,
            "tensors": ("a", "b"),
        }
        self.now = 100.0
        self.host = RunHost(RUN, CoordinatorConfig(**{**values, **sizes, **config}), seed=5)
        self.settings = Settings(**{**chosen, "retry": RETRY, "retry_most": 15.0, **(settings or {})})
        self.me, self.nodes = me, nodes
        self.core = NodeCore(KEYS[me], KEYS[me], RUN, self.settings, self.seal, promises, remembered)
        self.log = EpochLog(0, parameters(0), 1, 1)
        self.log.start(0, ())
        self.head: int | None = None
        self.open_ids: OpenIds = ()
        self.written: list[Any] = []
        self.kept: ev.Keep | None = None
        self.promises = dict(promises or {})
        self.remembered = dict(remembered or {})

    def restarted(self, head: int | None = None, **options: Any) -> Scene:
        """The core's node starts again with what is in its journal.

        Args:
            head: training steps that are in its parameters; None when they are others.
            options: of the new scene.
        """
        kept = {"promises": self.promises, "remembered": self.remembered}
        again = Scene(self.nodes, me=self.me, **{**kept, **options})
        again.host, again.log, again.now, again.head = self.host, self.log, self.now, head
        again.settings = self.settings
        return again

    # --- the run ----------------------------------------------------------------------------------------------------

    @property
    def state(self) -> RunState:
        return self.host.state

    @property
    def round(self) -> Round:
        assert self.state.current is not None
        return self.state.current

    @property
    def peers(self) -> list[int]:
        """The other nodes, without those that have left the epoch."""
        left = {client.signer for client in self.state.clients if client.status is not ClientStatus.HEALTHY}
        gone = {client.signer for client in self.state.exited_clients} | left
        return [i for i in range(self.nodes) if i != self.me and KEYS[i] not in gone]

    def pass_time(self, seconds: float) -> None:
        """Time passes for the coordinator."""
        self.now += seconds
        self.host.tick(self.now)
        self._observe()

    def ask(self, i: int, request: Request[Any]) -> Any:
        """Node ``i`` asks the coordinator."""
        answer = self.host.handle(KEYS[i], request, self.now)
        self._observe()
        return answer

    def join(self, *who: int) -> None:
        for i in who:
            self.ask(i, Join(f"at {i}"))

    def warm(self) -> None:
        """Everybody joins, and the epoch is formed."""
        self.join(*range(self.nodes))
        self.pass_time(3.0)
        assert self.state.phase is Phase.WARMUP

    def ready(self) -> None:
        """The first round is announced; the core holds its parameters, and has not seen it."""
        self.warm()
        self.head = 0
        self.obey(self.see())
        for i in self.peers:
            self.ask(i, WarmupWitness(self.state.epoch, i, parameters(0)))
            if self.state.phase is Phase.WARMUP:
                self.obey(self.see())  # who is not the first in the list waits for who is
        assert self.state.phase is Phase.ROUND_TRAIN

    def begin(self, but: tuple[type, ...] = ()) -> list[ev.Effect]:
        """The first round is announced, and the core sees it with the right parameters.

        Returns:
            The effects of seeing it, and of what follows from them; those of the kinds in ``but`` are left alone.
        """
        self.ready()
        return self.obey(self.see(), but)

    def next_epoch(self) -> bytes:
        """The epoch is over, and everybody begins the next with its parameters.

        The core has seen the warm-up, not the first round.
        """
        agreed = self.state.checkpoint.digest
        self.obey(self.see())
        self.join(*range(self.nodes))
        self.pass_time(3.0)
        self.obey(self.see())
        for i in self.peers:
            self.ask(i, WarmupWitness(self.state.epoch, i, agreed))
        assert self.state.phase is Phase.ROUND_TRAIN
        self.log = EpochLog(self.state.epoch, agreed, self.state.start_step, self.state.needed)
        self.log.start(0, ())
        self._observe()
        return agreed

    def _observe(self) -> None:
        """Follow the coordinator's rounds in the log of somebody who hears everything."""
        state, log, delay = self.state, self.log, self.settings.delay
        if state.current is None or self.host.rounds_epoch != log.epoch:
            return
        log.needed = state.needed
        over = state.epoch != log.epoch
        for record in self.host.rounds:
            if record.height not in log.rounds:
                opened = RoundLog.open(record, record.clients, state.config, log.needed, RUN, LAYOUT, 64)
                log.rounds[record.height] = opened
            known = log.rounds[record.height]
            known.round, known.final = record, over or record.height < state.current.height
        log.assign()
        while log.decided in log.rounds:
            assert log.decided is not None
            attesting = log.rounds.get(log.decided + delay - 1)
            if attesting is None and over:
                log.close(AgreedSet())
                continue
            if attesting is None or not attesting.final:
                break
            outcome = agreed_set(log.rounds[log.decided], attesting)
            if isinstance(outcome, Unknown):
                break
            log.close(outcome)
            log.assign()

    # --- the core ---------------------------------------------------------------------------------------------------

    def seal(self, message: Message, i: int | None = None) -> Envelope:
        return seal(NODES[self.me if i is None else i], RUN, message)

    def give(self, event: ev.Event) -> list[ev.Effect]:
        return self.core.handle(event, self.now)

    def see(self) -> list[ev.Effect]:
        """The core sees the coordinator's state."""
        return self.give(ev.StateSeen(self.state))

    def tick(self, seconds: float = 0.0) -> list[ev.Effect]:
        """Time passes for the core."""
        self.now += seconds
        return self.give(ev.Tick())

    def hear(self, *envelopes: Envelope) -> list[ev.Effect]:
        """The core hears messages, and so does whoever hears everything."""
        effects = []
        for envelope in envelopes:
            self.overhear(envelope)
            effects += self.give(ev.Received(envelope))
        return effects

    def overhear(self, envelope: Envelope) -> None:
        """Whoever hears everything hears a message, and the core does not."""
        message = envelope.message
        if not isinstance(message, (Result, Attest)) or message.height not in self.log.rounds:
            return
        known = self.log.rounds[message.height]
        if isinstance(message, Attest):
            known.add_list(envelope.sender, message.hashes())
        elif (entry := known.add_result(envelope)) is not None:
            known.settle(entry)

    def obey(self, effects: Iterable[ev.Effect], but: tuple[type, ...] = ()) -> list[ev.Effect]:
        """Carry out effects and what follows from them, as the runtime does; returns all of them.

        Args:
            effects: what the core gave out.
            but: kinds that are left alone.
        """
        done: list[ev.Effect] = []
        waiting = list(effects)
        while waiting:
            effect = waiting.pop(0)
            done.append(effect)
            if not isinstance(effect, but):
                waiting += self._obey(effect)
        return done

    def _obey(self, effect: ev.Effect) -> list[ev.Effect]:
        match effect:
            case Request():
                try:
                    answer = self.ask(self.me, effect)
                except CoordinatorError as error:
                    return self.give(ev.RequestFailed(effect, error.code, str(error), error.retryable))
                if isinstance(effect, GetRounds):
                    return self.give(ev.RoundsSeen(effect.epoch, effect.first, answer))
                return self.see()
            case ev.Promise(key, envelope):
                self.promises[key] = envelope
                self.overhear(envelope)
            case ev.Remember(key, envelopes):
                self.remembered[key] = envelopes
            case ev.Train():
                return self.give(self.trained(effect))
            case ev.Apply():
                return self.give(self.applied(effect))
            case ev.TakeSnapshot():
                return self.give(ev.SnapshotTaken(self.digest))
            case ev.Load(digest):
                self.head = _steps(digest)
                return self.give(ev.Loaded(digest, open_ids=self.open_ids))
            case ev.Fetch(payload):
                return self.give(ev.Fetched(payload))
            case ev.WriteDown(records):
                self.written += records
            case ev.Keep():
                self.kept = effect
        return []

    @property
    def digest(self) -> bytes:
        """The core's parameters."""
        return sha256(b"other parameters") if self.head is None else parameters(self.head)

    def trained(self, effect: ev.Train, **changes: Any) -> ev.Trained:
        """The answer of a training thread."""
        first, *again = closed(effect.batch)
        payload = sha256(b"payload", bytes([self.me, effect.height]))
        made = Result(
            effect.epoch, effect.height, effect.step, *first, 0, payload, SIZE, LAYOUT, RATES, 0, 2, tuple(again)
        )
        return ev.Trained(effect.epoch, effect.height, replace(made, **changes))

    def applied(self, effect: ev.Apply) -> ev.Applied:
        """The answer of a training thread; what it applies to other parameters stays other parameters."""
        step = self.log.rounds[effect.height].round.step
        if self.head is not None and step:
            assert self.head < step
            self.head = step
        prints = (b"" if self.head is None else b"a").ljust(8, b"x") + bytes([effect.height + 1]) * 8
        digest = self.digest if effect.digest_due else b""
        return ev.Applied(effect.epoch, effect.height, digest, prints if effect.prints else b"")

    # --- peers ------------------------------------------------------------------------------------------------------

    def result(self, i: int, height: int | None = None, **changes: Any) -> Envelope:
        """What node ``i`` announces for its batch of a round, the newest by default."""
        known = self.log.rounds[self.round.height if height is None else height]
        first, *again = closed(known.batches[known.nodes.index(KEYS[i])])
        payload = sha256(b"payload", bytes([i, known.round.height]))
        made = Result(
            self.log.epoch, known.round.height, known.round.step, *first, 0, payload, SIZE, LAYOUT, RATES, 0, 2,
            tuple(again),
        )  # fmt: skip
        return self.seal(replace(made, **changes), i)

    def listed(self, height: int | None = None) -> list[bytes]:
        """The commitments of everything that was announced and is witnessed in a round, the newest by default."""
        known = self._about(self.round.height if height is None else height)
        return list(known.own()[0]) if known else []

    def attest(self, i: int, hashes: Iterable[bytes] | None = None, height: int | None = None) -> Envelope:
        """The list that node ``i`` sends to who asks.

        Args:
            i: the sender.
            hashes: commitments; by default of everything that was announced.
            height: the round whose results these are; by default, the one that is witnessed now.
        """
        height = self.round.height - self.settings.delay + 1 if height is None else height
        found = self.log.rounds[height].own()[0] if hashes is None else sorted(hashes)
        return self.seal(Attest(self.log.epoch, height, b"".join(found)), i)

    def _about(self, height: int) -> RoundLog | None:
        """The round whose results are witnessed in round ``height``."""
        known = self.log.rounds.get(height - self.settings.delay + 1)
        return known if known and known.round.step else None

    def report(self, i: int, hashes: Iterable[bytes] | None = None, named: tuple[int, bytes] = (0, b"")) -> None:
        """Node ``i`` reports the newest round to the coordinator.

        Args:
            i: the witness.
            hashes: the commitments that it verified; by default of everything that was announced.
            named: training steps, and the parameters after them.
        """
        here, about = self.log.rounds[self.round.height], self._about(self.round.height)
        report = witness_report(self.state.epoch, here, here.nodes.index(KEYS[i]), about, *named)
        if hashes is not None:
            found = sorted(hashes)
            report = replace(report, merkle=merkle_root(found))
            if about is not None:
                about.add_list(KEYS[i], found)
        self.ask(i, report)

    def end_round(self, *who: int, hashes: Iterable[bytes] | None = None, digests: bool = False) -> None:
        """These nodes report until the round is decided; if it is not, its time passes.

        Args:
            who: witnesses; all peers by default.
            hashes: what they verified; by default everything that was announced.
            digests: whether they name parameters.
        """
        place = self.place
        hashes = None if hashes is None else list(hashes)
        for i in who or self.peers:
            if self.place == place:
                self.report(i, hashes, self.named if digests else (0, b""))
        if self.place == place:
            config = self.state.config
            if self.state.phase is Phase.ROUND_TRAIN:
                self.pass_time(config.cooldown_time if self.state.draining else config.max_round_train_time)
            if self.place == place:
                self.pass_time(config.round_witness_time)
        assert self.place != place

    @property
    def place(self) -> tuple[int, int]:
        """Epoch and height of the newest round."""
        return self.state.epoch, self.round.height

    def play(self, rounds: int = 1, digests: bool = True) -> list[ev.Effect]:
        """Rounds in which everybody does everything at once; returns the core's effects.

        Args:
            rounds: how many; less if the epoch ends before.
            digests: whether the peers name parameters.
        """
        effects: list[ev.Effect] = []
        for _ in range(rounds):
            effects += self.obey(self.see())
            if not self.state.phase.active:
                break
            place = self.place
            if self.round.step:
                effects += self.obey(self.hear(*[self.result(i) for i in self.peers]))
            if self.place == place:
                self.end_round(digests=digests)
            effects += self.obey(self.see())
        return effects

    def play_alone(self, rounds: int, digests: bool = True) -> None:
        """The peers play rounds of which the core sees and hears nothing."""
        for _ in range(rounds):
            if self.round.step:
                for i in self.peers:
                    self.overhear(self.result(i))
            self.end_round(digests=digests)

    def listen(self, *heights: int, but: tuple[type, ...] = (ev.Train, ev.Apply)) -> list[ev.Effect]:
        """The core hears the results and the list of these rounds; returns the effects, carried out but for some."""
        effects = []
        for height in heights:
            known = self.log.rounds[height]
            others = [one for one in known.messages() if one.sender != KEYS[self.me]]
            if known.round.step:
                others.append(self.attest(self.peers[0], self._decided(height), height))
            effects += self.obey(self.hear(*others), but)
        return effects

    def _decided(self, height: int) -> Sequence[bytes] | None:
        agreed = self.log.agreements.get(height)
        return None if agreed is None else [entry.commitment for entry in agreed.entries]

    @property
    def named(self) -> tuple[int, bytes]:
        """The training steps and the digest of the newest parameters that the peers know in the newest round."""
        first = self.log.first_step - 1
        applied = self.settings.applied_before(self.round.height)
        last = self.state.step - 1 - first
        if not self.state.draining or applied < last:
            applied -= applied % self.settings.digest_every
        steps = first + min(applied, last)
        return (steps, parameters(steps)) if applied else (0, b"")
