"""Blocks, and what explorers ask about the cluster."""

import json

from solana.rpc.commitment import Confirmed, Processed
from solana.rpc.types import TxOpts
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.message import Message
from solders.pubkey import Pubkey
from solders.rpc.responses import GetBlockResp
from solders.transaction import Transaction
from websockets.asyncio.client import connect

FAST = TxOpts(skip_preflight=True, skip_confirmation=True)
NOWHERE = "11111111111111111111111111111111"


def legacy(world, instructions, payer):
    message = Message(instructions, payer.pubkey())
    return Transaction([payer], message, world.chain.blockhash(world.chain.slot))


def failing(payer):
    """An instruction that the memo program refuses, since an account does not sign."""
    from psyche_lightning_localnet.chain import MEMO

    return Instruction(MEMO, b"\xff", [AccountMeta(payer.pubkey(), True, False)])


def test_a_block_in_every_form(play):
    async def test(world):
        payer, target = world.keypair(), Pubkey.new_unique()
        world.chain.advance(2)
        first = legacy(world, [world.pay(payer, target)], payer)
        await world.client.send_transaction(first, FAST)
        second = await world.signed([world.pay(payer, target, 7)], payer)
        await world.client.send_transaction(second, FAST)
        world.chain.advance()
        names = [str(first.signatures[0]), str(second.signatures[0])]
        newest = {"maxSupportedTransactionVersion": 0, "commitment": "confirmed"}
        block = await world.result("getBlock", 3, newest)
        assert {name: block[name] for name in block if name != "transactions"} == {
            "blockhash": str(world.chain.blockhash(3)),
            "previousBlockhash": str(world.chain.blockhash(2)),
            "parentSlot": 2,
            "blockHeight": 3,
            "blockTime": 1_700_000_000,
            "rewards": [],
        }
        assert [one["transaction"]["signatures"][0] for one in block["transactions"]] == names
        assert [one["version"] for one in block["transactions"]] == ["legacy", 0]
        alone = await world.result("getTransaction", names[1], newest)
        assert block["transactions"][1] == {name: alone[name] for name in ("transaction", "meta", "version")}
        for encoding in ("json", "jsonParsed", "base58", "base64"):
            raw = await world.call("getBlock", 3, {**newest, "encoding": encoding})
            typed = GetBlockResp.from_json(json.dumps(raw)).value
            assert (typed.parent_slot, len(typed.transactions)) == (2, 2)
        only = await world.result("getBlock", 3, {**newest, "transactionDetails": "signatures", "rewards": False})
        assert only["signatures"] == names
        assert not {"transactions", "rewards"} & only.keys()
        accounts = await world.result("getBlock", 3, {**newest, "transactionDetails": "accounts"})
        shown = accounts["transactions"][0]
        assert shown["transaction"]["accountKeys"][0] == {
            "pubkey": str(payer.pubkey()),
            "signer": True,
            "writable": True,
            "source": "transaction",
        }
        assert shown["meta"]["postBalances"][1] == 1_000_000
        assert "logMessages" not in shown["meta"]
        bare = await world.result("getBlock", 3, {**newest, "transactionDetails": "none"})
        assert not {"transactions", "signatures"} & bare.keys()
        for details in ("full", "accounts"):
            error = await world.refusal("getBlock", 3, {"commitment": "confirmed", "transactionDetails": details})
            assert error["code"] == -32015
        # Empty blocks, the first one, and an airdrop's, which clients without newer versions can read.
        assert (await world.result("getBlock", 2, newest))["transactions"] == []
        genesis = await world.result("getBlock", 0, newest)
        assert (genesis["parentSlot"], genesis["previousBlockhash"]) == (0, NOWHERE)
        assert len((await world.result("getBlock", 1, {"commitment": "confirmed"}))["transactions"]) == 1
        assert (await world.refusal("getBlock", 3))["code"] == -32004  # not finalized
        error = await world.refusal("getBlock", 4, newest)
        assert (error["code"], error["message"]) == (-32004, "Block not available for slot 4")

    play(test, confirmed_lag=1, finalized_lag=2)


def test_blocks_that_were_forgotten(play):
    async def test(world):
        payer = world.keypair()
        for number in range(6):
            world.chain.advance()
            await world.client.send_transaction(await world.signed([world.memo(str(number))], payer), FAST)
        settled = {"commitment": "confirmed"}
        assert await world.result("getFirstAvailableBlock") == await world.result("minimumLedgerSlot") == 5 + 1
        error = await world.refusal("getBlock", 5, settled)
        assert error == {
            "code": -32001,
            "message": "Block 5 cleaned up, does not exist on node. First available block: 6",
        }
        assert await world.result("getBlocks", 2, 99, settled) == [6, 7]
        assert await world.result("getBlocks", 2, settled) == [6, 7]
        assert await world.result("getBlocks", 7, None, settled) == [7]
        assert await world.result("getBlocks", 7, 6, settled) == []
        assert await world.result("getBlocksWithLimit", 2, 1, settled) == [6]
        assert await world.result("getTransactionCount", settled) == 7
        world.chain.advance(500_010)
        error = await world.refusal("getBlocks", 2, settled)
        assert (error["code"], error["message"]) == (-32602, "Slot range too large; max 500000")

    play(test, max_transactions=3, confirmed_lag=0, finalized_lag=0)


def test_the_transactions_are_counted_at_each_commitment(play):
    async def test(world):
        payer = world.keypair()
        for number in range(3):
            world.chain.advance()
            await world.client.send_transaction(await world.signed([world.memo(str(number))], payer), FAST)
        levels = ("processed", "confirmed", "finalized")
        counts = [await world.result("getTransactionCount", {"commitment": level}) for level in levels]
        assert counts == [4, 3, 2]
        info = [await world.result("getEpochInfo", {"commitment": level}) for level in levels]
        assert [one["transactionCount"] for one in info] == counts

    play(test, confirmed_lag=1, finalized_lag=2)


def test_the_cluster_for_explorers(play):
    async def test(world):
        keypairs = [world.keypair(10**9 * (number + 1)) for number in range(25)]
        client = world.client
        supply = (await client.get_supply(Confirmed)).value
        given = sum(range(1, 26)) * 10**9
        assert (supply.circulating, supply.total) == (given, 500_000_000 * 10**9 - 25 * 5000)
        assert supply.non_circulating_accounts == [world.chain.faucet.pubkey()]
        hidden = await world.result("getSupply", {"excludeNonCirculatingAccountsList": True, "commitment": "confirmed"})
        assert hidden["value"]["nonCirculatingAccounts"] == []
        rich = (await world.result("getLargestAccounts", {"filter": "circulating"}))["value"]
        assert [one["lamports"] for one in rich] == [10**9 * number for number in range(25, 5, -1)]
        assert rich[0]["address"] == str(keypairs[-1].pubkey())
        (faucet,) = (await world.result("getLargestAccounts", {"filter": "nonCirculating"}))["value"]
        assert faucet["lamports"] == supply.non_circulating
        schedule = (await client.get_epoch_schedule()).value
        assert (schedule.slots_per_epoch, schedule.warmup, schedule.first_normal_slot) == (432_000, False, 0)
        votes = (await client.get_vote_accounts()).value
        assert (votes.current, votes.delinquent) == ([], [])
        (node,) = await world.result("getClusterNodes")
        assert f"http://{node['rpc']}" == world.server.url
        assert f"ws://{node['pubsub']}" == world.server.ws_url
        assert node["version"] == (await client.get_version()).value.solana_core
        assert str((await client.get_identity()).value.identity) == node["pubkey"]
        assert str((await client.get_slot_leader()).value) == node["pubkey"]
        assert await world.result("getSlotLeaders", 0, 3) == [node["pubkey"]] * 3
        assert (await client.get_first_available_block()).value == 0
        assert (await client.get_transaction_count(Confirmed)).value == 25

    play(test, confirmed_lag=0, finalized_lag=0)


def test_samples_of_the_last_minutes(play):
    async def test(world):
        payer = world.keypair()
        assert await world.result("getRecentPerformanceSamples") == []  # no minute has passed
        world.chain.advance(149)
        await world.client.send_transaction(await world.signed([world.memo("last")], payer), FAST)
        world.chain.advance()
        for number in range(2):
            await world.client.send_transaction(await world.signed([world.memo(str(number))], payer), FAST)
        world.chain.advance(310)
        samples = (await world.client.get_recent_performance_samples()).value
        assert [(one.slot, one.num_transactions) for one in samples] == [(450, 0), (300, 2), (150, 2)]
        assert {(one.num_slots, one.sample_period_secs) for one in samples} == {(150, 60)}
        assert [one.slot for one in (await world.client.get_recent_performance_samples(1)).value] == [450]
        assert await world.result("getRecentPerformanceSamples", 0) == []

    play(test)


def test_updates_of_slots(play):
    async def test(world):
        payer = world.keypair()
        async with connect(world.server.ws_url) as socket:

            async def ask(method, *params):
                await socket.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": list(params)}))
                return json.loads(await socket.recv())["result"]

            number = await ask("slotsUpdatesSubscribe")
            poor = legacy(world, [failing(payer)], payer)
            await world.client.send_transaction(poor, FAST)
            world.chain.advance(2)
            told = [json.loads(await socket.recv()) for _ in range(9)]
            assert {one["method"] for one in told} == {"slotsUpdatesNotification"}
            assert {one["params"]["subscription"] for one in told} == {number}
            updates = [one["params"]["result"] for one in told]
            assert {update.pop("timestamp") for update in updates} == {world.chain.clock.unix_ms()}
            idle = dict.fromkeys(("numTransactionEntries", "numSuccessfulTransactions", "numFailedTransactions"), 0)
            assert updates == [
                {"type": "completed", "slot": 1},
                {
                    "type": "frozen",
                    "slot": 1,
                    "stats": {
                        "numTransactionEntries": 2,
                        "numSuccessfulTransactions": 1,
                        "numFailedTransactions": 1,
                        "maxTransactionsPerEntry": 1,
                    },
                },
                {"type": "createdBank", "slot": 2, "parent": 1},
                {"type": "optimisticConfirmation", "slot": 1},
                {"type": "completed", "slot": 2},
                {"type": "frozen", "slot": 2, "stats": {**idle, "maxTransactionsPerEntry": 0}},
                {"type": "createdBank", "slot": 3, "parent": 2},
                {"type": "optimisticConfirmation", "slot": 2},
                {"type": "root", "slot": 1},
            ]
            assert await ask("slotsUpdatesUnsubscribe", number) is True

    play(test, confirmed_lag=1, finalized_lag=2)


def test_a_client_of_older_transactions_reads_an_airdrop(play):
    async def test(world):
        signature = (await world.client.request_airdrop(Keypair().pubkey(), 10**9, Processed)).value
        shown = await world.result("getTransaction", str(signature), {"commitment": "confirmed"})
        assert "version" not in shown

    play(test, confirmed_lag=0, finalized_lag=0)
