"""The local chain with our programs on it: what people type, and anchorpy as their client."""

import asyncio
import json
import subprocess
import sys
import warnings

import pytest
from psyche_lightning_localnet import LocalnetProcess
from psyche_lightning_localnet.chain import faucet_keypair
from psyche_lightning_solana.client.cluster import local_faucet, local_program
from psyche_lightning_solana.interface import AUTHORIZER, JOIN_SCOPE
from psyche_lightning_solana.legacy_idl import idl
from solana.rpc.async_api import AsyncClient
from solana.rpc.commitment import Confirmed
from solana.rpc.types import TxOpts
from solana.rpc.websocket_api import connect
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.rpc.config import RpcTransactionLogsFilterMentions
from solders.system_program import ID as SYSTEM_PROGRAM

from psyche_lightning.cli import main

AUTHORIZER_ID = local_program("authorizer").pubkey()
PSYCHE = ("-m", "psyche_lightning", "solana", "localnet")
OPTIONS = TxOpts(skip_confirmation=False, preflight_commitment=Confirmed)


@pytest.fixture
def psyche(capsys, monkeypatch):
    """Run ``psyche solana ...``; its exit code, output and errors."""
    for name in ("PSYCHE_WALLET", "PSYCHE_WALLET_SECRET"):
        monkeypatch.delenv(name, raising=False)

    def psyche(*arguments):
        code = main(["solana", *arguments])
        return code, *capsys.readouterr()

    return psyche


@pytest.fixture(scope="module")
def local():
    with LocalnetProcess("--slot-ms", "20", command=PSYCHE) as process:
        yield process


def test_anchorpy_from_another_process(local):
    """A program through anchorpy's Program and Provider: call, refusal, accounts one by one and all, simulation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from anchorpy import Context, Idl, Program, Provider, Wallet
        from anchorpy.error import ProgramError

    grantor, grantee = Keypair(), Keypair().pubkey()
    seeds = [b"Authorization", bytes(grantor.pubkey()), bytes(grantee), JOIN_SCOPE]
    address = Pubkey.find_program_address(seeds, AUTHORIZER_ID)[0]
    accounts = {
        "payer": grantor.pubkey(),
        "grantor": grantor.pubkey(),
        "authorization": address,
        "system_program": SYSTEM_PROGRAM,
    }

    async def talk():
        async with AsyncClient(local.url, Confirmed) as client, connect(local.ws_url) as socket:
            given = (await client.request_airdrop(grantor.pubkey(), 10**10)).value
            await client.confirm_transaction(given, Confirmed, sleep_seconds=0.05)
            await socket.account_subscribe(address, Confirmed, "base64")
            await socket.recv()
            await socket.logs_subscribe(RpcTransactionLogsFilterMentions(AUTHORIZER_ID), Confirmed)
            await socket.recv()
            program = Program(
                Idl.from_json(json.dumps(idl(AUTHORIZER))), AUTHORIZER_ID, Provider(client, Wallet(grantor), OPTIONS)
            )
            create = {"grantee": grantee, "scope": JOIN_SCOPE}
            simulated = await program.simulate["authorization_create"](*create.values(), ctx=Context(accounts=accounts))
            assert simulated.raw[-1].endswith("success")
            await program.rpc["authorization_create"](*create.values(), ctx=Context(accounts=accounts))
            kind = program.account["Authorization"]
            made = await kind.fetch(address, Confirmed)
            assert (made.grantor, made.grantee, bytes(made.scope), made.active) == (
                grantor.pubkey(),
                grantee,
                JOIN_SCOPE,
                False,
            )
            update = Context(accounts={"grantor": grantor.pubkey(), "authorization": address})
            await program.rpc["authorization_grantor_update"](True, ctx=update)
            assert (await kind.fetch(address, Confirmed)).active
            close = Context(accounts={**accounts, "spill": grantor.pubkey()})
            with pytest.raises(ProgramError) as caught:
                await program.rpc["authorization_close"](ctx=close)
            assert caught.value.code == 6000
            assert [one.public_key for one in await kind.all()] == [address]
            several = await kind.fetch_multiple([address, Keypair().pubkey()], commitment=Confirmed)
            assert [one and one.active for one in several] == [True, None]
            told = []
            while len(told) < 4:  # two of the account and two of the program's logs
                told += [type(one).__name__ for one in await asyncio.wait_for(socket.recv(), 10)]
            assert sorted(told) == ["AccountNotification"] * 2 + ["LogsNotification"] * 2

    asyncio.run(asyncio.wait_for(talk(), 60))


def test_the_banner_says_what_there_is():
    with subprocess.Popen(
        [sys.executable, *PSYCHE, "--port", "0", "--frozen"],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        lines = [process.stdout.readline() for _ in range(6)]
        process.terminate()
        assert process.wait(60) == 0
    text = "".join(lines)
    assert "psyche solana localnet on http://127.0.0.1:" in lines[0]
    for name in ("authorizer", "coordinator", "treasurer"):
        assert f"{name:<12} {local_program(name).pubkey()}" in text
    assert local_faucet() == faucet_keypair()
    assert f"faucet       {local_faucet().pubkey()}" in text
    assert "frozen" in lines[1]


def test_airdrop_and_deploy_as_people_type_them(local, tmp_path, psyche):
    def keypair(name, seed):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(list(bytes(Keypair.from_seed(bytes([seed]) * 32)))))
        file.chmod(0o600)
        return str(file), Keypair.from_seed(bytes([seed]) * 32).pubkey()

    (wallet, address), (own, program) = keypair("wallet", 5), keypair("program", 6)
    payer = ("--url", local.url, "--keypair", wallet)
    place = (*payer, "--program", own)
    code, _, errors = psyche("deploy", "authorizer", *place)
    assert (code, f"error: {address} has 0.000000 SOL and needs 0." in errors) == (1, True)
    assert psyche("airdrop", "2.5", *payer)[1] == f"{address} has 2.500000000 SOL.\n"
    code, output, _ = psyche("deploy", "authorizer", *place, "--dry-run")
    assert (code, "stay in the program's accounts; it has 2.500000" in output) == (0, True)
    assert psyche("deploy", "authorizer", *place)[1].splitlines()[-1] == f"{program}  authorizer"
    assert "there already, the same" in psyche("deploy", "authorizer", *place)[1]
    # On a local chain the faucet pays for and upgrades what was there from the start.
    assert "there already, the same" in psyche("deploy", "coordinator", "--url", local.url)[1]


def test_mistakes_are_explained(psyche):
    for arguments, words in (
        (("deploy", "nothing"), "there is no program 'nothing'; choose authorizer, coordinator, treasurer"),
        (("deploy", "authorizer", "--url", "moonnet"), "there is no cluster 'moonnet'"),
        (("deploy", "authorizer", "--url", "http://127.0.0.1:9"), "no RPC service of http://127.0.0.1:9 answers"),
        (("deploy", "authorizer", "--keypair", "/nowhere.json"), "there is no wallet /nowhere.json"),
        (("airdrop", "1", "xyz"), "'xyz' is no address"),
        (("localnet", "--ledger", "/proc/nowhere", "--port", "0"), "cannot use the ledger /proc/nowhere"),
    ):
        code, _, errors = psyche(*arguments)
        assert (code, words in errors.replace("\n", " ")) == (1, True), errors


def test_a_port_that_is_taken(local, psyche):
    code, _, errors = psyche("localnet", "--port", local.url.rpartition(":")[2])
    assert (code, "Choose another --port" in errors) == (1, True)
