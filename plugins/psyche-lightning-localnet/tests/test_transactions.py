"""Tests how an ordinary client sends transactions over HTTP."""

import based58
import pytest
from solana.rpc.commitment import Confirmed, Finalized, Processed
from solana.rpc.core import RPCException, TransactionExpiredBlockheightExceededError
from solana.rpc.types import TxOpts
from solders.compute_budget import set_compute_unit_limit, set_compute_unit_price
from solders.hash import Hash
from solders.instruction import CompiledInstruction
from solders.message import Message, MessageV0
from solders.pubkey import Pubkey
from solders.rpc.errors import (
    InvalidParamsMessage,
    NodeUnhealthyMessage,
    RpcCustomErrorFieldless,
)
from solders.rpc.errors import (
    SendTransactionPreflightFailureMessage as PreflightFailure,
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
        text = based58.b58encode(bytes(second)).decode()  # the method's default encoding
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
        error = world.refused(caught, PreflightFailure, err=TransactionErrorFieldless.AlreadyProcessed)
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
        # Without a limit, an instruction counts 200,000 units, and one of a built-in program 3,000.
        unlimited = await world.signed([set_compute_unit_price(10**6), world.memo("m")], payer)
        assert (await world.client.get_fee_for_message(unlimited.message)).value == 5000 + 203_000

    play(test, **INSTANT)


def test_a_payer_must_afford_the_priority_fee_too(play):
    async def test(world):
        payer = world.keypair(10**9)
        priced = [set_compute_unit_limit(1_400_000), set_compute_unit_price(10**9), world.memo("m")]
        with pytest.raises(RPCException) as caught:
            await world.client.send_transaction(await world.signed(priced, payer), CHECKED)
        world.refused(caught, PreflightFailure, err=TransactionErrorFieldless.InsufficientFundsForFee)
        assert world.balance(payer.pubkey()) == 10**9

    play(test, **INSTANT)


def test_no_account_is_left_below_what_rent_asks(play):
    async def test(world):
        payer = world.keypair()
        transaction = await world.signed([world.pay(payer, Pubkey.new_unique(), 890_879)], payer)
        with pytest.raises(RPCException) as caught:
            await world.client.send_transaction(transaction, CHECKED)
        world.refused(caught, PreflightFailure, err=TransactionErrorInsufficientFundsForRent(1))
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
        error = world.refused(caught, PreflightFailure)
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
        error = world.refused(caught, PreflightFailure, err=TransactionErrorFieldless.BlockhashNotFound)
        assert error.message == "Transaction simulation failed: Blockhash not found"
        signature = (await world.client.send_transaction(transactions[1], FAST)).value  # accepted, but it never lands
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
        with pytest.raises(RPCException) as caught:  # Finalized is a validator's default
            await world.client.send_raw_transaction(bytes(newest), TxOpts(preflight_commitment=Finalized))
        world.refused(caught, PreflightFailure, err=TransactionErrorFieldless.BlockhashNotFound)
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
        world.refused(caught, PreflightFailure, err=TransactionErrorFieldless.BlockhashNotFound)
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
            error = await world.refusal(method, world.b64(large), {"encoding": "base64"})
            assert error["code"] == -32602
            assert error["message"] == (
                "decoded solana_transaction::versioned::VersionedTransaction too large: 1233 bytes (max: 1232 bytes)"
            )
        huge = await world.signed([world.memo("m" * 2000)], payer)
        with pytest.raises(RPCException) as caught:
            await world.client.send_transaction(huge, FAST)
        assert (
            "too large: 2896 bytes (max: encoded/raw 1644/1232)" in world.refused(caught, InvalidParamsMessage).message
        )

    play(test)


def test_a_custom_error_of_a_program_comes_with_its_logs(play):
    async def test(world):
        payer = world.keypair()
        with pytest.raises(RPCException) as caught:
            await world.client.send_transaction(
                await world.signed([world.pay(payer, Pubkey.new_unique(), 10**15)], payer), CHECKED
            )
        error = world.refused(
            caught,
            PreflightFailure,
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
        error = await world.refusal("simulateTransaction", world.b64(forged), {"encoding": "base64", "sigVerify": True})
        assert error["code"] == -32003
        unsigned = await world.result(
            "simulateTransaction", world.b64(forged), {"encoding": "base64", "commitment": "processed"}
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
        world.refused(caught, NodeUnhealthyMessage)
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
        raw = world.b64(VersionedTransaction.populate(made, signatures))
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
                "sendTransaction", world.b64(transaction), {"encoding": "base64", "preflightCommitment": "processed"}
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
        raw = world.b64(VersionedTransaction.populate(message, [Signature.default()]))
        error = await world.refusal("sendTransaction", raw, {"encoding": "base64", "skipPreflight": True})
        assert (error["code"], "doesn't exist" in error["message"]) == (-32602, True)

    play(test)
