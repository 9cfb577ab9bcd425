"""A local chain, real RPC services before it that fail as told, funded wallets, and runs with clients."""

import asyncio
import contextlib
import itertools
import math
import random
from dataclasses import asdict

import pytest
from psyche_lightning_localnet import LocalChain, LocalServer, SlotClock
from psyche_lightning_solana.client.admin import SolanaAdmin
from psyche_lightning_solana.client.cluster import Cluster, Endpoint, Options
from psyche_lightning_solana.client.coordinator import SolanaCoordinator
from psyche_lightning_solana.client.ledger import Ledger
from psyche_lightning_solana.client.reader import Reader
from psyche_lightning_solana.client.record import Log
from psyche_lightning_solana.client.rpc import PoolProvider
from psyche_lightning_solana.client.run import SolanaRun
from psyche_lightning_solana.client.sender import Sender
from psyche_lightning_solana.client.story import Story
from psyche_lightning_solana.client.wallet import Wallet
from psyche_lightning_solana.localnet import local_chain
from solana_support.proxy import Proxy
from solders.system_program import TransferParams, transfer

from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.bloom import participants_bloom
from psyche_lightning.protocol.committee import round_selection
from psyche_lightning.protocol.requests import Join, Report, WarmupWitness, Witness
from psyche_lightning.protocol.state import CoordinatorConfig, Phase
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import Identity

CONFIG = {
    **asdict(CoordinatorConfig()),
    "total_steps": 4,
    "global_batch_size_start": 8,
    "global_batch_size_end": 8,
    "init_min_clients": 2,
    "warmup_time": 600,
    "max_round_train_time": 600,
    "round_witness_time": 600,
    "cooldown_time": 600,
    "waiting_for_members_extra_time": 1,
}
MANIFEST = {"run": {"overlap": False, "seed": 1}, "model": {"layers": 2, "name": "x"}}


async def quickly(seconds):
    """A sleep for tests: a thousandth as long, so that slots still pass."""
    await asyncio.sleep(min(seconds / 20, 0.5))


class World:
    """A chain and ``services`` misbehaving services before it."""

    def __init__(self, server, proxies):
        self.server, self.chain, self.proxies = server, server.chain, proxies
        self.opened = []

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
        return PoolProvider(self.endpoints(), **{**settings, **given})

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

    # --- runs -------------------------------------------------------------------------------------------------------

    def cluster(self, genesis=None, **options):
        return Cluster("localnet", tuple(self.endpoints()), genesis, Options(**{"poll": 1.0, **options}))

    def access(self, run_id="run", wallet=None, **options):
        found = SolanaRun(self.cluster(**options), run_id, wallet or self.wallet(), sleep=quickly)
        found.provider._longest = 1.0
        self.opened.append(found)
        return found

    async def owner(self, run_id="run", *, start=True, manifest=MANIFEST, everybody=True, **config):
        """A created run's administrator."""
        admin = SolanaAdmin(self.access(run_id))
        await admin.create({**CONFIG, **config}, manifest=manifest, everybody=everybody)
        if start:
            await admin.start()
        return admin

    def node(self, run_id="run", wallet=None, patience=60.0, cluster=None, **options):
        """A node's client."""
        wallet = wallet or self.wallet()
        client = SolanaCoordinator(
            cluster or self.cluster(**options),
            run_id,
            Identity.generate(),
            wallet=wallet,
            patience=patience,
            sleep=quickly,
        )
        client.run.provider._longest = 1.0
        self.opened.append(client)
        return client

    async def ledger(self, admin):
        """Names and results of all transactions of a run that landed, and its story."""
        self.chain.advance(2)
        keys = await admin.run.keys()
        story = Story(keys.program, keys.coordinator_account)
        story.take(await Ledger(admin.run.reader, keys.coordinator_account).entries())
        return [(row.instruction, row.result) for row in story.rows], story

    async def rows(self, *clients):
        """``(instruction, result)`` of what these clients sent."""
        for client in clients:
            await client.run.sender.close()  # the log knows units only a moment later
        return [(row.instruction, row.result) for client in clients for row in client.run.log.records]


class Player:
    """Plays a node: reports all that the state asks for but ``silent``; its figures are ``late`` steps old."""

    def __init__(self, client, silent=(), late=0):
        self.client, self.silent, self.late = client, set(silent), late
        self.states, self.errors = [], []

    async def play(self, until):
        async for state in self.client.watch():
            self.states.append(state)
            if until(state):
                return state
            try:
                await self.act(state)
            except CoordinatorError as error:
                self.errors.append(error)
        raise AssertionError("the watch ended")

    async def act(self, state):
        me, client = self.client.signer, self.client
        index = next((i for i, c in enumerate(state.clients) if c.signer == me), None)
        if state.phase.name.lower() in self.silent:
            return
        if state.phase is Phase.WAITING_FOR_MEMBERS:
            await client.request(Join("tcp://127.0.0.1:1", MANIFEST))
            if state.checkpoint.digest and me not in state.holders:  # it has what the owner went back to
                await client.request(WarmupWitness(state.epoch, 0, state.checkpoint.digest))
        if index is None:
            return
        reported = {record.proof.index for record in state.warmup_witnesses}
        if state.phase is Phase.WARMUP and index not in reported:
            await client.request(WarmupWitness(state.epoch, index, state.checkpoint.digest or b"\1" * 32))
        elif state.phase is Phase.ROUND_TRAIN:
            round_ = state.current
            seat = round_.clients.index(me)
            selection = round_selection(round_, state.config)
            if selection.is_witness(seat) and seat not in {w.proof.index for w in round_.witnesses}:
                proof = selection.witness_proof(seat)
                merkle = sha256(bytes([round_.height]))
                held = state.step - 1, sha256(bytes([state.step]))
                # While an epoch drains, figures are still of the last step.
                trained = max(round_.step - self.late, 0) if round_.step else state.step - 1
                loss = 2.0 + trained / 4 if trained else math.nan
                report = Report(trained, loss, 100.0, 10, 20, (), trained * 1e-4, round_.height % 2, (trained, 7))
                filters = participants_bloom(round_.seed, round_.clients), bytes(192)
                await client.request(Witness(state.epoch, round_.height, proof, merkle, *filters, *held, report))


def reached(phase, epoch=None):
    return lambda state: state.phase is phase and epoch in (None, state.epoch)


@contextlib.asynccontextmanager
async def world(services=1, slot_ms=20, programs=False):
    clock = SlotClock(slot_ms)
    chain = local_chain(clock) if programs else LocalChain(clock)
    async with LocalServer(chain) as server, contextlib.AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(Proxy(server.url, server.ws_url)) for _ in range(services)]
        here = World(server, proxies)
        try:
            yield here
        finally:
            for client in here.opened:
                await client.close()


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


@pytest.fixture(name="play")
def play_fixture():
    """``play(players, until)``: let players act together until one of them sees it."""

    async def play(players, until, timeout=60.0):
        tasks = [asyncio.ensure_future(player.play(until)) for player in players]
        done, rest = await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        assert done, [(p.states[-1].phase, p.states[-1].nonce, p.errors[-1:]) for p in players if p.states]
        return next(iter(done)).result()

    return play


@pytest.fixture(name="player")
def player_fixture():
    return Player


@pytest.fixture(name="reached")
def reached_fixture():
    return reached


@pytest.fixture(name="manifest")
def manifest_fixture():
    return MANIFEST


@pytest.fixture(name="config")
def config_fixture():
    return dict(CONFIG)
