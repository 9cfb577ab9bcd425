"""A run of this process alone: whatever it hands in is agreed, so no messages, no thread and no waiting are needed.

It has the rounds, epochs, state and ledger that a run with a coordinator has. The coordinator's own machine begins it;
what machine, participant and messages would find out in each round is known here at once.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.coordinator.machine import batch_size
from psyche_lightning.errors import CoordinatorError, StoreError
from psyche_lightning.node.agreement import DecidedRound, float32
from psyche_lightning.node.events import Apply, StateSeen, Trained
from psyche_lightning.node.ledger import Ledger
from psyche_lightning.node.notices import Finished, Left, Outcome
from psyche_lightning.node.participant import RoundWork, loss_bits, result_of
from psyche_lightning.node.recorder import Recorder
from psyche_lightning.node.replica import Replica
from psyche_lightning.node.settings import Settings
from psyche_lightning.node.spare import SpareTime
from psyche_lightning.node.status import StatusFile, progress
from psyche_lightning.node.store import MemoryBlobStore
from psyche_lightning.protocol.messages import Envelope, seal
from psyche_lightning.protocol.open_ids import Interval, OpenIds, reopen, take
from psyche_lightning.protocol.requests import Answer, Figure, Join, Request, WarmupWitness
from psyche_lightning.protocol.state import STORED_ROUNDS, Checkpoint, Phase, Round, RunState
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import Identity, short

TICK = 0.25
"""Seconds between two looks at what the status file should say."""


@dataclass(frozen=True, kw_only=True)
class AloneParts:
    """The parts of a node that trains alone.

    Attributes:
        host: the new run, as its coordinator would hold it.
        identity: the node's key.
        replica: the parameters.
        manifest: the node's run configuration.
        settings: as of a node with others.
        epoch: rounds of an epoch.
        ledger: the ledger, or None.
        status: the status file, or None.
        recorder: writes the event files, or None.
    """

    host: RunHost
    identity: Identity
    replica: Replica
    manifest: Mapping[str, Any]
    settings: Settings
    epoch: int
    ledger: Ledger | None = None
    status: StatusFile | None = None
    recorder: Recorder | None = None


class Alone:
    """Takes part in a run of this process alone, for a training loop that may as well have a ``Participant``.

    Args:
        node: the node's parts.
        applied: called when a round's results are applied.

    Attributes:
        finished: how the run ended; None until it ends.
        loss: training loss of the newest applied round; None before the first.
        spare: other work, which gets a small share of the time, as this node never waits.
        transfer: None: there is nobody to download from.
        waited: 0: there is nobody to wait for.
        applying: 0: nobody looks at it.
    """

    def __init__(self, node: AloneParts, *, applied: Callable[[Apply], None] = lambda task: None) -> None:
        self.finished: Finished | None = None
        self.loss: float | None = None
        self.spare = SpareTime()
        self.transfer = None
        self.waited = self.applying = 0.0
        self._node = node
        self._applied = applied
        self._signer = node.identity.public
        self._open_ids: OpenIds = ()
        self._pending: deque[Apply] = deque()
        self._interruption: BaseException | None = None
        self._running = False
        self._told = -math.inf

    # --- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin the run.

        Raises:
            CoordinatorError: the node's values do not fit the run's.
        """
        host = self._node.host
        host.handle(self._signer, Join("", self._node.manifest), 0.0)
        host.handle(self._signer, WarmupWitness(host.state.epoch, 0, self._digest()), 0.0)
        self._running = True
        self._look_for_the_end()

    def stop(self, why: str = "") -> None:
        """End the run; idempotent.

        Args:
            why: reason for people; a finished run needs none.
        """
        if self._running:
            self._running = False
            reason = why or str(self.finished or "its training ended here")
            if self._node.recorder is not None:
                self._node.recorder.notice(Left(reason))
            with contextlib.suppress(StoreError):  # a full disk is why it leaves
                self._tell_status(reason)

    def interrupt(self, error: BaseException) -> None:
        """Raise ``error`` where a node with others would wait next; a signal handler may call this."""
        self._interruption = error

    @property
    def state(self) -> RunState:
        """The run's state."""
        return self._node.host.state

    def waiting(self) -> str:
        """Whom the node waits for, in one line."""
        return "a run of its own"

    def ask(self, request: Request[Answer]) -> Future[Answer]:
        """Ask the run."""
        answer: Future[Answer] = Future()
        try:
            answer.set_result(self._node.host.handle(self._signer, request, 0.0))
        except CoordinatorError as error:
            answer.set_exception(error)
        return answer

    def tell(self, figures: tuple[Figure, ...]) -> None:
        """Nobody else looks at this node's figures."""

    def wrote(self, prompt: int, token: int) -> None:
        """Nor at its texts, but for the log."""

    # --- rounds -----------------------------------------------------------------------------------------------------

    def next_round(self) -> RoundWork | None:
        """The next batch, when the results that come before it are applied; None when the run is over."""
        self._interrupt()
        now = time.monotonic()
        self.spare.rest("")
        while self.spare.use(here=True):
            self.spare.resume(now)
        while self._pending and (self.state.draining or self._pending[0].height < self._due()):
            self._apply(self._pending.popleft())
        if self.state.draining:
            self._end_epoch()
        if self.finished is not None:
            return None
        if self._node.status is not None and now >= self._told + TICK:
            self._told = now
            self._tell_status()
        state, round_ = self.state, self._current
        if self._node.recorder is not None:
            self._node.recorder.event(StateSeen(state))
        return RoundWork(state.epoch, round_.height, round_.step, self._batch(round_))

    def submit(
        self,
        work: RoundWork,
        payload: bytes,
        *,
        nonce: int,
        lrs: tuple[int, ...],
        loss: float = math.nan,
        tokens: int = 0,
    ) -> None:
        """Hand in a round's compressed update, which is agreed at once.

        Args:
            work: the round.
            payload: the encoded update.
            nonce: count of updates encoded before.
            lrs: fp32 bits of the learning rate of each parameter group.
            loss: mean training loss, for people.
            tokens: tokens or samples trained on. 0 means none: the ids are trained again.

        Raises:
            WireError: the learning rates are not those of the run's schedule.
            StoreError: the ledger cannot be written.
        """
        node, round_ = self._node, self._current
        node.settings.rates.check(lrs, work.step, short(self._signer))
        again, rest = take(self._open_ids, round_.step, round_.batch_size)
        if node.ledger is not None:
            digest, layout = sha256(payload), node.settings.layout
            result = result_of(work, digest, len(payload), layout, nonce=nonce, lrs=lrs, loss=loss, tokens=tokens)
            if node.recorder is not None:
                node.recorder.event(Trained(work.epoch, work.height, result))
            self._write_down(round_, again, (seal(node.identity, self.state.scope, result),))
        self._open_ids = reopen(rest, round_.step, () if tokens else work.batch)
        known = float32(loss_bits(loss)) if tokens and math.isfinite(loss) else None
        place = work.epoch, work.height, work.step
        self._pending.append(Apply(*place, (payload,), lrs, open_ids=self._open_ids, loss=known))
        self._advance(round_)

    def wait_applied(self, work: RoundWork) -> bool:
        """Apply a round's results; returns at once if results overlap training. Always true: nothing ends it early."""
        self._interrupt()
        if not self._node.settings.overlap:
            while self._pending:
                self._apply(self._pending.popleft())
        return True

    def _interrupt(self) -> None:
        if self._interruption is not None:
            raise self._interruption

    def _due(self) -> int:
        """How many of the epoch's rounds are applied before the current one is trained."""
        return self._node.settings.applied_before(self._current.height)

    def _apply(self, task: Apply) -> None:
        if task.loss is not None:
            self.loss = task.loss
        self._node.replica.apply(task.payloads, task.lrs, task.step)
        self._applied(task)

    def _batch(self, round_: Round) -> tuple[Interval, ...]:
        again, _ = take(self._open_ids, round_.step, round_.batch_size)
        return ((round_.data_index, round_.data_index + round_.batch_size), *again)

    # --- what the coordinator would do ------------------------------------------------------------------------------

    @property
    def _current(self) -> Round:
        round_ = self.state.current
        assert round_ is not None  # since start
        return round_

    def _set(self, **fields: Any) -> None:
        host = self._node.host
        host.state = replace(host.state, nonce=host.state.nonce + 1, **fields)

    def _advance(self, before: Round) -> None:
        """Begin the round after the one that is decided now; the epoch's last ones only drain it."""
        host, state = self._node.host, self.state
        height, step, place = before.height + 1, state.step + (before.step > 0), before.data_index + before.batch_size
        over = height >= self._node.epoch + self._node.settings.delay - 1 or step > state.config.total_steps
        drains = state.draining or over
        size = 0 if drains else batch_size(state.config, place * state.max_seq_len)
        seed = host.round_seed(state.epoch, height)
        round_ = Round(height, 0 if drains else step, seed, place, size, before.clients)
        head = height % STORED_ROUNDS
        rounds = (*state.rounds[:head], round_, *state.rounds[head + 1 :])
        self._set(step=step, rounds=rounds, head=head, last_step=step if drains else 0)

    def _end_epoch(self) -> None:
        """Name the parameters, which hold all of the epoch's results, and begin the next epoch, or end the run."""
        for _ in range(self._node.settings.delay - 1):
            self._write_down(self._current)
            self._advance(self._current)
        self._write_down(self._current)
        state, digest, place = self.state, self._digest(), self._current.data_index
        named = Checkpoint(digest, state.step - 1)
        votes = ((self._signer, named.step, digest),)
        self._set(
            epoch=state.epoch + 1,
            epoch_start_data_index=place,
            checkpoint=named,
            checkpoint_votes=votes,
            holders=(self._signer,),
        )
        if state.step > state.config.total_steps:
            self._set(phase=Phase.FINISHED)
        else:
            size = batch_size(state.config, place * state.max_seq_len)
            seed = self._node.host.round_seed(state.epoch + 1, 0)
            first = Round(0, state.step, seed, place, size, self._current.clients)
            self._set(
                start_step=state.step, last_step=0, epoch_digest=digest, rounds=(first,), head=0, checkpoint_votes=()
            )
        self._look_for_the_end()

    def _look_for_the_end(self) -> None:
        if self.state.phase is Phase.FINISHED:
            self.finished = Finished(Outcome.LAST_PARAMETERS, self.state.checkpoint.digest)

    def _digest(self) -> bytes:
        return self._node.replica.digest(MemoryBlobStore().put, self._open_ids)

    def _write_down(self, round_: Round, again: tuple[Interval, ...] = (), results: tuple[Envelope, ...] = ()) -> None:
        if self._node.ledger is not None:
            state = self.state
            record = DecidedRound(state.epoch, round_, (self._signer,), again, results, state.epoch_digest)
            self._node.ledger.append(state.scope, [record])

    def _tell_status(self, left: str | None = None) -> None:
        if self._node.status is not None:
            run, node = self.state.run_id, self._signer.hex()
            self._node.status.write(run=run, node=node, **progress(self.state), waiting=None, away=None, left=left)
