"""Random histories of a run: whatever members, clocks and restarts do, what must hold, holds."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import Phase as Stage
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.bloom import participants_bloom
from psyche_lightning.protocol.codec import diff, patch, state_to_json
from psyche_lightning.protocol.committee import (
    decided_root,
    least_clients,
    needed_reports,
    round_selection,
    starting_digest,
)
from psyche_lightning.protocol.requests import (
    HealthCheck,
    Join,
    Report,
    Request,
    WarmupWitness,
    Withdraw,
    Witness,
)
from psyche_lightning.protocol.state import CoordinatorConfig, Phase, Round, RunState, WitnessProof

KEYS = [bytes([i + 1]) * 32 for i in range(5)]
ROOTS = [bytes([i]) * 32 for i in range(3)]  # the first is that of an empty list
START, WRONG = b"s" * 32, b"w" * 32
nodes = st.sampled_from(range(len(KEYS)))
Name = tuple[int, int]


def right(step: int) -> bytes:
    """The digest of the parameters after so many steps, as members that keep the rules have it."""
    return bytes([step]) * 31 + b"r" if step else START


class Recorder(RunHost):
    """Writes down every round, also those that begin and end within one call, and checks each transition."""

    recorded: dict[Name, Round]
    enough: dict[int, int]

    def _set(self, state: RunState, now: float) -> None:
        before = self.state
        super()._set(state, now)
        if state.phase.active:
            self.recorded[state.epoch, self.rounds[-1].height] = self.rounds[-1]
            self.enough[state.epoch] = state.needed
        # Nothing is undone.
        assert state.epoch >= before.epoch
        assert state.step >= before.step
        assert state.checkpoint.step >= before.checkpoint.step
        if state.checkpoint.step == before.checkpoint.step and before.checkpoint.digest:
            assert state.checkpoint == before.checkpoint
        if state.phase is Phase.WARMUP and before.phase is not Phase.WARMUP:
            holders = {client.signer for client in state.clients} & set(before.holders)
            assert holders or not before.checkpoint.digest
        if state.phase.active and before.phase is Phase.WARMUP:
            assert state.needed == needed_reports(state)
            assert state.settled
        if state.phase.active and before.phase.active:
            assert state.needed == before.needed
            if state.rounds[state.head].height != before.rounds[before.head].height:
                assert len(state.clients) >= least_clients(state)


class Histories(RuleBasedStateMachine):
    @initialize(
        minimum=st.integers(1, 3),
        extra=st.integers(0, 2),
        steps=st.integers(1, 6),
        witnesses=st.integers(0, 3),
        ramp=st.sampled_from([0, 40]),
        seed=st.integers(0, 3),
        begun=st.integers(0, 5),
    )
    def create(self, minimum: int, extra: int, steps: int, witnesses: int, ramp: int, seed: int, begun: int) -> None:
        config = CoordinatorConfig(
            warmup_time=8.0,
            cooldown_time=8.0,
            max_round_train_time=8.0,
            round_witness_time=4.0,
            epoch_time=40.0,
            global_batch_size_start=3,
            global_batch_size_end=7,
            global_batch_size_warmup_tokens=ramp,
            total_steps=steps,
            init_min_clients=minimum + extra,
            min_clients=minimum,
            witness_nodes=min(witnesses, minimum),
            waiting_for_members_extra_time=2.0,
        )
        self.now = 0.0
        self.host = Recorder("run", config, seed=seed, max_seq_len=2)
        self.host.recorded = self.rounds = {}
        self.host.enough = self.needed = {}
        self.host.begin(self.now)
        self.known: dict[Name, Round] = {}
        self.view = state_to_json(self.host.state)
        self.nonce = self.host.state.nonce
        for _ in range(begun):
            self.go_on(4, 1, 2.0)

    # What members do, sensible or not.

    def attempt(self, what: Callable[[float], object]) -> None:
        state = self.host.state
        try:
            what(self.now)
        except CoordinatorError:
            assert self.host.state is state

    def ask(self, signer: bytes, request: Request[Any]) -> None:
        self.attempt(lambda now: self.host.handle(signer, request, now))

    @rule(i=nodes)
    def join(self, i: int) -> None:
        self.ask(KEYS[i], Join(f"host:{i}", {"model": 1}))

    @rule(i=nodes)
    def withdraw(self, i: int) -> None:
        self.ask(KEYS[i], Withdraw())

    @rule(i=nodes)
    def vanish(self, i: int) -> None:
        self.host.disconnected(KEYS[i], self.now, "gone")

    @rule(i=nodes, index=st.none() | nodes, wrong=st.booleans(), late=st.booleans())
    def warm_up(self, i: int, index: int | None, wrong: bool, late: bool) -> None:
        signers = [client.signer for client in self.host.state.clients]
        if index is None and KEYS[i] in signers:
            index = signers.index(KEYS[i])
        digest = WRONG if wrong else right(self.host.state.step - 1)
        self.ask(KEYS[i], WarmupWitness(self.host.state.epoch - late, index or 0, digest))

    def witness(
        self,
        i: int,
        back: int = 0,
        heard: tuple[int, ...] = (0, 1, 2, 3, 4),
        claim: int | None = None,
        root: bytes = ROOTS[1],
        **named: Any,
    ) -> None:
        state, round_ = self.host.state, self.host.state.current
        if round_ is None or KEYS[i] not in round_.clients:
            return
        proof = round_selection(round_, state.config).witness_proof(round_.clients.index(KEYS[i]))
        if claim is not None:
            proof = WitnessProof(claim, proof.index)
        bloom = participants_bloom(round_.seed, [KEYS[j] for j in heard])
        figures = Report(round_.step, 2.0, 1.0, 10, 10)
        place = state.epoch, round_.height - back
        self.ask(KEYS[i], Witness(*place, proof, root, bloom, bloom, **named, report=figures))

    @rule(
        i=nodes,
        back=st.sampled_from([0, 0, 0, 1]),
        heard=st.sets(nodes).map(tuple),
        claim=st.none() | st.none() | st.integers(0, 4),
        root=st.sampled_from(ROOTS),
    )
    def witness_somehow(self, i: int, back: int, heard: tuple[int, ...], claim: int | None, root: bytes) -> None:
        self.witness(i, back, heard, claim, root)

    @rule(i=nodes, ahead=st.sampled_from([-2, -1, 0]), wrong=st.booleans(), root=st.sampled_from(ROOTS))
    def name_parameters(self, i: int, ahead: int, wrong: bool, root: bytes) -> None:
        step = max(0, self.host.state.step + ahead)
        self.witness(i, root=root, step=step, digest=WRONG if wrong else right(step))

    @rule(i=nodes, named=st.lists(nodes, max_size=2), back=st.sampled_from([0, 0, 1]))
    def health_check(self, i: int, named: list[int], back: int) -> None:
        round_ = self.host.state.current
        if round_ is not None:
            place = self.host.state.epoch, round_.height - back
            self.ask(KEYS[i], HealthCheck(*place, tuple(KEYS[j] for j in named)))

    @rule(missing=nodes, times=st.integers(1, 6), seconds=st.sampled_from([0.0, 2.0, 9.0]))
    def go_on(self, missing: int, times: int, seconds: float) -> None:
        """What well-behaved members do next, all but one of them."""
        for _ in range(times):
            self.wait(seconds)
            state = self.host.state
            seats = {client.signer: place for place, client in enumerate(state.clients)}
            for signer in sorted(KEYS, key=lambda signer: seats.get(signer, 9)):
                i, state = KEYS.index(signer), self.host.state
                if i == missing:
                    continue
                if state.phase is Phase.WARMUP:
                    held = starting_digest(state) or right(state.step - 1)
                    self.ask(signer, WarmupWitness(state.epoch, seats.get(signer, 9), held))
                elif state.phase.active:
                    named = {"step": state.step - 1, "digest": right(state.step - 1)} if state.draining else {}
                    self.witness(i, heard=tuple({*range(5)} - {missing}), **named)
                elif state.phase is Phase.PAUSED:
                    self.attempt(self.host.resume)
                else:
                    self.ask(signer, Join("", {"model": 1}))

    @rule(i=nodes)
    def go_on_without(self, i: int) -> None:
        """Members report that they heard nothing from one of them."""
        self.go_on(i, 4, 0.0)
        round_ = self.host.state.current
        if round_ is not None:
            for j in range(len(KEYS)):
                self.ask(KEYS[j], HealthCheck(self.host.state.epoch, round_.height, (KEYS[i],)))

    # What people, clocks and machines do.

    @rule(really=st.integers(0, 4))
    def pause(self, really: int) -> None:
        if not really:
            self.attempt(self.host.pause)

    @rule()
    def resume(self) -> None:
        self.attempt(self.host.resume)

    @rule(seconds=st.sampled_from([0.5, 2.0, 8.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.host.tick(self.now)

    @rule()
    def wait_for_the_clock(self) -> None:
        deadline = self.host.deadline()
        if deadline is not None:
            self.now = max(self.now, deadline)
            assert self.host.tick(self.now), "the time that deadline() names changes nothing"

    @rule(down=st.sampled_from([0.0, 100.0]))
    def restart(self, down: float) -> None:
        left = None if self.host.deadline() is None else self.host.deadline() - self.host.dump()["now"]  # type: ignore[operator]
        self.host = Recorder.load(json.loads(json.dumps(self.host.dump())))
        self.host.recorded, self.host.enough = self.rounds, self.needed
        self.now += down
        self.host.restarted(self.now)
        if left is not None and self.host.deadline() is not None and self.host.state.nonce == self.nonce + 1:
            assert self.host.deadline() == pytest.approx(self.now + left)

    # What must hold.

    @invariant()
    def nothing_is_due(self) -> None:
        if hasattr(self, "host"):
            assert not self.host.tick(self.now)

    @invariant()
    def changes_count_and_travel(self) -> None:
        if not hasattr(self, "host"):
            return
        state = self.host.state
        current = state_to_json(state)
        if current != self.view:
            assert state.nonce > self.nonce
        change = json.loads(json.dumps(diff(self.view, current)))
        assert patch(self.view, change) == current
        self.view, self.nonce = current, state.nonce

    @invariant()
    def stored_runs_are_exact(self) -> None:
        if hasattr(self, "host"):
            data = self.host.dump()
            assert RunHost.load(json.loads(json.dumps(data))).dump() == data

    @invariant()
    def rounds_follow_one_another(self) -> None:
        if not hasattr(self, "host"):
            return
        host = self.host
        assert [round_.height for round_ in host.rounds] == list(range(len(host.rounds)))
        for name, round_ in self.rounds.items():
            known = self.known.get(name)
            if known is not None:
                # A round never changes, but for its reports; when they decide something, it stays decided.
                assert replace(round_, witnesses=known.witnesses) == known
                root = decided_root(known, self.needed[name[0]])
                assert root is None or decided_root(round_, self.needed[name[0]]) == root
            selection = round_selection(round_, host.state.config)
            seats = [record.proof.index for record in round_.witnesses]
            assert len(set(seats)) == len(seats) <= selection.witness_count
            assert all(selection.verify_witness(record.proof) for record in round_.witnesses)
        self.known = dict(self.rounds)
        ring = {round_.height for round_ in host.state.rounds}
        if ring or host.state.phase is not Phase.FINISHED:  # a run may finish in warm-up, with an epoch that has none
            assert ring == {round_.height for round_ in host.rounds[-4:]}

    @invariant()
    def steps_and_data_are_contiguous(self) -> None:
        if not hasattr(self, "host"):
            return
        state = self.host.state
        trained = [round_ for _, round_ in sorted(self.rounds.items()) if round_.step]
        assert [round_.step for round_ in trained] == list(range(1, len(trained) + 1))
        assert len(trained) <= state.config.total_steps
        position = 0
        for round_ in trained:
            assert round_.data_index == position
            assert 3 <= round_.batch_size <= 7
            position += round_.batch_size
        if state.phase is Phase.FINISHED:
            assert len(trained) == state.config.total_steps == state.step - 1
            assert state.settled
        assert sum(self.host.points.values()) <= position

    @invariant()
    def epochs_drain_last_and_go_on_only_with_enough_reports(self) -> None:
        if not hasattr(self, "host"):
            return
        for epoch in {epoch for epoch, _ in self.rounds}:
            rounds = [self.rounds[name] for name in sorted(self.rounds) if name[0] == epoch]
            drained = [round_.height for round_ in rounds if not round_.step]
            assert drained == list(range(len(rounds) - len(drained), len(rounds)))
            assert len(drained) <= 2
            for before, after in itertools.pairwise(rounds):
                assert len(before.witnesses) >= self.needed[epoch]
                assert set(after.clients) <= set(before.clients)

    @invariant()
    def clients_are_those_of_the_epoch(self) -> None:
        if not hasattr(self, "host"):
            return
        state = self.host.state
        everyone = [client.signer for client in (*state.clients, *state.exited_clients)]
        assert len(set(everyone)) == len(everyone)
        assert (state.phase is Phase.ROUND_TRAIN) <= bool(state.epoch_digest)


Histories.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    # Making a failing history shorter takes longer than a test may run.
    phases=[Stage.explicit, Stage.reuse, Stage.generate],
)
TestHistories = Histories.TestCase
