"""The conformance kit of coordinators: subclass one class, and pytest tests the contract.

Example::

    # tests/test_notary.py
    from psyche_lightning.testing.coordinators import CoordinatorContract

    class TestNotary(CoordinatorContract):
        @contextlib.asynccontextmanager
        async def open_run(self, run_id, config):
            async with notary() as url:
                await create(url, run_id, config)
                yield lambda identity: NotaryCoordinator(url, run_id, identity)

The kit needs pytest alone (``pip install psyche-lightning[testing]``). Each test has its own run and event loop, and
ends within :attr:`CoordinatorContract.limit` seconds. The nodes of :mod:`psyche_lightning.testing.walking` join and
report, but train nothing.
"""

# ruff: noqa: D102 - the name of a test says what it shows
from __future__ import annotations

import abc
import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from psyche_lightning.errors import CoordinatorError, ManifestMismatchError
from psyche_lightning.protocol.committee import decided_root, round_selection
from psyche_lightning.protocol.requests import (
    Coordinator,
    GetRounds,
    GetTerms,
    HealthCheck,
    Join,
    WarmupWitness,
    Withdraw,
    Witness,
)
from psyche_lightning.protocol.state import (
    INCARNATION_SIZE,
    ClientStatus,
    CoordinatorConfig,
    Phase,
    RunState,
    WitnessProof,
)
from psyche_lightning.testing.walking import (
    MANIFEST,
    START,
    end_digest,
    finished,
    list_root,
    state_when,
    walk,
    witness,
)
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import Identity

RUN_ID = "contract"

Connect = Callable[[Identity], Coordinator]


class CoordinatorContract(abc.ABC):
    """What every coordinator must do; subclass it as ``Test...`` and define :meth:`open_run`.

    Attributes:
        limit: seconds after which a test that hangs fails.
        config: the configuration of the runs. Phases end early when all clients have reported, so no test waits for the
            long times below. Override it if your coordinator cannot have these values, for example whole seconds only.
    """

    limit: float = 60.0
    config = CoordinatorConfig(
        warmup_time=600.0,
        cooldown_time=600.0,
        max_round_train_time=600.0,
        round_witness_time=600.0,
        epoch_time=3600.0,
        global_batch_size_start=2,
        global_batch_size_end=2,
        total_steps=5,
        init_min_clients=2,
        min_clients=1,
        waiting_for_members_extra_time=0.1,
    )

    @abc.abstractmethod
    def open_run(self, run_id: str, config: CoordinatorConfig) -> contextlib.AbstractAsyncContextManager[Connect]:
        """Opens a new run without a manifest, which everybody may join until the context ends.

        Returns:
            A context manager. It yields a function that returns a new client for a node's key at each call.
        """

    # -- helpers ------------------------------------------------------------------------------------------------------

    def play(self, scene: Callable[[Callable[[], Coordinator]], Awaitable[None]], clients: int = 2) -> None:
        """Run one test.

        Args:
            scene: the test; called with a function that returns the client of a new node.
            clients: number of nodes that the run waits for.
        """

        async def main() -> None:
            opened: list[Coordinator] = []
            async with self.open_run(RUN_ID, replace(self.config, init_min_clients=clients)) as connect:

                def client() -> Coordinator:
                    opened.append(connect(Identity.generate()))
                    return opened[-1]

                try:
                    await asyncio.wait_for(scene(client), self.limit)
                finally:
                    for each in opened:
                        await asyncio.wait_for(each.close(), self.limit)

        asyncio.run(main())

    @staticmethod
    async def refused(call: Awaitable[object], *codes: str) -> CoordinatorError:
        """Check that a call fails with one of these codes; returns the error."""
        with pytest.raises(CoordinatorError) as caught:
            await call
        assert caught.value.code in codes, f"{caught.value.code!r} ({caught.value}) instead of {codes}"
        assert str(caught.value)
        return caught.value

    async def gathered(self, *clients: Coordinator) -> RunState:
        """Let all clients join; returns the state in which the warm-up began."""
        for client in clients:
            await client.request(Join("nowhere", MANIFEST))
        return await state_when(clients[0], lambda state: state.phase is Phase.WARMUP)

    async def training(self, *clients: Coordinator) -> RunState:
        """Let all clients join and finish the warm-up; returns the state in which the first round began."""
        state = await self.gathered(*clients)
        for client in by_seat(state, clients):
            await client.request(WarmupWitness(state.epoch, seat(state, client), START))
        return await state_when(clients[0], lambda state: state.phase is Phase.ROUND_TRAIN)

    # -- the terms of the run -----------------------------------------------------------------------------------------

    def test_terms_are_the_run_s_and_asking_does_not_join(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            first, second = new(), new()
            terms = await first.request(GetTerms())
            assert terms.config == replace(self.config, init_min_clients=2)
            assert terms.unset == ()
            assert terms.manifest is None
            await second.request(Join("nowhere", MANIFEST))
            assert (await first.request(GetTerms())).manifest == MANIFEST
            state = await state_when(first, lambda state: state.phase is Phase.WAITING_FOR_MEMBERS)
            assert state.gathered_at is None, "a client that only asked for the terms counts as a member"
            assert len(terms.incarnation) == INCARNATION_SIZE, (
                "without an incarnation, signatures of a former run count"
            )
            assert state.incarnation == terms.incarnation

        self.play(scene)

    def test_every_client_has_a_key_of_its_own(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            first, second = new(), new()
            assert len(first.signer) == len(second.signer) == 32
            assert first.signer != second.signer

        self.play(scene)

    # -- joining and leaving ------------------------------------------------------------------------------------------

    def test_joining_again_changes_the_address_only(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            first, second = new(), new()
            await first.request(Join("old", MANIFEST))
            await first.request(Join("old", MANIFEST))
            await first.request(Join("new", MANIFEST))
            await second.request(Join("other", MANIFEST))
            state = await state_when(second, lambda state: state.phase is Phase.WARMUP)
            addresses = [(client.signer, client.address) for client in state.clients]
            assert sorted(addresses) == sorted([(first.signer, "new"), (second.signer, "other")])

        self.play(scene)

    def test_another_manifest_is_refused_field_by_field(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            first, second = new(), new()
            await first.request(Join("nowhere", MANIFEST))
            other = {"model": {"name": "none", "layers": 3}}
            with pytest.raises(ManifestMismatchError, match=r"model\.layers") as caught:
                await second.request(Join("nowhere", other))
            assert caught.value.differences == [("model.layers", 2, 3)]
            assert not caught.value.retryable
            assert (await first.request(GetTerms())).manifest == MANIFEST
            await second.request(Join("nowhere", MANIFEST))  # with the run's manifest it may join
            state = await state_when(first, lambda state: state.phase is Phase.WARMUP)
            assert {client.signer for client in state.clients} == {first.signer, second.signer}

        self.play(scene)

    def test_who_withdraws_before_the_epoch_is_forgotten(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            gone, first, second = new(), new(), new()
            await gone.request(Join("nowhere", MANIFEST))
            await gone.request(Withdraw())
            state = await self.gathered(first, second)
            assert {client.signer for client in state.clients} == {first.signer, second.signer}

        self.play(scene)

    def test_who_withdraws_in_a_round_leaves_the_list_and_the_run_goes_on(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            first, second, leaving = new(), new(), new()
            await self.training(first, second, leaving)
            await leaving.request(Withdraw())
            state = await state_when(first, lambda state: not healthy(state, leaving))
            known = {client.signer: client.status for client in (*state.clients, *state.exited_clients)}
            assert known[leaving.signer] is ClientStatus.WITHDRAWN
            states = await asyncio.gather(walk(first), walk(second))
            assert {state.step for state in states} == {self.config.total_steps + 1}

        self.play(scene, clients=3)

    def test_who_is_no_member_cannot_withdraw(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            first, stranger = new(), new()
            await first.request(Join("nowhere", MANIFEST))
            await self.refused(stranger.request(Withdraw()), "InvalidWithdraw")

        self.play(scene)

    # -- watching -----------------------------------------------------------------------------------------------------

    def test_watching_begins_with_the_state_and_the_nonce_grows(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            first, second = new(), new()
            nonces: dict[Coordinator, list[int]] = {first: [], second: []}
            state = await state_when(first, lambda state: True)
            assert state.run_id == RUN_ID
            assert not state.clients
            await asyncio.gather(*(walk(c, seen=lambda s, c=c: nonces[c].append(s.nonce)) for c in (first, second)))  # type: ignore[misc]
            for seen in nonces.values():
                assert len(seen) > 3
                assert all(a < b for a, b in itertools.pairwise(seen)), f"nonces must grow: {seen}"
            assert nonces[first][-1] == nonces[second][-1]

        self.play(scene)

    def test_several_may_watch_through_one_client(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            first, second = new(), new()
            watching = [asyncio.ensure_future(state_when(first, finished)) for _ in range(2)]
            await asyncio.gather(walk(first), walk(second))
            assert {state.phase for state in await asyncio.gather(*watching)} == {Phase.FINISHED}

        self.play(scene)

    # -- warm-up ------------------------------------------------------------------------------------------------------

    def test_nobody_reports_before_an_epoch_is_formed(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            first = new()
            await first.request(Join("nowhere", MANIFEST))
            await self.refused(first.request(WarmupWitness(0, 0, START)), "InvalidWitness")
            report = Witness(0, 0, WitnessProof(0, 0), START, bytes(192), bytes(192))
            await self.refused(first.request(report), "InvalidRunState")

        self.play(scene)

    def test_a_warm_up_witness_has_its_own_index_and_the_epoch(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            members, stranger = [new(), new()], new()
            state = await self.gathered(*members)
            first, _ = by_seat(state, members)
            for client, epoch, index in ((first, 0, 1), (first, 0, 2), (stranger, 0, 0), (first, 1, 0)):
                await self.refused(client.request(WarmupWitness(state.epoch + epoch, index, START)), "InvalidWitness")
            await first.request(WarmupWitness(state.epoch, 0, START))
            state = await state_when(members[1], lambda state: bool(state.warmup_witnesses))
            assert [(record.proof.index, record.merkle) for record in state.warmup_witnesses] == [(0, START)]
            assert state.phase is Phase.WARMUP

        self.play(scene)

    def test_the_first_member_of_a_fresh_run_names_its_parameters(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            members = [new(), new()]
            state = await self.gathered(*members)
            first, second = by_seat(state, members)
            other = sha256(b"something else")
            await self.refused(second.request(WarmupWitness(state.epoch, 1, other)), "InvalidWitness")
            await first.request(WarmupWitness(state.epoch, 0, START))
            await self.refused(second.request(WarmupWitness(state.epoch, 1, other)), "InvalidWitness")
            await second.request(WarmupWitness(state.epoch, 1, START))
            state = await state_when(second, lambda state: state.phase is Phase.ROUND_TRAIN)
            assert (state.epoch_digest, state.checkpoint.digest, state.checkpoint.step) == (START, START, 0)
            assert state.needed == 2

        self.play(scene)

    def test_a_warm_up_witness_reports_once(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            members = [new(), new()]
            state = await self.gathered(*members)
            first, _ = by_seat(state, members)
            await first.request(WarmupWitness(state.epoch, 0, START))
            for digest in (START, sha256(b"something else")):
                await self.refused(first.request(WarmupWitness(state.epoch, 0, digest)), "DuplicateWitness")

        self.play(scene)

    # -- rounds -------------------------------------------------------------------------------------------------------

    def test_a_witness_reports_again_until_enough_agree(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            first, second, third = (new() for _ in range(3))
            state = await self.training(first, second, third)
            await witness(first, state, root=sha256(b"few results"))
            await self.refused(witness(first, state, root=sha256(b"few results")), "DuplicateWitness")
            await witness(second, state)  # two reports, but not of the same results
            await witness(first, state)
            state = await state_when(third, lambda state: bool(state.current and state.current.height == 1))
            before = state.round_at(0)
            assert before is not None
            assert [record.merkle for record in before.witnesses] == [list_root(0)] * 2
            assert decided_root(before, state.needed) == list_root(0)
            await self.refused(witness(third, state, ahead=-1), "InvalidWitness")

        self.play(scene, clients=3)

    def test_a_witness_has_its_own_seat_and_the_current_round(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            first, second, stranger = new(), new(), new()
            state = await self.training(first, second)
            await self.refused(witness(first, state, as_client=second.signer), "InvalidWitness")
            await self.refused(witness(stranger, state, as_client=first.signer), "InvalidWitness")
            await self.refused(witness(first, state, ahead=1), "InvalidWitness")
            nobody = Witness(0, 0, WitnessProof(9, 9), START, bytes(192), bytes(192))
            await self.refused(first.request(nobody), "InvalidWitness")
            assert (await state_when(first, lambda state: True)).nonce == state.nonce, (
                "a refused request changed the state"
            )

        self.play(scene)

    def test_rounds_follow_the_reports(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            first, second = new(), new()
            state = await self.training(first, second)
            assert state.current is not None
            assert (state.current.height, state.current.step, state.current.data_index) == (0, 1, 0)
            for client in (first, second):
                await witness(client, state)
            state = await state_when(second, lambda state: bool(state.current and state.current.height == 1))
            before, now = state.round_at(0), state.current
            assert before is not None
            assert now is not None
            assert len(before.witnesses) == 2
            assert (now.step, now.data_index) == (2, before.data_index + before.batch_size)
            assert now.seed != before.seed

        self.play(scene)

    def test_enough_witnesses_name_the_parameters(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            first, second = new(), new()
            state = await self.training(first, second)
            for client in (first, second):
                await witness(client, state)
            state = await state_when(first, lambda state: bool(state.current and state.current.height == 1))
            digest, round_ = end_digest(1), state.current
            assert round_ is not None
            proof = round_selection(round_, state.config).witness_proof(round_.clients.index(first.signer))
            early = Witness(state.epoch, 1, proof, START, bytes(192), bytes(192), state.step, digest)
            await self.refused(first.request(early), "InvalidWitness")
            await witness(first, state, digest=digest)
            alone = await state_when(second, lambda state: bool(state.current and state.current.witnesses))
            assert (alone.checkpoint.digest, alone.checkpoint.step) == (START, 0), "one witness named the parameters"
            await witness(second, state, digest=digest)
            state = await state_when(second, lambda state: state.checkpoint.step > 0)
            assert (state.checkpoint.digest, state.checkpoint.step) == (digest, 1)

        self.play(scene)

    def test_a_healthy_client_cannot_be_dropped(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            first, second = new(), new()
            state = await self.training(first, second)
            for client in (first, second):
                await witness(client, state)
            await state_when(first, lambda state: bool(state.current and state.current.height == 1))
            await self.refused(first.request(HealthCheck(state.epoch, 1, (second.signer,))), "InvalidHealthCheck")
            assert healthy(await state_when(first, lambda state: True), second)

        self.play(scene)

    def test_a_client_that_is_not_heard_in_three_rounds_is_dropped(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            *heard, silent = new(), new(), new()
            state = await self.training(*heard, silent)
            for height in (1, 2, 3):
                for client in heard:  # each reports on what it sees itself
                    await state_when(client, lambda state, h=height - 1: state.current and state.current.height == h)  # type: ignore[misc]
                    await witness(client, state, heard=[each.signer for each in heard])
                state = await state_when(heard[0], lambda state, h=height: state.current.height == h)  # type: ignore[misc]
                check = heard[0].request(HealthCheck(state.epoch, height, (silent.signer,)))
                if height < 3:
                    await self.refused(check, "InvalidHealthCheck")
                else:
                    assert await check == 1
            # A client's first state may still be one from before the epoch.
            state = await state_when(heard[1], lambda state: state.phase.active and not healthy(state, silent))
            assert all(healthy(state, client) for client in heard)

        self.play(scene, clients=3)

    # -- a whole epoch ------------------------------------------------------------------------------------------------

    def test_two_clients_go_through_a_whole_epoch(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            clients = [new(), new()]
            phases: list[Phase] = []
            states = await asyncio.gather(
                walk(clients[0], seen=lambda state: phases.append(state.phase)), walk(clients[1])
            )
            assert states[0] == states[1]
            state = states[0]
            assert (state.epoch, state.step) == (1, self.config.total_steps + 1)
            assert state.checkpoint.step == self.config.total_steps
            assert state.checkpoint.digest == end_digest(self.config.total_steps)
            assert set(phases) >= {Phase.ROUND_TRAIN, Phase.FINISHED}
            late = Witness(0, 0, WitnessProof(0, 0), START, bytes(192), bytes(192))
            await self.refused(clients[0].request(late), "Halted")
            rounds = await clients[0].request(GetRounds(0, 0))
            assert [round_.height for round_ in rounds] == list(range(len(rounds)))
            # One round without training named the parameters, so there is no second one.
            assert [round_.step for round_ in rounds] == [*range(1, state.step), 0]
            for round_ in rounds:
                assert set(round_.clients) == {client.signer for client in clients}
                assert len(round_.witnesses) == 2
                assert {record.merkle for record in round_.witnesses} == {list_root(round_.height)}
            for first, second in itertools.pairwise(rounds):
                assert second.data_index == first.data_index + first.batch_size
            assert await clients[1].request(GetRounds(0, 3)) == rounds[3:]
            assert await clients[1].request(GetRounds(7, 0)) == ()

        self.play(scene)

    def test_one_who_joins_under_way_waits_for_the_next_epoch(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            first, second, late = new(), new(), new()
            await self.training(first, second)
            await late.request(Join("nowhere", MANIFEST))
            walking = asyncio.gather(walk(first), walk(second))
            seen = [state async for state in until_finished(late)]
            await walking
            assert all(late.signer not in state.current.clients for state in seen if state.current)

        self.play(scene)

    # -- closing ------------------------------------------------------------------------------------------------------

    def test_a_closed_client_says_so(self) -> None:
        async def scene(new: Callable[[], Coordinator]) -> None:
            first, second = new(), new()
            await first.request(Join("nowhere", MANIFEST))
            await first.close()
            await first.close()
            with pytest.raises(CoordinatorError):
                await first.request(Join("nowhere", MANIFEST))
            await second.request(Join("nowhere", MANIFEST))

        self.play(scene)


def seat(state: RunState, client: Coordinator) -> int:
    """The index of a client in the epoch's list."""
    return [member.signer for member in state.clients].index(client.signer)


def by_seat(state: RunState, clients: Sequence[Coordinator]) -> list[Coordinator]:
    """The clients in the order of the epoch's list."""
    return sorted(clients, key=lambda client: seat(state, client))


def healthy(state: RunState, client: Coordinator) -> bool:
    """Whether a client is in the epoch's list and healthy."""
    return any(each.signer == client.signer for each in state.healthy)


async def until_finished(client: Coordinator) -> Any:
    """Yields the states up to the end of the run."""
    async for state in client.watch():
        yield state
        if finished(state):
            return
