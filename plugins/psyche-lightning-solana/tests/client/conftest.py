"""A local chain, real RPC services before it that fail as told, and funded wallets."""

import asyncio
import contextlib
import itertools
import random

import pytest
from psyche_lightning_solana.client.cluster import Endpoint, Options
from psyche_lightning_solana.client.reader import Reader
from psyche_lightning_solana.client.record import Log
from psyche_lightning_solana.client.rpc import PoolProvider
from psyche_lightning_solana.client.sender import Sender
from psyche_lightning_solana.client.wallet import Wallet
from psyche_lightning_solana.localnet.chain import LocalChain
from psyche_lightning_solana.localnet.clock import SlotClock
from psyche_lightning_solana.localnet.server import LocalServer
from psyche_lightning_solana.testing.proxy import Proxy
from solders.system_program import TransferParams, transfer


async def quickly(seconds):
    """A sleep for tests: a thousandth as long, so that slots still pass."""
    await asyncio.sleep(min(seconds / 20, 0.1))


class World:
    """A chain and ``services`` misbehaving services before it."""

    def __init__(self, server, proxies):
        self.server, self.chain, self.proxies = server, server.chain, proxies
        self.problems = []

    def endpoints(self):
        return [Endpoint(proxy.url, proxy.ws_url) for proxy in self.proxies]

    def wallet(self, lamports=10**10):
        wallet = Wallet.generate()
        if lamports:
            self.chain.airdrop(wallet.public, lamports)
            self.chain.advance(2)
        return wallet

    def provider(self, **given):
        settings = {"sleep": quickly, "timeout": 1.0, "randomness": random.Random(0)}
        return PoolProvider(self.endpoints(), on_problem=self.problems.append, **{**settings, **given})

    def reader(self, commitment="confirmed", **given):
        return Reader(self.provider(**given), commitment)

    def sender(self, wallet=None, *, log=None, **given):
        options = given.pop("options", Options())
        settings = {"sleep": quickly, **given}
        reader = self.reader(options.commitment)
        return Sender(reader, wallet or self.wallet(), "r", options, "localnet", log or Log(), **settings)

    def balance(self, key):
        account = self.chain.account(key)
        return account.lamports if account else 0


@contextlib.asynccontextmanager
async def world(services=1, slot_ms=20):
    async with LocalServer(LocalChain(SlotClock(slot_ms))) as server, contextlib.AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(Proxy(server.url, server.ws_url)) for _ in range(services)]
        yield World(server, proxies)


def run(test, **settings):
    """Run ``test(world)`` with a chain of its own."""

    async def main():
        async with world(**settings) as here:
            return await test(here)

    return asyncio.run(main())


amounts = itertools.count(1_000_000)


def payment(wallet, target):
    return transfer(TransferParams(from_pubkey=wallet.public, to_pubkey=target, lamports=next(amounts)))


@pytest.fixture(name="run")
def run_fixture():
    return run


@pytest.fixture(name="payment")
def payment_fixture():
    return payment
