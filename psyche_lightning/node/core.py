"""The participant without I/O: takes events, returns effects (I3).

One :class:`NodeCore` follows one run. It keeps no clock, socket, thread or tensor: each event carries the time,
effects drive the replica (the parameters), and a history of events replays exactly. The runtime, the tests and the
simulator use the same class.

One round: train the assigned batch, announce the payload, fetch and verify the other payloads, attest them,
and apply the agreed set before the next training (without overlap) or the one after (with overlap).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from psyche_lightning.node import events as ev
from psyche_lightning.node.agreement import EpochLog
from psyche_lightning.node.buffers import BufferCopy
from psyche_lightning.node.events import Effect, Event
from psyche_lightning.node.exchange import Exchange, gone
from psyche_lightning.node.follower import Follower, catching_up
from psyche_lightning.node.notices import (
    CoordinatorWentBack,
    Finished,
    OtherStart,
    Outcome,
    RequestRefused,
    SignedBefore,
    TakesLast,
    TakesStart,
)
from psyche_lightning.node.outbox import Outbox
from psyche_lightning.node.patience import Patience
from psyche_lightning.node.repair import Base
from psyche_lightning.node.rounds import RoundLog
from psyche_lightning.node.settings import Settings
from psyche_lightning.node.waiting import Awaited, describe
from psyche_lightning.node.witness import result_promise, witness_report
from psyche_lightning.protocol.committee import decided_root, starting_digest
from psyche_lightning.protocol.merkle import EMPTY_ROOT
from psyche_lightning.protocol.messages import Buffers, Envelope, Message, Offer, Result, Stuck
from psyche_lightning.protocol.requests import Accuse, HealthCheck, Join, WarmupWitness
from psyche_lightning.protocol.state import MISSED_ROUNDS, Phase, Round, RunState

STALE = ("InvalidWitness", "DuplicateWitness", "InvalidHealthCheck", "InvalidRunState", "Halted")
"""Refusals of a request that arrives after the run moved on."""
CLAIM_AFTER = 10.0
"""Seconds of waiting for an epoch after which a newcomer looks whether it holds the run's parameters."""
SETTLING = 8
"""Rounds of an epoch in which a late result is a sign of life, as shares do not follow the members' speeds yet."""
OLDER_FOR = 20.0
"""Seconds after which an older state is not just late: the coordinator was restored from a copy."""
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
        remembered: the announcements of whole rounds that it stored before a restart, by key.
        lost: the payloads of its own stored results that are not in its store any more.
    """

    def __init__(
        self,
        public: bytes,
        signer: bytes,
        run_id: str,
        settings: Settings,
        seal: Callable[[Message], Envelope],
        promises: Mapping[str, Envelope] | None = None,
        remembered: Mapping[str, Sequence[Envelope]] | None = None,
        lost: Collection[bytes] = (),
    ) -> None:
        self.public = public
        self.signer = signer
        self.settings = settings
        self.state: RunState | None = None
        self.finished = False
        self._out = Outbox(settings.retry, settings.retry_most)
        self._exchange = Exchange(public, settings, seal, promises or {}, remembered or {}, self._out, lost)
        self._follower = Follower(public, run_id, settings, self._exchange, self._out)
        self._buffers = BufferCopy(public, settings, self._exchange, self._out)
        self._trained: tuple[int, int] = (-1, -1)
        self._training = False
        self._patience = Patience()
        self._final_loads = 0
        self._reported: tuple[int, bytes] | None = None
        self._older: tuple[float, RunState] | None = None

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
                self._training = False
                if (
                    result is not None
                    and (epoch, height) <= self._trained  # else a core before this one asked
                    and log is not None
                    and log.epoch == epoch
                    and height in log.rounds
                ):
                    self._exchange.announce(log.rounds[height], result, result_promise(epoch, height))
            case ev.Fetched():
                self._exchange.fetched(event)
            case ev.Applied():
                follower.applied(event)
            case ev.Loaded():
                if event.open_ids and self.state is not None and not self.state.checkpoint.digest:
                    event = replace(event, reason="they name data ids to train again, but nothing was trained yet")
                self._final_loads += bool(event.reason and self.state and self.state.phase is Phase.FINISHED)
                follower.loaded(event)
            case ev.SnapshotTaken(digest):
                follower.snapshot_taken(digest)
            case ev.BuffersTaken():
                self._buffers.taken(event)
            case ev.BuffersLoaded():
                self._buffers.loaded(event)
            case ev.RequestFailed(request, code, text, retryable):
                if retryable and isinstance(request, Accuse):
                    self._exchange.accuse_again(request)
                elif not retryable and code not in STALE:
                    self._out.say(RequestRefused(code, text))
            case ev.Tick():
                pass
        if self._older is not None and self.state is not None and self._out.now - self._older[0] >= OLDER_FOR:
            older = self._older[1]
            self._out.say(CoordinatorWentBack(self.state.step, older.step))
            self._out.emit(ev.StartOver(older))
        elif self.state is not None and not self.finished:
            self._advance(self.state, gather=isinstance(event, (ev.Tick, ev.StateSeen)))
        return self._out.take()

    def waiting(self) -> str:
        """Describes what and whom the node waits for, in one line (I4)."""
        return self.awaited().text

    def awaited(self) -> Awaited:
        """What and whom the node waits for."""
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
                repair.hear(envelope.sender, Base(message.applied, message.snapshot))
        elif isinstance(message, Stuck):
            if self._exchange.knows(envelope.sender):
                self._exchange.offer_to(envelope.sender, log.epoch)
                repair.ask(self._follower.next_apply or 0)
        else:
            self._exchange.receive(envelope, log, self.state.current.height if self.state.current else -1)

    # --- news from the coordinator ------------------------------------------------------------------------------------

    def _see(self, state: RunState) -> None:
        if self.state is not None:
            if state.nonce < self.state.nonce:  # late, or the coordinator has lost what it had announced
                self._older = self._older[0] if self._older else self._out.now, state
                return
            before, after = self.state.current, state.current
            if _contradicts(self.state, state):
                self._older = self._out.now - OLDER_FOR, state
                return
            if state.epoch != self.state.epoch:
                self._out.keep_only(("join", "load"))
            elif (before and before.height) != (after and after.height):
                self._out.prune()
            if state.phase != self.state.phase:
                self._out.forget("join")
                self._out.forget(("warmup", state.epoch))
        self.state, self._older = state, None
        self._exchange.meet(state)

    # --- what to do next ----------------------------------------------------------------------------------------------

    def _advance(self, state: RunState, *, gather: bool) -> None:
        follower = self._follower
        follower.observe_state(state)
        self._stay_member(state)
        self._exchange.repeat()
        if state.phase.active:
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
            return
        follower.follow(state)
        if state.phase is Phase.WARMUP:
            self._warm_up(state)
        elif state.phase is Phase.WAITING_FOR_MEMBERS:
            self._claim(state)
        elif state.phase is Phase.FINISHED and follower.busy is None:
            self._leave(state)

    def _stay_member(self, state: RunState) -> None:
        """Ask to join when this node is no member, or when an epoch is about to form."""
        if state.phase in (Phase.FINISHED, Phase.UNINITIALIZED):
            return
        member = any(client.signer == self.signer for client in state.healthy)
        if (not member or state.phase in (Phase.WAITING_FOR_MEMBERS, Phase.PAUSED)) and self._out.due("join"):
            self._out.emit(Join())

    def _warm_up(self, state: RunState) -> None:
        """Get the epoch's parameters and report them."""
        follower, decided = self._follower, starting_digest(state)
        index = next((i for i, c in enumerate(state.clients) if c.signer == self.signer), None)
        if index is None:
            return
        if not decided and not state.checkpoint.digest and index:
            return  # the first member says which parameters a fresh run begins with
        if catching_up(state):
            if not (follower.resolved(state) and follower.sure):
                return
        elif follower.busy is None:
            follower.next_apply = None  # the last epoch's rounds are in the checkpoint
        if follower.holding is None and (not state.settled or follower.looked or self._out.attempts("load")):
            follower.snapshot()
            return
        if self.settings.pinned and not state.checkpoint.digest and decided not in (b"", follower.holding):
            self._out.say(OtherStart(state.clients[0].node, decided))
            return
        target = decided or follower.holding
        if follower.holding != target or target is None:
            follower.load(decided, TakesStart(decided))
            return
        reported = any(record.proof.index == index for record in state.warmup_witnesses)
        if not reported and self._out.due(("warmup", state.epoch)):
            self._reported = state.epoch, target
            self._out.emit(WarmupWitness(state.epoch, index, target))
        self._buffers.advance(state, self.log)

    def _claim(self, state: RunState) -> None:
        """Tell a run that waits for a holder that this node holds its parameters, perhaps from a checkpoint."""
        follower = self._follower
        if catching_up(state) and self._reported == (state.epoch, follower.holding):
            # The warm-up ended without a quorum. Perhaps this node's parameters have changed by themselves.
            self._reported = None
            if any(record.merkle != follower.holding for record in state.warmup_witnesses):
                follower.doubt()
        if not state.settled or self.signer in state.holders or follower.busy is not None:
            return
        if follower.holding is None and not follower.looked:
            if self._out.due(("look", state.epoch), after=CLAIM_AFTER):
                follower.snapshot()
        elif follower.holding == state.checkpoint.digest:
            if self._out.due(("claim", state.epoch)):
                self._out.emit(WarmupWitness(state.epoch, 0, follower.holding))
        elif not state.holders:  # the owner goes back to older parameters, which may be in this node's store
            follower.load(state.checkpoint.digest, TakesStart(state.checkpoint.digest))

    def _to_train(self) -> RoundLog | None:
        """The oldest round this node still has to train; with overlap, perhaps the one before the announced one."""
        state, log, applied = self.state, self.log, self._follower.next_apply
        if state is None or log is None or state.current is None or state.phase is not Phase.ROUND_TRAIN:
            return None
        head = state.current.height
        for height in range(self.settings.applied_before(head), head + 1):
            if self._trained >= (log.epoch, height):
                continue
            known = log.rounds.get(height)
            mine = known is not None and known.index_of(self.public) in known.batches
            past = applied is not None and applied > self.settings.applied_before(height)
            if mine and not past:
                return known
        return None

    def _train(self, state: RunState) -> None:
        here = self._to_train()
        if here is None or self._follower.next_apply != self.settings.applied_before(here.round.height):
            return
        if not self._follower.sure:
            return
        if self._buffers.awaited(state, here.round.height):
            return
        index = here.index_of(self.public)
        assert index is not None
        self._trained = key = (state.epoch, here.round.height)
        batch = here.batches[index]
        promise = self._exchange.promised(result_promise(*key))
        if promise is not None:
            if isinstance(promise.message, Result) and promise.message.batch == batch:
                self._exchange.publish(here, promise)
            else:
                self._out.say(SignedBefore(here.round.height))
            return
        self._training = True
        self._out.emit(ev.Train(state.epoch, here.round.height, here.round.step, batch))

    def _attest(self, state: RunState, log: EpochLog, current: Round) -> None:
        """Report as a witness, and again when this node verified more, until the round is decided."""
        here = log.rounds[current.height]
        index = here.index_of(self.public)
        if index is None or not here.selection.is_witness(index) or self._follower.repair.stuck is not None:
            return
        about = self._attested(log, current.height)
        if not self._may_report(state, about):
            return
        step, digest = self._follower.named(state)
        root = about.own()[1] if about else EMPTY_ROOT
        mine = next((record for record in current.witnesses if record.proof.index == index), None)
        voted = not digest or (self.signer, step, digest) in state.checkpoint_votes
        decided = here.root is not None  # then a report counts for the parameters that it names only
        if mine is not None and (decided or mine.merkle == root) and (voted or not state.draining):
            return
        open_ = mine is None or not decided or state.draining
        if open_ and self._out.due(("witness", state.epoch, current.height, root, digest)):
            if about is not None:
                self._exchange.remember(log, about.round.height, about.verified())
            self._out.emit(witness_report(state.epoch, here, index, about, step, digest))

    def _may_report(self, state: RunState, about: RoundLog | None) -> bool:
        """Whether to report: in training once everything is here or late, in the witness phase in any case."""
        if about is None:
            drained = not state.draining or self._follower.named(state)[0] == state.step - 1
            return drained or state.phase is Phase.ROUND_WITNESS
        if not about.assigned:
            return False
        missing = about.missing - about.hopeless
        missing -= gone(state, about) if missing else set()
        key = (state.epoch, about.round.height)
        # With overlap, late results hold nobody up who still trains the round after theirs.
        held = not self.settings.overlap or not (self._training or self._to_train())
        over = self._patience.over(key, about, missing, self._out.now, held=held)
        return over or state.phase is Phase.ROUND_WITNESS

    def _attested(self, log: EpochLog, height: int) -> RoundLog | None:
        """The round whose results are witnessed in round ``height``, or None."""
        about = log.rounds.get(height - self.settings.delay + 1)
        return about if about and about.round.step else None

    def _check_health(self, state: RunState, log: EpochLog, current: Round) -> None:
        """Name the clients without an agreed result in the last rounds; in an epoch's first ones, without any."""
        height, back = current.height, self.settings.delay - 1
        if state.phase is not Phase.ROUND_TRAIN or height < MISSED_ROUNDS:
            return
        silent = {client.signer for client in state.healthy} - {self.signer}
        for before in range(height - MISSED_ROUNDS, height):
            about, agreed = log.rounds.get(before - back), log.agreements.get(before - back)
            if about is None or agreed is None or not agreed.entries:
                return  # where nothing was agreed, no single client is to blame
            heard = {entry.trainer for entry in agreed.entries}
            if height < SETTLING:
                heard |= {entry.trainer for entry in about.entries.values()}
            silent &= {about.round.clients[index] for index in about.batches if index not in heard}
            if not silent:
                return
        if self._out.once(("health", height)):
            self._out.emit(HealthCheck(state.epoch, height, tuple(sorted(silent))))

    def _leave(self, state: RunState) -> None:
        """Leave the finished run once this node has its parameters or cannot get them."""
        follower, wanted = self._follower, state.checkpoint.digest
        if not wanted:
            outcome = Outcome.NOTHING_AGREED
        elif follower.holding == wanted:
            outcome = Outcome.LAST_PARAMETERS
        elif self._final_loads >= FINAL_LOADS:
            outcome = Outcome.OTHER_PARAMETERS
        else:
            resolved = follower.resolved(state)
            if resolved and follower.holding is None:
                follower.snapshot()
                return
            if resolved or self._out.due("patience", after=4 * self.settings.retry):
                follower.next_apply = None
            if follower.next_apply is None:
                follower.load(wanted, TakesLast(wanted))
            return
        self.finished = True
        self._out.emit(Finished(outcome, wanted))


def _contradicts(before: RunState, after: RunState) -> bool:
    """Whether a newer state takes back what an older one showed, which a coordinator does only if it lost that."""
    if after.rounds_epoch != before.rounds_epoch:
        return after.rounds_epoch < before.rounds_epoch
    old, new = before.current, after.current
    if old is None or new is None:
        return False
    in_both = [(round_, same) for round_ in before.rounds if (same := after.round_at(round_.height)) is not None]
    under_way = before.phase.active and after.phase.active
    return (
        new.height < old.height
        or (under_way and any(replace(one, witnesses=()) != replace(two, witnesses=()) for one, two in in_both))
        or any(
            decided_root(one, before.needed) != decided_root(two, after.needed)
            for one, two in in_both
            if one is not old or not before.phase.active
        )
    )
