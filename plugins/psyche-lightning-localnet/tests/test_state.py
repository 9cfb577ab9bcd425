"""Tests how an ordinary client reads accounts, slots and time over HTTP."""

import asyncio
import base64
import json

import based58
import httpx
import pytest
import zstandard
from solana.rpc.commitment import Confirmed, Finalized, Processed
from solana.rpc.core import RPCException
from solana.rpc.types import DataSliceOpts, MemcmpOpts, TxOpts
from solders.account import Account
from solders.pubkey import Pubkey
from solders.rpc.errors import BlockNotAvailableMessage, InvalidParamsMessage, MinContextSlotNotReachedMessage
from solders.sysvar import CLOCK

PROGRAM = Pubkey(bytes([7]) * 32)
CHECKED = TxOpts(preflight_commitment=Processed)


def fill(world, count=3, size=300):
    """Store accounts of a program; the data of each begins with its number."""
    keys = [Pubkey(bytes([9, number]) + bytes(30)) for number in range(count)]
    accounts = {
        key: Account(10**9 + number, bytes([number]) * (size + number), PROGRAM) for number, key in enumerate(keys)
    }
    world.chain.store(accounts)
    return keys


# ---------------------------------------------------------------------------------------------------------------------
# Accounts
# ---------------------------------------------------------------------------------------------------------------------


def test_an_account_in_every_encoding(play):
    async def test(world):
        small, large = fill(world, 1, 100)[0], Pubkey.new_unique()
        world.chain.store({large: Account(10**9, bytes(119_160), PROGRAM)})
        for encoding in ("base58", "base64", "base64+zstd", "jsonParsed"):
            account = (await world.client.get_account_info(small, encoding=encoding)).value
            assert (account.lamports, account.data, account.owner) == (10**9, bytes(100), PROGRAM)
        raw = await world.result("getAccountInfo", str(small), {"commitment": "processed"})
        assert raw["value"]["data"] == based58.b58encode(bytes(100)).decode()  # the old encoding is still the default
        assert (raw["value"]["space"], raw["value"]["rentEpoch"]) == (100, 2**64 - 1)
        packed = await world.result(
            "getAccountInfo", str(large), {"encoding": "base64+zstd", "commitment": "processed"}
        )
        data, encoding = packed["value"]["data"]
        assert zstandard.ZstdDecompressor().decompress(base64.b64decode(data)) == bytes(119_160)
        assert (len(data) < 200, encoding) == (True, "base64+zstd")
        assert (await world.client.get_account_info(large, encoding="base64+zstd")).value.data == bytes(119_160)
        error = await world.refusal("getAccountInfo", str(large), {"encoding": "base58", "commitment": "processed"})
        assert (error["code"], error["message"]) == (
            -32600,
            "Encoded binary (base 58) data should be less than 128 bytes, please use Base64 encoding.",
        )
        part = await world.client.get_account_info(large, encoding="base58", data_slice=DataSliceOpts(7, 4))
        assert len(part.value.data) in (4, 7)
        assert (await world.client.get_account_info(Pubkey.new_unique())).value is None

    play(test)


def test_several_accounts_at_once(play):
    async def test(world):
        keys = fill(world)
        accounts = (await world.client.get_multiple_accounts([keys[2], Pubkey.new_unique(), keys[0]])).value
        assert [account and account.lamports for account in accounts] == [10**9 + 2, None, 10**9]
        error = await world.refusal("getMultipleAccounts", [str(keys[0])] * 101)
        assert (error["code"], error["message"]) == (-32602, "Too many inputs provided; max 100")

    play(test)


def test_the_accounts_of_a_program_through_filters(play):
    async def test(world):
        keys = fill(world)
        everything = (await world.client.get_program_accounts(PROGRAM, encoding="base64")).value
        assert [one.pubkey for one in everything] == keys
        assert everything[1].account.data == bytes([1]) * 301
        sized = (await world.client.get_program_accounts(PROGRAM, filters=[302], encoding="base64")).value
        assert [one.pubkey for one in sized] == [keys[2]]
        for given in (
            based58.b58encode(b"\1\1").decode(),
            based58.b58encode(bytes([1]) * 128).decode(),
        ):
            found = (
                await world.client.get_program_accounts(PROGRAM, filters=[MemcmpOpts(5, given)], encoding="base64")
            ).value
            assert [one.pubkey for one in found] == [keys[1]]
        assert (
            await world.client.get_program_accounts(PROGRAM, filters=[301, MemcmpOpts(300, "2")], encoding="base64")
        ).value[0].pubkey == keys[1]
        assert not (
            await world.client.get_program_accounts(PROGRAM, filters=[MemcmpOpts(302, "11")], encoding="base64")
        ).value
        raw = {
            "commitment": "processed",
            "encoding": "base64",
            "withContext": True,
            "dataSlice": {"offset": 0, "length": 0},
        }
        sliced = await world.result("getProgramAccounts", str(PROGRAM), raw)
        assert sliced["context"]["slot"] == 1
        assert [one["account"]["data"] for one in sliced["value"]] == [["", "base64"]] * 3
        coded = {"memcmp": {"offset": 0, "bytes": base64.b64encode(b"\2").decode(), "encoding": "base64"}}
        assert (
            len(
                await world.result(
                    "getProgramAccounts", str(PROGRAM), {**raw, "withContext": False, "filters": [coded]}
                )
            )
            == 1
        )
        for filters in ([{"dataSize": 1}] * 5, [{"memcmp": {"offset": 0, "bytes": "0OIl"}}], [{"what": 1}], [7]):
            assert (await world.refusal("getProgramAccounts", str(PROGRAM), {"filters": filters}))["code"] == -32602

    play(test)


def test_finalized_readers_see_an_older_state(play):
    async def test(world):
        payer, target = world.keypair(), Pubkey.new_unique()
        world.chain.advance(50)
        await world.client.send_transaction(await world.signed([world.pay(payer, target)], payer), CHECKED)
        fill(world)

        async def seen():
            balances = [(await world.client.get_balance(target, level)).value for level in LEVELS]
            listed = [
                len((await world.client.get_program_accounts(PROGRAM, level, encoding="base64")).value)
                for level in LEVELS
            ]
            slots = [(await world.client.get_slot(level)).value for level in LEVELS]
            return [bool(balance) for balance in balances], listed, slots

        assert await seen() == ([True, False, False], [3, 0, 0], [51, 49, 46])
        world.chain.advance(1)
        assert await seen() == ([True, False, False], [3, 0, 0], [52, 50, 47])
        world.chain.advance(1)
        assert await seen() == ([True, True, False], [3, 3, 0], [53, 51, 48])
        await world.client.send_transaction(await world.signed([world.pay(payer, target)], payer), CHECKED)
        world.chain.advance(3)
        balances = [(await world.client.get_balance(target, level)).value for level in LEVELS]
        assert balances == [2 * 10**6, 2 * 10**6, 10**6]

    play(test, confirmed_lag=2, finalized_lag=5)


LEVELS = (Processed, Confirmed, Finalized)


def test_accounts_that_are_built_in(play):
    async def test(world):
        assert (await world.client.get_account_info(Pubkey.from_string("11111111111111111111111111111111"))).value
        world.chain.advance(10)
        clock = (await world.client.get_account_info(CLOCK)).value.data
        assert int.from_bytes(clock[:8], "little") == 11
        assert int.from_bytes(clock[32:40], "little") == 1_700_000_004

    play(test)


# ---------------------------------------------------------------------------------------------------------------------
# Slots and time
# ---------------------------------------------------------------------------------------------------------------------


def test_the_cluster_as_it_presents_itself(play):
    async def test(world):
        client = world.client
        assert await client.is_connected()
        assert (await client.get_version()).value.solana_core == "2.2.0"
        assert str((await client.get_genesis_hash()).value) == "4bxvmof4HXxrfMePhcfmJQohYr8wv65CTs4SayYXfV1Z"
        assert (await client.get_minimum_balance_for_rent_exemption(0)).value == 890_880
        assert (await client.get_minimum_balance_for_rent_exemption(119_160)).value == 830_244_480
        world.chain.advance(432_010)
        info = (await client.get_epoch_info()).value
        assert (info.epoch, info.slot_index, info.absolute_slot, info.block_height) == (1, 11, 432_011, 432_011)
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"{world.server.url}/health")).text == "ok"

    play(test)


def test_the_clock_is_moved_frozen_and_resumed(play):
    async def test(world):
        clock = await world.result("psyche_advanceClock", {"seconds": 3600})
        assert (clock["slot"], clock["unixTimestamp"], clock["running"]) == (9001, 1_700_003_600, False)
        assert (await world.client.get_block_time(9001)).value == 1_700_003_600
        assert (await world.client.get_block_time(1)).value == 1_700_000_000
        assert (await world.result("psyche_advanceClock", {"slots": 5}))["slot"] == 9006
        for wrong in (
            {},
            {"slots": 0},
            {"seconds": -1},
            {"seconds": True},
            {"slots": 1, "seconds": 1},
            3,
            {"slots": 2**50},
        ):
            assert (await world.refusal("psyche_advanceClock", wrong))["code"] == -32602
        await world.result("psyche_resumeClock")
        while (await world.client.get_slot()).value < 9010:
            await asyncio.sleep(0.01)
        assert (await world.result("psyche_freezeClock"))["running"] is False
        slot = (await world.client.get_slot()).value
        await asyncio.sleep(0.1)
        assert (await world.client.get_slot()).value == slot
        with pytest.raises(RPCException) as caught:
            await world.client.get_block_time(slot + 1)
        assert caught.value.args[0] == BlockNotAvailableMessage(f"Block not available for slot {slot + 1}")

    play(test, slot_ms=400)


def test_programs_see_the_slot_and_its_time(play):
    """The time that programs see follows an advance of a year."""

    async def test(world):
        payer = world.keypair()
        world.chain.advance_seconds(365 * 86400)
        await world.client.send_transaction(await world.signed([world.memo("a year later")], payer), CHECKED)
        (record,) = world.chain.history.of(str(payer.pubkey()), until=next(iter(world.chain.history)).signature)
        assert record.time == 1_700_000_000 + 365 * 86400

    play(test)


def test_the_caller_may_ask_for_a_slot_at_least(play):
    async def test(world):
        world.chain.advance(9)
        options = {"commitment": "processed", "minContextSlot": 10}
        assert await world.result("getSlot", options) == 10
        error = await world.refusal("getBalance", str(PROGRAM), {**options, "minContextSlot": 11})
        assert error == {
            "code": -32016,
            "message": "Minimum context slot has not been reached",
            "data": {"contextSlot": 10},
        }
        from solders.rpc.responses import GetBalanceResp

        parsed = GetBalanceResp.from_json(json.dumps({"jsonrpc": "2.0", "id": 1, "error": error}))
        assert isinstance(parsed, MinContextSlotNotReachedMessage)

    play(test)


# ---------------------------------------------------------------------------------------------------------------------
# Requests that are wrong
# ---------------------------------------------------------------------------------------------------------------------


WRONG = [
    ("getBalance", [], -32602),
    ("getBalance", ["not base58 0OIl"], -32602),
    ("getBalance", ["abc"], -32602),
    ("getBalance", [5], -32602),
    ("getBalance", [str(PROGRAM), {"commitment": "yesterday"}], -32602),
    ("getBalance", [str(PROGRAM), 7], -32602),
    ("getBalance", {"by": "name"}, -32602),
    ("getAccountInfo", [str(PROGRAM), {"encoding": "utf-8"}], -32602),
    ("getAccountInfo", [str(PROGRAM), {"dataSlice": {"offset": -1, "length": 1}}], -32602),
    ("getMinimumBalanceForRentExemption", [-1], -32602),
    ("getMinimumBalanceForRentExemption", [2**40], -32602),
    ("getSignatureStatuses", ["abc"], -32602),
    ("sendTransaction", ["!!!", {"encoding": "base64"}], -32602),
    ("sendTransaction", ["AAAA", {"encoding": "base64"}], -32602),
    ("sendTransaction", ["0OIl"], -32602),
    ("sendTransaction", ["abc", {"encoding": "hex"}], -32602),
    ("sendTransaction", ["abc", {"skipPreflight": 1}], -32602),
    ("sendTransaction", [], -32602),
    ("getFeeForMessage", ["AAAA"], -32602),
    ("getBlock", [], -32602),
    ("getBlock", [-1], -32602),
    ("getBlock", [0, {"encoding": "hex"}], -32602),
    ("getBlock", [0, {"commitment": "processed"}], -32602),
    ("getBlock", [0, {"transactionDetails": "most"}], -32602),
    ("getBlock", [0, {"rewards": 1}], -32602),
    ("getBlock", [10**6], -32004),
    ("getBlocks", [0, 5, {"commitment": "processed"}], -32602),
    ("getBlocks", [0, -1], -32602),
    ("getBlocksWithLimit", [0, 500_001], -32602),
    ("getBlocksWithLimit", [0], -32602),
    ("getRecentPerformanceSamples", [721], -32602),
    ("getSlotLeaders", [0, 5001], -32602),
    ("getSlotLeaders", [0, 0], -32602),
    ("getLargestAccounts", [{"filter": "large"}], -32602),
    ("getSupply", [{"excludeNonCirculatingAccountsList": "yes"}], -32602),
    ("getVoteAccounts", [{"votePubkey": "abc"}], -32602),
    ("getTransactionCount", [{"minContextSlot": 10**9}], -32016),
    ("getTokenAccountsByOwner", [str(PROGRAM)], -32602),
    ("getTokenAccountsByOwner", [str(PROGRAM), {}], -32602),
    ("getTokenAccountsByOwner", [str(PROGRAM), {"mint": str(PROGRAM), "programId": str(PROGRAM)}], -32602),
    ("getTokenAccountsByOwner", [str(PROGRAM), {"mint": str(PROGRAM)}], -32602),
    ("getTokenAccountsByOwner", [str(PROGRAM), {"programId": str(PROGRAM)}], -32602),
    ("getTokenAccountsByDelegate", [str(PROGRAM), {"mint": 5}], -32602),
    ("getTokenLargestAccounts", [str(PROGRAM)], -32602),
    ("getTokenLargestAccounts", ["So11111111111111111111111111111111111111113"], -32602),
    ("getTokenSupply", [str(PROGRAM)], -32602),
    ("getTokenAccountBalance", [str(PROGRAM)], -32602),
    ("getLeaderSchedule", [], -32601),
    ("__init__", [], -32601),
    ("_run", [], -32601),
]


def test_wrong_parameters(play):
    async def test(world):
        for method, params, code in WRONG:
            request = {"jsonrpc": "2.0", "id": 7, "method": method, "params": params}
            answer = (await world.client._provider.session.post(world.server.url, json=request)).json()
            assert (answer["id"], answer["error"]["code"]) == (7, code), (method, params, answer)
        with pytest.raises(RPCException) as caught:
            await world.client.get_minimum_balance_for_rent_exemption(2**40)
        assert isinstance(caught.value.args[0], InvalidParamsMessage)

    play(test)


def test_bodies_that_are_no_requests(play):
    async def test(world):
        post = world.client._provider.session.post
        url = world.server.url
        kind = {"Content-Type": "application/json"}
        assert (await post(url, content=b"{", headers=kind)).json()["error"]["code"] == -32700
        assert (await post(url, content=b"[" * 40_000, headers=kind)).json()["error"]["code"] == -32700
        assert (await post(url, content=b"5", headers=kind)).json()["error"]["code"] == -32600
        assert (await post(url, content=b"[]", headers=kind)).json()["error"]["code"] == -32600
        assert (await post(url, content=b'{"id":1,"method":7}', headers=kind)).json()["error"]["code"] == -32600
        assert (await post(url, content=b'"\xff"', headers=kind)).json()["error"]["code"] == -32700
        assert (await post(url, content=b"x" * (50 * 1024 + 1), headers=kind)).status_code == 413
        assert (await post(url, content=b"{}", headers={"Content-Type": "text/plain"})).status_code == 415
        batch = [{"jsonrpc": "2.0", "id": number, "method": "getSlot"} for number in range(3)]
        answers = (await post(url, json=[*batch, {"jsonrpc": "2.0", "method": "getSlot"}])).json()
        assert [one["id"] for one in answers] == [0, 1, 2]
        # Some clients say that a plain body is compressed.
        labelled = {**kind, "Content-Encoding": "gzip"}
        assert (await post(url, content=json.dumps(batch).encode(), headers=labelled)).status_code == 200

    play(test)
