"""Keeps the parameters equal to the run's: decides and applies rounds, starts from snapshots, repairs differences.

Part of the node core, so it does no I/O: effects drive the replica (the parameters). Deciding runs ahead of
applying while a node catches up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from psyche_lightning.node import events as ev
from psyche_lightning.node.agreement import AgreedSet, DecidedRound, EpochLog, Undecided, decide
from psyche_lightning.node.exchange import Exchange, gone
from psyche_lightning.node.notices import (
    DecidedWithoutLists,
    Notice,
    ParametersDiffer,
    ParametersNotObtained,
    RatesDiffer,
    ReplayDoesNotHelp,
    RoundNotApplicable,
    TakesSnapshot,
    TensorDiffered,
)
from psyche_lightning.node.outbox import Outbox
from psyche_lightning.node.repair import Base, Repair
from psyche_lightning.node.rounds import RoundLog
from psyche_lightning.node.settings import Settings
from psyche_lightning.node.waiting import describe
from psyche_lightning.protocol.messages import Stuck
from psyche_lightning.protocol.open_ids import OpenIds
from psyche_lightning.protocol.requests import GetRounds
from psyche_lightning.protocol.state import ClientStatus, Phase, Round, RunState

ASKED_ENOUGH = 3
"""Questions to all peers after which a missing list counts as absent if its witness is gone."""
HOPELESS_LOADS = 3
"""Failed attempts to get parameters after which peers are asked for newer ones."""
LOOK_AHEAD = 8
"""Number of decided rounds to fetch payloads for in advance."""


class Follower:
    """Takes one node through the rounds of an epoch.

    Args:
        public: this node's key.
        run_id: the run.
        settings: see :class:`Settings`.
        exchange: talks to the peers.
        out: where effects go.

    Attributes:
        log: the epoch's known rounds.
        next_apply: height of the next round to apply; None until the parameters are the epoch's.
        holding: digest of the parameters, if known.
        digests: digests in this epoch, by the number of rounds applied.
        repair: state for repairing what differs or is missing.
        busy: the training thread's work on the parameters, or the fetch it waits for.
        looked: whether this node knows the digest of its initial parameters.
    """

    def __init__(self, public: bytes, run_id: str, settings: Settings, exchange: Exchange, out: Outbox) -> None:
        self.log: EpochLog | None = None
        self.next_apply: int | None = None
        self.holding: bytes | None = None
        self.digests: dict[int, bytes] = {}
        self.repair = Repair(settings)
        self.busy: object = None
        self.looked = False
        self._public = public
        self._run_id = run_id
        self._settings = settings
        self._exchange = exchange
        self._out = out
        self._open_ids: OpenIds = ()
        self._records: list[DecidedRound] = []
        self._loading: Base | None = None
        self._kept = 0
        self._overdue = 0.0
        self._guessed = False

    # --- what the coordinator announced ---------------------------------------------------------------------------

    def observe_state(self, state: RunState) -> None:
        """File the stored rounds of the current epoch, or of the one that just ended."""
        if state.current is None:
            return
        epoch = state.epoch if state.phase.active else state.epoch - 1
        if self.log is None or self.log.epoch != epoch:
            if not state.phase.active or all(client.node != self._public for client in state.clients):
                return
            self._open_epoch(epoch, state.epoch_digest)
        over = self.epoch_over(state)
        least = (self.next_apply or 0) - self._settings.delay
        for record in state.rounds:
            if record.height >= least and state.round_at(record.height) is record:
                self.observe(record, state, final=over or record.height < state.current.height)

    def observe(self, record: Round, state: RunState, *, final: bool) -> None:
        """Take an announced round; ``final`` means that its witness records are complete."""
        assert self.log is not None
        log = self.log.rounds.get(record.height)
        if log is None:
            members = {c.signer: c.node for c in (*state.exited_clients, *state.clients)}
            nodes = tuple(members.get(signer, signer) for signer in record.clients)
            limit = self._settings.max_payload
            log = RoundLog.open(record, nodes, state.config, self._run_id, self._settings.layout, limit)
            self.log.rounds[record.height] = log
            drains = [] if record.step else [log]
            self._exchange.file_early(self.log, [*drains, *self.log.assign()])
        if not log.final:
            log.round, log.final = record, final

    def epoch_over(self, state: RunState) -> bool:
        """Whether the log's epoch gets no more rounds."""
        assert self.log is not None
        return state.epoch != self.log.epoch or state.phase is Phase.COOLDOWN

    def resolved(self, state: RunState) -> bool:
        """Whether every round of the epoch that this node knows is applied."""
        height = self.next_apply
        return self.log is not None and height is not None and height > _head(state) and height not in self.log.rounds

    def _open_epoch(self, epoch: int, digest: bytes) -> None:
        old, self.log = self.log, EpochLog(epoch, digest)
        self.repair, self._records, self.digests = Repair(self._settings), [], {}
        self.next_apply, self._loading = None, None
        if self.holding == digest:
            self._begin(self.log, 0)
        elif self.busy == ("load", digest):
            self._loading = Base(0, digest)
        self._out.new_epoch()
        self._exchange.new_epoch()
        promises, payloads = self._exchange.keep_promises(epoch)
        if old is not None:
            self._out.emit(ev.Keep(tuple(sorted({digest, self.holding or digest})), payloads, promises))

    def _begin(self, log: EpochLog, applied: int) -> None:
        """Decide and apply on from parameters that contain ``applied`` rounds."""
        self.next_apply, self._kept, self._overdue, self._guessed = applied, 0, 0.0, False
        self.digests, self._records, self.repair.stuck = {}, [], None
        log.start(applied, self._open_ids)
        self._exchange.file_early(log, log.assign())

    # --- the parameters ---------------------------------------------------------------------------------------------

    def load(self, digest: bytes, why: Notice, base: Base | None = None) -> None:
        """Load parameters from this node's store or from peers, unless just tried."""
        if self.busy is None and self._out.due("load"):
            self._out.say(why)
            self.busy, self._loading, self.holding = ("load", digest), base, None
            self._out.emit(ev.Load(digest, self._exchange.providers()))

    def snapshot(self) -> None:
        """Store the parameters and get their digest."""
        if self.busy is None:
            self.busy = "snapshot"
            self._out.emit(ev.TakeSnapshot(self._open_ids))

    def snapshot_taken(self, digest: bytes) -> None:
        """The answer to :meth:`snapshot`."""
        self.looked = True
        if self.busy == "snapshot":
            self.busy, self.holding = None, digest

    def loaded(self, event: ev.Loaded) -> None:
        """The answer to :meth:`load`."""
        base = None
        if self.busy == ("load", event.digest):
            self.busy, base, self._loading = None, self._loading, None
        if event.reason:
            self._out.say(ParametersNotObtained(event.digest, event.reason))
            return
        self.holding, self._open_ids = event.digest, event.open_ids
        self._out.forget("load")
        if self.log is not None and base is not None and (self.next_apply is None or base.applied > self.next_apply):
            self._begin(self.log, base.applied)

    def applied(self, event: ev.Applied) -> None:
        """A round was applied."""
        stored = self.busy == ("apply", event.epoch, event.height, True)
        if not stored and self.busy != ("apply", event.epoch, event.height, False):
            return
        self.busy = None
        if self.log is None or self.log.epoch != event.epoch or self.next_apply != event.height:
            return
        applied = self.next_apply = event.height + 1
        tensor = self.repair.fingerprint(applied, event.prints) if event.prints else None
        if tensor is not None:
            self._out.say(TensorDiffered(tensor, event.height))
        if event.digest:
            self.digests[applied] = event.digest
            if stored:
                self._kept = 0
                self.repair.keep(Base(applied, event.digest))
                self._exchange.offer(self.log.epoch, applied, event.digest)
            self.compare()

    # --- deciding and applying --------------------------------------------------------------------------------------

    def follow(self, state: RunState, to_train: Callable[[], RoundLog | None] = lambda: None) -> None:
        """Get missing data and apply, in order, every round whose agreed set is known.

        Args:
            state: the run's.
            to_train: returns the round that this node trains next; later results wait for it.
        """
        log = self.log
        if log is None:
            return
        self._catch_up(log, state)
        self._decide(log, state)
        while log.decided is not None and self.next_apply is not None and self.busy is None:
            height, training = self.next_apply, to_train()
            for ahead in range(height, min(log.decided, height + LOOK_AHEAD)):
                self._exchange.fetch(log.rounds[ahead], log.agreements[ahead].entries)
            limit = log.decided if training is None else self._settings.applied_before(training.round.height)
            if height >= min(limit, log.decided) or not all(one.verified for one in log.agreements[height].entries):
                break
            self._apply(log, height, log.agreements[height])
        self._notice_stuck(log, state)

    def _catch_up(self, log: EpochLog, state: RunState) -> None:
        if (self.next_apply is None or self.repair.stuck is not None) and state.phase.active:
            self._find_base(log, state)
        if self.next_apply is None:
            return
        first, head = self.next_apply, _head(state)
        while first < head and first in log.rounds and log.rounds[first].final:
            first += 1
        if first < head:
            self._ask_rounds(log, first)

    def _ask_rounds(self, log: EpochLog, first: int) -> None:
        if self._out.due(("rounds", first)):
            self._out.emit(GetRounds(log.epoch, first))

    def _decide(self, log: EpochLog, state: RunState) -> None:
        """Decide rounds in order while lists and announcements are here; ask for missing ones."""
        while log.decided is not None and log.decided in log.rounds:
            agreement = self._agree(log, log.decided, state)
            if agreement is None:
                # The next two are assigned, too: in a replay, ask for all together.
                for height in range(log.decided + 1, log.decided + 3):
                    if height + self._settings.delay < _head(state):
                        self._agree(log, height, state)
                return
            self._records.append(log.close(agreement))
            self._exchange.file_early(log, log.assign())

    def _agree(self, log: EpochLog, height: int, state: RunState) -> AgreedSet | None:
        """A round's agreed set, or None while it is open."""
        results, attesting = log.rounds.get(height), log.rounds.get(height + self._settings.delay - 1)
        if attesting is None:
            over = self.epoch_over(state) and _head(state) < height + self._settings.delay - 1
            return AgreedSet() if over else None
        if results is None or not attesting.final or not results.assigned:
            return None
        absent = self._absent(log, attesting, state)
        outcome = decide(results, attesting, absent)
        if not isinstance(outcome, Undecided):
            if absent and isinstance(decide(results, attesting), Undecided):
                self._out.say(DecidedWithoutLists(height, tuple(attesting.nodes[index] for index in sorted(absent))))
                self._guessed = True
            return outcome
        away = gone(state, attesting)
        for index in outcome.lists:
            peer = None if index in away else attesting.nodes[index]
            self._exchange.ask(log.epoch, attesting.round.height, peer, everybody=index in away)
        if outcome.results:
            self._exchange.ask(log.epoch, height)
        return None

    def _absent(self, log: EpochLog, attesting: RoundLog, state: RunState) -> set[int]:
        """Witnesses that left and whose list no peer supplied within half the deadline, though all were asked."""
        key, height = self._public, attesting.round.height
        waited = self._overdue > state.config.max_round_train_time / 2
        asked = waited and self._exchange.asked(height) >= ASKED_ENOUGH
        if not asked or not any(c.node == key and c.status is ClientStatus.HEALTHY for c in state.clients):
            return set()
        lists = {
            record.proof.index
            for record in attesting.round.witnesses
            if record.merkle not in attesting.attests.get(record.proof.index, {})
        }
        return lists & gone(state, attesting)

    def _apply(self, log: EpochLog, height: int, agreement: AgreedSet) -> None:
        self._warn_of_rates(log.rounds[height], agreement)
        several = len(log.rounds[height].nodes) > 1
        due = (height + 1) % self._settings.digest_every == 0
        self._kept += sum(entry.result.size for entry in agreement.entries)
        self._open_ids = log.open_at[height + 1]
        if agreement.entries or log.open_at[height] != self._open_ids:
            self.holding = None
        if not agreement.entries and not due:
            self.next_apply = height + 1
            return
        snapshot = due and several and (self._kept > self._settings.keep_bytes or self.repair.wanted)
        self.busy = ("apply", log.epoch, height, snapshot)
        payloads = tuple(entry.result.payload for entry in agreement.entries)
        self._out.emit(ev.Apply(log.epoch, height, payloads, agreement.lrs, due, snapshot, several, self._open_ids))

    def _warn_of_rates(self, results: RoundLog, agreement: AgreedSet) -> None:
        mine = results.index_of(self._public)
        own = results.of(mine) if mine is not None else []
        if own and agreement.lrs and own[0].result.lrs != agreement.lrs:
            self._out.say(RatesDiffer())

    def _notice_stuck(self, log: EpochLog, state: RunState) -> None:
        """Notice a round that cannot be applied though all peers were asked in time."""
        height, stuck = self.next_apply, self.repair.stuck
        if height is None:
            return
        late = state.phase.active and self.busy is None and height + self._settings.delay <= _head(state)
        self._overdue = self.repair.waited(height, self._out.now) if late else 0.0
        if stuck is not None and height > stuck:
            self.repair.stuck = None
        elif stuck is None and self._overdue > state.config.max_round_train_time:
            self.repair.stuck = height
            missing = describe(state, log, height, self._settings.delay, self._public)
            self._out.say(RoundNotApplicable(height, missing))

    # --- where to begin ---------------------------------------------------------------------------------------------

    def _find_base(self, log: EpochLog, state: RunState) -> None:
        """Look for parameters to replay from: this node's, or offers that witness lists prove."""
        repair, head = self.repair, _head(state)
        if repair.stuck is None and self._out.attempts("load") > HOPELESS_LOADS:
            repair.stuck = -1
        if repair.stuck is not None:
            key = ("stuck", log.epoch)
            if self._out.due(key):
                self._exchange.complain(Stuck(log.epoch, max(0, repair.stuck), self._out.attempts(key)))
        for base in repair.unproven(log):
            height = base.applied + self._settings.delay - 1
            if height in log.rounds:
                self._exchange.ask(log.epoch, height)
            else:
                self._ask_rounds(log, base.applied)
        if self.busy is not None:
            return
        if not repair.own and repair.stuck is None and head > self._settings.digest_every:
            # Perhaps no peer has the first rounds any more: the answers say what peers keep.
            self._exchange.ask(log.epoch, head)
            if repair.sought is None:
                repair.sought = self._out.now
            if self._out.now - repair.sought < self._settings.retry:
                return
        bases = repair.bases(log)
        if bases:
            base = bases[self._out.attempts("load") % len(bases)]
            self.load(base.digest, TakesSnapshot(base.digest, base.applied), base)

    # --- comparing --------------------------------------------------------------------------------------------------

    def compare(self) -> None:
        """Compare this node's digests with the witnesses' and repair what differs from a quorum's (I6)."""
        if self.log is None or self.next_apply is None:
            return
        for applied in sorted(rounds for rounds in self.digests if rounds > self.repair.confirmed):
            theirs = self.log.quorum_digest(applied, self._settings.digest_span)
            if theirs == self.digests[applied]:
                self._confirm(self.log, applied)
            elif theirs is not None:
                self._repair(self.log, applied, theirs)
                return

    def _confirm(self, log: EpochLog, applied: int) -> None:
        """Write down rounds whose parameters a quorum confirmed, and drop what is no longer needed."""
        self.repair.confirm(applied)
        certain = tuple(record for record in self._records if record.round.height < applied)
        if certain:
            self._records = self._records[len(certain) :]
            self._out.emit(ev.WriteDown(certain))
        cut = self.repair.outdated()
        if cut > min(log.rounds, default=cut):
            log.forget(cut)
            promises, payloads = self._exchange.keep_promises(log.epoch, cut)
            snapshots = tuple(sorted({log.digest, *(base.digest for base in self.repair.own)}))
            self._out.emit(ev.Keep(snapshots, (*payloads, *log.payloads()), promises))

    def _repair(self, log: EpochLog, applied: int, theirs: bytes) -> None:
        """Replay because the parameters differ; if that fails, take a peer's parameters."""
        last, equal = applied - 1, self.repair.confirmed
        if self.repair.differ(applied, replay=not self._guessed):
            self._out.say(ParametersDiffer(last, equal))
        else:
            self._out.say(ReplayDoesNotHelp(last))
            self._out.emit(ev.Diagnose(last, self.digests[applied], theirs, self._exchange.providers()))
        self.next_apply, self.holding, self.digests, self.busy = None, None, {}, None
        log.decided = None
        self._out.forget("load")

    def write_down(self, state: RunState) -> None:
        """Write down an epoch's last rounds when the agreed parameters are this node's."""
        log = self.log
        if log is None or not self._records or state.epoch != log.epoch + 1 or not self.resolved(state):
            return
        if self.holding is not None and self.holding == state.checkpoint.digest:
            *records, last = self._records
            self._out.emit(ev.WriteDown((*records, replace(last, ended=self.holding))))
            self._records = []


def _head(state: RunState) -> int:
    """Height of the newest announced round, or -1."""
    return state.current.height if state.current else -1
