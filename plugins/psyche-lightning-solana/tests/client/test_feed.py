"""The run's accounts as they change, through services that fail."""

import asyncio
import base64
import contextlib
import copy
import dataclasses
import json

import pytest
import zstandard
from psyche_lightning_solana.client import ledger
from psyche_lightning_solana.client.cluster import Endpoint
from psyche_lightning_solana.client.feed import CLOCK, Feed
from psyche_lightning_solana.client.ledger import Ledger
from psyche_lightning_solana.client.rounds import replay
from psyche_lightning_solana.layout import COORDINATOR
from websockets.asyncio.server import serve
from websockets.server import ServerProtocol

from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.requests import GetRounds, Join, Withdraw
from psyche_lightning.protocol.state import Phase


async def following(world, ws=None, **options):
    """The run's owner, and a feed of it; its subscriptions go to the URL ``ws``, when there is one."""
    owner = await world.owner(init_min_clients=1, min_clients=1, total_steps=1000)
    access = world.access(**options)
    keys = await access.keys()
    endpoints = access.cluster.endpoints if ws is None else (Endpoint(world.proxies[0].url, ws),)
    feed = Feed(
        dataclasses.replace(access.cluster, endpoints=endpoints),
        access.reader,
        keys.coordinator_account,
        access.manifest_address,
        check=access.check_account,
        sleep=access.sleep,
    )
    return owner, feed


async def seen(feed, condition, timeout=30.0):
    news = feed.news()
    end = asyncio.get_running_loop().time() + timeout
    while not (feed.latest is not None and condition()):
        news.clear()
        await asyncio.wait({asyncio.ensure_future(news.wait())}, timeout=0.2)
        assert asyncio.get_running_loop().time() < end, "it was not seen"
    feed.forget(news)


async def change(owner, number):
    await owner.update(rates=(number, None))
    return (await owner.run.snapshot()).nonce


def test_changes_come_by_subscription_and_again_after_it_broke(run, caplog):
    async def test(world):
        owner, feed = await following(world, poll=3600.0)
        feed.start()
        await seen(feed, lambda: feed.subscriptions == 1)
        for number in range(1, 4):
            nonce = await change(owner, number)
            await seen(feed, lambda nonce=nonce: feed.latest.nonce == nonce)
            await world.proxies[0].cut()
        name = f"the subscription with {world.endpoints()[0].name}"
        told = [text for text in caplog.messages if name in text]
        assert told[0].startswith(f"lost {name}: ")
        assert told[0].endswith("polling every 3600 s meanwhile; trying again")
        assert told[1].startswith(f"{name} is back after ")
        await feed.stop()

    caplog.set_level("INFO", "psyche_lightning_solana")
    run(test, programs=True)


def test_a_chain_that_does_not_answer_is_told_at_once_then_at_intervals_and_when_it_is_back(run, caplog):
    now = [0.0]

    def said():
        return [(record.levelname, record.getMessage()) for record in caplog.records if record.name.endswith(".feed")]

    async def told(text):
        while not any(text in message for _, message in said()):
            await asyncio.sleep(0.01)

    async def test(world):
        _, feed = await following(world, poll=0.5)
        feed._outage._clock = lambda: now[0]
        feed.start()
        await seen(feed, lambda: feed.subscriptions == 1)
        assert said() == []
        world.proxies[0].always("*", "status 503")
        feed.look()
        await told("lost the chain localnet: ")
        assert "it answered with HTTP status 503; trying again" in caplog.text
        now[0] = 31.0
        feed.look()
        await told("the chain localnet is still away after 31 s: ")
        now[0] = 42.0
        world.proxies[0].heal()
        feed.look()
        await told("the chain localnet is back after 42 s")
        assert [level for level, _ in said()] == ["WARNING"] * 3
        await feed.stop()

    caplog.set_level("WARNING", "psyche_lightning_solana")
    run(test, programs=True)


def test_without_any_subscription_it_looks(run):
    async def test(world):
        owner, feed = await following(world, poll=1.0)
        world.proxies[0].fail("notification", *["x"] * 1000)
        feed.start()
        nonce = await change(owner, 1)
        await seen(feed, lambda: feed.latest.nonce == nonce)
        # A subscription over which nothing comes is not believed for long.
        world.proxies[0].deaf = True
        nonce = await change(owner, 2)
        await seen(feed, lambda: feed.latest.nonce == nonce)
        await feed.stop()

    run(test, programs=True)


@pytest.mark.parametrize("size", [COORDINATOR.itemsize, 1 << 28])
def test_a_notification_that_grows_is_not_taken(run, size, caplog):
    """A few bytes over the subscription become many when they are decompressed."""
    data = base64.b64encode(zstandard.ZstdCompressor().compress(bytes(size))).decode()
    account = {"data": [data, "base64+zstd"], "owner": str(CLOCK), "lamports": 1, "executable": False}
    result = {"context": {"slot": 1}, "value": account}
    served = asyncio.Event()

    async def hostile(socket):
        await socket.recv()
        await socket.send(json.dumps({"jsonrpc": "2.0", "id": 1, "result": 5}))
        params = {"result": result, "subscription": 5}
        await socket.send(json.dumps({"jsonrpc": "2.0", "method": "accountNotification", "params": params}))
        served.set()
        await socket.wait_closed()

    async def test(world):
        async with serve(hostile, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            owner, feed = await following(world, ws=f"ws://127.0.0.1:{port}", poll=3600.0)
            feed.start()
            await served.wait()
            await seen(feed, lambda: feed.subscriptions == (size == COORDINATOR.itemsize))
            assert feed.latest.coordinator == (await owner.run.snapshot()).coordinator
            await feed.stop()

    caplog.set_level("INFO", "psyche_lightning_solana")
    run(test, programs=True)
    assert ("ValueError" in caplog.text) == (size > COORDINATOR.itemsize)


def test_it_stops_while_a_service_leaves_the_end_of_a_connection_open(run):
    closing = asyncio.Event()

    async def rude(reader, writer):
        """Answers the first subscription with nonsense, and its close not at all."""
        if closing.is_set():
            return writer.close()
        protocol = ServerProtocol()
        requests = []
        while data := await reader.read(4096):
            protocol.receive_data(data)
            if not requests and (requests := protocol.events_received()):
                protocol.send_response(protocol.accept(requests[0]))
                protocol.send_text(b"{}")
                writer.write(b"".join(protocol.data_to_send()))
            elif protocol.close_rcvd is not None:
                closing.set()

    async def test(world):
        async with await asyncio.start_server(rude, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            _, feed = await following(world, ws=f"ws://127.0.0.1:{port}")
            feed.start()
            await closing.wait()
            await feed.stop()
            assert feed.subscriptions == 0

    run(test, programs=True)


def test_of_two_services_the_newest_counts_and_nothing_goes_back(run):
    old = {}

    def behind(method, answer):
        if method == "getMultipleAccounts" and len(answer["result"]["value"]) == 3:
            return old.setdefault("answer", copy.deepcopy(answer))
        return answer

    async def test(world):
        owner, feed = await following(world, poll=1.0)
        world.proxies[0].edit(behind)  # it stands still, and says nothing on its subscription
        world.proxies[0].deaf = True
        feed.start()
        await seen(feed, lambda: feed.subscriptions == 2)
        nonces = []
        for number in range(1, 4):
            await change(owner, number)
            await asyncio.sleep(0.2)
            nonces.append(feed.latest.nonce)
        assert nonces == sorted(nonces)
        assert nonces[-1] > nonces[0]
        assert feed.failure is None
        await feed.stop()

    run(test, programs=True, services=2)


def test_a_closed_run_ends_it(run):
    async def test(world):
        owner, feed = await following(world)
        feed.start()
        await seen(feed, lambda: True)
        await owner.pause()
        before = await owner.run.reader.balance(owner.run.wallet.public)
        assert await owner.close() > 800_000_000
        assert await owner.run.reader.balance(owner.run.wallet.public) > before
        news = feed.news()
        while feed.failure is None:
            news.clear()
            await asyncio.wait({asyncio.ensure_future(news.wait())}, timeout=0.2)
        assert feed.failure.code == "Closed"
        await feed.stop()

    run(test, programs=True)


def test_a_chain_that_answered_once_is_awaited(run):
    async def test(world):
        _, feed = await following(world)
        feed._patience = 0.2
        feed.start()
        await seen(feed, lambda: True)
        world.proxies[0].down = True
        await world.proxies[0].cut()
        while feed.away is None:
            await asyncio.sleep(0.05)
        assert "the chain " in feed.away
        await asyncio.sleep(0.5)  # longer than it would wait for a first answer
        assert feed.failure is None
        world.proxies[0].down = False
        while feed.away is not None:
            await asyncio.sleep(0.05)
        await feed.stop()

    run(test, programs=True)


def test_when_nothing_ever_answers_it_gives_up(run):
    async def test(world):
        _, feed = await following(world)
        feed._patience = 0.2
        world.proxies[0].down = True
        await world.proxies[0].cut()
        feed.start()
        news = feed.news()
        while feed.failure is None:
            news.clear()
            await asyncio.wait({asyncio.ensure_future(news.wait())}, timeout=0.2)
        assert feed.failure.code == "Unreachable"
        await feed.stop()

    run(test, programs=True)


def test_rounds_that_were_not_seen_come_from_the_ledger(run, play, player, reached):
    async def test(world):
        owner = await world.owner(total_steps=40, init_min_clients=3)
        clients = [world.node() for _ in range(3)]
        for client in clients:
            await client.request(Join("tcp://127.0.0.1:1", MANIFEST))
        players = [player(client) for client in clients]
        await play(players, lambda state: state.current is not None and state.current.height >= 6)
        watched = await clients[0].request(GetRounds(0, 0))
        await asyncio.sleep(0.2)
        world.chain.advance(3)
        late = world.node(wallet=clients[2].run.wallet)
        made = await late.request(GetRounds(0, 0))
        assert len(made) >= len(watched) > 5
        assert [strip(r) for r in made[: len(watched) - 1]] == [strip(r) for r in watched[:-1]]
        assert await late.request(GetRounds(0, 3)) == made[3:]
        assert late._replayed[0] == 0
        # A ledger that lost something is noticed.
        now = await late._look()
        entries = await late._ledger.entries()
        keys = await owner.run.keys()
        assert replay(now, entries, keys.program, keys.coordinator_account)
        witness = next(i for i, entry in enumerate(entries) if len(entry.calls) > 2 and entry.size > 1000)
        lost = [*entries[:witness], *entries[witness + 6 :]]
        assert replay(now, lost, keys.program, keys.coordinator_account) == []
        assert now.state.phase in (Phase.ROUND_TRAIN, Phase.ROUND_WITNESS)

    run(test, programs=True)


def test_rounds_of_the_last_epoch_come_from_the_ledger(run, play, player, monkeypatch):
    """The epoch ended because too few reported; a warm-up came since, which failed, and another one has begun."""
    monkeypatch.setattr(ledger, "AT_ONCE", 8)  # it stops reading where the epoch before ends

    async def test(world):
        times = {"warmup_time": 60, "max_round_train_time": 60, "round_witness_time": 60, "epoch_time": 7200}
        owner = await world.owner(total_steps=40, init_min_clients=4, global_batch_size_warmup_tokens=500, **times)
        clients = [world.node() for _ in range(4)]
        newcomer = world.node()

        async def join(*those):
            for client in those:
                await client.request(Join("tcp://127.0.0.1:1", MANIFEST))

        async def pass_time(until):
            for _ in range(8):
                state = (await owner.look()).state
                if until(state):
                    return state
                world.chain.advance_seconds(61)
                with contextlib.suppress(CoordinatorError):
                    await newcomer._tick(state.nonce)
            raise AssertionError(state.phase)

        await join(*clients)
        players = [player(client) for client in clients]
        await play(players, lambda state: state.current is not None and state.current.height >= 3)
        await owner.pause()
        await play(players, lambda state: state.phase is Phase.PAUSED)
        await owner.resume()
        await play(players, lambda state: state.epoch == 1 and state.phase.active and state.current.height >= 3)
        await clients[3].request(Withdraw())
        await play(players[:3], lambda state: state.current is not None and state.current.height >= 7)
        await join(newcomer)  # for the next epoch
        state = await pass_time(lambda state: not state.phase.active)
        assert (state.epoch, state.settled, state.phase) == (2, False, Phase.WAITING_FOR_MEMBERS)
        watched = await clients[0].request(GetRounds(1, 0))
        assert [round_.height for round_ in watched] == list(range(state.current.height + 1))
        for way in ("waits", "warms up", "waits again", "warms up again"):
            if way == "warms up":
                await join(clients[0], clients[1], clients[3])
                await pass_time(lambda state: state.phase is Phase.WARMUP)
            elif way == "waits again":
                await clients[3].request(Withdraw())
                await pass_time(lambda state: state.phase is Phase.WAITING_FOR_MEMBERS)
            elif way == "warms up again":
                await join(clients[2])
                await pass_time(lambda state: state.phase is Phase.WARMUP)
            world.chain.advance(3)
            late = world.node(wallet=clients[2].run.wallet)
            made = await late.request(GetRounds(1, 0))
            assert [strip(r) for r in made] == [strip(r) for r in watched], way
            assert await late.request(GetRounds(1, 5)) == made[5:]
            assert len(late._ledger._entries) < len(await Ledger(late.run.reader, late._ledger._key).entries()) - 8
            assert await late.request(GetRounds(2, 0)) == ()
            # Whoever trained has a node key, also if it is not in the epoch that forms.
            watching = late.watch()
            state = await anext(watching)
            nodes = {client.signer: client.node for client in (*state.exited_clients, *state.clients)}
            assert all(nodes[client.signer] == client._node for client in clients), way
            await watching.aclose()

    run(test, programs=True)


def strip(round_):
    place = round_.height, round_.step, round_.seed, round_.data_index, round_.batch_size, round_.clients
    return *place, *((record.proof, record.merkle) for record in round_.witnesses)


MANIFEST = {"run": {"overlap": False, "seed": 1}, "model": {"layers": 2, "name": "x"}}
