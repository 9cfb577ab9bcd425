"""Tests subscriptions with the websocket API of an ordinary client."""

import asyncio
import base64
import json

import pytest
from psyche_lightning_localnet import server as serving
from solana.rpc.commitment import Confirmed, Finalized, Processed
from solana.rpc.types import MemcmpOpts, TxOpts
from solana.rpc.websocket_api import SubscriptionError, connect
from solders.account import Account
from solders.pubkey import Pubkey
from solders.rpc.config import RpcTransactionLogsFilter, RpcTransactionLogsFilterMentions
from solders.rpc.responses import (
    AccountNotification,
    LogsNotification,
    ProgramNotification,
    RootNotification,
    SignatureNotification,
    SlotNotification,
    SubscriptionResult,
)
from solders.transaction_status import TransactionErrorInstructionError

CHECKED = TxOpts(preflight_commitment=Processed)
PROGRAM = Pubkey(bytes([7]) * 32)


async def receive(socket):
    (message,) = await asyncio.wait_for(socket.recv(), 10)
    return message


async def receive_raw(socket):
    """Receive a message without the client's own processing."""
    return json.loads(await asyncio.wait_for(super(type(socket), socket).recv(), 10))


async def nothing(socket):
    """Check that no notification came: the answer to a new request arrives first."""
    await socket.root_subscribe()
    answer = await receive(socket)
    assert isinstance(answer, SubscriptionResult)
    await socket.root_unsubscribe(answer.result)
    await receive(socket)


def test_an_account_at_each_commitment(play):
    async def test(world):
        payer, target = world.keypair(), Pubkey.new_unique()
        async with connect(world.server.ws_url) as socket:
            numbers = {}
            for level in (Processed, Confirmed, Finalized):
                await socket.account_subscribe(target, level, "base64")
                numbers[(await receive(socket)).result] = level
            first = world.chain.slot
            await world.client.send_transaction(await world.signed([world.pay(payer, target)], payer), CHECKED)
            seen = await receive(socket)
            assert isinstance(seen, AccountNotification)
            assert (numbers[seen.subscription], seen.result.value.lamports) == (Processed, 1_000_000)
            assert seen.result.context.slot == first
            await nothing(socket)
            world.chain.advance(2)
            await world.client.send_transaction(await world.signed([world.pay(payer, target)], payer), CHECKED)
            confirmed, newest = [await receive(socket) for _ in range(2)]
            assert (numbers[confirmed.subscription], confirmed.result.value.lamports) == (Confirmed, 1_000_000)
            assert (numbers[newest.subscription], newest.result.value.lamports) == (Processed, 2_000_000)
            world.chain.advance(100)  # at once; the client still gets each state in order
            told = [await receive(socket) for _ in range(3)]
            assert [(numbers[one.subscription], one.result.value.lamports) for one in told] == [
                (Confirmed, 2_000_000),
                (Finalized, 1_000_000),
                (Finalized, 2_000_000),
            ]
            assert [one.result.context.slot for one in told] == [first + 2, first, first + 2]
            (first_number, *_) = numbers
            await socket.account_unsubscribe(first_number)
            await receive(socket)
            await world.client.send_transaction(await world.signed([world.pay(payer, target)], payer), CHECKED)
            await nothing(socket)

    play(test, confirmed_lag=2, finalized_lag=5)


def test_an_account_that_is_emptied(play):
    async def test(world):
        payer, target = world.keypair(), world.keypair()
        async with connect(world.server.ws_url) as socket:
            await socket.account_subscribe(target.pubkey(), Processed, "base64")
            await receive(socket)
            everything = world.balance(target.pubkey())
            back = world.pay(target, payer.pubkey(), everything)
            await world.client.send_transaction(await world.signed([back], payer, target), CHECKED)
            value = (await receive(socket)).result.value
            assert (value.lamports, value.data, value.owner) == (0, b"", Pubkey.default())

    play(test)


def test_the_accounts_of_a_program_through_filters(play):
    """The filters select accounts of the system program without data, which are all of its accounts."""

    async def test(world):
        system = Pubkey.default()
        payer, target = world.keypair(), Pubkey.new_unique()
        async with connect(world.server.ws_url) as socket:
            await socket.program_subscribe(system, Processed, "base64", filters=[0])
            matching = (await receive(socket)).result
            await socket.program_subscribe(system, Processed, "base64", filters=[1])
            await receive(socket)
            await socket.program_subscribe(system, Processed, "base64", filters=[MemcmpOpts(0, "2")])
            await receive(socket)
            await world.client.send_transaction(await world.signed([world.pay(payer, target)], payer), CHECKED)
            told = [await receive(socket) for _ in range(2)]
            assert all(isinstance(one, ProgramNotification) and one.subscription == matching for one in told)
            assert {one.result.value.pubkey for one in told} == {payer.pubkey(), target}
            await nothing(socket)

    play(test)


def test_logs_of_all_and_of_those_that_mention_an_address(play):
    async def test(world):
        payer, other = world.keypair(), world.keypair()
        async with connect(world.server.ws_url) as socket:
            await socket.logs_subscribe(RpcTransactionLogsFilter.All, Processed)
            everything = (await receive(socket)).result
            await socket.logs_subscribe(RpcTransactionLogsFilterMentions(payer.pubkey()), Processed)
            mentioned = (await receive(socket)).result
            sent = await world.signed([world.memo("hello")], payer)
            await world.client.send_transaction(sent, CHECKED)
            told = [await receive(socket) for _ in range(2)]
            assert {one.subscription for one in told} == {everything, mentioned}
            for one in told:
                assert isinstance(one, LogsNotification)
                assert one.result.value.signature == sent.signatures[0]
                assert 'Program log: Memo (len 5): "hello"' in one.result.value.logs
            failing = await world.signed([world.memo(b"\xff")], other)
            await world.client.send_transaction(failing, TxOpts(skip_preflight=True))
            (one,) = [await receive(socket)]
            assert (one.subscription, type(one.result.value.err)) == (everything, TransactionErrorInstructionError)
            await nothing(socket)

    play(test)


def test_a_signature_once_whether_it_is_there_already_or_not(play):
    async def test(world):
        payer = world.keypair()
        async with connect(world.server.ws_url) as socket:
            sent = await world.signed([world.memo("m")], payer)
            await socket.signature_subscribe(sent.signatures[0], Confirmed)
            number = (await receive(socket)).result
            await world.client.send_transaction(sent, CHECKED)
            await nothing(socket)
            world.chain.advance(1)
            told = await receive(socket)
            assert isinstance(told, SignatureNotification)
            assert (told.subscription, told.result.value.err) == (number, None)
            await socket.signature_subscribe(sent.signatures[0], Processed)
            number = (await receive(socket)).result
            assert (await receive(socket)).subscription == number
            world.chain.advance(5)
            await nothing(socket)  # each subscription has ended with its notification

    play(test)


def test_a_signature_on_arrival(play):
    async def test(world):
        payer = world.keypair()
        sent = await world.signed([world.memo("m")], payer)
        async with connect(world.server.ws_url) as socket:
            options = {"commitment": "confirmed", "enableReceivedNotification": True}
            request = {"id": 1, "method": "signatureSubscribe", "params": [str(sent.signatures[0]), options]}
            await socket.send(json.dumps({"jsonrpc": "2.0", **request}))
            await receive_raw(socket)
            await world.client.send_transaction(sent, CHECKED)
            world.chain.advance(1)
            raw = [await receive_raw(socket) for _ in range(2)]
            assert [one["params"]["result"]["value"] for one in raw] == ["receivedSignature", {"err": None}]

    play(test)


def test_slots_and_roots(play):
    async def test(world):
        async with connect(world.server.ws_url) as socket:
            await socket.slot_subscribe()
            await receive(socket)
            world.chain.advance(2)
            slots = [await receive(socket) for _ in range(2)]
            assert all(isinstance(one, SlotNotification) for one in slots)
            assert [(one.result.parent, one.result.slot, one.result.root) for one in slots] == [(1, 2, 0), (2, 3, 0)]
            await socket.root_subscribe()
            await receive(socket)
            world.chain.advance(2)
            kinds = [await receive(socket) for _ in range(3)]
            assert [type(one) for one in kinds] == [SlotNotification, SlotNotification, RootNotification]
            assert kinds[2].result == 1

    play(test, finalized_lag=4)


def test_large_accounts_as_they_are_asked_for(play):
    async def test(world):
        key = Pubkey.new_unique()
        payer = world.keypair()
        async with connect(world.server.ws_url) as socket:
            for encoding in ("base64", "base64+zstd"):
                await socket.account_subscribe(key, Processed, encoding)
                await receive(socket)
            world.chain.store({key: Account(10**10, bytes(119_160), Pubkey.default())})
            await world.client.send_transaction(await world.signed([world.pay(payer, key)], payer), CHECKED)
            for _ in range(2):
                value = (await receive(socket)).result.value
                assert (value.data, value.lamports) == (bytes(119_160), 10**10 + 10**6)
            await socket.send(
                json.dumps(
                    {
                        "jsonrpc": "2.0",
                        "id": 1,
                        "method": "accountSubscribe",
                        "params": [str(key), {"commitment": "processed"}],
                    }
                )
            )
            await receive_raw(socket)
            await world.client.send_transaction(await world.signed([world.pay(payer, key, 5)], payer), CHECKED)
            raw = [await receive_raw(socket) for _ in range(3)]
            data = [one["params"]["result"]["value"]["data"] for one in raw]
            assert data[2] == "error: data too large for bs58 encoding"
            assert base64.b64decode(data[0][0]) == bytes(119_160)

    play(test)


def test_what_is_refused(play):
    async def test(world):
        async with connect(world.server.ws_url) as socket:

            async def ask(method, *params):
                await socket.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": list(params)}))
                return (await receive_raw(socket))["error"]["code"]

            assert await ask("accountSubscribe", "no address") == -32602
            assert await ask("accountSubscribe") == -32602
            assert await ask("accountSubscribe", str(PROGRAM), {"commitment": "x"}) == -32602
            assert await ask("programSubscribe", str(PROGRAM), {"filters": [{}]}) == -32602
            assert await ask("logsSubscribe", {"mentions": [str(PROGRAM)] * 2}) == -32602
            assert await ask("logsSubscribe", "some") == -32602
            assert await ask("accountUnsubscribe", 7) == -32602
            assert await ask("blockSubscribe", "all") == -32601
            assert await ask("getSlot") == -32601
            await socket.send("{")
            assert (await receive_raw(socket))["error"]["code"] == -32700

    play(test)


def test_too_many_subscriptions(play):
    async def test(world):
        async with connect(world.server.ws_url) as socket:
            for _ in range(1024):
                await socket.slot_subscribe()
                await receive(socket)
            await socket.slot_subscribe()
            with pytest.raises(SubscriptionError):
                await receive(socket)

    play(test)


def test_whoever_does_not_read_is_disconnected_and_others_are_not(play, monkeypatch):
    monkeypatch.setattr(serving, "MAX_WAITING", 200_000)

    async def test(world):
        key, payer = Pubkey.new_unique(), world.keypair()
        world.chain.store({key: Account(10**10, bytes(100_000), Pubkey.default())})
        async with (
            connect(world.server.ws_url, max_queue=1, read_limit=1024, max_size=None) as slow,
            connect(world.server.ws_url) as quick,
        ):
            await slow.account_subscribe(key, Processed, "base64")
            await receive(slow)
            await quick.slot_subscribe()
            await receive(quick)
            for number in range(2000):  # more than the buffers of both sides hold
                world.chain.submit(world.chain.sign([world.pay(payer, key, number)], payer))
                await asyncio.sleep(0)
                if len(world.server._hub.listeners) == 1:
                    break
            assert len(world.server._hub.listeners) == 1
            world.chain.advance()
            assert isinstance(await receive(quick), SlotNotification)

    play(test)
