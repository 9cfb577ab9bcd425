"""Keeps the parameters equal to the run's: decides and applies rounds, starts from snapshots, repairs differences.

Part of the node core, so it does no I/O: effects drive the replica (the parameters). Deciding runs ahead of
applying while a node catches up.
"""

from __future__ import annotations

from collections.abc import Callable

from psyche_lightning.node import events as ev
from psyche_lightning.node.agreement import AgreedSet, DecidedRound, EpochLog, Unknown, agreed_set
from psyche_lightning.node.exchange import Exchange
from psyche_lightning.node.notices import (
    Notice,
    OtherRates,
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
from psyche_lightning.protocol.merkle import EMPTY_ROOT
from psyche_lightning.protocol.messages import Stuck
from psyche_lightning.protocol.open_ids import OpenIds
from psyche_lightning.protocol.requests import GetRounds
from psyche_lightning.protocol.state import Round, RunState

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
        self._loading: Base | None = None
        self._kept = 0
        self._written = -1
        self._unwritten: list[DecidedRound] = []

    # --- what the coordinator announced ---------------------------------------------------------------------------

    def observe_state(self, state: RunState) -> None:
        """File the stored rounds of the current epoch, or of the one that ended last."""
        if state.current is None:
            return
        if self.log is None or self.log.epoch != state.rounds_epoch:
            client = any(client.node == self._public for client in state.clients)
            if not (client if state.phase.active else catching_up(state)):
                return
            self._open_epoch(state.rounds_epoch, state)
        assert self.log is not None
        self.log.name(state.checkpoint)
        over = self.epoch_over(state)
        least = (self.next_apply or 0) - self._settings.delay
        for record in state.rounds:
            if record.height >= least and state.round_at(record.height) is record:
                self.observe(record, state, final=over or record.height < state.current.height)
        self.compare()

    def observe(self, record: Round, state: RunState, *, final: bool) -> None:
        """Take an announced round; ``final`` means that its witness records are complete."""
        assert self.log is not None
        log = self.log.rounds.get(record.height)
        if log is None:
            members = {c.signer: c.node for c in (*state.exited_clients, *state.clients)}
            nodes = tuple(members.get(signer, signer) for signer in record.clients)
            allowed = self._settings.layout, self._settings.payload_size(record.step), self.log.rates
            log = RoundLog.open(record, nodes, state.config, self.log.needed, self._run_id, *allowed)
            self.log.rounds[record.height] = log
            drains = [] if record.step else [log]
            self._exchange.file_early(self.log, [*drains, *self.log.assign()])
        if not log.final:
            log.round, log.final = record, final

    def epoch_over(self, state: RunState) -> bool:
        """Whether the log's epoch gets no more rounds."""
        assert self.log is not None
        return state.epoch != self.log.epoch

    def resolved(self, state: RunState) -> bool:
        """Whether every round of the epoch that this node knows is applied."""
        height = self.next_apply
        return self.log is not None and height is not None and height > _head(state) and height not in self.log.rounds

    def _open_epoch(self, epoch: int, state: RunState) -> None:
        digest = state.epoch_digest
        rates = self._settings.rates.of_epoch(state)
        old, self.log = self.log, EpochLog(epoch, digest, state.start_step, state.needed, rates)
        self.repair, self.digests = Repair(self._settings), {}
        self.repair.remember([Base(offer.applied, offer.snapshot) for offer in self._exchange.offered(epoch)])
        self.next_apply, self._loading = None, None
        self._written = -1
        if self.holding == digest:
            self._begin(self.log, 0)
        elif self.busy == ("load", digest):
            self._loading = Base(0, digest)
        self._out.new_epoch()
        promises, payloads = self._exchange.keep_promises(epoch)
        if old is not None:
            self._out.emit(ev.Keep(tuple(sorted({digest, self.holding or digest})), payloads, promises))

    def _begin(self, log: EpochLog, applied: int) -> None:
        """Decide and apply on from parameters that contain ``applied`` rounds."""
        self.next_apply, self._kept = applied, 0
        self.digests, self.repair.stuck, self._unwritten = {}, None, []
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
            self.repair.trial = None if self.repair.proven(self.log, base) else base
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
                self._kept, self.holding = 0, event.digest
                self.repair.keep(Base(applied, event.digest))
                self._exchange.offer(self.log.epoch, applied, event.digest)
            self.compare()

    @property
    def sure(self) -> bool:
        """Whether these are surely the run's parameters: not from an offer that is still tried."""
        return self.next_apply is not None and self.repair.trial is None

    def named(self, state: RunState) -> tuple[int, bytes]:
        """The newest parameters of this epoch whose digest this node knows: their training steps, and the digest."""
        if self.log is None or not self.digests or not self.sure:
            return 0, b""
        applied, digest = max(self.digests.items())
        return min(self.log.first_step - 1 + applied, state.step - 1), digest

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
        if self._unwritten and self.sure:  # else these rounds may retrain other ids than this node thinks
            self._written = self._unwritten[-1].round.height
            self._out.emit(ev.WriteDown(tuple(self._unwritten)))
            self._unwritten = []
        while log.decided is not None and self.next_apply is not None and self.busy is None:
            height, training = self.next_apply, to_train()
            for ahead in range(height, min(log.decided, height + LOOK_AHEAD)):
                self._exchange.fetch(log.rounds[ahead], log.agreements[ahead].entries)
            limit = log.decided if training is None else self._settings.applied_before(training.round.height)
            if height >= min(limit, log.decided) or not all(one.verified for one in log.agreements[height].entries):
                break
            tried = self.repair.trial is not None and height >= max(log.named, default=0)
            if tried:  # what goes beyond the record would prove nothing
                break
            self._apply(log, height, log.agreements[height], state)
        self._notice_stuck(log, state)

    def _catch_up(self, log: EpochLog, state: RunState) -> None:
        if (self.next_apply is None or self.repair.stuck is not None) and self._wanted(log, state):
            self._find_base(log, state)
        if self.next_apply is None:
            return
        first, head = self.next_apply, _head(state)
        while first < head and first in log.rounds and log.rounds[first].final:
            first += 1
        if first < head:
            self._ask_rounds(log, first)

    @staticmethod
    def _wanted(log: EpochLog, state: RunState) -> bool:
        """Whether the run's parameters are those that this epoch's rounds give."""
        return state.epoch == log.epoch if state.phase.active else catching_up(state) and state.epoch == log.epoch + 1

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
            self._exchange.remember(log, log.decided, agreement.entries)
            record = log.close(agreement)
            if record.round.height > self._written:
                self._unwritten.append(record)
            self._exchange.file_early(log, log.assign())

    def _agree(self, log: EpochLog, height: int, state: RunState) -> AgreedSet | None:
        """A round's agreed set, or None while it is not known."""
        results, attesting = log.rounds.get(height), log.rounds.get(height + self._settings.delay - 1)
        if attesting is None:
            over = self.epoch_over(state) and _head(state) < height + self._settings.delay - 1
            return AgreedSet() if over else None
        if results is None or not attesting.final or not results.assigned:
            return None
        outcome = agreed_set(results, attesting)
        if not isinstance(outcome, Unknown):
            return outcome
        if outcome.results:  # also if their trainer sent this node many others
            results.wanted = frozenset(results.list_of(attesting.root or EMPTY_ROOT) or ())
        backers = [record.proof.index for record in attesting.round.witnesses if record.merkle == attesting.root]
        attempt = self._out.attempts(("ask", height, "backers"))
        if self._out.due(("ask", height, "backers")):
            # Some of those who stand behind the root may be gone or lie, and any other node may have the list.
            peer = attesting.nodes[backers[attempt % len(backers)]]
            self._exchange.ask(log.epoch, height, peer, everybody=attempt % 2 == 1 or peer == self._public)
        return None

    def _apply(self, log: EpochLog, height: int, agreement: AgreedSet, state: RunState) -> None:
        self._warn_of_rates(log.rounds[height], agreement)
        several = len(log.rounds[height].nodes) > 1
        last = self._last_training(log, height, state)
        due = (height + 1) % self._settings.digest_every == 0 or last or height + 1 in log.named
        self._kept += sum(entry.result.size for entry in agreement.entries)
        self._open_ids = log.open_at[height + 1]
        if agreement.entries or log.open_at[height] != self._open_ids:
            self.holding = None
        if not agreement.entries and not due:
            self.next_apply = height + 1
            return
        snapshot = last or (due and several and (self._kept > self._settings.keep_bytes or self.repair.wanted))
        self.busy = ("apply", log.epoch, height, snapshot)
        payloads = tuple(entry.result.payload for entry in agreement.entries)
        what = (payloads, agreement.lrs, due, snapshot, several, self._open_ids, agreement.loss)
        self._out.emit(ev.Apply(log.epoch, height, log.rounds[height].round.step, *what))

    def _last_training(self, log: EpochLog, height: int, state: RunState) -> bool:
        """Whether the round is the epoch's last that trains, so that its parameters are the next epoch's."""
        after = log.rounds.get(height + 1)
        ends = after.round.step == 0 if after is not None else self.epoch_over(state) and height == _head(state)
        return log.rounds[height].round.step > 0 and ends

    def _warn_of_rates(self, results: RoundLog, agreement: AgreedSet) -> None:
        others = {entry.envelope.sender for entry in agreement.entries if entry.result.lrs != agreement.lrs}
        mine = results.index_of(self._public)
        own = results.of(mine) if mine is not None else []
        if own and agreement.lrs and own[0].result.lrs != agreement.lrs:
            self._out.say(RatesDiffer())
        for trainer in sorted(others - {self._public}):
            self._out.say(OtherRates(trainer))

    def _notice_stuck(self, log: EpochLog, state: RunState) -> None:
        """Notice a round that cannot be applied though all peers were asked in time."""
        height, stuck = self.next_apply, self.repair.stuck
        if height is None:
            return
        late = self._wanted(log, state) and self.busy is None and height + self._settings.delay <= _head(state)
        overdue = self.repair.waited(height, self._out.now) if late else 0.0
        if stuck is not None and height > stuck:
            self.repair.stuck = None
        elif stuck is None and overdue > state.config.max_round_train_time:
            self.repair.stuck = height
            missing = describe(state, log, height, self._settings.delay, self._public).text
            self._out.say(RoundNotApplicable(height, missing))

    # --- where to begin ---------------------------------------------------------------------------------------------

    def _find_base(self, log: EpochLog, state: RunState) -> None:
        """Look for parameters to replay from: this node's, or what peers offer."""
        repair, head = self.repair, _head(state)
        if repair.stuck is None and self._out.attempts("load") > HOPELESS_LOADS:
            repair.stuck = -1
        if repair.stuck is not None:
            key = ("stuck", log.epoch)
            if self._out.due(key):
                self._exchange.complain(Stuck(log.epoch, max(0, repair.stuck), self._out.attempts(key)))
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
        """Compare this node's digests with those on record, and repair what differs (I6)."""
        if self.log is None or self.next_apply is None:
            return
        for applied in sorted(rounds for rounds in self.digests if rounds > self.repair.confirmed):
            theirs = self.log.named.get(applied)
            if theirs == self.digests[applied]:
                self._confirm(self.log, applied)
            elif theirs is not None:
                self._repair(self.log, applied, theirs)
                return

    def _confirm(self, log: EpochLog, applied: int) -> None:
        """The parameters after these rounds are on record: drop what is no longer needed."""
        self.repair.confirm(applied)
        cut = self.repair.outdated()
        if cut > min(log.rounds, default=cut):
            log.forget(cut)
            promises, payloads = self._exchange.keep_promises(log.epoch, cut)
            snapshots = tuple(sorted({log.digest, *(base.digest for base in self.repair.own)}))
            self._out.emit(ev.Keep(snapshots, (*payloads, *log.payloads()), promises))

    def _repair(self, log: EpochLog, applied: int, theirs: bytes) -> None:
        """Replay because the parameters differ; if that fails, take a peer's parameters."""
        last, equal = applied - 1, self.repair.confirmed
        tried = self.repair.trial
        if tried is not None:
            self.repair.refuse(tried)
        elif self.repair.differ(applied):
            self._out.say(ParametersDiffer(last, equal))
        else:
            self._out.say(ReplayDoesNotHelp(last))
            self._out.emit(ev.Diagnose(last, self.digests[applied], theirs, self._exchange.providers()))
        self._replay(log)

    def doubt(self) -> None:
        """Work the parameters out again, once an epoch, because members of the next one hold others."""
        if self.log is not None and self.next_apply is not None and self.busy is None and not self.repair.doubted:
            self.repair.doubted = True
            self._out.say(ParametersDiffer(self.next_apply - 1, self.repair.confirmed))
            self._replay(self.log)

    def _replay(self, log: EpochLog) -> None:
        self.next_apply, self.holding, self.digests, self.busy = None, None, {}, None
        log.decided = None
        self._out.forget("load")


def catching_up(state: RunState) -> bool:
    """Whether the run's parameters are those of the last epoch's rounds, whose digest is not on record yet."""
    return not state.phase.active and bool(state.checkpoint.digest) and not state.settled


def _head(state: RunState) -> int:
    """Height of the newest announced round, or -1."""
    return state.current.height if state.current else -1
