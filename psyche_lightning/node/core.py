"""The participant without I/O: events in, effects out (invariant I3).

One :class:`NodeCore` follows one run. It keeps no clock, socket, thread or tensor: time comes with each event, the
replica (the parameters) is driven by effects, and a history of events replays exactly. The runtime, the tests and the
simulator drive the same class.

A round in short: train the assigned batch, announce the payload, fetch and verify the others', attest what was
verified, and apply the agreed set before the next training (without overlap) or the one after (with it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from psyche_lightning.coordinator.state import ClientStatus, Phase, Round, RunState
from psyche_lightning.errors import WireError
from psyche_lightning.node import events as ev
from psyche_lightning.node.events import Effect, Event
from psyche_lightning.node.ledger import Agreement, Entry, EpochLog, RoundLog, Undecided, decide
from psyche_lightning.node.retries import Retries
from psyche_lightning.node.waiting import describe
from psyche_lightning.node.witness import attest_promise, result_promise, witness_report
from psyche_lightning.wire.identity import short
from psyche_lightning.wire.messages import Ask, Attest, Buffers, Envelope, Message, Result

EARLY_ROUNDS = 3
"""Messages of at most this many rounds ahead of the coordinator's news are kept."""
EARLY_MESSAGES = 4096
STALE = ("InvalidWitness", "DuplicateWitness", "InvalidHealthCheck", "InvalidRunState", "Halted")
"""Refusals that a request meets when the run moved on while it travelled."""
FINAL_LOADS = 3
"""Attempts to obtain the parameters of a finished run."""


@dataclass(frozen=True)
class Settings:
    """What a node must know besides the run's state; equal on all nodes through the manifest.

    Attributes:
        overlap: whether results are witnessed one round later and applied two rounds later.
        digest_every: a parameter digest is due each time this many rounds have been applied.
        layout: digest of the meaning of payload positions.
        max_payload: largest payload in bytes.
        buffers: whether the model has buffers that are copied at the start of an epoch.
        retry: seconds until a fetch, a question or a call is repeated first; doubles up to ``retry_most``.
        retry_most: longest such interval in seconds.
    """

    overlap: bool
    digest_every: int
    layout: bytes
    max_payload: int
    buffers: bool = False
    retry: float = 2.0
    retry_most: float = 15.0

    @property
    def delay(self) -> int:
        """Rounds from training to applying."""
        return 2 if self.overlap else 1


class NodeCore:
    """One node's part in one run.

    Args:
        public: this node's key, which signs its messages.
        signer: the key that the coordinator knows it by.
        run_id: the run.
        settings: see :class:`Settings`.
        seal: signs a message.
        promises: envelopes that a former life of this node had stored, by key (I8).
    """

    def __init__(
        self,
        public: bytes,
        signer: bytes,
        run_id: str,
        settings: Settings,
        seal: Callable[[Message], Envelope],
        promises: Mapping[str, Envelope] | None = None,
    ) -> None:
        self.public = public
        self.signer = signer
        self.run_id = run_id
        self.settings = settings
        self.state: RunState | None = None
        self.log: EpochLog | None = None
        self.next_apply: int | None = None
        """Height of the next round to apply; None while the parameters are not the epoch's."""
        self.holding: bytes | None = None
        """Digest of the parameters where it is known."""
        self.digests: dict[int, bytes] = {}
        """Digests in this epoch, by the number of rounds applied."""
        self.finished = False
        self._seal = seal
        self._promises = dict(promises or {})
        self._out: list[Effect] = []
        self._now = 0.0
        self._retries = Retries(settings.retry, settings.retry_most)
        self._fetching: dict[bytes, tuple[RoundLog, Entry]] = {}
        self._busy: object = None
        self._trained: tuple[int, int] = (-1, -1)
        self._peers: tuple[tuple[bytes, str], ...] | None = None
        self._said: set[str] = set()
        self._repaired: set[int] = set()
        self._buffers: Envelope | None = None
        self._final_loads = 0

    # --- the door -------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event and return what has to be done, in order.

        Args:
            event: what happened.
            now: seconds of any clock that never goes back.
        """
        self._now = max(now, self._now)
        match event:
            case ev.StateSeen(state):
                self._see(state)
            case ev.RoundsSeen(epoch, _, rounds):
                if self.log and self.log.epoch == epoch:
                    # The newest may have got more records since this answer was made.
                    for record in rounds[:-1]:
                        self._observe(record, final=True)
            case ev.Received(envelope):
                self._receive(envelope)
            case ev.Trained():
                self._announce(event)
            case ev.Fetched():
                self._fetched(event)
            case ev.Applied(epoch, height, digest):
                self._applied(epoch, height, digest)
            case ev.Loaded(digest, reason):
                self._loaded(digest, reason)
            case ev.SnapshotTaken(digest):
                if self._busy == "snapshot":
                    self._busy = None
                    self.holding = digest
            case ev.BuffersTaken(epoch, index):
                self._buffers = self._seal(Buffers(epoch, index))
                self._emit(ev.Broadcast(self._buffers))
            case ev.CallFailed(_, code, text, retryable):
                if not retryable and code not in STALE:
                    self._say("warning", f"the coordinator refused a request: {text}")
            case ev.Tick():
                pass
        if self.state is not None and not self.finished:
            self._advance(self.state)
        out, self._out = self._out, []
        return out

    def waiting(self) -> str:
        """What the node waits for and for whom, in one line for people (I4)."""
        return describe(self.state, self.log, self.next_apply, self.settings.delay)

    # --- helpers --------------------------------------------------------------------------------------------------

    def _emit(self, effect: Effect) -> None:
        self._out.append(effect)

    def _say(self, level: str, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._emit(ev.Say(level, text))

    def _due(self, key: object, *, after: float = 0.0) -> bool:
        return self._retries.due(key, self._now, after=after)

    def _providers(self, first: bytes | None = None) -> tuple[bytes, ...]:
        peers = [key for key, _ in self._peers or ()]
        return tuple(sorted(peers, key=lambda key: key != first))

    def _gone(self, state: RunState, log: RoundLog) -> set[int]:
        """Indices of clients of a round that cannot be waited for any more."""
        healthy = {client.signer for client in state.clients if client.status is ClientStatus.HEALTHY}
        return {i for i, signer in enumerate(log.round.clients) if signer not in healthy}

    def _attested(self, height: int) -> RoundLog | None:
        """The round whose results are witnessed in round ``height``; None when it has none."""
        assert self.log is not None
        log = self.log.rounds.get(height - self.settings.delay + 1)
        return log if log and log.batches else None

    def _ready_for(self, height: int) -> bool:
        """Whether everything was applied that precedes the training of round ``height``."""
        return self.next_apply is not None and self.next_apply > height - self.settings.delay

    def _my_index(self, log: RoundLog) -> int | None:
        return log.index_of(self.public)

    # --- news from the coordinator ------------------------------------------------------------------------------------

    def _see(self, state: RunState) -> None:
        if self.state is not None:
            if state.nonce < self.state.nonce:
                return
            before, after = self.state.current, state.current
            if state.epoch != self.state.epoch or (before and before.height) != (after and after.height):
                self._retries.keep_only(("join", "load"))
            if state.phase != self.state.phase:
                self._retries.forget("join")
        self.state = state
        peers = tuple((c.node, c.address) for c in state.clients if c.node != self.public)
        if state.clients and peers != self._peers:
            self._peers = peers
            self._emit(ev.SetPeers(peers))

    def _head(self) -> int:
        """Height of the newest round that the coordinator announced, or -1."""
        assert self.state is not None
        return self.state.current.height if self.state.current else -1

    def _observe(self, record: Round, *, final: bool) -> None:
        """Take a round that the coordinator announced; ``final`` when its witness records are complete."""
        assert self.log is not None
        assert self.state is not None
        log = self.log.rounds.get(record.height)
        if log is None:
            members = {c.signer: c.node for c in (*self.state.exited_clients, *self.state.clients)}
            nodes = tuple(members.get(signer, signer) for signer in record.clients)
            log = RoundLog.open(
                record, nodes, self.state.config, self.run_id, self.settings.layout, self.settings.max_payload
            )
            self.log.rounds[record.height] = log
            for envelope in self.log.early.pop(record.height, []):
                self._file(log, envelope)
        if not log.final:
            log.round, log.final = record, final

    def _observe_state(self, state: RunState) -> None:
        """File the stored rounds of the current epoch, or of the one that just ended."""
        if state.current is None:
            return
        epoch = state.epoch if state.phase.active else state.epoch - 1
        if self.log is None or self.log.epoch != epoch:
            if not state.phase.active or all(client.node != self.public for client in state.clients):
                return
            self._open_epoch(epoch, state.epoch_digest)
        for record in state.rounds:
            if state.round_at(record.height) is record:
                self._observe(record, final=self._epoch_over() or record.height < state.current.height)

    def _open_epoch(self, epoch: int, digest: bytes) -> None:
        if self.log is not None:
            self._emit(ev.Forget(self.log.payloads()))
        early = self.log.early if self.log is not None and self.log.epoch == epoch else {}
        self.log = EpochLog(epoch, digest, early=early)
        self.next_apply = 0 if self.holding == digest else None
        self.digests = {}
        self._said.clear()
        self._repaired.clear()

    # --- messages from peers ----------------------------------------------------------------------------------------

    def _receive(self, envelope: Envelope) -> None:
        message = envelope.message
        log = self.log
        if log is None or message.epoch != log.epoch:
            if isinstance(message, Buffers):
                self._take_buffers(envelope)
            return
        match message:
            case Ask(_, height, _):
                self._answer(envelope.sender, height)
            case Buffers():
                self._take_buffers(envelope)
            case Result(height=height) | Attest(height=height):
                known = log.rounds.get(height)
                newest = max(log.rounds, default=-1)
                if known is not None:
                    self._file(known, envelope)
                elif newest < height <= newest + EARLY_ROUNDS:
                    waiting = log.early.setdefault(height, [])
                    if len(waiting) < EARLY_MESSAGES and envelope not in waiting:
                        waiting.append(envelope)

    def _file(self, log: RoundLog, envelope: Envelope) -> None:
        try:
            if isinstance(envelope.message, Result):
                entry = log.add_result(envelope)
                if entry and len(log.of(entry.trainer)) > 1:
                    self._say(
                        "warning", f"{short(envelope.sender)} signed two results for one batch; both are excluded"
                    )
            else:
                log.add_attest(envelope)
        except WireError as error:
            self._say("warning", f"refused a message: {error}")

    def _answer(self, peer: bytes, height: int) -> None:
        if self.log is None or peer not in dict(self._peers or ()):
            return
        if self._buffers is not None and self._buffers.message.epoch == self.log.epoch:
            self._emit(ev.SendTo(peer, self._buffers))
        log = self.log.rounds.get(height)
        if log is None:
            return
        if not self._retries.once(("answer", peer, height), self._now, every=self.settings.retry / 4):
            return
        for envelope in log.messages():
            self._emit(ev.SendTo(peer, envelope))

    def _take_buffers(self, envelope: Envelope) -> None:
        """The buffers of the epoch are those of its first warm-up witness."""
        state, message = self.state, envelope.message
        assert isinstance(message, Buffers)
        if state is None or message.epoch != state.epoch or not state.warmup_witnesses or self._buffers is not None:
            return
        first = state.warmup_witnesses[0].proof.index
        if first < len(state.clients) and state.clients[first].node == envelope.sender and self.settings.buffers:
            self._buffers = envelope
            self._emit(ev.LoadBuffers(message.index, self._providers(envelope.sender)))

    # --- answers from the replica and the network ---------------------------------------------------------------------

    def _announce(self, event: ev.Trained) -> None:
        if event.result is None or self.log is None or self.log.epoch != event.epoch:
            return
        log = self.log.rounds.get(event.height)
        if log is None:
            return
        key = result_promise(event.epoch, event.height)
        if self._promised(key, event.result) is not None:
            return
        envelope = self._seal(event.result)
        self._promises[key] = envelope
        self._emit(ev.Promise(key, envelope))
        self._publish(log, envelope)

    def _promised(self, key: str, batch: Result | tuple[int, int]) -> Envelope | None:
        """The result that this node, perhaps in a former life, signed for that batch."""
        start, end = (batch.start, batch.end) if isinstance(batch, Result) else batch
        envelope = self._promises.get(key)
        result = envelope.message if envelope else None
        return envelope if isinstance(result, Result) and (result.start, result.end) == (start, end) else None

    def _publish(self, log: RoundLog, envelope: Envelope) -> None:
        """File and broadcast this node's own announcement, whose payload is stored."""
        try:
            entry = log.add_result(envelope)
        except WireError as error:
            self._say("warning", f"the own result does not fit its round: {error}")
            return
        if entry is not None:
            entry.verified = True
        self._emit(ev.Broadcast(envelope))

    def _fetched(self, event: ev.Fetched) -> None:
        log, entry = self._fetching.pop(event.payload, (None, None))
        if log is None or entry is None:
            return
        entry.verified = not event.reason
        if event.refused:
            entry.refused = event.reason
            who = short(entry.envelope.sender)
            self._say("warning", f"refused the payload of {who} in round {log.round.height}: {event.reason}")

    def _applied(self, epoch: int, height: int, digest: bytes) -> None:
        if self._busy != ("apply", epoch, height):
            return
        self._busy = None
        if self.log is not None and self.log.epoch == epoch and self.next_apply == height:
            self.next_apply = height + 1
            if digest:
                self.digests[self.next_apply] = digest

    def _loaded(self, digest: bytes, reason: str) -> None:
        if self._busy == ("load", digest):
            self._busy = None
        if reason:
            self._final_loads += self.state is not None and self.state.phase is Phase.FINISHED
            self._say("warning", f"could not obtain the parameters {digest.hex()[:12]}: {reason}; trying again")
            return
        self.holding = digest
        self._retries.forget("load")
        if self.log is not None and digest == self.log.digest and self.next_apply is None:
            self.next_apply = 0

    # --- what to do next ----------------------------------------------------------------------------------------------

    def _advance(self, state: RunState) -> None:
        self._observe_state(state)
        self._stay_member(state)
        if state.phase is Phase.WARMUP:
            self._warm_up(state)
        if state.phase in (Phase.ROUND_TRAIN, Phase.ROUND_WITNESS):
            self._gather(state)
            self._catch_up()
            self._follow(state)
            self._train(state)
            self._attest(state)
            self._check_health(state)
            self._compare()
        if state.phase in (Phase.COOLDOWN, Phase.WAITING_FOR_MEMBERS, Phase.FINISHED, Phase.PAUSED):
            self._catch_up()
            self._follow(state)
            self._conclude(state)

    def _stay_member(self, state: RunState) -> None:
        """Ask to be counted in whenever this node is not, or an epoch is about to be formed."""
        if state.phase in (Phase.FINISHED, Phase.UNINITIALIZED):
            return
        member = any(c.signer == self.signer and c.status is ClientStatus.HEALTHY for c in state.clients)
        if (not member or state.phase in (Phase.WAITING_FOR_MEMBERS, Phase.PAUSED)) and self._due("join"):
            self._emit(ev.Join())

    def _load(self, digest: bytes, why: str) -> None:
        if self._busy is None and self._due("load"):
            self._say("info", why)
            self._busy = ("load", digest)
            self.holding = None
            self._emit(ev.Load(digest, self._providers()))

    def _snapshot(self) -> None:
        if self._busy is None:
            self._busy = "snapshot"
            self._emit(ev.TakeSnapshot())

    def _warm_up(self, state: RunState) -> None:
        index = next((i for i, c in enumerate(state.clients) if c.signer == self.signer), None)
        if index is None:
            return
        if self.log is not None and self.log.epoch < state.epoch and self.next_apply is not None:
            self.next_apply = None
            self.holding = self.holding if self._busy is None else None
        if self.holding is None:
            self._snapshot()
            return
        records = state.warmup_witnesses
        target = state.checkpoint.digest or (records[0].merkle if records else b"")
        if not target:
            # Nobody decided yet: the first in the list goes at once, another when that one seems to be away.
            if index and not self._due(("first", state.epoch), after=state.config.warmup_time / 2):
                return
            target = self.holding
        if self.holding != target:
            self._load(target, f"taking the run's parameters {target.hex()[:12]} in place of the own ones")
            return
        if not any(record.proof.index == index for record in records):
            if self._due(("warmup", state.epoch)):
                self._emit(ev.WarmupWitness(state.epoch, index, self.holding))
        elif records[0].proof.index == index and self.settings.buffers and self._due(("buffers", state.epoch)):
            self._emit(ev.ShareBuffers(state.epoch))

    def _gather(self, state: RunState) -> None:
        """Obtain announcements and payloads of the rounds that are witnessed now or next."""
        current = state.current
        if self.log is None or current is None:
            return
        for height in range(max(0, current.height - self.settings.delay + 1), current.height + 1):
            log = self.log.rounds.get(height)
            if log is None:
                continue
            self._fetch(log, log.entries.values())
            silent = [i for i in log.unannounced() if i not in self._gone(state, log)]
            for index in silent:
                if log.nodes[index] != self.public:
                    self._ask(height, log.nodes[index], after=2 * self.settings.retry)

    def _fetch(self, log: RoundLog, entries: Iterable[Entry]) -> None:
        for entry in entries:
            payload = entry.result.payload
            if entry.verified or entry.refused or payload in self._fetching:
                continue
            if self._due(("fetch", payload)):
                self._fetching[payload] = (log, entry)
                providers = self._providers(log.nodes[entry.trainer])
                self._emit(ev.Fetch(payload, entry.result.size, providers))

    def _ask(self, height: int, peer: bytes | None, *, after: float = 0.0) -> None:
        """Ask one peer (or all) for a round's messages; every third time all, as someone else may have them."""
        key = ("ask", height, peer)
        if not self._due(key, after=after):
            return
        attempt = self._retries.attempts(key)
        assert self.log is not None
        envelope = self._seal(Ask(self.log.epoch, height, attempt))
        if peer is None or attempt % 3 == 0:
            self._emit(ev.Broadcast(envelope))
        else:
            self._emit(ev.SendTo(peer, envelope))

    def _catch_up(self) -> None:
        """Obtain what the replay needs: the epoch's first parameters, and rounds that were not seen."""
        if self.log is None:
            return
        if self.next_apply is None:
            if self.state is not None and self.state.phase.active:
                digest = self.log.digest
                self._load(digest, f"taking the epoch's first parameters {digest.hex()[:12]} and replaying from there")
            return
        known = self.log.rounds
        gaps = [h for h in range(self.next_apply, self._head()) if h not in known or not known[h].final]
        if gaps and self._due(("rounds", gaps[0])):
            self._emit(ev.AskRounds(self.log.epoch, gaps[0]))

    def _follow(self, state: RunState) -> None:
        """Apply every round whose agreed set can be known, in order."""
        while self.log is not None and self.next_apply is not None and self._busy is None:
            height = self.next_apply
            results = self.log.rounds.get(height)
            if results is None:
                return
            agreement = self._agree(results, height)
            if agreement is None:
                return
            missing = [entry for entry in agreement.entries if not entry.verified]
            if missing:
                self._fetch(results, missing)
                return
            self._warn_of_rates(results, agreement)
            due = (height + 1) % self.settings.digest_every == 0
            self.holding = None if agreement.entries else self.holding
            if not agreement.entries and not due:
                self.next_apply += 1
                continue
            self._busy = ("apply", self.log.epoch, height)
            payloads = tuple(entry.result.payload for entry in agreement.entries)
            self._emit(ev.Apply(self.log.epoch, height, payloads, agreement.lrs, due))

    def _agree(self, results: RoundLog, height: int) -> Agreement | None:
        """The agreed set of a round, or None while it is open."""
        assert self.log is not None
        attesting = self.log.rounds.get(height + self.settings.delay - 1)
        if attesting is None:
            over = self._epoch_over() and self._head() < height + self.settings.delay - 1
            return Agreement() if over else None
        if not attesting.final:
            return None
        outcome = decide(results, attesting)
        if isinstance(outcome, Undecided):
            for index in outcome.lists:
                self._ask(attesting.round.height, attesting.nodes[index])
            if outcome.results:
                self._ask(height, None)
            return None
        return outcome

    def _epoch_over(self) -> bool:
        assert self.state is not None
        assert self.log is not None
        return self.state.epoch != self.log.epoch or self.state.phase is Phase.COOLDOWN

    def _warn_of_rates(self, results: RoundLog, agreement: Agreement) -> None:
        mine = next((e for e in results.entries.values() if e.envelope.sender == self.public), None)
        if mine is not None and agreement.lrs and mine.result.lrs != agreement.lrs:
            self._say("warning", "this node's learning rate differs from the agreed one, which is used")

    def _train(self, state: RunState) -> None:
        current = state.current
        if state.phase is not Phase.ROUND_TRAIN or current is None or self.log is None:
            return
        log = self.log.rounds[current.height]
        index, key = self._my_index(log), (state.epoch, current.height)
        if index is None or index not in log.batches or self._trained >= key or not self._ready_for(current.height):
            return
        self._trained = key
        start, end = log.batches[index]
        promise = self._promised(result_promise(*key), (start, end))
        if promise is not None:
            self._publish(log, promise)
            return
        self._emit(ev.Train(state.epoch, current.height, current.step, start, end))

    def _attest(self, state: RunState) -> None:
        """Report as a witness: during training once everything is here, in the witness phase with what is here."""
        current = state.current
        if current is None or self.log is None:
            return
        here = self.log.rounds[current.height]
        index = self._my_index(here)
        if index is None or not here.selection.is_witness(index) or index in {w.proof.index for w in current.witnesses}:
            return
        about = self._attested(current.height)
        gone = self._gone(state, here)
        if state.phase is Phase.ROUND_TRAIN:
            if about and any(i not in self._gone(state, about) for i in about.unverified()):
                return
            if self.settings.overlap and any(i not in gone for i in here.unannounced()):
                return
        if not self._due(("witness", state.epoch, current.height)):
            return
        key = attest_promise(state.epoch, current.height)
        envelope = self._promises.get(key)
        if envelope is None:
            applied = self.next_apply or 0
            digest = self.digests.get(applied, b"")
            hashes = sorted(entry.commitment for entry in about.verified()) if about else []
            message = Attest(state.epoch, current.height, b"".join(hashes), applied if digest else 0, digest)
            envelope = self._seal(message)
            self._promises[key] = envelope
            self._emit(ev.Promise(key, envelope))
        self._file(here, envelope)
        self._emit(ev.Broadcast(envelope))
        self._emit(witness_report(here, index, envelope, about))

    def _check_health(self, state: RunState) -> None:
        """Name the trainers from which nothing was witnessed in the round before."""
        current = state.current
        if current is None or self.log is None or state.phase is not Phase.ROUND_TRAIN or current.height == 0:
            return
        before = self.log.rounds.get(current.height - 1)
        about = self._attested(current.height - 1)
        if before is None or about is None or not self._retries.once(("health", current.height), self._now):
            return
        index = self._my_index(before)
        if index is None or index not in {record.proof.index for record in before.round.witnesses}:
            return
        gone = self._gone(state, about)
        silent = [about.round.clients[i] for i in about.unverified() if i not in gone and about.nodes[i] != self.public]
        if silent:
            self._emit(ev.HealthCheck(state.epoch, current.height, tuple(silent)))

    def _compare(self) -> None:
        """Repair parameters that differ from those of a quorum of witnesses, by replaying the epoch (I6)."""
        if self.log is None or self.next_apply is None:
            return
        found = self.log.desync(self.digests, since=self.next_apply - self.settings.delay)
        if found is None or found[0] in self._repaired:
            return
        applied, theirs = found
        self._repaired.add(applied)
        self._emit(ev.Diagnose(applied - 1, self.digests[applied], theirs, self._providers()))
        self._say("warning", f"the parameters differ after round {applied - 1}; replaying the epoch")
        self.next_apply, self.holding, self.digests, self._busy = None, None, {}, None

    def _conclude(self, state: RunState) -> None:
        """At the end of an epoch: report the parameters; at the end of the run: leave with them."""
        if state.phase is Phase.FINISHED and self._busy is None and self._left(state):
            return
        if self.log is None or not self._epoch_over() or not self._resolved():
            return
        if self.holding is None:
            self._snapshot()
            return
        mine = next((c for c in state.clients if c.signer == self.signer), None)
        voted = any(vote[0] == self.signer for vote in state.checkpoint_votes)
        may = mine is not None and mine.status is ClientStatus.HEALTHY and state.phase is Phase.COOLDOWN
        if may and not voted and self._due(("vote", state.epoch)):
            self._emit(ev.Vote(state.epoch, state.step - 1, self.holding))

    def _resolved(self) -> bool:
        """Whether every round of the epoch that ended is applied."""
        return self.next_apply is not None and self.next_apply > self._head()

    def _left(self, state: RunState) -> bool:
        """Leave the finished run once this node holds its parameters, or cannot get them; returns whether it left."""
        wanted = state.checkpoint.digest
        if not wanted:
            reason = "the run is finished; no parameters were agreed"
        elif self.holding == wanted:
            reason = "the run is finished"
        elif self._final_loads >= FINAL_LOADS:
            reason = f"the run is finished, but nobody gave this node its last parameters {wanted.hex()[:12]}"
        else:
            replayed = self._resolved() and self.holding is not None
            if replayed or (not self._resolved() and self._due("patience", after=4 * self.settings.retry)):
                self.next_apply = None
            if self.next_apply is None:
                self._load(wanted, f"taking the run's last parameters {wanted.hex()[:12]}")
            return False
        self.finished = True
        self._emit(ev.Finish(reason))
        return True
