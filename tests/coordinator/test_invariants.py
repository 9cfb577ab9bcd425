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
from psyche_lightning.protocol.committee import quorum, round_selection
from psyche_lightning.protocol.requests import (
    HealthCheck,
    Join,
    Report,
    Request,
    Vote,
    WarmupWitness,
    Withdraw,
    Witness,
)
from psyche_lightning.protocol.state import CoordinatorConfig, Phase, Round, RunState, WitnessProof

KEYS = [bytes([i + 1]) * 32 for i in range(5)]
DIGESTS = [bytes([i]) * 32 for i in range(2)]
nodes = st.sampled_from(range(len(KEYS)))
Name = tuple[int, int]


class Recorder(RunHost):
    """Writes down every round, also those that begin and end within one call."""

    recorded: dict[Name, Round]

    def _set(self, state: RunState, now: float) -> None:
        super()._set(state, now)
        if state.phase.active:
            self.recorded[state.epoch, self.rounds[-1].height] = self.rounds[-1]


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

    @rule(i=nodes, index=st.none() | nodes, digest=st.sampled_from(DIGESTS), late=st.booleans())
    def warm_up(self, i: int, index: int | None, digest: bytes, late: bool) -> None:
        signers = [client.signer for client in self.host.state.clients]
        if index is None and KEYS[i] in signers:
            index = signers.index(KEYS[i])
        self.ask(KEYS[i], WarmupWitness(self.host.state.epoch - late, index or 0, digest))

    def witness(
        self, i: int, back: int = 0, heard: tuple[int, ...] = (0, 1, 2, 3, 4), claim: int | None = None
    ) -> None:
        round_ = self.host.state.current
        if round_ is None or KEYS[i] not in round_.clients:
            return
        proof = round_selection(round_, self.host.state.config).witness_proof(round_.clients.index(KEYS[i]))
        if claim is not None:
            proof = WitnessProof(claim, proof.index)
        bloom = participants_bloom(round_.seed, [KEYS[j] for j in heard])
        figures = Report(round_.step, 2.0, 1.0, 10, 10)
        place = self.host.state.epoch, round_.height - back
        self.ask(KEYS[i], Witness(*place, proof, DIGESTS[0], bloom, bloom, figures))

    @rule(
        i=nodes,
        back=st.sampled_from([0, 0, 0, 1]),
        heard=st.sets(nodes).map(tuple),
        claim=st.none() | st.none() | st.integers(0, 4),
    )
    def witness_somehow(self, i: int, back: int, heard: tuple[int, ...], claim: int | None) -> None:
        self.witness(i, back, heard, claim)

    @rule(i=nodes, named=st.lists(nodes, max_size=2), back=st.sampled_from([0, 0, 1]))
    def health_check(self, i: int, named: list[int], back: int) -> None:
        round_ = self.host.state.current
        if round_ is not None:
            place = self.host.state.epoch, round_.height - back
            self.ask(KEYS[i], HealthCheck(*place, tuple(KEYS[j] for j in named)))

    @rule(i=nodes, digest=st.sampled_from(DIGESTS), late=st.booleans())
    def vote(self, i: int, digest: bytes, late: bool) -> None:
        state = self.host.state
        self.ask(KEYS[i], Vote(state.epoch - late, state.step - 1, digest))

    @rule(missing=nodes, times=st.integers(1, 6), seconds=st.sampled_from([0.0, 2.0, 9.0]))
    def go_on(self, missing: int, times: int, seconds: float) -> None:
        """What well-behaved members do next, all but one of them."""
        for _ in range(times):
            self.wait(seconds)
            state = self.host.state
            for i, signer in enumerate(KEYS):
                if i == missing:
                    continue
                if state.phase is Phase.WARMUP:
                    index = next((j for j, client in enumerate(state.clients) if client.signer == signer), 9)
                    held = state.checkpoint.digest or DIGESTS[0]
                    self.ask(signer, WarmupWitness(state.epoch, index, held))
                elif state.phase in (Phase.ROUND_TRAIN, Phase.ROUND_WITNESS):
                    self.witness(i, heard=tuple({*range(5)} - {missing}))
                elif state.phase is Phase.COOLDOWN:
                    self.ask(signer, Vote(state.epoch, state.step - 1, DIGESTS[1]))
                elif state.phase is Phase.PAUSED:
                    self.attempt(self.host.resume)
                else:
                    self.ask(signer, Join("", {"model": 1}))

    @rule(i=nodes)
    def go_on_without(self, i: int) -> None:
        """Members report that they heard nothing from one of them."""
        self.go_on(i, 1, 0.0)
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
        self.host.recorded = self.rounds
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
                # A round never changes, but for reports that are added to it.
                assert replace(round_, witnesses=known.witnesses) == known
                assert round_.witnesses[: len(known.witnesses)] == known.witnesses
            selection = round_selection(round_, host.state.config)
            seats = [record.proof.index for record in round_.witnesses]
            assert len(set(seats)) == len(seats) <= selection.witness_count
            assert all(selection.verify_witness(record.proof) for record in round_.witnesses)
        self.known = dict(self.rounds)
        ring = {round_.height for round_ in host.state.rounds}
        assert ring == {round_.height for round_ in host.rounds[-4:]}

    @invariant()
    def steps_and_data_are_contiguous(self) -> None:
        if not hasattr(self, "host"):
            return
        state = self.host.state
        trained: list[Round] = []
        for _, round_ in sorted(self.rounds.items()):
            if round_.step:  # an epoch whose end was not agreed is trained again
                trained = [*(earlier for earlier in trained if earlier.step < round_.step), round_]
        assert [round_.step for round_ in trained] == list(range(1, len(trained) + 1))
        assert len(trained) <= state.config.total_steps
        position = 0
        for round_ in trained:
            assert round_.data_index == position
            assert 3 <= round_.batch_size <= 7
            position += round_.batch_size
        if state.phase is Phase.FINISHED:
            assert len(trained) == state.config.total_steps == state.step - 1

    @invariant()
    def every_epoch_drains(self) -> None:
        if not hasattr(self, "host"):
            return
        state = self.host.state
        for epoch in {epoch for epoch, _ in self.rounds}:
            rounds = [self.rounds[name] for name in sorted(self.rounds) if name[0] == epoch]
            drained = [round_.height for round_ in rounds if not round_.step]
            assert drained == list(range(len(rounds) - len(drained), len(rounds)))
            if epoch < state.epoch:
                collapsed = not rounds[-1].witnesses and not drained
                assert len(drained) == 2 or collapsed
            for before, after in itertools.pairwise(rounds):
                selection = round_selection(before, state.config)
                if before.step and after.step:
                    assert len(before.witnesses) >= quorum(selection.witness_count)
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
    deadline=None,
    # Making a failing history shorter takes longer than a test may run.
    phases=[Stage.explicit, Stage.reuse, Stage.generate],
)
TestHistories = Histories.TestCase
