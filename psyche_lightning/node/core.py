"""The participant without I/O: events in, effects out (invariant I3).

One :class:`NodeCore` follows one run. It keeps no clock, socket, thread or tensor: time comes with each event, the
replica (the parameters) is driven by effects, and a history of events replays exactly. The runtime, the tests and the
simulator drive the same class.

A round in short: train the assigned batch, announce the payload, fetch and verify the others', attest what was
verified, and apply the agreed set before the next training (without overlap) or the one after (with it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from psyche_lightning.coordinator.state import ClientStatus, Phase, Round, RunState
from psyche_lightning.node import events as ev
from psyche_lightning.node.events import Effect, Event
from psyche_lightning.node.exchange import Exchange, gone
from psyche_lightning.node.ledger import Agreement, EpochLog, RoundLog, Undecided, decide
from psyche_lightning.node.outbox import Outbox
from psyche_lightning.node.settings import Settings
from psyche_lightning.node.waiting import describe
from psyche_lightning.node.witness import attest_promise, result_promise, witness_report
from psyche_lightning.wire.messages import Attest, Envelope, Message

STALE = ("InvalidWitness", "DuplicateWitness", "InvalidHealthCheck", "InvalidRunState", "Halted")
"""Refusals that a request meets when the run moved on while it travelled."""
FINAL_LOADS = 3
"""Attempts to obtain the parameters of a finished run."""


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
        self._out = Outbox(settings.retry, settings.retry_most)
        self._exchange = Exchange(public, settings, seal, promises or {}, self._out)
        self._busy: object = None
        self._trained: tuple[int, int] = (-1, -1)
        self._repaired: set[int] = set()
        self._snapshots: set[bytes] = set()
        self._final_loads = 0

    # --- the door -------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event and return what has to be done, in order.

        Args:
            event: what happened.
            now: seconds of any clock that never goes back.
        """
        self._out.now = max(now, self._out.now)
        match event:
            case ev.StateSeen(state):
                self._see(state)
            case ev.RoundsSeen(epoch, _, rounds):
                if self.log and self.log.epoch == epoch:
                    # The newest may have got more records since this answer was made.
                    for record in rounds[:-1]:
                        self._observe(record, final=True)
            case ev.Received(envelope):
                self._exchange.receive(envelope, self.log, self.state)
                if isinstance(envelope.message, Attest):
                    self._compare()
            case ev.Trained(epoch, height, result):
                if result is not None and self.log is not None and self.log.epoch == epoch:
                    self._exchange.announce(self.log.rounds[height], result, result_promise(epoch, height))
            case ev.Fetched():
                self._exchange.fetched(event)
            case ev.Applied(epoch, height, digest):
                self._applied(epoch, height, digest)
                if digest:
                    self._compare()
            case ev.Loaded(digest, reason):
                self._loaded(digest, reason)
            case ev.SnapshotTaken(digest):
                if self._busy == "snapshot":
                    self._busy = None
                    self.holding = digest
                self._snapshots.add(digest)
            case ev.BuffersTaken(epoch, index):
                self._exchange.share_buffers(epoch, index)
            case ev.CallFailed(_, code, text, retryable):
                if not retryable and code not in STALE:
                    self._out.say("warning", f"the coordinator refused a request: {text}")
            case ev.Tick():
                pass
        if self.state is not None and not self.finished:
            self._advance(self.state)
        return self._out.take()

    def waiting(self) -> str:
        """What the node waits for and for whom, in one line for people (I4)."""
        return describe(self.state, self.log, self.next_apply, self.settings.delay)

    # --- helpers --------------------------------------------------------------------------------------------------

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
                self._out.keep_only(("join", "load"))
            if state.phase != self.state.phase:
                self._out.forget("join")
        self.state = state
        self._exchange.meet(state)

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
                self._exchange.file(log, envelope)
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
        old = self.log
        self.log = EpochLog(epoch, digest)
        self.next_apply = 0 if self.holding == digest else None
        stored = {*self._snapshots, *self.digests.values()}
        keep = {digest, self.holding or digest}
        self._snapshots = stored & keep
        self.digests = {}
        self._out.new_epoch()
        self._repaired.clear()
        promises = self._exchange.keep_promises(epoch)
        if old is not None:
            self._out.emit(ev.Forget(old.payloads(), tuple(sorted(stored - keep)), tuple(sorted(keep)), promises))

    # --- answers from the replica and the network ---------------------------------------------------------------------

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
            self._out.say("warning", f"could not obtain the parameters {digest.hex()[:12]}: {reason}; trying again")
            return
        self.holding = digest
        self._snapshots.add(digest)
        self._out.forget("load")
        if self.log is not None and digest == self.log.digest and self.next_apply is None:
            self.next_apply = 0

    # --- what to do next ----------------------------------------------------------------------------------------------

    def _advance(self, state: RunState) -> None:
        self._observe_state(state)
        self._stay_member(state)
        if state.phase is Phase.WARMUP:
            self._warm_up(state)
        if state.phase in (Phase.ROUND_TRAIN, Phase.ROUND_WITNESS):
            if self.log is not None:
                self._exchange.gather(self.log, state)
            self._catch_up()
            self._follow(state)
            self._train(state)
            self._attest(state)
            self._check_health(state)
        if state.phase in (Phase.COOLDOWN, Phase.WAITING_FOR_MEMBERS, Phase.FINISHED, Phase.PAUSED):
            self._catch_up()
            self._follow(state)
            self._conclude(state)

    def _stay_member(self, state: RunState) -> None:
        """Ask to be counted in whenever this node is not, or an epoch is about to be formed."""
        if state.phase in (Phase.FINISHED, Phase.UNINITIALIZED):
            return
        member = any(c.signer == self.signer and c.status is ClientStatus.HEALTHY for c in state.clients)
        if (not member or state.phase in (Phase.WAITING_FOR_MEMBERS, Phase.PAUSED)) and self._out.due("join"):
            self._out.emit(ev.Join())

    def _load(self, digest: bytes, why: str) -> None:
        if self._busy is None and self._out.due("load"):
            self._out.say("info", why)
            self._busy = ("load", digest)
            self.holding = None
            self._out.emit(ev.Load(digest, self._exchange.providers()))

    def _snapshot(self) -> None:
        if self._busy is None:
            self._busy = "snapshot"
            self._out.emit(ev.TakeSnapshot())

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
            if index and not self._out.due(("first", state.epoch), after=state.config.warmup_time / 2):
                return
            target = self.holding
        if self.holding != target:
            self._load(target, f"taking the run's parameters {target.hex()[:12]} in place of the own ones")
            return
        if not any(record.proof.index == index for record in records):
            if self._out.due(("warmup", state.epoch)):
                self._out.emit(ev.WarmupWitness(state.epoch, index, self.holding))
        elif records[0].proof.index == index and self.settings.buffers and self._out.due(("buffers", state.epoch)):
            self._out.emit(ev.ShareBuffers(state.epoch))

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
        if gaps and self._out.due(("rounds", gaps[0])):
            self._out.emit(ev.AskRounds(self.log.epoch, gaps[0]))

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
                self._exchange.fetch(results, missing)
                return
            self._warn_of_rates(results, agreement)
            due = (height + 1) % self.settings.digest_every == 0
            self.holding = None if agreement.entries else self.holding
            if not agreement.entries and not due:
                self.next_apply += 1
                continue
            self._busy = ("apply", self.log.epoch, height)
            payloads = tuple(entry.result.payload for entry in agreement.entries)
            self._out.emit(ev.Apply(self.log.epoch, height, payloads, agreement.lrs, due))

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
                self._exchange.ask(self.log.epoch, attesting.round.height, attesting.nodes[index])
            if outcome.results:
                self._exchange.ask(self.log.epoch, height, None)
            return None
        return outcome

    def _epoch_over(self) -> bool:
        assert self.state is not None
        assert self.log is not None
        return self.state.epoch != self.log.epoch or self.state.phase is Phase.COOLDOWN

    def _warn_of_rates(self, results: RoundLog, agreement: Agreement) -> None:
        mine = next((e for e in results.entries.values() if e.envelope.sender == self.public), None)
        if mine is not None and agreement.lrs and mine.result.lrs != agreement.lrs:
            self._out.say("warning", "this node's learning rate differs from the agreed one, which is used")

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
        promise = self._exchange.promised(result_promise(*key), start, end)
        if promise is not None:
            self._exchange.publish(log, promise)
            return
        self._out.emit(ev.Train(state.epoch, current.height, current.step, start, end))

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
        away = gone(state, here)
        if state.phase is Phase.ROUND_TRAIN:
            if about and any(i not in gone(state, about) for i in about.unverified()):
                return
            if self.settings.overlap and any(i not in away for i in here.unannounced()):
                return
        if not self._out.due(("witness", state.epoch, current.height)):
            return
        key = attest_promise(state.epoch, current.height)
        envelope = self._exchange.attest(here, key, lambda: self._list(state.epoch, current.height, about))
        self._out.emit(witness_report(here, index, envelope, about))

    def _list(self, epoch: int, height: int, about: RoundLog | None) -> Attest:
        applied = self.next_apply or 0
        digest = self.digests.get(applied, b"")
        hashes = sorted(entry.commitment for entry in about.verified()) if about else []
        return Attest(epoch, height, b"".join(hashes), applied if digest else 0, digest)

    def _check_health(self, state: RunState) -> None:
        """Name the trainers from which nothing was witnessed in the round before."""
        current = state.current
        if current is None or self.log is None or state.phase is not Phase.ROUND_TRAIN or current.height == 0:
            return
        before = self.log.rounds.get(current.height - 1)
        about = self._attested(current.height - 1)
        if before is None or about is None or not self._out.once(("health", current.height)):
            return
        index = self._my_index(before)
        if index is None or index not in {record.proof.index for record in before.round.witnesses}:
            return
        away = gone(state, about)
        silent = [about.round.clients[i] for i in about.unverified() if i not in away and about.nodes[i] != self.public]
        if silent:
            self._out.emit(ev.HealthCheck(state.epoch, current.height, tuple(silent)))

    def _compare(self) -> None:
        """Repair parameters that differ from those of a quorum of witnesses, by replaying the epoch (I6)."""
        if self.log is None or self.next_apply is None:
            return
        found = self.log.desync(self.digests, since=self.next_apply - self.settings.delay)
        if found is None or found[0] in self._repaired:
            return
        applied, theirs = found
        self._repaired.add(applied)
        self._out.emit(ev.Diagnose(applied - 1, self.digests[applied], theirs, self._exchange.providers()))
        self._out.say("warning", f"the parameters differ after round {applied - 1}; replaying the epoch")
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
        if may and not voted and self._out.due(("vote", state.epoch)):
            self._out.emit(ev.Vote(state.epoch, state.step - 1, self.holding))

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
            if replayed or (not self._resolved() and self._out.due("patience", after=4 * self.settings.retry)):
                self.next_apply = None
            if self.next_apply is None:
                self._load(wanted, f"taking the run's last parameters {wanted.hex()[:12]}")
            return False
        self.finished = True
        self._out.emit(ev.Finish(reason))
        return True
