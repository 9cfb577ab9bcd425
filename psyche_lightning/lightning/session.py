"""A node's membership in a run, for Trainer and Fabric."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from psyche_lightning.chronicle.entry import Kind
from psyche_lightning.chronicle.writer import Chronicle
from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.distro import DisTrO, NonFiniteGradientError
from psyche_lightning.errors import ConfigError, DataError, PsycheError, StoreError
from psyche_lightning.lightning import delta as saved_delta
from psyche_lightning.lightning.alone import Alone, AloneParts
from psyche_lightning.lightning.collectives import RUN_LOSS
from psyche_lightning.lightning.entry import Entry
from psyche_lightning.lightning.following import (
    APPLIED,
    END,
    FIGURES,
    GO_ON,
    STARTED,
    WORK,
    Follower,
    Mirrored,
    hand_on_model,
    tell_round,
)
from psyche_lightning.lightning.optimizers import TakenStep
from psyche_lightning.lightning.standing import Standing, after_round, at_the_end
from psyche_lightning.lightning.traffic import Traffic
from psyche_lightning.lightning.world import World
from psyche_lightning.logs import speaking
from psyche_lightning.node.agreement import float32
from psyche_lightning.node.download import Transfer
from psyche_lightning.node.events import Apply
from psyche_lightning.node.journal import Journal, MemoryJournal
from psyche_lightning.node.ledger import FILE as LEDGER
from psyche_lightning.node.ledger import Ledger
from psyche_lightning.node.notices import Finished
from psyche_lightning.node.parameters import ParameterReplica, persistent_buffers
from psyche_lightning.node.participant import Participant, RoundWork, reason_to_leave
from psyche_lightning.node.rates import Rates
from psyche_lightning.node.recorder import LogRecorder, Recorder
from psyche_lightning.node.replica import Replica
from psyche_lightning.node.runtime import NodeParts
from psyche_lightning.node.settings import Settings
from psyche_lightning.node.spans import NoSpans, spans_of
from psyche_lightning.node.spare import SpareTime
from psyche_lightning.node.status import FILE as STATUS
from psyche_lightning.node.status import StatusFile
from psyche_lightning.node.store import DirectoryBlobStore, MemoryBlobStore
from psyche_lightning.protocol.manifest import START
from psyche_lightning.protocol.open_ids import shown
from psyche_lightning.protocol.requests import MAX_FIGURES, Answer, Figure, Request
from psyche_lightning.protocol.state import INCARNATION_SIZE, CoordinatorConfig, RunState
from psyche_lightning.recipe.manifest import schedule_of
from psyche_lightning.version import __version__
from psyche_lightning.wire.canonical import pack, sha256, unpack
from psyche_lightning.wire.identity import Identity, short

logger = logging.getLogger(__name__)

ENDLESS = 2**32 - 1
"""Steps of a run without a limit."""
ALONE_EPOCH = 1000
"""Rounds of an epoch in a run of one process alone, which then drops its record of them."""
LEAST_KEPT = 64 << 20
"""Minimum bytes of agreed payloads to keep between two snapshots, if the run sets no value."""
LOST_ROUNDS = 20
"""A node leaves after this many rounds in a row without samples; others train its share."""
AHEAD_NODES = 4
"""In runs of up to this many nodes, each prefetches the whole next round, because its share is not known yet."""


class Session:
    """A node's membership in a run, for the thread that trains. It gets rounds and submits updates.

    Args:
        entry: the run's fixed values.
        step: the module with its optimizer.
        sections: the manifest's sections of model, optimizer and data.
        global_batch: see :meth:`Entry.global_batch`.
        total_steps: the last step that this node's user wants; None for no limit.
        done: steps done before, in a run of this process alone.
        stops: returns whether the training loop wants to stop; asked during waits.
        world: the ranks of the node, of which rank 0 takes part in the run; None for a node with one device.

    Attributes:
        entry: as given.
        traffic: counts sent and received bytes.
        identity: the node's public key.
        signer: the key by which the coordinator knows this node.
        payload_bytes: computed bytes of the payloads to peers so far: one payload to each peer in each round.
        loss: mean loss of the last round that this node trained.
        samples: number of samples of this node in that round.
        work: the current round; None between rounds.
        lost_rounds: number of rounds in a row, up to the last one, without samples for this node.
        rounds: number of rounds in which this node had a share.
        empty_rounds: number of those to which it contributed nothing.
        works: what :meth:`on_shards` can do, by name; the same names on all ranks of the node.

    Raises:
        PsycheError: the node's folder is unusable, or the coordinator's URL is wrong.
    """

    def __init__(
        self,
        entry: Entry,
        step: TakenStep,
        sections: dict[str, dict[str, Any]],
        *,
        global_batch: int,
        total_steps: int | None,
        done: int = 0,
        stops: Callable[[], bool] = lambda: False,
        world: World | None = None,
    ) -> None:
        self.entry = entry
        self._world = world
        self.payload_bytes = 0
        self.loss = math.nan
        self.samples = 0
        self.work: RoundWork | None = None
        self.lost_rounds = 0
        self.rounds = self.empty_rounds = 0
        self.works: dict[str, Callable[..., Any]] = {}
        self._due = False  # whether the figures of the current step are to be computed
        self._figures: dict[str, float] = {}
        self._told: dict[str, Figure] = {}
        self._took = self._encoding = self._idle = self._applying = 0.0
        self._next: RoundWork | None = None
        self._taken: tuple[RoundWork, RunState] | None = None
        self._submitted: RoundWork | None = None
        self._ticks = 0
        self._over = self._closed = False
        self._why = ""
        self._step = step
        self._recorder: Recorder | None = None
        self._spans = NoSpans()
        self._replica = ParameterReplica(step.distro, step.module)
        replica: Replica = self._replica
        if world is not None and world.rank == 0:
            replica = Mirrored(self._replica, world, self._hand_on, sharded=self._sharded)
        self.traffic = Traffic(entry.transport, entry.meter, step.distro.payload_sizes)
        self._folder = folder = entry.options.folder
        total = entry.options.total_steps or total_steps or ENDLESS
        with contextlib.ExitStack() as opened:
            identity = entry.memory.identity if folder is None else node_key(folder)
            self.identity = self.signer = identity.public
            follows = world is not None and world.rank > 0
            who = short(identity.public) if world is None or not follows else f"rank {world.rank}"
            opened.enter_context(speaking(entry.run_id, who))
            if not follows:
                logger.info("%s", step)
            self._delta_folder = folder
            restored = folder is not None and saved_delta.load(folder, entry.scope, step.distro, step.optimizer)
            if restored:
                logger.info("restored the delta of %d rounds from %s", step.distro.nonce, folder)
            journal: Journal | MemoryJournal = entry.memory.journal
            ledger = status = None
            coordinator = (
                None
                if follows or entry.options.coordinator is None
                else entry.client(entry.options.coordinator, identity)
            )
            if coordinator is not None:
                self.signer = coordinator.signer
            if folder is not None:
                journal = opened.enter_context(contextlib.closing(Journal(folder / "journal")))  # locks the folder
                ledger = opened.enter_context(contextlib.closing(Ledger(folder / LEDGER)))
                status = StatusFile(folder / STATUS)
                self._recorder = opened.enter_context(self._recording(folder, identity))
            agreed = entry.manifest(sections, {"global_batch_size": global_batch, "total_steps": total})
            planned, groups = schedule_of(agreed), step.optimizer.param_groups
            shares = [group.get("initial_lr", group["lr"]) / planned.base_lr for group in groups] if planned else []
            self._rates = Rates(replica.groups, planned, tuple(shares), entry.run.cold_start_warmup_steps)
            settings = Settings(
                overlap=entry.run.overlap,
                digest_every=entry.run.digest_every,
                layout=replica.layout,
                payload_size=replica.payload_size,
                pinned=START in agreed,
                rates=self._rates,
                buffers=replica.has_buffers,
                keep_bytes=entry.run.keep_bytes or max(replica.size, LEAST_KEPT),
                tensors=replica.tensors,
            )
            self._participant: Participant | Alone | Follower
            if world is not None:
                self._level(world, agreed, restored)
            if world is not None and follows:
                self._participant = Follower(
                    world, replica, self._hand_on, figures=step.distro.figures, works=self.works
                )
            elif coordinator is None:
                own = AloneParts(
                    host=self._own_run(global_batch, total, done),
                    identity=identity,
                    replica=replica,
                    manifest=agreed,
                    settings=settings,
                    epoch=ALONE_EPOCH,
                    ledger=ledger,
                    status=status,
                    recorder=self._recorder,
                )
                self._participant = Alone(own, applied=self._after_round)
            else:
                store = entry.memory.store if folder is None else DirectoryBlobStore(folder / "blobs")
                self._spans = spans_of(entry.run_id, identity.public.hex())
                node = NodeParts(
                    identity=identity,
                    run_id=entry.run_id,
                    coordinator=coordinator,
                    transport=entry.transport,
                    replica=replica,
                    manifest=agreed,
                    region=entry.options.region,
                    settings=settings,
                    store=store,
                    journal=journal,
                    traffic=lambda: self.traffic.total,
                    served=self.traffic.served,
                    ledger=ledger,
                    status=status,
                    recorder=self._recorder,
                    spans=self._spans,
                )
                patience = entry.options.patience
                self._participant = Participant(node, patience=patience, stops=stops, applied=self._after_round)
            self._opened = opened.pop_all()

    def start(self) -> None:
        """Become a member.

        Raises:
            PsycheError: the run refuses this node, or the transport cannot listen.
        """
        if self._world is not None and self._world.rank == 0:
            self._world.watch = self.interrupt
        self._participant.start()
        if self._world is not None and self._world.rank == 0:
            self._world.tell(STARTED)

    def _hand_on(self) -> None:
        """Give all ranks of the node rank 0's parameters and buffers."""
        assert self._world is not None
        distro = self._step.distro
        if isinstance(distro, DisTrO):
            hand_on_model(self._world, distro, self._step.module)
        else:  # parameters are divided already
            self._level_buffers()

    def _level(self, world: World, agreed: Mapping[str, Any], restored: bool) -> None:
        """Make sure that all ranks of the node train the same, and give them rank 0's parameters, delta and key.

        Raises:
            ConfigError: a rank would train something else.
        """
        sort = json.dumps([__version__, torch.__version__, agreed], sort_keys=True)
        other = world.equal(sha256(sort.encode()))
        if other is not None:
            raise ConfigError(
                f"rank {other} of this node has another model, optimizer, data set, configuration or release than its "
                "rank 0. Start all ranks with the same program and arguments, and let nothing of these depend on the "
                "rank."
            )
        self._hand_on()
        path = str(self._folder or "") if restored or self._sharded else ""
        told = world.hand_on_bytes(pack([self.identity, self.signer, path]))
        if world.rank:
            self.identity, self.signer, path = unpack(told, max_size=len(told))
            if path:  # on this machine, like all ranks
                self._delta_folder = Path(path) if self._sharded else None
                saved_delta.load(Path(path), self.entry.scope, self._step.distro, self._step.optimizer)

    def on_shards(self, name: str, *values: Any) -> Any:
        """Do one of :attr:`works`: on all ranks of the node if each has a part of the model, else here alone.

        Rank 0 calls it; the others do it in their current or next wait, for instance in :meth:`meet`.

        Args:
            name: of the work.
            values: its arguments: whole numbers, text, bytes, None, and lists of them.

        Returns:
            What it gives on this rank.

        Raises:
            RankError: another rank is gone.
        """
        if self._world is None or not self._sharded:
            return self.works[name](*values)
        self._world.tell(WORK, name, list(values))
        with self._world.computing():
            return self.works[name](*values)

    def meet(self) -> None:
        """With shards: where ranks other than 0 do what rank 0 has them do, until it comes to the same place."""
        if isinstance(self._participant, Follower):
            if self._sharded:
                self._participant.meet()
        elif self._world is not None and self._sharded:
            self._world.tell(GO_ON)

    @property
    def left(self) -> bool:
        """Whether rank 0 of this node left the run before its end, so that this rank must end its training, too."""
        return isinstance(self._participant, Follower) and self._participant.left

    def _own_run(self, global_batch: int, total: int, done: int) -> RunHost:
        """A run of this process alone."""
        options = self.entry.options
        sizes = CoordinatorConfig(
            global_batch_size_start=global_batch, global_batch_size_end=global_batch, total_steps=total
        )
        config = replace(options.config or sizes, init_min_clients=1, min_clients=1, witness_nodes=0)
        host = RunHost(
            self.entry.run_id,
            config,
            seed=self.entry.run.seed,
            max_seq_len=options.tokens_per_sample,
            incarnation=os.urandom(INCARNATION_SIZE),
        )
        done, index = options.start or (done, done * global_batch)
        host.state = replace(host.state, step=done + 1, start_step=done + 1, epoch_start_data_index=index)
        return host

    # --- rounds -----------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> Finished | None:
        """How the run ended for this node; None until it ends."""
        return self._participant.finished

    @property
    def alone(self) -> bool:
        """Whether this process is the whole run."""
        return self.entry.options.coordinator is None

    @property
    def state(self) -> RunState | None:
        """The newest state of the run that this node saw; None before the first."""
        return self._participant.state

    @property
    def run_loss(self) -> float | None:
        """The run's training loss in the newest applied round, the same on every node; None before the first."""
        return self._participant.loss

    @property
    def waited(self) -> float:
        """Seconds that this node has waited for others; not those in which it applied their results."""
        return self._participant.waited

    @property
    def transfer(self) -> Transfer | None:
        """The download of parameters in progress; None if there is none."""
        return self._participant.transfer

    @property
    def spare(self) -> SpareTime:
        """Other work for this node's waits."""
        return self._participant.spare

    def ask(self, request: Request[Answer]) -> Future[Answer]:
        """Ask the run's coordinator; see :meth:`Participant.ask`."""
        return self._participant.ask(request)

    def peek(self) -> RoundWork | None:
        """Wait for this node's next round, without starting it.

        Returns:
            None when the run is over (:attr:`finished`), or when the training loop wants to stop.

        Raises:
            UnfinishedError: the run is over, but this node does not hold its last parameters.
            PsycheError: this node has left the run, or the run refuses it.
        """
        if self._closed and self.finished is None:
            raise PsycheError(
                f"this node has left run {self.entry.run_id!r}. To join again, make a new Trainer or Fabric strategy."
            )
        if self._next is None and not self._over:
            if self.work is not None:
                logger.warning(
                    "the optimizer made no step in round %d of epoch %d: this node contributes nothing to it",
                    self.work.height,
                    self.work.epoch,
                )
                self._send_nothing(self.work, still=True)
            self._next = self._participant.next_round()
            if self._world is not None and self._world.rank == 0:
                tell_round(self._world, self._next, self.state, self.finished)
            self._over = self.finished is not None
            if self._next is None and not self._over:
                self._stopped()
        return self._next

    def take(self) -> RoundWork | None:
        """Wait for this node's next round, and start it. None when the run is over."""
        self.work, self._next = self.peek(), None
        self._took = time.monotonic()
        if self.work is not None and self.state is not None:
            self._taken = self.work, self.state
            self._warm_up(self.work, self.state)
        return self.work

    def put_back(self) -> None:
        """Take no part in the current round yet: it comes again."""
        self._next, self.work = self.work, None

    def _warm_up(self, work: RoundWork, state: RunState) -> None:
        """After a pause all nodes begin anew: without what they had yet to send, and with rates that rise."""
        rates = self._rates.of_epoch(state) if state.epoch == work.epoch else self._rates
        self._step.factor = rates.factor(work.step)
        if rates.cold_from is not None and work.height == 0:
            text = "the run goes on after a pause: delta is empty, and learning rates rise over %d steps"
            logger.info(text, rates.cold_start)
            self._step.distro.reset()

    @property
    def rate_factor(self) -> float:
        """The factor on the learning rates in the last round: less than 1 while they rise after a pause."""
        return self._step.factor

    @property
    def standing(self) -> Standing | None:
        """The progress of the parameters, between two rounds; None if unknown."""
        if self.finished and self.state is not None:
            return at_the_end(self.state)
        if self._taken is None:
            return None
        work, state = self._taken
        return after_round(state, work.epoch, work.height, overlap=self.entry.run.overlap)

    def submit(self, work: RoundWork, loss: float = math.nan, samples: int = 0) -> bool:
        """Submit the update of a round, and apply the round's results unless they overlap.

        Args:
            work: the round.
            loss: mean loss of this node's samples, for display.
            samples: number of this node's samples.

        Returns:
            False when the training loop wanted to stop before the results were applied: the step must not count.

        Raises:
            PsycheError: as :meth:`peek`.
        """
        distro = self._step.distro
        nonce = distro.nonce
        self._step.copy_rates()
        if self._follows and not (distro.config.lookahead or self._sharded):  # which alone need delta on all ranks
            return self._send(work, b"", nonce, distro.lr_bits(), loss, samples)
        self._spans.end(work.step, "compute")
        began = time.monotonic()
        try:
            with self._spans.part(work.step, "encode"):
                payload = distro.encode(work.step)
        except NonFiniteGradientError as error:
            return self.abstain(work, str(error), loss)
        self._encoding = time.monotonic() - began
        return self._send(work, payload, nonce, distro.lr_bits(), loss, samples)

    def abstain(self, work: RoundWork, why: str, loss: float = math.nan, *, still: bool = False) -> bool:
        """Contribute nothing to a round, and tell the other nodes, so that none waits until its deadline.

        Args:
            work: the round; its data ids stay open.
            why: the reason, for the log.
            loss: as of :meth:`submit`.
            still: whether the parameters of a node alone stay as they are, without weight decay either.

        Returns:
            As of :meth:`submit`.
        """
        if not self._follows:
            text = "round %d of epoch %d: this node contributes nothing to it, and its data ids %s stay open: %s"
            logger.warning(text, work.height, work.epoch, shown(work.batch), why)
        return self._send_nothing(work, loss, still)

    def _send_nothing(self, work: RoundWork, loss: float = math.nan, still: bool = False) -> bool:
        distro = self._step.distro
        self._step.copy_rates()
        rates = distro.lr_bits()
        if still and self.alone and self._rates.planned is None:
            rates = (0,) * len(rates)
        return self._send(work, distro.abstention(work.step), distro.nonce, rates, loss, 0)  # zero tokens mark it

    def _send(
        self, work: RoundWork, payload: bytes, nonce: int, rates: tuple[int, ...], loss: float, samples: int
    ) -> bool:
        self.work = None
        self.loss, self.samples, self.lost_rounds = loss, samples, 0
        self.rounds += 1
        self.empty_rounds += samples == 0
        self.payload_bytes += len(payload) * max(0, self._clients() - 1)
        if samples:
            self._tell_round(work.step, rates)
        self._participant.submit(
            work,
            payload,
            nonce=nonce,
            lrs=rates,
            loss=loss,
            tokens=samples * self.entry.options.tokens_per_sample,
        )
        self._submitted = work
        if self.entry.run.overlap:
            self._look(work)
        self._ticks += 1
        if self._delta_folder is not None and self._ticks % saved_delta.SAVE_EVERY == 0:
            self._save_delta(self._delta_folder)
        state = self.state
        if state is not None and work.step >= state.config.total_steps:
            applied = self.peek() is not None or self._over  # waits until the run is over and all results are applied
            self._level_buffers()
            return applied
        applied = self._participant.wait_applied(work)
        if self._world is not None and not self._follows:
            loss_now = self._participant.loss
            self._world.tell(APPLIED, applied, None if loss_now is None else loss_now.hex())
        self._level_buffers()
        if not applied:
            self._stopped()
        return applied

    def _level_buffers(self) -> None:
        """Give the ranks of the node the same buffers, which each one's samples moved in another way."""
        if self._world is not None:
            for _, buffer in sorted(persistent_buffers(self._step.module).items()):
                self._world.hand_on(buffer)

    @property
    def _sharded(self) -> bool:
        """Whether this rank has a part of the node's model."""
        return self._step.distro.ranks is not None

    @property
    def _follows(self) -> bool:
        """Whether this is a rank other than 0."""
        return isinstance(self._participant, Follower)

    @contextlib.contextmanager
    def _recording(self, folder: Path, identity: Identity) -> Iterator[Recorder]:
        """Write event files into the node's folder."""
        node, run = short(identity.public), self.entry.run_id
        with contextlib.closing(Chronicle(folder, node=node, run=run, key=identity.public.hex())) as chronicle:
            recorder = Recorder(node, self.signer, run, time.time, chronicle.add)
            recorder.note(Kind.START, f"release {__version__}, process {os.getpid()}")
            with LogRecorder(recorder, node).listening():
                yield recorder

    def _save_delta(self, folder: Path) -> None:
        distro = self._step.distro
        saved_delta.save(folder, self.entry.scope, distro, self._step.optimizer)
        if self._recorder is not None:
            self._recorder.note(Kind.SAVE, f"saved the delta of {distro.nonce} rounds")

    def _stopped(self) -> None:
        """Note, for the log, what this node was waiting for when its training loop stopped."""
        if self._follows:
            return
        self._why = f"its training was told to stop (max_time or should_stop), in {self._participant.waiting()}"
        logger.warning("stops waiting: %s", self._why)

    def decline(self, work: RoundWork, error: DataError) -> bool:
        """Contribute nothing to a round whose samples are unavailable; its data ids stay open.

        Args:
            work: the round.
            error: why.

        Returns:
            As of :meth:`submit`.

        Raises:
            DataError: the error is lasting, or too many rounds in a row failed; the node must leave.
        """
        if error.lasting:
            raise error
        lost = self.lost_rounds + 1
        if lost >= LOST_ROUNDS:
            raise DataError(
                f"this node leaves the run, because its samples were unavailable in {lost} rounds in a row: {error}",
                ids=error.ids,
                lasting=True,
            ) from error
        applied = self.abstain(work, str(error))
        self.lost_rounds = lost
        return applied

    def upcoming(self) -> tuple[int, int] | None:
        """The data ids ``(start, stop)`` of the whole next round, if it is worthwhile to prefetch them; else None.

        A node does not know its share before the round begins, so this is worthwhile only in runs of few nodes.
        """
        current = self.state.current if self.state else None
        if current is None or not current.batch_size or len(current.clients) > AHEAD_NODES:
            return None
        start = current.data_index + current.batch_size
        return start, start + current.batch_size

    def observe(self, step: int, due: Callable[[int], bool]) -> None:
        """Before a step: have its figures computed if it is due, for :meth:`step_figures` and the coordinator.

        Args:
            step: the step that begins.
            due: says whether the figures of a step are wanted. It is also asked for the next step, because with
                overlap the results that come before that one are applied while this one's travel.
        """
        if self._follows:  # rank 0 logs
            return
        self._figures, self._due = {}, due(step)
        self._step.distro.observing = due(step + 1) if self.entry.run.overlap else self._due

    def step_figures(self) -> dict[str, float]:
        """``gradient_norm``, ``momentum_norm`` and ``agreement`` of the last step; with ``/0``... for several groups.

        With overlap, the agreement is that of the round before last, whose results were applied last. Leaves out what
        is not known: the agreement without others, all of them if the step is not due or this node trained nothing.
        """
        return self._figures

    def _after_round(self, task: Apply) -> None:
        work = self._submitted
        if work is not None and (work.epoch, work.height) == (task.epoch, task.height) and not self.entry.run.overlap:
            self._look(work)

    def _look(self, work: RoundWork) -> None:
        """Compute the step's figures if they are due, and tell them to the coordinator."""
        if not (self._due and self.samples):
            return
        if self._sharded and self._world is not None:
            self._world.tell(FIGURES)  # of which each rank has a part
        groups = self._step.distro.figures()
        named = {
            name if len(groups) == 1 else f"{name}/{number}": value
            for number, group in enumerate(groups)
            for name, value in group.items()
        }
        self._figures = {name: value for name, value in named.items() if math.isfinite(value)}
        self.measured(work.step, self._figures)

    def _tell_round(self, step: int, rates: tuple[int, ...]) -> None:
        """Tell the coordinator how this node's time since its round before went, and what it trains."""
        participant, idle, applying = self._participant, self._idle, self._applying
        self._idle, self._applying = participant.waited, participant.applying
        named = {
            "seconds/compute": max(0.0, time.monotonic() - self._took - self._encoding),
            "seconds/encode": self._encoding,
            "seconds/wait": self._idle - idle,
            "seconds/apply": self._applying - applying,
            "parameters": float(sum(math.prod(entry.shape) for entry in self._step.distro.layout.entries)),
        }
        if rates:
            named["learning_rate"] = float32(rates[0])
        self.measured(step, named)

    def measured(self, step: int, figures: Mapping[str, float]) -> None:
        """Tell the coordinator figures of a step, for people; each stays in the reports until there is a newer one.

        Args:
            step: optimizer step to which they belong.
            figures: finite numbers by name, see :data:`~psyche_lightning.protocol.requests.FIGURE_NAME`.
        """
        self._told |= {name: Figure(name, step, value) for name, value in figures.items() if math.isfinite(value)}
        self._participant.tell(tuple(self._told.values())[:MAX_FIGURES])

    def wrote(self, prompt: int, token: int) -> None:
        """Tell the coordinator a token that this node added to a text, for people; a run on a chain carries it.

        Args:
            prompt: the text's number.
            token: its id.
        """
        self._participant.wrote(prompt, token)

    def mean_payload(self, step: int) -> float:
        """Bytes of one payload, in the mean of the steps from 1 to ``step``."""
        distro = self._step.distro
        rounds = zip(distro.payload_sizes, distro.config.rounds(step), strict=True)
        return sum(size * count for size, count in rounds) / step

    def figures(self) -> dict[str, float]:
        """The run's figures, by name."""
        state, (up, down) = self.state, self.traffic.total
        current = state.current if state else None
        loss = {} if self.run_loss is None else {RUN_LOSS: self.run_loss}
        return {
            **loss,
            "psyche/clients": float(self._clients()),
            "psyche/epoch": float(state.epoch if state else 0),
            "psyche/round": float(current.height if current else 0),
            "psyche/bytes_up": float(up),
            "psyche/bytes_down": float(down),
            "psyche/waiting": self.waited,
        }

    def _clients(self) -> int:
        return len(self.state.healthy) if self.state else 0

    def digest(self) -> bytes:
        """Digest of the current parameters."""
        return self._replica.digest(MemoryBlobStore().put)

    # --- leaving ----------------------------------------------------------------------------------------------------

    def interrupt(self, error: BaseException) -> None:
        """End the training thread's current or next wait with ``error``; signal handlers may call it."""
        self.fails(error)
        self._participant.interrupt(error)

    def fails(self, error: BaseException) -> None:
        """Note the error that ends training; the log gives it as the reason when the node leaves."""
        self._why = reason_to_leave(error)

    def close(self) -> None:
        """Leave the run; idempotent.

        Raises:
            StoreError: delta cannot be saved, and no other error ends training. The node has left the run.
        """
        if self.empty_rounds and not self._closed and not self._follows:
            level = logging.WARNING if self.empty_rounds < self.rounds else logging.ERROR
            text = "this node contributed nothing to %d of its %d rounds; the warnings above say why"
            logger.log(level, text, self.empty_rounds, self.rounds)
        unsaved: StoreError | None = None
        if self._delta_folder is not None and not self._over:
            try:
                self._save_delta(self._delta_folder)
            except StoreError as error:
                unsaved = error
        if self._world is not None and not self._follows and not self._closed:
            self._world.watch = None
            with contextlib.suppress(PsycheError):  # whoever ended with an error hears nothing more
                self._world.tell(END)
        self._over = self._closed = True
        self._next = self.work = None
        if self._participant.finished is not None:
            self.entry.memory.forget()
        try:
            self._participant.stop(self._why or str(unsaved or ""))
        finally:
            self._opened.close()
        if unsaved is not None:
            if not self._why:
                raise unsaved
            logger.error("%s", unsaved)


def node_key(folder: Path) -> Identity:
    """The key in a node's folder; creates it if it is missing.

    Raises:
        ConfigError: the key cannot be read or written.
    """
    return Identity.load_or_create(folder / "node.key")
