import asyncio
import base64
import copy

import pytest
import zstandard
from psyche_lightning_solana.client.cluster import Endpoint
from psyche_lightning_solana.client.ledger import Ledger
from psyche_lightning_solana.client.reader import MAX_ACCOUNT_SIZE
from psyche_lightning_solana.client.rpc import (
    PoolClient,
    PoolProvider,
    RpcProblem,
    custom_code,
    error_name,
    is_retryable,
    unreachable,
)
from solders.pubkey import Pubkey

PASSING = [
    "drop",
    "lost",
    "garbage",
    "empty",
    "wrong",
    "status 500",
    "status 429",
    "status 403",
    "error -32005 Node is behind by 42 slots",
    "error -32016 Minimum context slot has not been reached",
    "error 17 new",
]
FINAL = ["error -32602 Invalid params", "error -32601 Method not found", "error -32600 Invalid request"]


@pytest.mark.parametrize("failure", PASSING)
def test_what_passes_is_tried_again_at_the_same_service(run, failure, caplog):
    async def test(world):
        world.proxies[0].fail("getBalance", failure, failure)
        key = world.wallet(5_000_000).public
        assert await world.reader().balance(key) == 5_000_000
        assert world.proxies[0].counts["getBalance"] == 3
        name = world.endpoints()[0].name
        problems = [(record.levelname, record.getMessage()) for record in caplog.records if name in record.getMessage()]
        assert [level for level, text in problems if text.startswith(f"{name}: ")] == ["DEBUG", "DEBUG"]
        assert len(problems) == 2  # of the only service, whoever asks it tells

    caplog.set_level("DEBUG", "psyche_lightning_solana")
    run(test)


@pytest.mark.parametrize("failure", PASSING)
def test_then_the_next_service_is_asked_and_stays_the_first(run, failure, caplog):
    async def test(world):
        first, second = world.proxies
        first.always("getBalance", failure)
        reader = world.reader()
        assert await reader.balance(Pubkey.new_unique()) == 0
        assert (first.counts["getBalance"], second.counts["getBalance"]) == (3, 1)
        await reader.balance(Pubkey.new_unique())
        assert (first.counts["getBalance"], second.counts["getBalance"]) == (3, 2)
        told = [record.getMessage() for record in caplog.records if record.name.endswith(".rpc")]
        if failure.startswith("error"):  # it answers
            assert told == []
        else:
            assert [text.rpartition(": ")[0] for text in told] == [f"cannot reach the RPC service {first.url}"]

    caplog.set_level("INFO", "psyche_lightning_solana")
    run(test, services=2)


@pytest.mark.parametrize("failure", FINAL)
def test_what_is_wrong_with_the_request_is_final(run, failure):
    async def test(world):
        world.proxies[0].fail("getBalance", failure)
        with pytest.raises(RpcProblem) as caught:
            await world.reader().balance(Pubkey.new_unique())
        assert not caught.value.retryable
        assert caught.value.code == int(failure.split()[1])
        assert world.proxies[1].counts["getBalance"] == 0

    run(test, services=2)


def test_a_service_that_never_answers_is_left(run):
    async def test(world):
        world.proxies[0].always("*", "hang")
        reader = world.reader(timeout=0.1)
        assert await reader.balance(Pubkey.new_unique()) == 0
        assert world.proxies[0].counts["getBalance"] == 3

    run(test, services=2)


def test_when_all_fail_the_error_says_where_and_hides_keys(run):
    async def test(world):
        world.proxies[0].down = True
        endpoint = Endpoint(world.proxies[0].url + "/v2/SECRET?api-key=SECRET", "")
        provider = PoolProvider([endpoint], sleep=lambda _: asyncio.sleep(0))
        with pytest.raises(RpcProblem) as caught:
            await PoolClient(provider, "confirmed").get_balance(Pubkey.new_unique())
        error = unreachable(caught.value, "the balance", "localnet")
        assert error.retryable
        assert error.code == "Unreachable"
        assert world.proxies[0].url in str(error)
        assert "SECRET" not in str(error)
        assert "SECRET" not in repr(caught.value)
        assert caught.value.lost

    run(test)


def test_nothing_listens():
    async def main():
        provider = PoolProvider([Endpoint("http://127.0.0.1:9", "ws://127.0.0.1:9")], sleep=lambda _: asyncio.sleep(0))
        with pytest.raises(RpcProblem, match="no connection"):
            await provider.call("getHealth", [])
        await provider.close()

    asyncio.run(main())


def test_an_ordinary_client_goes_through_the_pool(run):
    async def test(world):
        world.proxies[0].always("*", "status 503")
        client = PoolClient(world.provider(), "confirmed")
        assert (await client.get_slot()).value >= 0
        assert (await client.is_connected()) in (True, False)
        assert world.proxies[1].counts["getSlot"] == 1

    run(test, services=2)


def test_accounts_are_read_together_and_in_any_number(run):
    async def test(world):
        keys = [world.wallet(1_000_000 + i).public for i in range(3)]
        unknown = Pubkey.new_unique()
        slot, found = await world.reader().accounts([keys[0], unknown])
        assert slot > 0
        assert (found[0].lamports, found[1]) == (1_000_000, None)
        many = await world.reader().many([*keys, *[unknown] * 150])
        assert [account.lamports for account in many[:3]] == [1_000_000, 1_000_001, 1_000_002]
        assert len(many) == 153
        assert set(many[3:]) == {None}

    run(test)


def test_a_service_that_is_behind_does_not_count(run):
    async def test(world):
        slot = world.chain.slot
        with pytest.raises(RpcProblem) as caught:
            await world.reader().accounts([Pubkey.new_unique()], min_slot=slot + 10_000)
        assert caught.value.code == -32016
        assert caught.value.retryable

    run(test)


@pytest.mark.parametrize(
    ("error", "name", "custom", "retryable"),
    [
        ("BlockhashNotFound", "BlockhashNotFound", None, True),
        ({"InstructionError": [2, {"Custom": 6011}]}, "Custom 6011", 6011, False),
        ({"InstructionError": [0, "MissingRequiredSignature"]}, "MissingRequiredSignature", None, False),
        ({"InsufficientFundsForRent": {"account_index": 0}}, "InsufficientFundsForRent", None, False),
        ("AccountInUse", "AccountInUse", None, True),
        (None, "an unknown error", None, False),
        ({"a": 1, "b": 2}, "an unknown error", None, False),
    ],
)
def test_errors_of_transactions(error, name, custom, retryable):
    assert (error_name(error), custom_code(error), is_retryable(error)) == (name, custom, retryable)


def grows(size):
    """A few bytes that become ``size`` when they are decompressed."""
    return base64.b64encode(zstandard.ZstdCompressor().compress(bytes(size))).decode()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data", [grows(MAX_ACCOUNT_SIZE + 1), "base64+zstd"]),
        ("data", ["AAAA", "base64+zstd"]),
        ("data", ["A", "base64"]),
        ("data", ["AAAA", "base58"]),
        ("data", "AAAA"),
        ("data", None),
        ("owner", "x"),
        ("lamports", "many"),
    ],
)
def test_an_account_that_no_chain_has_is_refused_and_the_next_service_asked(run, field, value):
    async def test(world):
        wallet = world.wallet(5_000_000)

        def spoil(method, answer):
            answer = copy.deepcopy(answer)
            answer["result"]["value"][0][field] = value
            return answer

        world.proxies[0].edit(spoil)
        found = await world.reader().account(wallet.public)
        assert (found.lamports, found.data) == (5_000_000, b"")
        assert world.proxies[1].counts["getMultipleAccounts"] == 1
        world.proxies[1].edit(spoil)
        with pytest.raises(RpcProblem, match="does not fit this request"):
            await world.reader().account(wallet.public)

    run(test, services=2)


@pytest.mark.parametrize("slot", [-1, 1 << 63, 1.5, "7", None])
def test_a_slot_that_no_chain_has_is_refused(run, slot):
    async def test(world):
        def spoil(method, answer):
            return {**answer, "result": {**answer["result"], "context": {"slot": slot}}}

        world.proxies[0].edit(spoil)
        with pytest.raises(RpcProblem, match="does not fit this request"):
            await world.reader().account(Pubkey.new_unique())

    run(test)


@pytest.mark.parametrize(
    ("method", "spoilt"),
    [
        ("getSignaturesForAddress", {"signature": "x"}),
        ("getSignaturesForAddress", {"signature": 5}),
        ("getSignaturesForAddress", {"blockTime": "today"}),
        ("getTransaction", {"slot": -1}),
        ("getTransaction", {"slot": 1 << 64}),
        ("getTransaction", {"blockTime": 1 << 64}),
        ("getTransaction", {"blockTime": 1.5}),
        ("getTransaction", {"transaction": ["AAAA", "base64"]}),
        ("getTransaction", {"meta": {"err": None}}),
    ],
)
def test_a_ledger_that_no_chain_has_is_refused(run, method, spoilt):
    async def test(world):
        wallet = world.wallet(5_000_000)
        assert [entry.error for entry in await Ledger(world.reader(), wallet.public).entries()] == [None]

        def spoil(asked, answer):
            answer, result = copy.deepcopy(answer), answer["result"]
            if asked == method:
                answer["result"] = {**result, **spoilt} if method == "getTransaction" else [{**result[0], **spoilt}]
            return answer

        world.proxies[0].edit(spoil)
        with pytest.raises(RpcProblem, match="malformed"):
            await Ledger(world.reader(), wallet.public).entries()

    run(test)
