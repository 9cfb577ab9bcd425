"""One run without I/O: the state machine, members that wait for an epoch, the agreed manifest, the epoch's rounds.

Hosts around it (in the process, the server, the simulator) provide the clock and carry messages. Every method that
takes ``now`` advances the run as far as possible. A method that raises has changed nothing that decides anything.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from psyche_lightning.coordinator import machine
from psyche_lightning.coordinator.delivery import shares_of
from psyche_lightning.coordinator.history import History, plain_round
from psyche_lightning.coordinator.machine import MachineError
from psyche_lightning.coordinator.membership import Membership
from psyche_lightning.coordinator.settings import Settings
from psyche_lightning.coordinator.shares import Speeds
from psyche_lightning.coordinator.waiting import awaited
from psyche_lightning.errors import ConfigError, CoordinatorError, WireError, counted
from psyche_lightning.protocol.bloom import Bloom
from psyche_lightning.protocol.codec import round_from_json, round_to_json, state_from_json, to_json
from psyche_lightning.protocol.committee import decided_root
from psyche_lightning.protocol.evals import Evaluation, evaluated_tasks
from psyche_lightning.protocol.limits import Limits, check_config, check_run_id
from psyche_lightning.protocol.manifest import fix_values, merge, shares_by_speed, with_values
from psyche_lightning.protocol.merkle import EMPTY_ROOT
from psyche_lightning.protocol.messages import equivocator
from psyche_lightning.protocol.requests import (
    Accuse,
    Answer,
    Evaluated,
    GetRounds,
    GetTerms,
    HealthCheck,
    Join,
    Request,
    Terms,
    WarmupWitness,
    Withdraw,
    Witness,
)
from psyche_lightning.protocol.state import (
    INCARNATION_SIZE,
    MISSED_ROUNDS,
    Checkpoint,
    Client,
    ClientStatus,
    CoordinatorConfig,
    Phase,
    Round,
    RunState,
)
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import short

FORMAT = 2
MAX_ROUNDS = 4096
"""Rounds of the epoch that are kept; a node that needs older rounds takes a newer snapshot instead."""


LINGER = 0.5
"""A decided round stays open for this share of its time, within its limit, for members that reported on the rounds
before but not yet on this one. They then hold it as well: after a power cut, the run goes on with any one of them."""
PAGE = 8192
"""Clients and witness records of the rounds in one answer; as JSON, some 2 MB."""


class RunHost:
    """One run, from its creation to its end.

    Args:
        run_id: the run's name, see :func:`~psyche_lightning.protocol.limits.check_run_id`.
        config: durations and sizes.
        seed: u64 from which the seeds of all rounds follow.
        max_seq_len: tokens of a sample.
        manifest: the sections that are already agreed; None if the first node fixes everything.
        limits: the largest sizes that this host supports; wide limits if None.
        unset: the values of the configuration that the first node fixes through the section ``run`` of its manifest:
            names of :data:`~psyche_lightning.protocol.manifest.LEFT_OPEN`.
        incarnation: 16 random bytes that tell this run from others of its name; empty if no other will have it.

    Attributes:
        state: the run's state.
        manifest: the agreed sections; None until a node has joined, unless the creator gave some.
        sealed: whether the manifest is complete, because a node has joined; later nodes compare, and add nothing.
        membership: who belongs to the run, and who may join.
        history: what happened, for people: events, figures of rounds, the members' reports.
        rounds: the newest rounds of the epoch ``rounds_epoch`` without gaps, the current one last; with all witness
            records but without their Bloom filters. They stay until the next epoch trains.
        rounds_epoch: the epoch of these rounds.
        points: points of each signer: the samples of decided rounds, divided among those whose results they have as
            their shares are.
        speeds: how fast the members train, if shares follow that.

    Raises:
        ConfigError: the name or the configuration is not valid.
    """

    def __init__(
        self,
        run_id: str,
        config: CoordinatorConfig,
        *,
        seed: int,
        max_seq_len: int = 1,
        manifest: dict[str, Any] | None = None,
        limits: Limits | None = None,
        unset: Sequence[str] = (),
        incarnation: bytes = b"",
    ) -> None:
        self.limits = limits or Limits()
        check_run_id(run_id)
        check_config(config, self.limits)
        if not 0 <= seed < 1 << 64:
            raise ConfigError(f"the seed is {seed}; it must be 0 to 2^64 - 1")
        if not 0 < max_seq_len < 1 << 32:
            raise ConfigError(f"max_seq_len is {max_seq_len}; it must be 1 to 2^32 - 1")
        if len(incarnation) not in (0, INCARNATION_SIZE):
            raise ConfigError(f"the incarnation has {len(incarnation)} bytes; it must have {INCARNATION_SIZE} or none")
        self.state = RunState(run_id, config=config, max_seq_len=max_seq_len, incarnation=incarnation)
        self.manifest = None if manifest is None else merge(None, manifest)
        self.sealed = False
        self.membership = Membership(run_id, self.limits.clients)
        self.history = History()
        self.rounds: list[Round] = []
        self.rounds_epoch = 0
        self.points: dict[bytes, int] = {}
        self.speeds = Speeds()
        self._settings: tuple[dict[str, Any] | None, Settings] = None, Settings()
        self._seed = seed
        self._left_open: dict[str, int | None] = dict.fromkeys(unset)
        self._now = 0.0
        self._lingers: tuple[int, int, float] | None = None  # epoch and height of a decided round, and until when

    # What others read.

    def pending(self) -> list[Client]:
        """Members that wait for the next epoch."""
        return [member for signer, member in self.membership.members.items() if not self.trains(signer)]

    def trains(self, signer: bytes) -> bool:
        """Whether it is a healthy client of an epoch that is formed and has not ended."""
        formed = self.state.phase is Phase.WARMUP or self.state.phase.active
        return formed and any(client.signer == signer for client in self.state.healthy)

    @property
    def unset(self) -> list[str]:
        """The values of the configuration that the first node will fix."""
        return [name for name, value in self._left_open.items() if value is None]

    @property
    def by_speed(self) -> bool:
        """Whether shares follow the members' speeds, as the manifest says."""
        return shares_by_speed(self.manifest)

    @property
    def waits_for(self) -> str:
        """What the run waits for, in one line for people; empty while it trains, and when it is finished."""
        return awaited(self.state, self.membership.members.values())

    @property
    def settings(self) -> Settings:
        """What the manifest says of model, data and compression, for people."""
        if self._settings[0] is not self.manifest:
            self._settings = self.manifest, Settings.of(self.manifest)
        return self._settings[1]

    def deadline(self) -> float | None:
        """When time alone advances the run, in the coordinator's seconds; None if only an input can."""
        due = machine.deadline(self.state)
        return due if self._lingers is None or due is None else min(due, self._lingers[2])

    # What people request.

    def begin(self, now: float) -> None:
        """Open the run to members; the first node that joins also opens it."""
        opened = machine.start(self.state, now) if self.state.phase is Phase.UNINITIALIZED else self.state
        self._apply(opened, now)

    def pause(self, now: float) -> None:
        """Pause the run when its epoch has drained, or at once if no epoch has begun.

        Raises:
            CoordinatorError: ``Halted``.
        """
        self._apply(machine.pause(self.state, now), now)

    def resume(self, now: float) -> None:
        """Open a paused run to members again; connected nodes are members already.

        Raises:
            CoordinatorError: ``CannotResume``.
        """
        self._apply(machine.resume(self.state, now), now)

    def restart_from(self, digest: bytes, step: int, now: float) -> None:
        """Go on from other parameters than the newest; later steps are undone.

        Args:
            digest: their digest; some member must hold them.
            step: training steps that they contain.
            now: the coordinator's seconds.

        Raises:
            CoordinatorError: ``InvalidRunState`` or ``InvalidCheckpoint``.
        """
        place = next((known.data_index for known in self.rounds if known.step == step + 1), None)
        state = machine.restart_from(self.state, Checkpoint(digest, step), now)
        if place is not None:  # the ids of the undone rounds are trained again
            state = replace(state, epoch_start_data_index=place)
        text = f"the owner goes back to the parameters {digest[:4].hex()} of step {step}"
        self.history.note(self.state, now, "run", text)
        self.history.undo(step)
        self.speeds.undo(step)
        self.rounds, self.rounds_epoch = [], state.epoch
        self._apply(state, now)

    def start(self, now: float) -> None:
        """Open a halted run to members, new or paused.

        Raises:
            CoordinatorError: the run is already open, or finished (``CannotResume``).
        """
        self.begin(now) if self.state.phase is Phase.UNINITIALIZED else self.resume(now)

    def update(self, config: dict[str, Any], now: float) -> None:
        """Change settings of a halted run.

        Raises:
            CoordinatorError: the run is open (``UpdateConfigNotHalted``).
            ConfigError: the run could not proceed with these settings.
        """
        if not self.state.phase.halted:
            raise CoordinatorError(
                f"the run is open, in phase {self.state.phase.name}; pause it before you change it",
                code="UpdateConfigNotHalted",
            )
        changed = replace(self.state.config, **config)
        check_config(changed, self.limits)
        # The owner now fixes what the first node would fix.
        fixed = {"total_steps": "total_steps", "global_batch_size_start": "global_batch_size"}
        for setting in config.keys() & fixed.keys():
            self._left_open.pop(fixed[setting], None)
        self.history.note(self.state, now, "owner", f"the owner changed {', '.join(sorted(config)) or 'nothing'}")
        self._apply(replace(self.state, config=changed, nonce=self.state.nonce + 1), now)

    def allow(self, node: bytes | None) -> None:
        """Let a node with this key join, or everyone whose key was not revoked."""
        self.membership.allow(node)
        who = "everybody" if node is None else short(node)
        self.history.note(self.state, self._now, "owner", f"the owner lets {who} join", node or b"")

    def revoke(self, node: bytes | None, now: float) -> None:
        """Take a node's permission back, or that of everyone who is no member; it finishes the epoch that it is in."""
        self.membership.forbid(node)
        who = "who is no member may not join any more" if node is None else f"{short(node)} may not join any more"
        self.history.note(self.state, now, "owner", f"the owner's decision: {who}", node or b"")
        self._apply(self.state, now)

    def kick(self, node: bytes, now: float) -> None:
        """Take a node's permission back and remove it at once, also from the epoch."""
        self.membership.forbid(node)
        for signer in self._signers(node):
            self._forget(signer, ClientStatus.EJECTED, "kicked", "was removed by the run's owner", now)

    def _signers(self, node: bytes) -> list[bytes]:
        everyone = (*self.state.clients, *self.membership.members.values())
        return list(dict.fromkeys(member.signer for member in everyone if member.node == node))

    # What members request.

    def handle(self, signer: bytes, request: Request[Answer], now: float) -> Answer:
        """Answer a request.

        Args:
            signer: 32-byte node key that signed the request.
            request: the request.
            now: the coordinator's seconds.

        Raises:
            CoordinatorError: the request is refused, and nothing that decides anything has changed. The codes are those
                of :mod:`~psyche_lightning.coordinator.machine` and of the methods below.
        """
        answer: Any = None
        match request:
            case GetTerms():
                answer = Terms(self.state.config, tuple(self.unset), self.manifest, self.state.incarnation)
            case GetRounds(epoch, first):
                answer = self._rounds_from(signer, epoch, first)
            case Join():
                self._join(signer, request, now)
            case Withdraw():
                self._withdraw(signer, now)
            case WarmupWitness():
                self._warmup_witness(signer, request, now)
            case Witness():
                self._witness(signer, request, now)
            case HealthCheck():
                answer = self._health_check(signer, request, now)
            case Accuse(first, second):
                self._accuse(signer, first, second, now)
            case Evaluated():
                answer = self._evaluated(signer, request)
            case _:
                raise CoordinatorError(f"no coordinator knows the request {request!r:.80}", code="Unsupported")
        return answer  # type: ignore[no-any-return] # each branch returns what its request declares

    def _rounds_from(self, signer: bytes, epoch: int, first: int) -> tuple[Round, ...]:
        """A page of the epoch's rounds; whoever needs more asks again from the page's last on."""
        if signer not in self.membership.members and not self.trains(signer):
            raise CoordinatorError("the rounds of a run are for its members", code="NotMember", retryable=True)
        if epoch != self.rounds_epoch or not self.rounds or not self.rounds[0].height <= first:
            return ()
        start = first - self.rounds[0].height
        sizes = itertools.accumulate(len(one.clients) + len(one.witnesses) for one in self.rounds[start:])
        count = sum(1 for _ in itertools.takewhile(lambda size: size <= PAGE, sizes))
        # A node takes the last round of an answer only once it is no longer the last.
        return tuple(self.rounds[start : start + max(2, count)])

    def _join(self, signer: bytes, request: Join, now: float) -> None:
        """Make a node a member from the next epoch on; repeated to change its address or region.

        Raises:
            ManifestMismatchError: the run has another manifest.
            CoordinatorError: ``InvalidManifest``; ``InvalidMember`` for an impossible key, address or region;
                ``NotAuthorized``; ``Ejected``; ``RunFull`` (retryable); ``Halted`` for a newcomer to a finished run.
        """
        if self.state.phase is Phase.FINISHED and signer not in self.membership.members:
            raise CoordinatorError(
                f"run {self.state.run_id!r} finished after {counted(self.state.step - 1, 'step')}; nothing is left to "
                "train. Its result is in its nodes' checkpoints. To train further, create a run that resumes from one: "
                "`psyche run create NEW RECIPE checkpoint.resume=ADDRESS`.",
                code="Halted",
            )
        address, region = request.address, request.region
        self.membership.check(signer, address, region)
        rest, values = fix_values(self._left_open, request.manifest)
        state = self._with_values(values)
        self.manifest, self._left_open = merge(self.manifest, rest, sealed=self.sealed), values
        self.sealed = True
        if signer not in self.membership.members:
            self.history.note(self.state, now, "joined", f"{short(signer)} joined", signer)
        self.membership.members[signer] = Client(signer, signer, address)
        self.history.nodes.change(signer, lambda node: replace(node, address=address, region=region or None))
        if state.phase is Phase.UNINITIALIZED:
            state = machine.start(state, now)
        self._apply(machine.move(state, signer, signer, address), now)

    def _with_values(self, values: dict[str, int | None]) -> RunState:
        """The state with the values of the configuration that a node fixed."""
        if values == self._left_open:
            return self.state
        config = with_values(self.state.config, values)
        try:
            check_config(config, self.limits)
        except ConfigError as error:
            raise CoordinatorError(f"this node's values do not fit the run: {error}", code="InvalidManifest") from error
        return replace(self.state, config=config, nonce=self.state.nonce + 1)

    def _withdraw(self, signer: bytes, now: float) -> None:
        if not self._forget(signer, ClientStatus.WITHDRAWN, "left", "left", now):
            raise MachineError("InvalidWithdraw", f"{short(signer)} is not a member of this run")

    def disconnected(self, signer: bytes, now: float, reason: str) -> None:
        """Handle a vanished node: forget a pending member, drop a client of the epoch, ignore others.

        When the run is finished, nodes leave as expected.
        """
        if self.state.phase is Phase.FINISHED:
            self._forget(signer, ClientStatus.WITHDRAWN, "left", "left the finished run", now)
        else:
            self._forget(signer, ClientStatus.DROPPED, "dropped", f"is gone: {reason}", now)

    def _forget(self, signer: bytes, status: ClientStatus, kind: str, text: str, now: float) -> bool:
        known = self.membership.members.pop(signer, None) is not None
        state = self.state
        if any(client.signer == signer for client in state.healthy):
            known, state = True, machine.withdraw(state, signer, status)
        if known:
            self.history.note(self.state, now, kind, f"{short(signer)} {text}", signer)
            self._apply(state, now)
        return known

    def _warmup_witness(self, signer: bytes, request: WarmupWitness, now: float) -> None:
        if signer not in self.membership.members:
            raise MachineError("InvalidWitness", f"{short(signer)} is not a member of this run")
        self._apply(machine.warmup_witness(self.state, signer, request), now)

    def _witness(self, signer: bytes, request: Witness, now: float) -> None:
        """Record a witness' report; also keeps the figures of a report that comes too late."""
        if any(client.signer == signer for client in self.state.clients):
            self.history.report(request.epoch, signer, request.report, now)
            if self.by_speed and request.report.step <= self.state.step:
                self.speeds.measured(signer, request.report.step, request.report.tokens_per_second)
        self._apply(machine.witness(self.state, signer, request), now)

    def _health_check(self, signer: bytes, request: HealthCheck, now: float) -> int:
        """Drop clients that gave no sign of life; they may join again."""
        before = {client.signer for client in self.state.healthy}
        state, dropped = machine.health_check(self.state, signer, request)
        for gone in before - {client.signer for client in state.healthy}:
            self.membership.members.pop(gone, None)
            missed = f"delivered nothing in the last {MISSED_ROUNDS} rounds"
            self.history.note(self.state, now, "dropped", f"{short(gone)} is dropped: it {missed}", gone)
            self.history.check(gone, now, "health_check", False, missed, signer)
        self._apply(state, now)
        return dropped

    def _accuse(self, signer: bytes, first: bytes, second: bytes, now: float) -> None:
        """Eject a trainer that signed two results for one batch, for the rest of the run."""
        culprit = equivocator(self.state.scope, first, second)
        if signer not in self.membership.members:
            raise CoordinatorError(f"{short(signer)} is not a member of this run", code="InvalidAccusation")
        if culprit in self.membership.ejected:
            return
        self.membership.ejected.add(culprit)
        for each in self._signers(culprit):
            text = "is ejected: it signed two results for one batch"
            self._forget(each, ClientStatus.EJECTED, "ejected", text, now)
            self.history.check(each, now, "accusation", False, "signed two results for one batch", signer)

    def _evaluated(self, signer: bytes, request: Evaluated) -> Evaluation:
        """Keep what a member measured: for people, on its word."""
        state = self.state
        if signer not in self.membership.members and all(client.signer != signer for client in state.clients):
            raise CoordinatorError(f"{short(signer)} is not a member of this run", code="NotMember")
        tasks, every = evaluated_tasks(self.manifest)
        if request.task not in tasks:
            text = f"the run evaluates {', '.join(tasks) or 'nothing'}; {request.task[:80]!r} is not among its tasks"
            raise CoordinatorError(text, code="InvalidRequest")
        due = request.step == state.config.total_steps or (every > 0 and request.step % every == 0)
        if not (due and 0 < request.step <= state.step) or not 0 < request.documents < 1 << 32:
            text = f"nothing is evaluated after step {request.step} with {counted(request.documents, 'document')}"
            raise CoordinatorError(text, code="InvalidRequest")
        return self.history.evaluated(request)

    # Time.

    def tick(self, now: float) -> bool:
        """Advance the run as far as possible at ``now``; returns whether anything changed."""
        before = self.state
        self._apply(self.state, now)
        return self.state is not before

    def restarted(self, now: float) -> None:
        """Continue after the host was down; the time since the last change does not count."""
        shift, state = now - self._now, self.state
        gathered = state.gathered_at
        self._apply(
            replace(
                state,
                phase_start=state.phase_start + shift,
                epoch_start=state.epoch_start + shift,
                gathered_at=None if gathered is None else gathered + shift,
                nonce=state.nonce + 1,
            ),
            now,
        )

    def round_seed(self, epoch: int, height: int) -> int:
        """The seed of a round: LE64 of S(LE64(seed), run id, LE64(epoch), LE64(height))."""
        place = struct.pack("<QQ", epoch, height)
        digest = sha256(struct.pack("<Q", self._seed), self.state.run_id.encode(), place)
        return int.from_bytes(digest[:8], "little")

    def _next_seed(self) -> int:
        state, round_ = self.state, self.state.current
        return self.round_seed(state.epoch, round_.height + 1 if round_ and state.phase.active else 0)

    def _apply(self, state: RunState, now: float) -> None:
        """Set ``state``, then take every step that is due."""
        self._now = now
        while True:
            if state is not self.state:
                self._set(state, now)
            self._dismiss(now)
            if self.state.phase.halted:
                return
            if self._stays_open(now):
                return
            pending = list(self.membership.members.values())
            speeds = self._samples_per_second() if self.by_speed else None
            state = machine.tick(self.state, pending, now, self._next_seed(), speeds)
            if state is self.state:
                return

    def _stays_open(self, now: float) -> bool:
        """Whether members get time to report on the decided round; see :data:`LINGER`."""
        state, round_ = self.state, self.state.current
        lingers, self._lingers = self._lingers, None
        if not state.phase.active or round_ is None or decided_root(round_, state.needed) is None:
            return False
        late = machine.unreported(state, round_)
        for before in state.rounds:
            if before is not round_:
                late &= {before.clients[record.proof.index] for record in before.witnesses}
        if not late:
            return False
        if lingers is None or lingers[:2] != (state.epoch, round_.height):
            until = now + LINGER * (now - state.phase_start)
            lingers = state.epoch, round_.height, min(until, machine.deadline(state) or until)
        if now >= lingers[2]:
            return False
        self._lingers = lingers
        return True

    def _dismiss(self, now: float) -> None:
        """Forget members that may no longer be one, unless they are in an epoch, which they finish."""
        for signer, member in list(self.membership.members.items()):
            if not self.membership.admits(member.node) and not self.trains(signer):
                del self.membership.members[signer]
                self.history.note(self.state, now, "left", f"{short(signer)} may no longer be a member", signer)

    def _set(self, state: RunState, now: float) -> None:
        before, self.state = self.state, state
        self.history.observe(before, state, now)
        if state.step != before.step:
            self._tell_settings(before.step, state.step, now)
        round_, ended = state.current, before.current
        over = not state.phase.active or (ended is not None and round_ is not None and round_.height > ended.height)
        if before.phase.active and ended is not None and over:
            self._reward(ended, before.needed)
            self._record_delivery(before, ended, now)
        if before.phase is Phase.WARMUP and state.phase is Phase.WAITING_FOR_MEMBERS and not state.checkpoint.digest:
            # The first member did not say which parameters the run begins with: the next one's turn.
            for client in before.clients[:1]:  # none if all have left
                if client.signer in self.membership.members:
                    self.membership.members[client.signer] = self.membership.members.pop(client.signer)
        if round_ is not None and ended is not round_:
            if self.rounds_epoch != state.epoch and state.phase.active:
                self.rounds, self.rounds_epoch = [], state.epoch
            if self.rounds and self.rounds[-1].height == round_.height:
                self.rounds.pop()
            self.rounds.append(plain_round(round_))
            del self.rounds[:-MAX_ROUNDS]

    def _reward(self, round_: Round, needed: int) -> None:
        """Give a decided round's samples to the clients whose results its reports name, as their shares are."""
        root = decided_root(round_, needed)
        if not round_.step or root in (None, EMPTY_ROOT):
            return
        heard = [Bloom.from_bytes(record.participants) for record in round_.witnesses if record.merkle == root]
        items = {signer: sha256(signer) for signer in round_.clients}
        named = [one for one in items if sum(items[one] in each for each in heard) >= needed]
        parts = dict.fromkeys(round_.clients, 1)
        if round_.weights:
            parts = shares_of(round_, self.state.config)
        whole = sum(parts[signer] for signer in named)
        for signer in named:
            self.points[signer] = self.points.get(signer, 0) + round_.batch_size * parts[signer] // max(1, whole)
        for signer in round_.clients:
            if not parts[signer]:
                self.speeds.rested(signer)
            elif signer not in named:
                self.speeds.missed(signer)

    def _tell_settings(self, before: int, step: int, now: float) -> None:
        """Note when the schedule of the compression has reached other values."""
        then, values = self.settings.at(before), self.settings.at(step)
        changed = [name for name, value in values.items() if value != then[name]]
        if changed:
            text = ", ".join(f"{name} is {values[name]} (was {then[name]})" for name in changed)
            self.history.note(self.state, now, "settings", f"from step {step} on {text}")

    def _record_delivery(self, before: RunState, ended: Round, now: float) -> None:
        """Record, for people, who delivered in the round of which the one that has ended tells."""
        about = before.round_at(ended.height - 1) if self.settings.overlap else ended
        if about is not None and about.step:
            shares = shares_of(about, self.state.config)
            self.history.delivered(before, about, ended, before.needed, shares, now)

    def _samples_per_second(self) -> dict[bytes, float]:
        """The members' speeds; they report tokens, of which the manifest knows more than who created the run."""
        data = (self.manifest or {}).get("data")
        length = data.get("seq_len") if isinstance(data, dict) else None
        tokens = length if type(length) is int and length > 0 else self.state.max_seq_len
        return {signer: rate / tokens for signer, rate in self.speeds.known.items()}

    # Durability.

    def dump(self, *, rounds_from: int = 0, since: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Everything as exact JSON values.

        A store that keeps growing parts separately asks for the new entries only, and gives all of them to
        :meth:`load`. Entries that were dumped do not change, except the last of ``history`` and the newest of
        ``metrics``, ``past``, ``deliveries`` and ``evaluations``.

        Args:
            rounds_from: height of the first round in ``history``.
            since: as of :meth:`History.dump`; all if None.
        """
        return {
            "format": FORMAT,
            "seed": self._seed,
            "now": float(self._now),
            "terms": self._left_open,
            "manifest": self.manifest,
            "sealed": self.sealed,
            "state": to_json(self.state),
            "points": {signer.hex(): points for signer, points in self.points.items()},
            "speeds": self.speeds.dump(),
            **self.membership.dump(),
            "history_epoch": self.rounds_epoch,
            "history": [round_to_json(round_) for round_ in self.rounds if round_.height >= rounds_from],
            **self.history.dump(since or {}),
        }

    @classmethod
    def load(cls, data: dict[str, Any], *, limits: Limits | None = None) -> RunHost:
        """Read what :meth:`dump` wrote; call :meth:`restarted` before anything else.

        Raises:
            WireError: the data is something else.
        """
        try:
            if data["format"] != FORMAT:
                which = "a newer" if data["format"] > FORMAT else "an older"
                raise WireError(
                    f"{which} psyche_lightning stored a run in format {data['format']}; this one reads format {FORMAT}"
                )
            state = state_from_json(data["state"])
            host = cls(state.run_id, state.config, seed=data["seed"], max_seq_len=state.max_seq_len, limits=limits)
            host.state = state
            host.manifest, host.sealed = data["manifest"], data["sealed"]
            host._left_open = dict(data["terms"])
            host.rounds = [round_from_json(item) for item in data["history"]]
            host.rounds_epoch = data["history_epoch"]
            host.membership.restore(data)
            host.points = {bytes.fromhex(key): int(points) for key, points in data.get("points", {}).items()}
            host.speeds = Speeds.load(data.get("speeds", {}))
            host.history = History.load(data)
            host._now = float(data["now"])
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            raise WireError(f"not a stored run: {type(error).__name__}: {error}") from error
        return host
