"""Fixtures: a frozen chain with a real server and a real client."""

import asyncio
import base64
import contextlib

import pytest
from psyche_lightning_localnet.chain import MEMO, LocalChain
from psyche_lightning_localnet.clock import SlotClock
from psyche_lightning_localnet.server import LocalServer
from solana.rpc.async_api import AsyncClient
from solana.rpc.commitment import Processed
from solders.hash import Hash
from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.message import MessageV0
from solders.system_program import TransferParams, transfer
from solders.transaction import VersionedTransaction

START = 1_700_000_000


class World:
    """The parts of a test: the chain, its server, and a client that reads the newest state."""

    def __init__(self, server, client):
        self.server, self.chain, self.client = server, server.chain, client

    def keypair(self, lamports=10**10):
        keypair = Keypair()
        if lamports:
            self.chain.airdrop(keypair.pubkey(), lamports)
        return keypair

    def balance(self, key):
        account = self.chain.account(key)
        return account.lamports if account else 0

    async def call(self, method, *params):
        """Send a request without the client's API; returns the whole response."""
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": list(params)}
        response = await self.client._provider.session.post(self.server.url, json=request)
        return response.json()

    async def result(self, method, *params):
        return (await self.call(method, *params))["result"]

    async def refusal(self, method, *params):
        return (await self.call(method, *params))["error"]

    @staticmethod
    def refused(caught, kind, **data):
        """The error that solders built from a response."""
        (error,) = caught.value.args
        assert isinstance(error, kind), error
        for name, value in data.items():
            assert getattr(error.data, name) == value
        return error

    @staticmethod
    def b64(transaction):
        return base64.b64encode(bytes(transaction)).decode()

    async def signed(self, instructions, *signers):
        """Sign a transaction with the newest blockhash, which comes from the server."""
        blockhash = (await self.client.get_latest_blockhash(Processed)).value.blockhash
        return signed(instructions, *signers, blockhash=blockhash)


def signed(instructions, *signers, blockhash=None):
    message = MessageV0.try_compile(signers[0].pubkey(), list(instructions), [], blockhash or Hash.default())
    return VersionedTransaction(message, list(signers))


def pay(source, target, lamports=1_000_000):
    return transfer(TransferParams(from_pubkey=source.pubkey(), to_pubkey=target, lamports=lamports))


def memo(text):
    return Instruction(MEMO, text if isinstance(text, bytes) else text.encode(), [])


# Test files cannot import each other, so they get these functions from the world.
World.new_transaction, World.pay, World.memo = staticmethod(signed), staticmethod(pay), staticmethod(memo)


@contextlib.asynccontextmanager
async def world(*, slot_ms=400, ledger=None, **settings):
    clock = SlotClock(slot_ms, running=False, unix_ms=START * 1000)
    chain = LocalChain(clock, seed=bytes(32), **settings)
    async with LocalServer(chain, ledger=ledger) as server, AsyncClient(server.url, Processed) as client:
        yield World(server, client)


@pytest.fixture
def play():
    """Returns a function that runs ``test(world)`` with a new world."""

    def play(test, **settings):
        async def main():
            async with world(**settings) as here:
                return await asyncio.wait_for(test(here), 60)

        return asyncio.run(main())

    return play


@pytest.fixture(scope="session")
def small_program():
    """A real program: the SPL memo program that comes with the virtual machine."""
    from solders.litesvm import LiteSVM

    return bytes(LiteSVM().get_account(MEMO).data)
