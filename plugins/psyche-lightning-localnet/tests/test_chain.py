"""Tests the chain without a server."""

import struct

import pytest
from psyche_lightning_localnet import vm
from psyche_lightning_localnet.chain import LocalChain
from psyche_lightning_localnet.clock import SlotClock
from psyche_lightning_localnet.errors import LocalnetError, error_json, error_text
from psyche_lightning_localnet.vm import LOADER, VmPanicError
from solders.address_lookup_table_account import AddressLookupTableAccount
from solders.compute_budget import set_compute_unit_limit, set_compute_unit_price
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.message import MessageV0
from solders.pubkey import Pubkey
from solders.system_program import (
    ID as SYSTEM_PROGRAM,
)
from solders.system_program import (
    CreateAccountParams,
    TransferParams,
    create_account,
    transfer,
)
from solders.sysvar import CLOCK, RENT
from solders.transaction import VersionedTransaction

TABLES = Pubkey.from_string("AddressLookupTab1e1111111111111111111111111")


@pytest.fixture
def chain():
    return LocalChain(SlotClock(running=False, unix_ms=1_700_000_000_000), seed=bytes(32))


@pytest.fixture
def payer(chain):
    payer = Keypair()
    chain.airdrop(payer.pubkey(), 10**10)
    return payer


def pay(payer, target, lamports=10**6):
    return transfer(TransferParams(from_pubkey=payer.pubkey(), to_pubkey=target, lamports=lamports))


def test_two_chains_with_one_seed_are_the_same_chain(chain):
    def play(chain):
        keys = [Keypair.from_seed(bytes([number]) * 32) for number in range(1, 5)]
        for number, key in enumerate(keys):
            chain.airdrop(key.pubkey(), 10**9 + number)
            chain.advance(number)
        return [(one.signature, one.slot, one.time) for one in chain.history], dict(chain.accounts.newest())

    other = LocalChain(SlotClock(running=False, unix_ms=1_700_000_000_000), seed=bytes(32))
    assert play(chain) == play(other)
    assert LocalChain(SlotClock(running=False)).blockhash(5) != LocalChain(SlotClock(running=False)).blockhash(5)


def test_lookup_tables_and_what_they_load(chain, payer):
    """As on a cluster, a table needs a recent slot, and can be used from the slot after it was filled."""
    chain.advance(20)
    recent = chain.slot - 2
    table, bump = Pubkey.find_program_address([bytes(payer.pubkey()), recent.to_bytes(8, "little")], TABLES)
    owner, paying = AccountMeta(payer.pubkey(), True, False), AccountMeta(payer.pubkey(), True, True)
    rest = [AccountMeta(SYSTEM_PROGRAM, False, False)]
    make = Instruction(
        TABLES,
        (0).to_bytes(4, "little") + recent.to_bytes(8, "little") + bytes([bump]),
        [AccountMeta(table, False, True), owner, paying, *rest],
    )
    target, bystander = Pubkey.new_unique(), Pubkey.new_unique()
    fill = Instruction(
        TABLES,
        (2).to_bytes(4, "little") + (2).to_bytes(8, "little") + bytes(bystander) + bytes(target),
        [AccountMeta(table, False, True), owner, paying, *rest],
    )
    assert chain.submit(chain.sign([make, fill], payer)).err is None

    def use():
        looked_up = [AddressLookupTableAccount(table, [bystander, target])]
        message = MessageV0.try_compile(payer.pubkey(), [pay(payer, target)], looked_up, chain.blockhash(chain.slot))
        assert target not in message.account_keys
        transaction = VersionedTransaction(message, [payer])
        return transaction, chain.submit(transaction)

    chain.advance()
    transaction, outcome = use()
    assert outcome.err is None
    assert chain.account(target).lamports == 10**6
    record = chain.history.get(str(transaction.signatures[0]))
    assert (record.addresses[record.static :], record.writable_loaded) == ((str(target),), 1)
    assert next(chain.history.of(str(target))) is record


def test_a_program_can_be_used_from_the_next_slot(chain, payer, small_program):
    program, buffer = Keypair().pubkey(), Keypair()
    assert chain.add_program(program, small_program)
    assert not chain.add_program(program, small_program)
    chain.advance()
    assert chain.submit(chain.sign([Instruction(program, b"first", [])], payer)).err is None
    use = Instruction(program, b"hello", [])
    upgraded = small_program + b"x"
    faucet = chain.faucet
    size = 37 + len(upgraded)
    made = CreateAccountParams(
        from_pubkey=faucet.pubkey(),
        to_pubkey=buffer.pubkey(),
        lamports=chain.vm.minimum_balance(size),
        space=size,
        owner=LOADER,
    )

    def load(data, *accounts):
        """An instruction of the loader. Accounts with ``w`` are writable, and the faucet signs."""
        return Instruction(
            LOADER, data, [AccountMeta(key, key == faucet.pubkey(), "w" in how) for key, how in accounts]
        )

    code = Pubkey.find_program_address([bytes(program)], LOADER)[0]
    place, owner = (buffer.pubkey(), "w"), (faucet.pubkey(), "")
    assert chain.submit(chain.sign([create_account(made), load(bytes(4), place, owner)], faucet, buffer)).err is None
    for offset in range(0, len(upgraded), 900):
        piece = upgraded[offset : offset + 900]
        write = load(struct.pack("<IIQ", 1, offset, len(piece)) + piece, place, owner)
        assert chain.submit(chain.sign([write], faucet)).err is None
    extend = load(struct.pack("<II", 6, 1), (code, "w"), (program, "w"), (SYSTEM_PROGRAM, ""), (faucet.pubkey(), "w"))
    assert chain.submit(chain.sign([extend], faucet)).err is None
    unready = chain.submit(chain.sign([use], payer))
    assert error_json(unready.err) == {"InstructionError": [0, "UnsupportedProgramId"]}
    assert (unready.landed, unready.logs) == (True, ("Program is not deployed",))
    chain.advance()
    spill = (faucet.pubkey(), "w")
    upgrade = load(struct.pack("<I", 3), (code, "w"), (program, "w"), place, spill, (RENT, ""), (CLOCK, ""), owner)
    assert chain.submit(chain.sign([upgrade], faucet)).err is None
    chain.advance()
    assert chain.submit(chain.sign([use], payer)).err is None


def test_a_program_that_is_none_leaves_nothing_behind(chain, payer, small_program):
    program = Keypair().pubkey()
    for image in (b"", b"x", small_program[:2000]):
        with pytest.raises(LocalnetError, match="the runtime does not take the program"):
            chain.add_program(program, image)
    assert chain.account(program) is None
    assert chain.add_program(program, small_program)
    chain.advance()
    assert chain.submit(chain.sign([Instruction(program, b"hello", [])], payer)).err is None


def test_the_runtime_panics_and_it_goes_on(chain, payer, monkeypatch):
    """The runtime panics on more accounts than may be locked, so the chain refuses these earlier."""
    keys = [Pubkey.new_unique() for _ in range(70)]
    many = Instruction(SYSTEM_PROGRAM, b"", [AccountMeta(key, False, False) for key in keys])
    transaction = chain.sign([set_compute_unit_limit(10_000), set_compute_unit_price(10**9), many], payer)
    assert error_json(chain.submit(transaction).err) == "TooManyAccountLocks"
    monkeypatch.setattr(vm, "require_locks", lambda keys: None)
    with pytest.raises(VmPanicError, match="the runtime panicked on a transaction"):
        chain.submit(transaction)
    monkeypatch.undo()
    assert chain.account(payer.pubkey()).lamports == chain.vm.account(payer.pubkey()).lamports == 10**10
    assert chain.submit(chain.sign([pay(payer, Pubkey.new_unique())], payer)).err is None


def test_errors_in_a_validators_words(chain, payer):
    broke = chain.submit(chain.sign([pay(payer, Pubkey.new_unique(), 10**15)], payer))
    assert error_text(broke.err, broke.logs) == "Error processing Instruction 0: custom program error: 0x1"
    twice = chain.submit(chain.sign([set_compute_unit_limit(1), set_compute_unit_limit(1)], payer))
    assert error_text(twice.err) == "Transaction contains a duplicate instruction (1) that is not allowed"
    poor = chain.submit(chain.sign([pay(payer, Pubkey.new_unique(), 1)], payer))
    assert error_text(poor.err) == "Transaction results in an account (1) with insufficient funds for rent"
    assert [twice.landed, broke.landed, poor.landed] == [False, True, True]


def test_an_account_that_was_closed_can_be_made_again(chain, payer):
    other = Keypair()

    def make(space):
        made = CreateAccountParams(
            from_pubkey=payer.pubkey(), to_pubkey=other.pubkey(), lamports=10**8, space=space, owner=SYSTEM_PROGRAM
        )
        return chain.submit(chain.sign([create_account(made)], payer, other)).err

    assert make(0) is None
    assert chain.submit(chain.sign([pay(other, payer.pubkey(), 10**8)], payer, other)).err is None
    assert chain.account(other.pubkey()) is None
    assert make(7) is None
    assert len(chain.account(other.pubkey()).data) == 7
