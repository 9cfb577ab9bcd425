"""Tests how an ordinary client simulates and looks up transactions over HTTP."""

import pytest
from solana.rpc.api import Client
from solana.rpc.commitment import Confirmed, Finalized, Processed
from solana.rpc.core import RPCException
from solana.rpc.types import TxOpts
from solders.hash import Hash
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.message import Message
from solders.pubkey import Pubkey
from solders.rpc.errors import (
    InvalidParamsMessage,
    UnsupportedTransactionVersionMessage,
)
from solders.rpc.errors import (
    SendTransactionPreflightFailureMessage as PreflightFailure,
)
from solders.signature import Signature
from solders.system_program import ID as SYSTEM_PROGRAM
from solders.transaction import Transaction
from solders.transaction_status import (
    TransactionErrorFieldless,
)

FAST = TxOpts(skip_preflight=True, skip_confirmation=True)
CHECKED = TxOpts(preflight_commitment=Processed)
INSTANT = {"confirmed_lag": 0, "finalized_lag": 0}

# ---------------------------------------------------------------------------------------------------------------------
# Simulating
# ---------------------------------------------------------------------------------------------------------------------


def test_simulating_changes_nothing_and_shows_accounts(play):
    async def test(world):
        payer, target = world.keypair(), Pubkey.new_unique()
        transaction = await world.signed([world.pay(payer, target)], payer)
        simulated = (await world.client.simulate_transaction(transaction, sig_verify=True, commitment=Processed)).value
        assert (simulated.err, simulated.units_consumed) == (None, 150)
        assert simulated.logs[-1].endswith("success")
        addresses = [str(target), str(Pubkey.new_unique())]
        options = {
            "encoding": "base64",
            "commitment": "processed",
            "accounts": {"encoding": "base64", "addresses": addresses},
        }
        value = (await world.result("simulateTransaction", world.b64(transaction), options))["value"]
        assert value["accounts"][0]["lamports"] == 1_000_000
        assert value["accounts"][1] is None
        assert (world.balance(target), world.balance(payer.pubkey())) == (0, 10**10)

    play(test)


def test_simulating_with_another_blockhash(play):
    async def test(world):
        payer = world.keypair()
        stale = world.new_transaction([world.memo("m")], payer)
        simulated = (await world.client.simulate_transaction(stale, commitment=Processed)).value
        assert simulated.err == TransactionErrorFieldless.BlockhashNotFound
        options = {"encoding": "base64", "replaceRecentBlockhash": True, "commitment": "processed"}
        value = (await world.result("simulateTransaction", world.b64(stale), options))["value"]
        assert value["err"] is None
        assert value["replacementBlockhash"] == {
            "blockhash": str(world.chain.blockhash(1)),
            "lastValidBlockHeight": 151,
        }
        legacy = Transaction([payer], Message([world.memo("m")], payer.pubkey()), Hash.default())
        assert (await world.result("simulateTransaction", world.b64(legacy), options))["value"]["err"] is None
        error = await world.refusal("simulateTransaction", world.b64(stale), {**options, "sigVerify": True})
        assert (error["code"], error["message"]) == (-32602, "sigVerify may not be used with replaceRecentBlockhash")

    play(test)


def test_a_payer_who_does_not_exist(play):
    async def test(world):
        nobody = Keypair()
        transaction = await world.signed([world.memo("m")], nobody)
        with pytest.raises(RPCException) as caught:
            await world.client.send_transaction(transaction, CHECKED)
        error = world.refused(caught, PreflightFailure, err=TransactionErrorFieldless.AccountNotFound)
        assert "Attempt to debit an account but found no record of a prior credit." in error.message

    play(test)


# ---------------------------------------------------------------------------------------------------------------------
# Looking up
# ---------------------------------------------------------------------------------------------------------------------


def test_statuses_rise_with_the_slots_and_leave_the_cache(play):
    async def test(world):
        payer = world.keypair()
        transaction = await world.signed([world.memo("m")], payer)
        signature = (await world.client.send_transaction(transaction, CHECKED)).value
        seen = []
        for slots in (0, 2, 30):
            world.chain.advance(slots) if slots else None
            (status,) = (await world.client.get_signature_statuses([signature])).value
            seen.append((str(status.confirmation_status).rpartition(".")[2], status.confirmations))
        assert seen == [("Processed", 0), ("Confirmed", 2), ("Finalized", None)]
        world.chain.advance(300)
        assert (await world.client.get_signature_statuses([signature])).value == [None]
        assert (await world.client.get_signature_statuses([signature], True)).value[0].slot == 1
        error = await world.refusal("getSignatureStatuses", [str(signature)] * 257)
        assert (error["code"], error["message"]) == (-32602, "Too many inputs provided; max 256")

    play(test, confirmed_lag=2, finalized_lag=32)


def test_a_transaction_in_every_encoding(play):
    async def test(world):
        payer, target = world.keypair(), Pubkey.new_unique()
        transaction = await world.signed([world.pay(payer, target), world.memo("hello")], payer)
        signature = (await world.client.send_transaction(transaction, CHECKED)).value
        for encoding in ("json", "jsonParsed", "base58", "base64"):
            shown = (await world.client.get_transaction(signature, encoding, Confirmed, 0)).value
            meta = shown.transaction.meta
            assert (shown.slot, shown.block_time) == (1, 1_700_000_000)
            assert meta.pre_balances[:2] == [10**10, 0]
            assert meta.post_balances[:2] == [10**10 - 1_005_000, 1_000_000]
            assert any("hello" in line for line in meta.log_messages)
            if encoding.startswith("base"):
                assert bytes(shown.transaction.transaction) == bytes(transaction)
            else:
                message = shown.transaction.transaction.message
                keys = [str(getattr(key, "pubkey", key)) for key in message.account_keys]
                assert keys == [str(key) for key in transaction.message.account_keys]
                assert len(message.instructions) == 2
        parsed = await world.result(
            "getTransaction",
            str(signature),
            {"encoding": "jsonParsed", "commitment": "confirmed", "maxSupportedTransactionVersion": 0},
        )
        assert parsed["transaction"]["message"]["accountKeys"][:2] == [
            {"pubkey": str(payer.pubkey()), "signer": True, "writable": True, "source": "transaction"},
            {"pubkey": str(target), "signer": False, "writable": True, "source": "transaction"},
        ]
        with pytest.raises(RPCException) as caught:
            await world.client.get_transaction(signature, "json", Confirmed)
        world.refused(caught, UnsupportedTransactionVersionMessage)
        assert (await world.client.get_transaction(Signature.new_unique(), "json", Confirmed)).value is None
        error = await world.refusal("getTransaction", str(signature), {"commitment": "processed"})
        assert (error["code"], error["message"]) == (-32602, "Method does not support commitment below `confirmed`")

    play(test, **INSTANT)


def test_what_programs_called_by_programs_and_returned_is_shown(play):
    """The associated-token program calls the token program, which returns a size."""

    async def test(world):
        payer, mint = world.keypair(), Keypair()
        await make_mint(world, payer, mint, decimals=6)
        account, create = associated(payer.pubkey(), payer.pubkey(), mint.pubkey())
        transaction = await world.signed([create], payer)
        signature = (await world.client.send_transaction(transaction, CHECKED)).value
        raw = await world.result("getTransaction", str(signature), {"maxSupportedTransactionVersion": 0})
        (inner,) = raw["meta"]["innerInstructions"]
        assert inner["index"] == 0
        assert {call["stackHeight"] for call in inner["instructions"]} == {2}
        assert len(inner["instructions"]) == 4
        (after,) = raw["meta"]["postTokenBalances"]
        assert raw["meta"]["preTokenBalances"] == []
        assert (after["mint"], after["owner"]) == (str(mint.pubkey()), str(payer.pubkey()))
        give = Instruction(
            TOKEN,
            bytes([7]) + (1_500_000).to_bytes(8, "little"),
            [
                AccountMeta(mint.pubkey(), False, True),
                AccountMeta(account, False, True),
                AccountMeta(payer.pubkey(), True, False),
            ],
        )
        await world.client.send_transaction(await world.signed([give], payer), CHECKED)
        amount = (await world.client.get_token_account_balance(account)).value
        assert (amount.amount, amount.decimals, amount.ui_amount_string) == ("1500000", 6, "1.5")
        assert (await world.client.get_token_supply(mint.pubkey())).value.amount == "1500000"
        with pytest.raises(RPCException) as caught:
            await world.client.get_token_account_balance(mint.pubkey())
        assert "not a Token account" in world.refused(caught, InvalidParamsMessage).message

    play(test, **INSTANT)


TOKEN = Pubkey.from_string("TokenkegQfeZyiNwAJbNbGKPFXCWuBvf9Ss623VQ5DA")
ASSOCIATED = Pubkey.from_string("ATokenGPvbdGVxr1b2hvZbsiqW5xWH25efTNsLJA8knL")


async def make_mint(world, payer, mint, decimals):
    from solders.system_program import CreateAccountParams, create_account

    rent = (await world.client.get_minimum_balance_for_rent_exemption(82)).value
    make = create_account(
        CreateAccountParams(from_pubkey=payer.pubkey(), to_pubkey=mint.pubkey(), lamports=rent, space=82, owner=TOKEN)
    )
    begin = Instruction(
        TOKEN, bytes([20, decimals]) + bytes(payer.pubkey()) + b"\0", [AccountMeta(mint.pubkey(), False, True)]
    )
    await world.client.send_transaction(await world.signed([make, begin], payer, mint), CHECKED)


def associated(payer, owner, mint):
    account = Pubkey.find_program_address([bytes(owner), bytes(TOKEN), bytes(mint)], ASSOCIATED)[0]
    metas = [
        AccountMeta(payer, True, True),
        AccountMeta(account, False, True),
        AccountMeta(owner, False, False),
        AccountMeta(mint, False, False),
        AccountMeta(SYSTEM_PROGRAM, False, False),
        AccountMeta(TOKEN, False, False),
    ]
    return account, Instruction(ASSOCIATED, b"\0", metas)


def test_signatures_of_an_address_in_pages(play):
    async def test(world):
        payer, target = world.keypair(), Pubkey.new_unique()
        sent = []
        for number in range(7):
            transaction = await world.signed([world.pay(payer, target, 10**6 + number), world.memo("m")], payer)
            sent.insert(0, (await world.client.send_transaction(transaction, CHECKED)).value)
            world.chain.advance()
        listed = (await world.client.get_signatures_for_address(target, commitment=Confirmed)).value
        assert [one.signature for one in listed] == sent
        assert listed[0].slot == 7
        assert listed[0].memo == "[1] m"
        page = (await world.client.get_signatures_for_address(target, limit=2, commitment=Confirmed)).value
        assert [one.signature for one in page] == sent[:2]
        following = await world.client.get_signatures_for_address(
            target, before=sent[1], until=sent[5], limit=10, commitment=Confirmed
        )
        assert [one.signature for one in following.value] == sent[2:5]
        world.chain.advance(10)
        settled = (await world.client.get_signatures_for_address(target, commitment=Finalized)).value
        assert [one.signature for one in settled] == sent[1:]
        for limit in (0, 1001):
            assert (await world.refusal("getSignaturesForAddress", str(target), {"limit": limit}))["code"] == -32602

    play(test, confirmed_lag=1, finalized_lag=12)


def test_airdrops_are_transactions_of_the_faucet(play):
    async def test(world):
        target = Pubkey.new_unique()
        signatures = [(await world.client.request_airdrop(target, 10**9)).value for _ in range(2)]
        assert len(set(signatures)) == 2
        assert (await world.client.get_balance(target)).value == 2 * 10**9
        shown = (await world.client.get_transaction(signatures[0], "base64", Confirmed, 0)).value
        assert shown.transaction.transaction.message.account_keys[0] == world.chain.faucet.pubkey()
        assert world.balance(world.chain.faucet.pubkey()) == 500_000_000 * 10**9 - 2 * 10**9 - 2 * 5000
        error = await world.refusal("requestAirdrop", str(Pubkey.new_unique()), 1)
        assert (error["code"], "InsufficientFundsForRent" in error["message"]) == (-32603, True)
        assert (await world.refusal("requestAirdrop", str(target), 10**18))["code"] == -32602

    play(test, **INSTANT)


def test_history_is_bounded(play):
    async def test(world):
        payer = world.keypair()
        for number in range(6):
            await world.client.send_transaction(await world.signed([world.memo(str(number))], payer), FAST)
        assert len(world.chain.history) == 3
        assert len((await world.client.get_signatures_for_address(payer.pubkey(), commitment=Confirmed)).value) == 3
        assert world.chain.history.count == 7

    play(test, max_transactions=3, **INSTANT)


def test_the_blocking_client_works_as_well(play):
    async def test(world):
        import asyncio

        def ask():
            client = Client(world.server.url, Processed)
            return client.get_balance(world.chain.faucet.pubkey()).value

        assert await asyncio.get_running_loop().run_in_executor(None, ask) == 500_000_000 * 10**9

    play(test)
