"""The participant without I/O: takes events, returns effects (I3).

One :class:`NodeCore` follows one run. It keeps no clock, socket, thread or tensor: each event carries the time,
effects drive the replica (the parameters), and a history of events replays exactly. The runtime, the tests and the
simulator use the same class.

One round: train the assigned batch, announce the payload, fetch and verify the other payloads, attest them,
and apply the agreed set before the next training (without overlap) or the one after (with overlap).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from psyche_lightning.node import events as ev
from psyche_lightning.node.agreement import EpochLog
from psyche_lightning.node.buffers import BufferCopy
from psyche_lightning.node.events import Effect, Event
from psyche_lightning.node.exchange import Exchange, gone
from psyche_lightning.node.follower import Follower
from psyche_lightning.node.notices import Finished, Outcome, RequestRefused, TakesLast, TakesStart
from psyche_lightning.node.outbox import Outbox
from psyche_lightning.node.repair import Base
from psyche_lightning.node.rounds import RoundLog
from psyche_lightning.node.settings import Settings
from psyche_lightning.node.waiting import describe
from psyche_lightning.node.witness import attest_promise, result_promise, witness_report
from psyche_lightning.protocol.messages import Attest, Buffers, Envelope, Message, Offer, Stuck
from psyche_lightning.protocol.requests import HealthCheck, Join, Vote, WarmupWitness
from psyche_lightning.protocol.state import ClientStatus, Phase, Round, RunState

STALE = ("InvalidWitness", "DuplicateWitness", "InvalidHealthCheck", "InvalidRunState", "Halted")
"""Refusals of a request that arrives after the run moved on."""
FINAL_LOADS = 3
"""Attempts to get the parameters of a finished run."""


class NodeCore:
    """One node in one run.

    Args:
        public: this node's key, which signs its messages.
        signer: this node's key at the coordinator.
        run_id: the run.
        settings: see :class:`Settings`.
        seal: signs a message.
        promises: envelopes that this node stored before a restart, by key (I8).
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
        self.settings = settings
        self.state: RunState | None = None
        self.finished = False
        self._out = Outbox(settings.retry, settings.retry_most)
        self._exchange = Exchange(public, settings, seal, promises or {}, self._out)
        self._follower = Follower(public, run_id, settings, self._exchange, self._out)
        self._buffers = BufferCopy(public, settings, self._exchange, self._out)
        self._trained: tuple[int, int] = (-1, -1)
        self._final_loads = 0

    # --- the door -------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Handle one event and return its effects in order.

        Args:
            event: what happened.
            now: seconds of any monotonic clock.
        """
        self._out.now = max(now, self._out.now)
        follower, log = self._follower, self._follower.log
        match event:
            case ev.StateSeen(state):
                self._see(state)
            case ev.RoundsSeen(epoch, _, rounds):
                if log is not None and log.epoch == epoch and self.state is not None:
                    # The newest may have more records than this answer.
                    for record in rounds[:-1]:
                        follower.observe(record, self.state, final=True)
            case ev.Received(envelope):
                self._receive(envelope)
            case ev.Trained(epoch, height, result):
                if result is not None and log is not None and log.epoch == epoch and height in log.rounds:
                    self._exchange.announce(log.rounds[height], result, result_promise(epoch, height))
            case ev.Fetched():
                self._exchange.fetched(event)
            case ev.Applied():
                follower.applied(event)
            case ev.Loaded():
                self._final_loads += bool(event.reason and self.state and self.state.phase is Phase.FINISHED)
                follower.loaded(event)
            case ev.SnapshotTaken(digest):
                follower.snapshot_taken(digest)
            case ev.BuffersTaken():
                self._buffers.taken(event)
            case ev.BuffersLoaded():
                self._buffers.loaded(event)
            case ev.RequestFailed(_, code, text, retryable):
                if not retryable and code not in STALE:
                    self._out.say(RequestRefused(code, text))
            case ev.Tick():
                pass
        if self.state is not None and not self.finished:
            self._advance(self.state, gather=isinstance(event, (ev.Tick, ev.StateSeen)))
        return self._out.take()

    def waiting(self) -> str:
        """Describes what and whom the node waits for, in one line (I4)."""
        return describe(self.state, self.log, self._follower.next_apply, self.settings.delay, self.public)

    @property
    def log(self) -> EpochLog | None:
        """The epoch's known rounds."""
        return self._follower.log

    @property
    def holding(self) -> bytes | None:
        """Digest of the parameters, if known."""
        return self._follower.holding

    # --- news from peers ----------------------------------------------------------------------------------------------

    def _receive(self, envelope: Envelope) -> None:
        message, log, repair = envelope.message, self.log, self._follower.repair
        if isinstance(message, Buffers):
            self._buffers.hear(envelope)
        elif log is None or self.state is None or message.epoch != log.epoch:
            return
        elif isinstance(message, Offer):
            if self._exchange.knows(envelope.sender):
                repair.hear(Base(message.applied, message.snapshot))
        elif isinstance(message, Stuck):
            if self._exchange.knows(envelope.sender):
                self._exchange.offer_to(envelope.sender)
                repair.ask(self._follower.next_apply or 0)
        else:
            self._exchange.receive(envelope, log, self.state.current.height if self.state.current else -1)
            if isinstance(message, Attest):
                self._follower.compare()

    # --- news from the coordinator ------------------------------------------------------------------------------------

    def _see(self, state: RunState) -> None:
        if self.state is not None:
            if state.nonce < self.state.nonce:
                return
            before, after = self.state.current, state.current
            if state.epoch != self.state.epoch:
                self._out.keep_only(("join", "load"))
            elif (before and before.height) != (after and after.height):
                self._out.prune()
            if state.phase != self.state.phase:
                self._out.forget("join")
        self.state = state
        self._exchange.meet(state)

    # --- what to do next ----------------------------------------------------------------------------------------------

    def _advance(self, state: RunState, *, gather: bool) -> None:
        follower = self._follower
        follower.observe_state(state)
        self._stay_member(state)
        follower.write_down(state)
        if state.phase is Phase.WARMUP:
            self._warm_up(state)
        if state.phase in (Phase.ROUND_TRAIN, Phase.ROUND_WITNESS):
            log, current = self.log, state.current
            if log is None or current is None or log.epoch != state.epoch:
                return  # not a client of this epoch
            if gather:
                self._exchange.gather(log, state)
            follower.follow(state, self._to_train)
            self._buffers.advance(state, log)
            self._train(state)
            self._attest(state, log, current)
            self._check_health(state, log, current)
        if state.phase in (Phase.COOLDOWN, Phase.WAITING_FOR_MEMBERS, Phase.FINISHED, Phase.PAUSED):
            follower.follow(state)
            self._conclude(state)

    def _stay_member(self, state: RunState) -> None:
        """Ask to join when this node is no member, or when an epoch is about to form."""
        if state.phase in (Phase.FINISHED, Phase.UNINITIALIZED):
            return
        member = any(c.signer == self.signer and c.status is ClientStatus.HEALTHY for c in state.clients)
        if (not member or state.phase in (Phase.WAITING_FOR_MEMBERS, Phase.PAUSED)) and self._out.due("join"):
            self._out.emit(Join())

    def _warm_up(self, state: RunState) -> None:
        follower = self._follower
        index = next((i for i, c in enumerate(state.clients) if c.signer == self.signer), None)
        if index is None:
            return
        follower.next_apply = None  # unfinished work of the previous epoch stays unfinished
        decided = state.checkpoint.digest
        if follower.holding is None and (follower.looked or not decided or self._out.attempts("load")):
            follower.snapshot()
            return
        records = state.warmup_witnesses
        target = decided or (records[0].merkle if records else b"")
        if not target:
            # Undecided: the first in the list reports at once, the next ones when it seems to be away.
            if index and not self._out.due(("first", state.epoch), after=state.config.warmup_time / 2):
                return
            assert follower.holding is not None
            target = follower.holding
        if follower.holding != target:
            follower.load(target, TakesStart(target))
            return
        reported = any(record.proof.index == index for record in records)
        if not reported and self._out.due(("warmup", state.epoch)):
            self._out.emit(WarmupWitness(state.epoch, index, target))
        self._buffers.advance(state, self.log)

    def _to_train(self) -> RoundLog | None:
        """The oldest round this node still has to train; with overlap, perhaps the one before the announced one."""
        state, log, applied = self.state, self.log, self._follower.next_apply
        if state is None or log is None or state.current is None or state.phase is not Phase.ROUND_TRAIN:
            return None
        head = state.current.height
        for height in range(self.settings.applied_before(head), head + 1):
            known = log.rounds.get(height)
            mine = known is not None and known.index_of(self.public) in known.batches
            past = applied is not None and applied > self.settings.applied_before(height)
            if mine and not past and self._trained < (log.epoch, height):
                return known
        return None

    def _train(self, state: RunState) -> None:
        here = self._to_train()
        if here is None or self._follower.next_apply != self.settings.applied_before(here.round.height):
            return
        if self._buffers.awaited(state, here.round.height):
            return
        index = here.index_of(self.public)
        assert index is not None
        self._trained = key = (state.epoch, here.round.height)
        batch = here.batches[index]
        promise = self._exchange.promised(result_promise(*key), batch)
        if promise is not None:
            self._exchange.publish(here, promise)
            return
        self._out.emit(ev.Train(state.epoch, here.round.height, here.round.step, batch))

    def _attest(self, state: RunState, log: EpochLog, current: Round) -> None:
        """Report as a witness: in training once everything is here, in the witness phase in any case."""
        here = log.rounds[current.height]
        index = here.index_of(self.public)
        if index is None or not here.selection.is_witness(index) or self._follower.repair.stuck is not None:
            return
        if any(record.proof.index == index for record in current.witnesses):
            return
        about = self._attested(log, current.height)
        incomplete = about and (not about.assigned or not _none_of(state, about, about.missing - about.hopeless))
        if incomplete and state.phase is Phase.ROUND_TRAIN:
            return
        if not self._out.due(("witness", state.epoch, current.height)):
            return
        key = attest_promise(state.epoch, current.height)
        envelope = self._exchange.attest(here, key, lambda: self._list(state.epoch, current.height, about))
        self._out.emit(witness_report(here, index, envelope, about))

    def _list(self, epoch: int, height: int, about: RoundLog | None) -> Attest:
        # Repeats the newest digest until the next: a round may end before all lists arrive.
        applied, digest = max(self._follower.digests.items(), default=(0, b""))
        hashes = sorted(entry.commitment for entry in about.verified()) if about else []
        return Attest(epoch, height, b"".join(hashes), applied, digest)

    def _attested(self, log: EpochLog, height: int) -> RoundLog | None:
        """The round whose results are witnessed in round ``height``, or None."""
        about = log.rounds.get(height - self.settings.delay + 1)
        return about if about and about.round.step else None

    def _check_health(self, state: RunState, log: EpochLog, current: Round) -> None:
        """Name the trainers without a witnessed result in the previous round."""
        if state.phase is not Phase.ROUND_TRAIN or current.height == 0:
            return
        before, about = log.rounds.get(current.height - 1), self._attested(log, current.height - 1)
        if before is None or about is None or not about.assigned or not self._out.once(("health", current.height)):
            return
        index = before.index_of(self.public)
        if index is None or index not in {record.proof.index for record in before.round.witnesses}:
            return
        silent = about.missing - gone(state, about)
        signers = tuple(about.round.clients[i] for i in sorted(silent) if about.nodes[i] != self.public)
        if signers:
            self._out.emit(HealthCheck(state.epoch, current.height, signers))

    def _conclude(self, state: RunState) -> None:
        """Report the parameters at the end of an epoch; leave at the end of the run."""
        follower, log = self._follower, self.log
        if state.phase is Phase.FINISHED and follower.busy is None and self._left(state):
            return
        if log is None or not follower.epoch_over(state) or not follower.resolved(state):
            return
        if follower.holding is None:
            follower.snapshot()
            return
        mine = next((c for c in state.clients if c.signer == self.signer), None)
        voted = any(vote[0] == self.signer for vote in state.checkpoint_votes)
        may = mine is not None and mine.status is ClientStatus.HEALTHY and state.phase is Phase.COOLDOWN
        if may and not voted and self._out.due(("vote", state.epoch)):
            self._out.emit(Vote(state.epoch, state.step - 1, follower.holding))

    def _left(self, state: RunState) -> bool:
        """Leave the finished run once this node has its parameters or cannot get them; returns whether it left."""
        follower, wanted = self._follower, state.checkpoint.digest
        if not wanted:
            outcome = Outcome.NOTHING_AGREED
        elif follower.holding == wanted:
            outcome = Outcome.LAST_PARAMETERS
        elif self._final_loads >= FINAL_LOADS:
            outcome = Outcome.OTHER_PARAMETERS
        else:
            resolved = follower.resolved(state)
            replayed = resolved and follower.holding is not None
            if replayed or (not resolved and self._out.due("patience", after=4 * self.settings.retry)):
                follower.next_apply = None
            if follower.next_apply is None:
                follower.load(wanted, TakesLast(wanted))
            return False
        self.finished = True
        self._out.emit(Finished(outcome, wanted))
        return True


def _none_of(state: RunState, log: RoundLog, indices: set[int]) -> bool:
    """Whether all these clients of a round are gone."""
    return not indices or indices <= gone(state, log)
