"""Tests that a chain is saved and loaded."""

import asyncio
import hashlib
import os

import pytest
from psyche_lightning_localnet import LedgerError
from psyche_lightning_localnet.chain import LocalChain
from psyche_lightning_localnet.clock import SlotClock
from psyche_lightning_localnet.ledger import MAGIC, Ledger
from solana.rpc.commitment import Confirmed, Processed
from solana.rpc.types import TxOpts
from solders.account import Account
from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey

CHECKED = TxOpts(preflight_commitment=Processed)


def frozen(unix_ms=1_700_000_000_000):
    return SlotClock(running=False, unix_ms=unix_ms)


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    yield ledger
    ledger.close()


def test_a_chain_comes_back_as_it_was_with_its_programs(ledger, small_program):
    program, gone, payer = Keypair(), Keypair(), Keypair()
    chain = LocalChain(frozen(), programs={program.pubkey(): small_program})
    for target in (payer, gone):
        chain.airdrop(target.pubkey(), 10**9)
    from solders.system_program import TransferParams, transfer

    empty = TransferParams(from_pubkey=gone.pubkey(), to_pubkey=payer.pubkey(), lamports=10**9)
    last = chain.sign([transfer(empty), Instruction(program.pubkey(), b"hello", [])], payer, gone)
    assert chain.submit(last).err is None
    chain.advance(7)
    assert ledger.behind(chain)
    ledger.save(chain)
    assert not ledger.behind(chain)

    again = ledger.load(frozen(0))
    assert (again.slot, again.clock.unix_ms()) == (chain.slot, chain.clock.unix_ms())
    assert dict(again.accounts.newest()) == dict(chain.accounts.newest())
    assert list(again.history) == list(chain.history)
    assert again.history.count == chain.history.count
    assert again.account(gone.pubkey()) is None
    assert again.account(payer.pubkey(), "finalized") == chain.account(payer.pubkey())
    # The chain continues: the program runs, the blockhash is still valid, and no transaction lands twice.
    assert str(again.submit(last).err) == "TransactionErrorFieldless.AlreadyProcessed"
    assert again.blockhash(again.slot) == chain.blockhash(chain.slot)
    fresh = again.sign([Instruction(program.pubkey(), b"again", [])], payer)
    assert again.submit(fresh).logs[1] == 'Program log: Memo (len 5): "again"'
    one, _ = again.airdrop(payer.pubkey(), 10**9)
    assert chain.history.get(one) is None


def test_a_running_chain_has_aged_meanwhile(ledger):
    wall = [5000.0]
    chain = LocalChain(SlotClock(500, now=lambda: wall[0]))
    chain.advance(99)
    ledger.save(chain)
    wall[0] += 3600
    again = ledger.load(SlotClock(500, now=lambda: wall[0]))
    # The test advanced the clock by 49.5 seconds, which have now passed on the wall clock, too.
    assert (again.slot, again.clock.unix_time()) == (100 + (3600 - 49.5) * 2, 8600)
    assert again.blockhash_slot(chain.blockhash(100)) is None


def test_nothing_to_come_back_to(ledger):
    assert ledger.load(frozen()) is None
    ledger.save(LocalChain(frozen()))
    ledger.reset()
    assert ledger.load(frozen()) is None


def test_two_chains_cannot_share_a_folder(ledger):
    with pytest.raises(LedgerError, match="used by another local chain"):
        Ledger(ledger.folder)
    ledger.close()
    Ledger(ledger.folder).close()


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot use the ledger"):
        Ledger(tmp_path / "file")


@pytest.mark.parametrize("damage", ["cut", "bit", "magic", "empty", "version"])
def test_a_damaged_file_is_refused(ledger, damage):
    ledger.save(LocalChain(frozen()))
    path = ledger.folder / "snapshot"
    content = path.read_bytes()
    changed = {
        "cut": content[:-1],
        "bit": content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
        "magic": b"X" + content[1:],
        "empty": b"",
        "version": MAGIC[:-1] + b"\x02" + content[8:],
    }[damage]
    path.write_bytes(changed)
    with pytest.raises(LedgerError, match=r"damaged or of another version .*--reset"):
        ledger.load(frozen())


def test_well_formed_nonsense_is_refused(ledger):
    import msgpack
    import zstandard

    good = {"seed": bytes(32), "slot": 1, "unix_ms": 0, "count": 0, "airdrops": 0, "accounts": [], "records": []}
    for wrong in (
        {**good, "accounts": [[b"short", 1, bytes(32), False, b""]]},
        {**good, "accounts": [[bytes(32), -1, bytes(32), False, b""]]},
        {**good, "records": [[1, 2, 3]]},
        {**good, "slot": "one"},
        {name: value for name, value in good.items() if name != "seed"},
        [],
    ):
        body = zstandard.ZstdCompressor().compress(msgpack.packb(wrong))
        (ledger.folder / "snapshot").write_bytes(MAGIC + hashlib.sha256(body).digest() + body)
        with pytest.raises(LedgerError):
            ledger.load(frozen())
    bomb = zstandard.ZstdCompressor().compress(b"")  # its header gives the size 0
    (ledger.folder / "snapshot").write_bytes(MAGIC + hashlib.sha256(bomb).digest() + bomb)
    with pytest.raises(LedgerError, match="out of bounds"):
        ledger.load(frozen())


def test_a_full_disk_leaves_what_was_there(ledger, monkeypatch):
    chain = LocalChain(frozen())
    ledger.save(chain)
    before = (ledger.folder / "snapshot").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    chain.airdrop(Pubkey.new_unique(), 10**9)
    with pytest.raises(LedgerError, match="No space left"):
        ledger.save(chain)
    assert (ledger.folder / "snapshot").read_bytes() == before
    assert sorted(path.name for path in ledger.folder.iterdir()) == ["lock", "snapshot"]


def test_an_older_snapshot_that_is_late_does_not_win(ledger):
    chain = LocalChain(frozen())
    late = ledger._capture(chain)
    chain.store({Pubkey.new_unique(): Account(10**9, b"x", Pubkey.default())})
    ledger.save(chain)
    after = (ledger.folder / "snapshot").read_bytes()
    ledger._write(*late)
    assert (ledger.folder / "snapshot").read_bytes() == after


def test_the_server_saves_at_its_end_now_and_then_and_when_told(play, tmp_path):
    ledger = Ledger(tmp_path, interval=0.05)
    snapshot = tmp_path / "snapshot"

    async def test(world):
        payer = world.keypair()
        while not snapshot.exists():
            await asyncio.sleep(0.01)
        first = snapshot.read_bytes()
        ledger.interval = 3600
        await asyncio.sleep(0.1)
        world.chain.advance(3)
        assert await world.result("psyche_snapshot") is True
        assert snapshot.read_bytes() != first
        sent = await world.signed([world.memo("m")], payer)
        await world.client.send_transaction(sent, CHECKED)
        return sent.signatures[0], world.chain.slot

    signature, slot = play(test, ledger=ledger)
    again = ledger.load(frozen())
    ledger.close()
    assert (again.history.get(str(signature)).slot, again.slot) == (slot, slot)


def test_a_disk_that_is_full_for_a_while(play, tmp_path, monkeypatch, caplog):
    ledger = Ledger(tmp_path, interval=0.02)
    snapshot, sync = tmp_path / "snapshot", os.fsync
    full = [True]

    def fsync(descriptor):
        if full[0]:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)

    async def test(world):
        world.keypair()
        while "No space left on device" not in caplog.text:
            await asyncio.sleep(0.01)
        assert not snapshot.exists()
        full[0] = False
        while not snapshot.exists():
            await asyncio.sleep(0.01)

    play(test, ledger=ledger)
    ledger.close()


def test_without_a_ledger_nothing_can_be_saved(play):
    async def test(world):
        assert (await world.refusal("psyche_snapshot"))["code"] == -32601
        assert (await world.client.get_slot(Confirmed)).value == 0

    play(test)
