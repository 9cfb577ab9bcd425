import asyncio
import base64
import json
import random

import pytest
from psyche_lightning_solana.client.cluster import Options
from psyche_lightning_solana.client.record import Log
from psyche_lightning_solana.client.rpc import RpcProblem
from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey
from solders.system_program import ID as SYSTEM
from solders.system_program import TransferParams, transfer
from solders.transaction import VersionedTransaction

from psyche_lightning.errors import CoordinatorError

UNITS = 20_000


async def pay(world, sender, target, payment, **given):
    return await sender.send("pay", [payment(sender.wallet, target)], units=UNITS, **given)


def test_a_payment_lands_once_and_is_recorded(run, payment, tmp_path):
    async def test(world):
        log = Log(tmp_path / "log.jsonl")
        sender, target = world.sender(log=log), Pubkey.new_unique()
        receipt = await pay(world, sender, target, payment)
        await sender.close()
        assert world.balance(target) >= 1_000_000
        row = json.loads((tmp_path / "log.jsonl").read_text())
        assert row["signature"] == str(receipt.signature)
        assert (row["instruction"], row["result"], row["landed"], row["tries"]) == ("pay", "ok", True, 1)
        assert 0 < row["units"] <= UNITS
        assert row["fee"] >= 5000
        assert row["slot"] == receipt.slot
        assert 0 < row["size"] <= 1232

    run(test)


def test_limit_and_price_are_always_set_and_within_the_bounds(run, payment):
    async def test(world):
        options = Options(compute_limit=30_000, priority_fee_min=7, priority_fee_max=9)
        sender = world.sender(options=options)
        receipts = [await pay(world, sender, Pubkey.new_unique(), payment) for _ in range(2)]
        for receipt in receipts:
            found = await sender._reader.transaction(receipt.signature)
            transaction = VersionedTransaction.from_bytes(base64.b64decode(found["transaction"][0]))
            limit, price = (bytes(part.data) for part in transaction.message.instructions[:2])
            assert limit[0] == 2
            assert UNITS <= int.from_bytes(limit[1:], "little") <= 30_000
            assert price[0] == 3
            assert 7 <= int.from_bytes(price[1:], "little") <= 9

    run(test)


def test_what_others_pay_decides_between_the_bounds(run, payment):
    paid = {"fees": []}

    def edit(method, answer):
        if method == "getRecentPrioritizationFees":
            answer["result"] = [{"slot": i, "prioritizationFee": fee} for i, fee in enumerate(paid["fees"])]
        return answer

    async def test(world):
        world.proxies[0].edit(edit)
        for fees, expected in (([], 10), ([50] * 4, 50), ([0, 20, 40, 1000], 100), ([1 << 60], 100)):
            paid["fees"] = fees
            sender = world.sender(options=Options(priority_fee_min=10, priority_fee_max=100))
            assert await sender._fees.price([sender.wallet.public]) == expected
        world.proxies[0].always("getRecentPrioritizationFees", "error -32601 no such method")
        sender = world.sender(options=Options(priority_fee_min=10, priority_fee_max=100))
        assert await sender._fees.price([sender.wallet.public]) == 10
        await pay(world, sender, Pubkey.new_unique(), payment)

    run(test)


def test_equal_instructions_are_two_transactions(run):
    async def test(world):
        sender, target = world.sender(), Pubkey.new_unique()
        same = transfer(TransferParams(from_pubkey=sender.wallet.public, to_pubkey=target, lamports=1_000_000))
        receipts = [await sender.send("pay", [same], units=UNITS) for _ in range(3)]
        assert len({receipt.signature for receipt in receipts}) == 3
        assert world.balance(target) == 3_000_000

    run(test)


def test_one_blockhash_serves_many_transactions(run, payment):
    async def test(world):
        sender = world.sender(clock=lambda: 0.0)
        for _ in range(5):
            await pay(world, sender, Pubkey.new_unique(), payment)
        assert world.proxies[0].counts["getLatestBlockhash"] == 1

    run(test)


# A lost answer, a broken line, a service that is down: sent again as the same bytes, it lands once.
@pytest.mark.parametrize(
    "failures", [["lost"] * 3, ["drop", "lost", "drop"], ["hang", "lost", "garbage"], ["drop"] * 3]
)
@pytest.mark.parametrize("services", [1, 2])
def test_a_lost_answer_does_not_pay_twice(run, payment, failures, services):
    async def test(world):
        sender, target = world.sender(), Pubkey.new_unique()
        sender._reader.provider._longest = 0.3
        world.proxies[0].fail("sendTransaction", *failures)
        before = world.balance(sender.wallet.public)
        part = payment(sender.wallet, target)
        receipt = await sender.send("pay", [part], units=UNITS)
        assert receipt.slot > 0
        amount = int.from_bytes(part.data[4:], "little")
        assert world.balance(target) == amount
        assert before - world.balance(sender.wallet.public) < 2 * amount

    run(test, services=services)


def test_an_expired_blockhash_is_replaced_and_nothing_lands_twice(run, payment):
    async def test(world):
        sender, target = world.sender(), Pubkey.new_unique()
        world.proxies[0].always("sendTransaction", "drop")  # nobody knows whether it arrived; it did not
        part = payment(sender.wallet, target)
        task = asyncio.ensure_future(sender.send("pay", [part], units=UNITS))
        while world.proxies[0].counts["getSignatureStatuses"] < 3:
            await asyncio.sleep(0.01)
        assert not task.done()
        assert world.proxies[0].counts["getLatestBlockhash"] == 1
        world.proxies[0].always("sendTransaction", None)
        world.proxies[0].fail("sendTransaction", *["drop"] * 3)  # what is still under way stays lost
        world.chain.advance(400)
        await task
        await sender.close()
        assert world.balance(target) == int.from_bytes(part.data[4:], "little")
        assert sender.log.records[-1].tries >= 1

    run(test)


def test_a_blockhash_that_a_service_does_not_know_is_replaced_at_once(run, payment):
    async def test(world):
        sender, target = world.sender(), Pubkey.new_unique()
        await sender._blockhashes.get()
        world.chain.advance(500)
        await pay(world, sender, target, payment)
        await sender.close()
        assert [(row.result, row.landed, row.tries) for row in sender.log.records] == [
            ("BlockhashNotFound", False, 1),
            ("ok", True, 2),
        ]

    run(test)


def test_time_runs_out_and_the_same_transaction_is_taken_up_again(run, payment):
    async def test(world):
        sender, target = world.sender(patience=0.5), Pubkey.new_unique()
        world.proxies[0].fail("sendTransaction", "lost")
        world.proxies[0].always("sendTransaction", "drop")
        world.proxies[0].always("getSignatureStatuses", "drop")
        part = payment(sender.wallet, target)
        with pytest.raises(CoordinatorError, match="did not land") as caught:
            await sender.send("pay", [part], units=UNITS)
        assert caught.value.retryable
        for method in ("sendTransaction", "getSignatureStatuses"):
            world.proxies[0].always(method, None)
        await sender.send("pay", [part], units=UNITS)
        assert world.balance(target) == int.from_bytes(part.data[4:], "little")

    run(test)


def test_a_refusal_of_the_program_is_final_and_free(run):
    async def test(world):
        sender = world.sender()
        wrong = Instruction(SYSTEM, b"\xff\xff\xff\xff", [AccountMeta(sender.wallet.public, True, True)])
        before = world.balance(sender.wallet.public)
        with pytest.raises(CoordinatorError) as caught:
            await sender.send("nonsense", [wrong], units=UNITS)
        assert not caught.value.retryable
        assert caught.value.code == "InvalidInstructionData"
        assert world.proxies[0].counts["sendTransaction"] == 1
        assert world.balance(sender.wallet.public) == before
        assert [(row.result, row.landed) for row in sender.log.records] == [("InvalidInstructionData", False)]

    run(test)


@pytest.mark.parametrize("lamports", [0, 900_000])
def test_a_wallet_that_cannot_pay_says_so(run, payment, lamports):
    async def test(world):
        sender = world.sender(world.wallet(lamports))
        with pytest.raises(CoordinatorError, match=r"cannot pay.*airdrop") as caught:
            await sender.send("pay", [payment(sender.wallet, Pubkey.new_unique())], units=UNITS)
        assert caught.value.code == "Unfunded"
        assert str(sender.wallet.public) in str(caught.value)

    run(test)


def test_too_large_for_a_transaction(run):
    async def test(world):
        sender = world.sender()
        large = Instruction(SYSTEM, bytes(1200), [AccountMeta(sender.wallet.public, True, True)])
        with pytest.raises(CoordinatorError, match="at most 1232"):
            await sender.send("large", [large])
        assert world.proxies[0].counts["sendTransaction"] == 0

    run(test)


def test_all_services_down_is_an_error_that_passes(run, payment):
    async def test(world):
        sender = world.sender()
        world.proxies[0].down = True
        with pytest.raises(CoordinatorError, match="cannot reach the chain") as caught:
            await pay(world, sender, Pubkey.new_unique(), payment)
        assert caught.value.retryable
        world.proxies[0].down = False
        await pay(world, sender, Pubkey.new_unique(), payment)

    run(test)


def test_under_random_failures_every_payment_lands_exactly_once(run, payment):
    choice = random.Random(7)

    async def test(world):
        sender, target = world.sender(), Pubkey.new_unique()
        sender._reader.provider._longest = 0.2
        parts = [payment(sender.wallet, target) for _ in range(12)]
        kinds = ["drop", "lost", "garbage", "hang", "status 500", "status 429", "error -32005 behind", ""]
        for proxy in world.proxies:
            for method in ("sendTransaction", "getSignatureStatuses", "getEpochInfo", "getLatestBlockhash"):
                proxy.fail(method, *choice.choices(kinds, k=12))

        async def one(part):
            while True:
                try:
                    return await sender.send("pay", [part], units=UNITS)
                except CoordinatorError as error:
                    if not error.retryable:
                        raise

        await asyncio.gather(*map(one, parts))
        assert world.balance(target) == sum(int.from_bytes(part.data[4:], "little") for part in parts)

    run(test, services=2)


def test_problems_tell_whether_a_request_may_have_been_carried_out(run):
    async def test(world):
        for failures, lost in ((["drop"] * 3, True), (["error -32005 x"] * 3, False), (["lost", "status 500"], True)):
            world.proxies[0].always("getBalance", "error -32005 x")
            world.proxies[0].fail("getBalance", *failures)
            with pytest.raises(RpcProblem) as caught:
                await world.reader().balance(Pubkey.new_unique())
            assert caught.value.lost == lost

    run(test)
