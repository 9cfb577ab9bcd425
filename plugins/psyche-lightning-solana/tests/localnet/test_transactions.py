"""Sending, simulating and looking up transactions, over HTTP with the ordinary client."""

import base64

import based58
import pytest
from solana.rpc.api import Client
from solana.rpc.commitment import Confirmed, Finalized, Processed
from solana.rpc.core import RPCException, TransactionExpiredBlockheightExceededError
from solana.rpc.types import TxOpts
from solders.compute_budget import set_compute_unit_limit, set_compute_unit_price
from solders.hash import Hash
from solders.instruction import AccountMeta, CompiledInstruction, Instruction
from solders.keypair import Keypair
from solders.message import Message, MessageV0
from solders.pubkey import Pubkey
from solders.rpc.errors import (
    InvalidParamsMessage,
    NodeUnhealthyMessage,
    RpcCustomErrorFieldless,
    SendTransactionPreflightFailureMessage,
    UnsupportedTransactionVersionMessage,
)
from solders.signature import Signature
from solders.system_program import ID as SYSTEM_PROGRAM
from solders.transaction import Transaction, VersionedTransaction
from solders.transaction_status import (
    InstructionErrorCustom,
    TransactionErrorFieldless,
    TransactionErrorInstructionError,
    TransactionErrorInsufficientFundsForRent,
)

FAST = TxOpts(skip_preflight=True, skip_confirmation=True)
CHECKED = TxOpts(preflight_commitment=Processed)
PROCESSED = {"commitment": "processed"}
INSTANT = {"confirmed_lag": 0, "finalized_lag": 0}


def refused(caught, kind, **data):
    """The error that solders made of the answer."""
    (error,) = caught.value.args
    assert isinstance(error, kind), error
    for name, value in data.items():
        assert getattr(error.data, name) == value
    return error


def b64(transaction):
    return base64.b64encode(bytes(transaction)).decode()


# ---------------------------------------------------------------------------------------------------------------------
# Landing
# ---------------------------------------------------------------------------------------------------------------------


def test_a_payment_moves_lamports_and_costs_five_thousand(play):
    async def test(world):
        payer, target = world.keypair(), Pubkey.new_unique()
        transaction = await world.signed([world.pay(payer, target, 1_234_567)], payer)
        signature = (await world.client.send_transaction(transaction, CHECKED)).value
        assert signature == transaction.signatures[0]
        assert (await world.client.get_balance(target)).value == 1_234_567
        assert (await world.client.get_balance(payer.pubkey())).value == 10**10 - 1_234_567 - 5000
        await world.client.confirm_transaction(signature, Finalized, sleep_seconds=0.01)

    play(test, **INSTANT)


def test_send_and_confirm_as_the_client_does_it_with_a_running_clock(play):
    async def test(world):
        world.chain.clock.resume()
        payer, target = world.keypair(), Pubkey.new_unique()
        latest = (await world.client.get_latest_blockhash(Confirmed)).value
        transaction = world.new_transaction([world.pay(payer, target)], payer, blockhash=latest.blockhash)
        options = TxOpts(
            preflight_commitment=Confirmed,
            last_valid_block_height=latest.last_valid_block_height,
            skip_confirmation=False,
        )
        await world.client.send_transaction(transaction, options)
        assert (await world.client.get_balance(target, Confirmed)).value == 1_000_000

    play(test, slot_ms=20)


def test_legacy_transactions_and_both_encodings(play):
    async def test(world):
        payer, target = world.keypair(), Pubkey.new_unique()
        blockhash = (await world.client.get_latest_blockhash()).value.blockhash
        legacy = Transaction([payer], Message([world.pay(payer, target, 10**6)], payer.pubkey()), blockhash)
        await world.client.send_transaction(legacy, CHECKED)
        second = await world.signed([world.pay(payer, target, 2 * 10**6)], payer)
        text = based58.b58encode(bytes(second)).decode()  # the method's own default
        assert await world.result("sendTransaction", text) == str(second.signatures[0])
        assert world.balance(target) == 3 * 10**6

    play(test, **INSTANT)


def test_a_failed_transaction_without_preflight_lands_and_pays(play):
    async def test(world):
        payer = world.keypair()
        transaction = await world.signed([world.pay(payer, Pubkey.new_unique(), 10**15)], payer)
        signature = (await world.client.send_transaction(transaction, FAST)).value
        assert world.balance(payer.pubkey()) == 10**10 - 5000
        (status,) = (await world.client.get_signature_statuses([signature])).value
        assert status.err == TransactionErrorInstructionError(0, InstructionErrorCustom(1))
        shown = (await world.client.get_transaction(signature, "json", Confirmed, 0)).value.transaction
        assert shown.meta.err == status.err
        assert shown.meta.fee == 5000

    play(test, **INSTANT)


def test_the_same_transaction_lands_once(play):
    async def test(world):
        payer, target = world.keypair(), Pubkey.new_unique()
        transaction = await world.signed([world.pay(payer, target)], payer)
        await world.client.send_transaction(transaction, CHECKED)
        world.chain.advance(3)
        with pytest.raises(RPCException) as caught:
            await world.client.send_transaction(transaction, CHECKED)
        error = refused(caught, SendTransactionPreflightFailureMessage, err=TransactionErrorFieldless.AlreadyProcessed)
        assert error.message == "Transaction simulation failed: This transaction has already been processed"
        assert (await world.client.send_transaction(transaction, FAST)).value == transaction.signatures[0]
        assert world.balance(target) == 1_000_000

    play(test, **INSTANT)


def test_priority_fees_are_charged_for_the_limit_and_reported(play):
    async def test(world):
        payer, target = world.keypair(), Pubkey.new_unique()
        priced = [set_compute_unit_limit(30_001), set_compute_unit_price(1_000_001), world.pay(payer, target)]
        transaction = await world.signed(priced, payer)
        fee = 5000 + 30_002  # rounded up
        assert (await world.client.get_fee_for_message(transaction.message)).value == fee
        signature = (await world.client.send_transaction(transaction, CHECKED)).value
        assert world.balance(payer.pubkey()) == 10**10 - 1_000_000 - fee
        meta = (await world.client.get_transaction(signature, "json", Confirmed, 0)).value.transaction.meta
        assert (meta.fee, meta.compute_units_consumed) == (fee, 450)
        prices = await world.result("getRecentPrioritizationFees", [str(target)])
        assert prices[-1] == {"slot": world.chain.slot, "prioritizationFee": 1_000_001}
        assert (await world.result("getRecentPrioritizationFees", [str(Pubkey.new_unique())]))[-1][
            "prioritizationFee"
        ] == 0
        # Without a limit: 200,000 for an instruction, 3,000 for one of a built-in program.
        unlimited = await world.signed([set_compute_unit_price(10**6), world.memo("m")], payer)
        assert (await world.client.get_fee_for_message(unlimited.message)).value == 5000 + 203_000

    play(test, **INSTANT)


def test_a_payer_must_afford_the_priority_fee_too(play):
    async def test(world):
        payer = world.keypair(10**9)
        priced = [set_compute_unit_limit(1_400_000), set_compute_unit_price(10**9), world.memo("m")]
        with pytest.raises(RPCException) as caught:
            await world.client.send_transaction(await world.signed(priced, payer), CHECKED)
        refused(caught, SendTransactionPreflightFailureMessage, err=TransactionErrorFieldless.InsufficientFundsForFee)
        assert world.balance(payer.pubkey()) == 10**9

    play(test, **INSTANT)


def test_no_account_is_left_below_what_rent_asks(play):
    async def test(world):
        payer = world.keypair()
        transaction = await world.signed([world.pay(payer, Pubkey.new_unique(), 890_879)], payer)
        with pytest.raises(RPCException) as caught:
            await world.client.send_transaction(transaction, CHECKED)
        refused(caught, SendTransactionPreflightFailureMessage, err=TransactionErrorInsufficientFundsForRent(1))
        await world.client.send_transaction(transaction, FAST)
        assert world.balance(payer.pubkey()) == 10**10 - 5000
        everything = await world.signed([world.pay(payer, Pubkey.new_unique(), 10**10 - 10_000)], payer)
        await world.client.send_transaction(everything, CHECKED)
        assert await world.result("getAccountInfo", str(payer.pubkey())) == {
            "context": {"slot": 1, "apiVersion": "2.2.0"},
            "value": None,
        }

    play(test, **INSTANT)


def test_the_compute_limit_holds(play):
    async def test(world):
        payer = world.keypair()
        transaction = await world.signed([set_compute_unit_limit(1000), world.memo("x" * 400)], payer)
        with pytest.raises(RPCException) as caught:
            await world.client.send_transaction(transaction, CHECKED)
        error = refused(caught, SendTransactionPreflightFailureMessage)
        assert "Error processing Instruction 1: exceeded CUs meter at BPF instruction" in error.message
        assert error.data.units_consumed == 1000
        assert error.data.logs[-1].endswith("failed: exceeded CUs meter at BPF instruction")

    play(test, **INSTANT)


# ---------------------------------------------------------------------------------------------------------------------
# Blockhashes
# ---------------------------------------------------------------------------------------------------------------------


def test_a_blockhash_can_be_used_for_150_slots(play):
    async def test(world):
        world.chain.advance(999)
        payer = world.keypair()
        latest = (await world.client.get_latest_blockhash()).value
        assert latest.last_valid_block_height == 1150
        transactions = [
            world.new_transaction([world.pay(payer, payer.pubkey(), n)], payer, blockhash=latest.blockhash)
            for n in range(2)
        ]
        world.chain.advance(150)
        assert (await world.result("isBlockhashValid", str(latest.blockhash), PROCESSED))["value"]
        await world.client.send_transaction(transactions[0], CHECKED)
        world.chain.advance(1)
        assert not (await world.result("isBlockhashValid", str(latest.blockhash), PROCESSED))["value"]
        assert (await world.client.get_fee_for_message(transactions[1].message)).value is None
        with pytest.raises(RPCException) as caught:
            await world.client.send_transaction(transactions[1], CHECKED)
        error = refused(caught, SendTransactionPreflightFailureMessage, err=TransactionErrorFieldless.BlockhashNotFound)
        assert error.message == "Transaction simulation failed: Blockhash not found"
        signature = (await world.client.send_transaction(transactions[1], FAST)).value  # accepted, and never seen again
        assert (await world.client.get_signature_statuses([signature], True)).value == [None]
        with pytest.raises(TransactionExpiredBlockheightExceededError):
            await world.client.confirm_transaction(
                signature, Processed, sleep_seconds=0.01, last_valid_block_height=latest.last_valid_block_height
            )

    play(test, **INSTANT)


def test_a_blockhash_is_judged_at_the_commitment_of_the_preflight(play):
    async def test(world):
        world.chain.advance(100)
        payer = world.keypair()
        newest = await world.signed([world.memo("new")], payer)
        with pytest.raises(RPCException) as caught:  # whose default is finalized
            await world.client.send_raw_transaction(bytes(newest), TxOpts(preflight_commitment=Finalized))
        refused(caught, SendTransactionPreflightFailureMessage, err=TransactionErrorFieldless.BlockhashNotFound)
        blockhash = (await world.client.get_latest_blockhash(Finalized)).value.blockhash
        settled = world.new_transaction([world.memo("old")], payer, blockhash=blockhash)
        await world.client.send_raw_transaction(bytes(settled), TxOpts(preflight_commitment=Finalized))
        assert world.chain.history.get(str(settled.signatures[0])) is not None

    play(test)


def test_a_blockhash_that_never_was(play):
    async def test(world):
        payer = world.keypair()
        with pytest.raises(RPCException) as caught:
            await world.client.send_transaction(world.new_transaction([world.memo("m")], payer), CHECKED)
        refused(caught, SendTransactionPreflightFailureMessage, err=TransactionErrorFieldless.BlockhashNotFound)
        assert not (await world.result("isBlockhashValid", str(Hash.new_unique())))["value"]

    play(test)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def test_a_transaction_has_at_most_1232_bytes(play):
    async def test(world):
        payer = world.keypair()
        small = await world.signed([world.memo("m" * 1060)], payer)
        large = await world.signed([world.memo("m" * 1061)], payer)
        assert (len(bytes(small)), len(bytes(large))) == (1232, 1233)
        await world.client.send_transaction(small, FAST)
        for method in ("sendTransaction", "simulateTransaction"):
            error = await world.refusal(method, b64(large), {"encoding": "base64"})
            assert error["code"] == -32602
            assert error["message"] == (
                "decoded solana_transaction::versioned::VersionedTransaction too large: 1233 bytes (max: 1232 bytes)"
            )
        huge = await world.signed([world.memo("m" * 2000)], payer)
        with pytest.raises(RPCException) as caught:
            await world.client.send_transaction(huge, FAST)
        assert "too large: 2896 bytes (max: encoded/raw 1644/1232)" in refused(caught, InvalidParamsMessage).message

    play(test)


def test_a_custom_error_of_a_program_comes_with_its_logs(play):
    async def test(world):
        payer = world.keypair()
        with pytest.raises(RPCException) as caught:
            await world.client.send_transaction(
                await world.signed([world.pay(payer, Pubkey.new_unique(), 10**15)], payer), CHECKED
            )
        error = refused(
            caught,
            SendTransactionPreflightFailureMessage,
            err=TransactionErrorInstructionError(0, InstructionErrorCustom(1)),
        )
        assert error.message == (
            "Transaction simulation failed: Error processing Instruction 0: custom program error: 0x1"
        )
        assert any("insufficient lamports" in line for line in error.data.logs)
        assert world.chain.history.count == 1  # the airdrop

    play(test)


def test_signatures_are_checked(play):
    async def test(world):
        payer = world.keypair()
        good = await world.signed([world.memo("m")], payer)
        forged = VersionedTransaction.populate(good.message, [Signature.new_unique()])
        with pytest.raises(RPCException) as caught:
            await world.client.send_transaction(forged, CHECKED)
        refused_as = caught.value.args[0]
        assert refused_as == RpcCustomErrorFieldless.TransactionSignatureVerificationFailure
        await world.client.send_transaction(forged, FAST)  # the leader drops it
        assert (await world.client.get_signature_statuses([forged.signatures[0]])).value == [None]
        error = await world.refusal("simulateTransaction", b64(forged), {"encoding": "base64", "sigVerify": True})
        assert error["code"] == -32003
        unsigned = await world.result(
            "simulateTransaction", b64(forged), {"encoding": "base64", "commitment": "processed"}
        )
        assert unsigned["value"]["err"] is None
        assert world.balance(payer.pubkey()) == 10**10

    play(test)


def test_an_unhealthy_node_refuses(play):
    async def test(world):
        payer = world.keypair()
        assert await world.result("psyche_setHealthy", False) is False
        assert (await world.refusal("getHealth"))["code"] == -32005
        with pytest.raises(RPCException) as caught:
            await world.client.send_transaction(await world.signed([world.memo("m")], payer), CHECKED)
        refused(caught, NodeUnhealthyMessage)
        await world.result("psyche_setHealthy", True)
        assert await world.result("getHealth") == "ok"

    play(test)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            lambda a, b: Message.new_with_compiled_instructions(1, 0, 1, [a, b], Hash.default(), [_ix(7)]),
            "invalid trans",
        ),
        (lambda a, b: Message.new_with_compiled_instructions(0, 0, 0, [], Hash.default(), []), "invalid trans"),
        (
            lambda a, b: Message.new_with_compiled_instructions(1, 1, 1, [a, b], Hash.default(), [_ix(1)]),
            "invalid trans",
        ),
    ],
    ids=["program beyond the list", "nobody", "payer that is read only"],
)
def test_transactions_that_make_no_sense(play, message, words):
    async def test(world):
        payer = world.keypair()
        made = message(payer.pubkey(), SYSTEM_PROGRAM)
        signatures = [Signature.default()] * made.header.num_required_signatures
        raw = b64(VersionedTransaction.populate(made, signatures))
        for skip in (False, True):
            error = await world.refusal("sendTransaction", raw, {"encoding": "base64", "skipPreflight": skip})
            assert (error["code"], error["message"][: len(words)]) == (-32602, words)

    play(test)


def _ix(program, accounts=b""):
    return CompiledInstruction(program, b"", accounts)


def test_what_the_runtime_panics_on_is_refused_and_it_goes_on(play):
    async def test(world):
        payer = world.keypair()
        keys = [payer.pubkey(), *(Pubkey.new_unique() for _ in range(30)), SYSTEM_PROGRAM]
        blockhash = world.chain.blockhash(world.chain.slot)
        for count, err in ((2, "AccountLoadedTwice"), (1, None)):
            message = Message.new_with_compiled_instructions(
                1, 0, 31, [payer.pubkey()] * count + keys[1:], blockhash, [_ix(30 + count, bytes([0]))]
            )
            transaction = VersionedTransaction.populate(message, [payer.sign_message(bytes(message))])
            error = await world.refusal(
                "sendTransaction", b64(transaction), {"encoding": "base64", "preflightCommitment": "processed"}
            )
            assert error["code"] == -32002
            assert err is None or error["data"]["err"] == err
        await world.client.send_transaction(await world.signed([world.memo("m")], payer), CHECKED)

    play(test)


def test_a_table_of_addresses_that_does_not_exist(play):
    async def test(world):
        from solders.message import MessageAddressTableLookup, MessageHeader

        payer = world.keypair()
        lookup = MessageAddressTableLookup(Pubkey.new_unique(), b"\0", b"")
        message = MessageV0(
            MessageHeader(1, 0, 1), [payer.pubkey(), SYSTEM_PROGRAM], Hash.default(), [_ix(1, b"\0\2")], [lookup]
        )
        raw = b64(VersionedTransaction.populate(message, [Signature.default()]))
        error = await world.refusal("sendTransaction", raw, {"encoding": "base64", "skipPreflight": True})
        assert (error["code"], "doesn't exist" in error["message"]) == (-32602, True)

    play(test)


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
        value = (await world.result("simulateTransaction", b64(transaction), options))["value"]
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
        value = (await world.result("simulateTransaction", b64(stale), options))["value"]
        assert value["err"] is None
        assert value["replacementBlockhash"] == {
            "blockhash": str(world.chain.blockhash(1)),
            "lastValidBlockHeight": 151,
        }
        legacy = Transaction([payer], Message([world.memo("m")], payer.pubkey()), Hash.default())
        assert (await world.result("simulateTransaction", b64(legacy), options))["value"]["err"] is None
        error = await world.refusal("simulateTransaction", b64(stale), {**options, "sigVerify": True})
        assert (error["code"], error["message"]) == (-32602, "sigVerify may not be used with replaceRecentBlockhash")

    play(test)


def test_a_payer_who_does_not_exist(play):
    async def test(world):
        nobody = Keypair()
        transaction = await world.signed([world.memo("m")], nobody)
        with pytest.raises(RPCException) as caught:
            await world.client.send_transaction(transaction, CHECKED)
        error = refused(caught, SendTransactionPreflightFailureMessage, err=TransactionErrorFieldless.AccountNotFound)
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
        refused(caught, UnsupportedTransactionVersionMessage)
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
        assert "not a Token account" in refused(caught, InvalidParamsMessage).message

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
