"""Tests the local chain in its own process: the command, and ordinary clients over HTTP and websocket."""

import asyncio
import json
import subprocess
import sys

import pytest
from psyche_lightning_localnet import LocalnetError, LocalnetProcess
from psyche_lightning_localnet.chain import faucet_keypair
from solana.rpc.async_api import AsyncClient
from solana.rpc.commitment import Confirmed, Processed
from solana.rpc.websocket_api import connect
from solders.hash import Hash
from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.message import MessageV0
from solders.pubkey import Pubkey
from solders.transaction import VersionedTransaction

COMMAND = [sys.executable, "-m", "psyche_lightning_localnet"]


@pytest.fixture
def type_it(capfd):
    """Returns a function that runs the command, and returns its exit code and errors."""

    def type_it(*arguments):
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr

    return type_it


def test_a_program_of_ones_own_from_another_process(tmp_path, small_program):
    """One program is at the address of a key pair, the other at an address without a known key."""
    image, keys, own, payer = tmp_path / "memo.so", tmp_path / "own.json", Keypair(), Keypair()
    image.write_bytes(small_program)
    keys.write_text(json.dumps(list(bytes(own))))
    other = Pubkey.new_unique()

    async def talk(local):
        async with AsyncClient(local.url, Confirmed) as client, connect(local.ws_url) as socket:
            given = (await client.request_airdrop(payer.pubkey(), 10**10)).value
            await client.confirm_transaction(given, Confirmed, sleep_seconds=0.05)
            await socket.account_subscribe(payer.pubkey(), Confirmed, "base64")
            await socket.recv()
            calls = [Instruction(program, b"hello", []) for program in (own.pubkey(), other)]
            blockhash: Hash = (await client.get_latest_blockhash(Confirmed)).value.blockhash
            message = MessageV0.try_compile(payer.pubkey(), calls, [], blockhash)
            sent = (await client.send_transaction(VersionedTransaction(message, [payer]))).value
            await client.confirm_transaction(sent, Confirmed, sleep_seconds=0.05)
            (told,) = await asyncio.wait_for(socket.recv(), 10)
            found = await client.get_transaction(sent, max_supported_transaction_version=0)
            return found.value.transaction.meta.log_messages, told.result.value.lamports

    programs = ("--program", f"{keys}={image}", "--program", f"{other}={image}")
    with LocalnetProcess("--slot-ms", "20", *programs) as local:
        logs, lamports = asyncio.run(asyncio.wait_for(talk(local), 60))
    assert sum('Memo (len 5): "hello"' in line for line in logs) == 2
    assert lamports == 10**10 - 5000


def test_the_banner_says_what_there_is():
    with subprocess.Popen([*COMMAND, "--port", "0", "--frozen"], stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline() for _ in range(3)]
        process.terminate()
        assert process.wait(60) == 0
    assert lines[0].startswith("solana-localnet on http://127.0.0.1:")
    assert "frozen" in lines[1]
    assert f"faucet       {faucet_keypair().pubkey()}" in lines[2]


def test_mistakes_are_explained(type_it, tmp_path):
    nonsense = tmp_path / "nonsense.so"
    nonsense.write_text("nonsense")
    for arguments, words in (
        (("--ledger", "/proc/nowhere"), "error: cannot use the ledger /proc/nowhere"),
        (("--program", "x"), "expected ADDRESS=FILE"),
        (("--program", f"xyz={nonsense}"), "expected an address, 32 bytes in base58"),
        (("--program", f"{Pubkey.new_unique()}=/nowhere.so"), "cannot read /nowhere.so: No such file"),
        (("--program", f"{Pubkey.new_unique()}={nonsense}"), "expected an ELF shared object"),
    ):
        code, errors = type_it("--port", "0", *arguments)
        assert (code, words in errors) == (1, True), errors
        assert "Traceback" not in errors


def test_a_port_that_is_taken(type_it):
    with LocalnetProcess("--slot-ms", "20") as local:
        code, errors = type_it("--port", local.url.rpartition(":")[2])
    assert (code, "Choose another --port" in errors) == (1, True)
    with pytest.raises(LocalnetError, match="did not start"):
        LocalnetProcess("--slot-ms", "0")


@pytest.mark.slow
def test_a_ledger_outlives_its_process(tmp_path):
    folder = str(tmp_path / "ledger")
    arguments = ("--ledger", folder, "--slot-ms", "20")
    target = Keypair().pubkey()

    async def give(url, save):
        async with AsyncClient(url, Processed) as client:
            signature = (await client.request_airdrop(target, 10**9)).value
            if save:
                request = {"jsonrpc": "2.0", "id": 1, "method": "psyche_snapshot"}
                await client._provider.session.post(url, json=request)
            return signature

    async def seen(url, signature):
        async with AsyncClient(url, Confirmed) as client:
            status = (await client.get_signature_statuses([signature], True)).value[0]
            return (await client.get_balance(target)).value, status is not None

    with LocalnetProcess(*arguments) as first:
        signature = asyncio.run(give(first.url, save=False))
        assert first.stop() == 0
    with LocalnetProcess(*arguments) as second:
        assert asyncio.run(seen(second.url, signature)) == (10**9, True)
        kept = asyncio.run(give(second.url, save=True))
        lost = asyncio.run(give(second.url, save=False))
        second.kill()  # only transactions after the last snapshot are lost
    with LocalnetProcess(*arguments) as third:
        assert asyncio.run(seen(third.url, kept)) == (2 * 10**9, True)
        assert asyncio.run(seen(third.url, lost)) == (2 * 10**9, False)
    with LocalnetProcess(*arguments, "--reset") as fourth:
        assert asyncio.run(seen(fourth.url, kept)) == (0, False)
