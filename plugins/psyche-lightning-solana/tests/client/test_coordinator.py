"""A node's client against the real programs on a local chain."""

import asyncio
import json
import math

import pytest
from psyche_lightning_solana.client import timekeeper
from psyche_lightning_solana.client.coordinator import _efficiency
from psyche_lightning_solana.client.ledger import Ledger
from psyche_lightning_solana.instructions import decode
from solders.account import Account
from solders.pubkey import Pubkey

from psyche_lightning.coordinator.machine import MachineError
from psyche_lightning.errors import CoordinatorError, ManifestMismatchError
from psyche_lightning.node.core import STALE
from psyche_lightning.protocol.bloom import participants_bloom
from psyche_lightning.protocol.committee import round_selection
from psyche_lightning.protocol.evals import Measure
from psyche_lightning.protocol.requests import (
    Evaluated,
    GetRounds,
    GetTerms,
    HealthCheck,
    Join,
    Report,
    WarmupWitness,
    Withdraw,
    Witness,
)
from psyche_lightning.protocol.state import ClientStatus, Phase, WitnessProof


async def joined(world, count, **options):
    clients = [world.node(**options) for _ in range(count)]
    for client in clients:
        await client.request(Join("tcp://127.0.0.1:1", {**MANIFEST, "data": {"length": 7}}))
    return clients


MANIFEST = {"run": {"overlap": False, "seed": 1}, "model": {"layers": 2, "name": "x"}}


def test_a_run_from_the_first_join_to_its_end(run, play, player, reached):
    async def test(world):
        owner = await world.owner()
        clients = await joined(world, 3)
        players = [player(client) for client in clients]
        last = await play(players, reached(Phase.FINISHED))
        assert last.step == 5
        assert last.checkpoint.step == 4
        assert len(last.clients) == 3
        states = players[0].states
        assert [s.nonce for s in states] == sorted(s.nonce for s in states)
        assert {s.phase for s in states} >= {Phase.WAITING_FOR_MEMBERS, Phase.ROUND_TRAIN}
        assert {c.address for s in states for c in s.clients if c.signer != clients[0].signer} == {"tcp://127.0.0.1:1"}
        # Four training rounds and one in which the last parameters are named, seen without a gap.
        rounds = await clients[0].request(GetRounds(0, 0))
        assert [(r.height, r.step) for r in rounds] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0)]
        assert all(r.witnesses for r in rounds)
        assert await clients[0].request(GetRounds(0, 4)) == rounds[4:]
        # Nothing but the end of the waiting needs a tick, and it is one for all.
        rows, story = await world.ledger(owner)
        assert rows.count(("tick", "ok")) <= 1
        assert rows.count(("set_address+join_run", "ok")) == 3
        assert rows.count(("warmup_witness", "ok")) == 3
        assert {result for _, result in rows} == {"ok"}
        # The ledger alone tells the same, with each round's figures.
        assert story.run.state.phase is Phase.FINISHED
        assert story.run.state.checkpoint == last.checkpoint
        told = story.status(await owner.look())
        assert [(row["step"], row["loss"]) for row in told["metrics"]][:4] == [(i, 2.0 + i / 4) for i in range(1, 5)]
        assert [event["kind"] for event in told["events"]].count("joined") == 3
        assert told["events"][-1]["text"] == "the run has finished after 4 steps"
        assert told["events"][-2]["text"].endswith("of step 4 are agreed")

    run(test, programs=True)


@pytest.mark.parametrize("late", [0, 1], ids=["at once", "overlap"])
def test_every_report_has_the_step_of_the_run_and_each_loss_is_told_once(run, play, player, reached, late):
    async def test(world):
        owner = await world.owner()
        players = [player(client, late=late) for client in await joined(world, 2)]
        await play(players, reached(Phase.ROUND_TRAIN))
        await owner.pause()
        await play(players, reached(Phase.PAUSED))
        await owner.resume()
        await play(players, reached(Phase.FINISHED))
        _, story = await world.ledger(owner)
        account = (await owner.run.keys()).coordinator_account
        entries = await Ledger(owner.run.reader, account).entries()
        calls = [
            decode(call.data)
            for entry in entries
            if entry.error is None
            for call in entry.calls
            if account in call.accounts and call.program == owner.run.program
        ]
        figures = [given["metadata"] for name, given in calls if name == "witness"]
        return figures, {row["step"]: row["loss"] for row in story.status(await owner.look())["metrics"]}

    figures, rows = run(test, programs=True)
    assert all(0.0 <= row["efficency"] <= 1.0 for row in figures)
    assert any(row["efficency"] > 0 for row in figures), "the part of the time in which the node trained"
    assert all(row["prompt_index"] in (0, 1) and row["prompt_results"][1:] == [7] for row in figures)
    assert {1, 2, 3, 4} <= {row["prompt_results"][0] for row in figures}
    steps = [row["step"] for row in figures]
    assert set(steps) == {1, 2, 3, 4, 5}  # the rounds that drain have the next one
    # Psyche's website forgets whatever comes before a lower step.
    assert steps == sorted(steps)
    told = {(row["step"], row["loss"]) for row in figures if row["loss"] != math.inf}
    assert told == {(step + late, 2.0 + step / 4) for step in range(1, 5)}
    if not late:
        assert rows == {step: 2.0 + step / 4 for step in range(1, 5)}


def test_efficiency_is_the_part_of_the_time_whatever_the_shares_were():
    assert _efficiency([]) == _efficiency([(5.0, 1, 2.0)]) == 0.0
    # 2, 0 (a step without a share) and 4 of 20 seconds.
    assert _efficiency([(10.0, 1, 3.0), (15.0, 2, 5.0), (30.0, 4, 9.0)]) == 6.0 / 20.0
    assert _efficiency([(10.0, 1, 3.0), (11.0, 2, 9.0)]) == 1.0


def test_joining_sends_only_what_is_not_so_yet(run, play, player, reached):
    async def test(world):
        owner = await world.owner(epoch_time=601, total_steps=50)
        client, other = await joined(world, 2)
        await client.request(Join("tcp://127.0.0.1:1", MANIFEST))
        assert await world.rows(client) == [("set_address+join_run", "ok")]
        await asyncio.gather(*(client.request(Join("tcp://127.0.0.1:2", MANIFEST)) for _ in range(3)))
        await client.request(Join("", MANIFEST))
        assert (await world.rows(client))[1:] == [("set_address", "ok"), ("set_address", "ok")]
        players = [player(client), player(other)]
        await play(players, reached(Phase.ROUND_TRAIN))
        before = len(await world.rows(client))
        await client.request(Join("tcp://127.0.0.1:3", MANIFEST))
        names = [name for name, _ in (await world.rows(client))[before:]]
        assert "set_address" in names
        assert not any("join_run" in name for name in names)
        await owner.pause()
        await play(players, reached(Phase.PAUSED))
        await client.request(Join("tcp://127.0.0.1:4", MANIFEST))  # it waits with the run
        await owner.resume()
        state = await play(players, reached(Phase.ROUND_TRAIN, 1))
        assert state.epoch_digest == state.checkpoint.digest
        assert len(state.clients) == 2
        joins = [result for name, result in await world.rows(client) if "join_run" in name]
        assert joins.count("ok") == 2  # one for each epoch; a blockhash may expire on a busy machine

    run(test, programs=True)


def test_terms_and_manifest(run):
    async def test(world):
        owner = await world.owner()
        client = world.node()
        terms = await client.request(GetTerms())
        assert terms.manifest == MANIFEST
        assert terms.unset == ()
        assert terms.config.total_steps == 4
        with pytest.raises(ManifestMismatchError, match=r"model\.layers: the run has 2, this node has 3") as caught:
            await client.request(Join("", {**MANIFEST, "model": {"layers": 3, "name": "x"}}))
        assert caught.value.differences == [("model.layers", 2, 3)]
        assert await world.rows(client) == []
        bare = await world.owner("bare", manifest=None)
        assert (await world.node("bare").request(GetTerms())).manifest is None
        with pytest.raises(CoordinatorError, match="has no manifest") as caught:
            await world.node("bare").request(Join("", MANIFEST))
        assert caught.value.code == "NoManifest"
        await bare.update(manifest=MANIFEST)  # a run without one may get it while it is open
        await world.node("bare").request(Join("", MANIFEST))
        # Somebody else's bytes at the manifest's place are not taken.
        fixed = (await owner.look()).manifest
        place = Pubkey.from_string(fixed.address.removeprefix("account:"))
        held = world.chain.account(place)
        for data in (bytes(held.data)[:-10], bytes(held.data)[:37] + b"x" * 40, b""):
            world.chain.store({place: Account(held.lamports, data, held.owner)})
            world.chain.advance(2)
            with pytest.raises(CoordinatorError, match=r"Only that owner can store it again|should lie"):
                await world.node().request(GetTerms())

    run(test, programs=True)


def test_bad_input_is_explained(run, play, player, reached):
    async def test(world):
        owner = await world.owner("closed", start=False)

        async def refused(code, client, text=""):
            with pytest.raises(CoordinatorError) as caught:
                await client.request(Join("tcp://127.0.0.1:1", MANIFEST))
            assert caught.value.code == code, caught.value
            assert not caught.value.retryable
            assert text in str(caught.value)
            assert await world.rows(client) == []

        await refused("NoSuchRun", world.node("none"), "psyche run create none")
        await refused("Halted", world.node("closed"), "psyche run start closed")
        await owner.start()
        await owner.pause()
        await refused("Halted", world.node("closed"), "psyche run resume closed")
        await owner.resume()
        await refused("Unfunded", world.node("closed", world.wallet(1_000_000)), "holds 0.001 SOL on localnet; a node")
        await refused("NotDeployed", world.node("closed", program=str(world.wallet().public)), "psyche solana deploy")
        await refused("NotDeployed", world.node("closed", program=str(owner.run.wallet.public)), "is no program")
        genesis = "EtWTRABZaYq6iMfeYKouRu166VU2xqa1wcaWoxkZrfBG"
        await refused("WrongCluster", world.node("closed", genesis=genesis), "its first block is")
        await owner.revoke(None)
        await refused("NotAuthorized", world.node("closed"), "psyche run authorize closed")
        await owner.authorize(None)
        with pytest.raises(Exception, match="1 to 32 letters"):
            world.node("x" * 33)

        # Accounts of another size, version, run or owner.
        keys = await owner.run.keys()
        held = world.chain.account(keys.coordinator_account)
        data = bytes(held.data)
        for wrong, text in (
            (data[:-1], "119,160 bytes"),
            (data[:8] + (2).to_bytes(8, "little") + data[16:], "version 2"),
            (bytes(8) + data[8:], "begins with"),
            (data[:376] + b"other".ljust(32, b"\0") + data[408:], "of the run 'other'"),
        ):
            world.chain.store({keys.coordinator_account: Account(held.lamports, wrong, held.owner)})
            world.chain.advance(2)
            await refused("WrongAccount", world.node("closed"), text)
        world.chain.store({keys.coordinator_account: held})
        world.chain.advance(2)

        # No service at all.
        client = world.node("closed")
        for proxy in world.proxies:
            proxy.down = True
        with pytest.raises(CoordinatorError, match="cannot reach the chain localnet") as caught:
            await client.request(Join("", MANIFEST))
        assert caught.value.retryable

    run(test, programs=True)


def test_services_of_different_chains_are_refused(run):
    async def test(world):
        await world.owner()

        def edit(method, answer):
            return {**answer, "result": "1" * 32} if method == "getGenesisHash" else answer

        world.proxies[1].edit(edit)
        with pytest.raises(CoordinatorError, match="different chains") as caught:
            await world.node().request(GetTerms())
        assert caught.value.code == "WrongCluster"

    run(test, programs=True, services=2)


def test_a_finished_run_takes_nobody(run, play, player, reached):
    async def test(world):
        await world.owner(total_steps=1, init_min_clients=1)
        (client,) = await joined(world, 1)
        await play([player(client)], reached(Phase.FINISHED))
        with pytest.raises(CoordinatorError, match="is finished: all 1 steps"):
            await world.node().request(Join("", MANIFEST))

    run(test, programs=True)


def test_refusals_have_the_machines_names(run, play, player, reached):
    async def test(world):
        await world.owner()
        clients = await joined(world, 2)
        filters = bytes(192), bytes(192)
        for call, code in (
            (lambda c: c.request(WarmupWitness(0, 0, b"\1" * 32)), "InvalidWitness"),
            (lambda c: c.request(Witness(0, 0, WitnessProof(0, 0), bytes(32), *filters)), "InvalidRunState"),
        ):
            with pytest.raises(CoordinatorError) as caught:
                await call(clients[0])
            assert caught.value.code == code
            assert not caught.value.retryable
        players = [player(client, ["round_train"]) for client in clients]
        state = await play(players, reached(Phase.ROUND_TRAIN))
        wrong = WitnessProof(0, 77)
        for height in (0, 5):
            with pytest.raises(CoordinatorError) as caught:
                await clients[0].request(Witness(0, height, wrong, b"\1" * 32, *filters))
            assert caught.value.code == "InvalidWitness"
        with pytest.raises(CoordinatorError) as caught:
            await world.node().request(WarmupWitness(0, 0, b"\1" * 32))
        assert caught.value.code == "InvalidWitness"
        assert state.current.height == 0
        assert issubclass(MachineError, CoordinatorError)

    run(test, programs=True)


def test_withdrawing(run, play, player, reached):
    async def test(world):
        await world.owner(init_min_clients=3)
        clients = await joined(world, 2)
        await clients[0].request(Withdraw())
        with pytest.raises(CoordinatorError, match="is not a member"):
            await clients[0].request(Withdraw())
        assert ("withdraw", "InvalidWithdraw") not in await world.rows(clients[0])
        run_now = await clients[1]._look()
        assert [client.signer for client in run_now.pending] == [clients[1].signer]
        clients += await joined(world, 2)
        players = [player(client, ["round_train"]) for client in clients[1:]]
        await play(players, reached(Phase.ROUND_TRAIN))
        await clients[1].request(Withdraw())
        state = (await clients[2]._look()).state
        assert {c.signer: c.status for c in state.clients}[clients[1].signer] is ClientStatus.WITHDRAWN

    run(test, programs=True)


def test_who_is_kicked_is_out_at_once(run, play, player, reached):
    async def test(world):
        owner = await world.owner(everybody=False)
        clients = [world.node() for _ in range(2)]
        for client in clients:
            await owner.authorize(client.run.wallet.public)
            await client.request(Join("tcp://127.0.0.1:1", MANIFEST))
        await play([player(client, ["round_train"]) for client in clients], reached(Phase.ROUND_TRAIN))
        gone = clients[1]
        assert await owner.kick(gone.run.wallet.public)
        state = (await owner.look()).state
        assert {c.signer: c.status for c in state.exited_clients}[gone.signer] is ClientStatus.EJECTED
        with pytest.raises(CoordinatorError) as caught:
            await gone.request(Join("tcp://127.0.0.1:1", MANIFEST))
        assert caught.value.code == "NotAuthorized"
        assert not await owner.kick(gone.run.wallet.public)
        assert ("kick", "ok") in (await world.ledger(owner))[0]

    run(test, programs=True)


def test_the_clock_moves_the_run_on_with_one_tick(run, play, player, reached, monkeypatch):
    monkeypatch.setattr(timekeeper, "STAGGER", 60.0)  # on a busy machine the first one's turn may take a while

    async def test(world):
        owner = await world.owner(max_round_train_time=30, round_witness_time=30, cooldown_time=30)
        clients = await joined(world, 4)
        players = [player(client, ["round_train"]) for client in clients]
        await play(players, reached(Phase.ROUND_TRAIN))
        before = (await world.ledger(owner))[0].count(("tick", "ok"))
        world.chain.advance_seconds(31)
        silent = [player(client, ["round_train"]) for client in clients]
        await play(silent, reached(Phase.ROUND_WITNESS))
        await asyncio.sleep(0.5)
        assert (await world.ledger(owner))[0].count(("tick", "ok")) == before + 1
        assert {error.code for player in (*players, *silent) for error in player.errors} <= set(STALE)

    run(test, programs=True)


def test_when_those_whose_turn_it_is_are_gone_others_tick(run, play, player, reached):
    async def test(world):
        await world.owner(max_round_train_time=30, init_min_clients=3)
        clients = await joined(world, 3)
        state = await play([player(client, ["round_train"]) for client in clients], reached(Phase.ROUND_TRAIN))
        now = await clients[0]._look()
        assert now.state.nonce == state.nonce
        last = next(client for client in clients if timekeeper.turn(now, client.signer) == 2)
        for client in clients:
            if client is not last:
                await client.close()
        world.chain.advance_seconds(40)
        await play([player(last, ["round_train", "round_witness"])], reached(Phase.ROUND_WITNESS))

    run(test, programs=True)


def test_a_silent_client_is_dropped_by_one_transaction(run, play, player, reached):
    async def test(world):
        await world.owner(max_round_train_time=30, round_witness_time=30)
        clients = await joined(world, 3)
        state = await play([player(client, ["round_train"]) for client in clients], reached(Phase.ROUND_TRAIN))
        gone = clients[2]
        await gone.close()
        here = [signer for signer in state.current.clients if signer != gone.signer]
        for height in range(3):
            state = (await clients[0]._look()).state
            assert state.current.height == height  # two equal reports of three are a quorum
            filters = participants_bloom(state.current.seed, here), bytes(192)
            selection = round_selection(state.current, state.config)
            for client in clients[:2]:
                seat = state.current.clients.index(client.signer)
                proof = selection.witness_proof(seat)
                await client.request(Witness(0, height, proof, b"\1" * 32, *filters, report=Report(1, 1.0)))
        dropped = await asyncio.gather(*(client.request(HealthCheck(0, 3, (gone.signer,))) for client in clients[:2]))
        assert sum(dropped) == 1
        state = (await clients[0]._look()).state
        assert {c.signer: c.status for c in state.clients}[gone.signer] is ClientStatus.DROPPED
        assert await clients[0].request(HealthCheck(0, 3, (gone.signer,))) == 0
        assert (await world.rows(*clients[:2])).count(("health_check", "ok")) == 1

    run(test, programs=True)


def test_what_a_node_measured_is_in_its_next_report(run, play, player, reached):
    async def test(world):
        owner = await world.owner(max_round_train_time=30, round_witness_time=30)
        clients = await joined(world, 2)
        state = await play([player(client, ["round_train"]) for client in clients], reached(Phase.ROUND_TRAIN))
        filters = participants_bloom(state.current.seed, state.current.clients), bytes(192)
        selection = round_selection(state.current, state.config)
        for number, client in enumerate(clients):
            for share in range(3):
                measured = (Measure("acc", float(share == number), 1.0), Measure("acc_norm", float(number), 1.0))
                answer = await client.request(Evaluated("a-task", 1, 4, share, measured))
            assert (answer.measured, answer.values) == (3, {"acc": pytest.approx(1 / 3), "acc_norm": float(number)})
            proof = selection.witness_proof(state.current.clients.index(client.signer))
            await client.request(Witness(0, 0, proof, b"\1" * 32, *filters, report=Report(1, 1.0)))
        _, story = await world.ledger(owner)
        (found,) = story.status(await clients[0]._look())["evaluations"]
        assert (found["task"], found["figures"]) == ("a-task", {"mean of 2 nodes": 0.5})

    run(test, programs=True)


def test_another_process_with_the_same_wallet_ends_this_one(run, play, player, reached):
    async def test(world):
        await world.owner()
        (client,) = await joined(world, 1)
        twin = world.node(wallet=client.run.wallet)
        await twin.request(Join("tcp://127.0.0.1:2", MANIFEST))
        with pytest.raises(CoordinatorError, match="another process joined") as caught:
            await play([player(client, ["waiting_for_members"])], reached(Phase.FINISHED))
        assert caught.value.code == "Replaced"

    run(test, programs=True)


def test_every_transaction_is_in_the_log(run, play, player, reached, tmp_path):
    async def test(world):
        owner = await world.owner()
        clients = [world.node(log=str(tmp_path / f"{i}.jsonl")) for i in range(2)]
        for client in clients:
            await client.request(Join("tcp://127.0.0.1:1", MANIFEST))
        await play([player(client) for client in clients], reached(Phase.FINISHED))
        for client in clients:
            await client.close()
        rows = [json.loads(line) for i in range(2) for line in (tmp_path / f"{i}.jsonl").read_text().splitlines()]
        landed = {row["signature"]: row for row in rows if row["landed"]}
        assert len(landed) == len([row for row in rows if row["landed"]])
        assert all(row["result"] == "ok" and row["units"] > 0 and row["fee"] >= 5000 for row in landed.values())
        assert {row["instruction"] for row in rows} >= {"set_address+join_run", "warmup_witness", "witness"}
        _, story = await world.ledger(owner)
        assert {row.signature: row.units for row in story.rows if row.signature in landed} == {
            signature: row["units"] for signature, row in landed.items() if row["instruction"] != "set_address"
        }

    run(test, programs=True)
