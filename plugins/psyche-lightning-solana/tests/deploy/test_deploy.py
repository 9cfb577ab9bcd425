"""Deploying through the loader, over HTTP, with a cluster that stumbles."""

import asyncio
import contextlib
import json

import pytest
from aiohttp import ClientSession, web
from psyche_lightning_localnet import LocalChain, LocalServer, SlotClock
from psyche_lightning_solana.client.cluster import local_program
from psyche_lightning_solana.client.wallet import Wallet
from psyche_lightning_solana.deploy import deployer as deploying
from psyche_lightning_solana.deploy import loader
from psyche_lightning_solana.deploy.deployer import Deployer, DeployError, Target
from psyche_lightning_solana.localnet import local_chain
from psyche_lightning_solana.programs import image
from solana.rpc.async_api import AsyncClient
from solana.rpc.commitment import Confirmed
from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.transaction import VersionedTransaction

IMAGE = image("authorizer")


class World:
    def __init__(self, chain, client):
        self.chain, self.client = chain, client
        self.payer = self.wallet(100 * 10**9)
        self.told = []

    def wallet(self, lamports):
        wallet = Wallet.generate()
        if lamports:
            self.chain.airdrop(wallet.public, lamports)
            self.chain.advance(1)
        return wallet

    def balance(self, wallet):
        account = self.chain.account(wallet.public)
        return account.lamports if account else 0

    def target(self, name=b"memo"):
        address, seed = loader.seeded_address(self.payer.public, b"program", name)
        return Target(address, seed=seed)

    def deployer(self, image=IMAGE, target=None, **options):
        payer = options.pop("payer", self.payer)
        return Deployer(
            self.client,
            payer,
            target or self.target(),
            image,
            progress=lambda done, total: self.told.append((done, total)),
            **options,
        )

    async def deploy(self, *given, **options):
        deployer = self.deployer(*given, **options)
        plan = await deployer.plan()
        await deployer.run(plan)
        return plan

    def uses(self, address):
        """Whether the program runs: what it is told makes no sense to it, and it says so."""
        outcome = self.chain.submit(self.chain.sign([Instruction(address, b"hello", [])], self.chain.faucet))
        self.chain.advance(1)
        return any(line.startswith(f"Program {address} consumed") for line in outcome.logs)


class Stumbling:
    """A service before the server that loses some of the requests."""

    def __init__(self, url):
        self._to = url
        self.lose = lambda method, number: False
        self.refuse = lambda method, number: False
        self.seen, self.pieces = {}, set()

    @contextlib.asynccontextmanager
    async def running(self):
        app = web.Application()
        app.router.add_post("/", self._post)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        async with ClientSession() as self._session:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        await runner.cleanup()

    async def _post(self, request):
        body = await request.json()
        method = body["method"]
        number = self.seen[method] = self.seen.get(method, 0) + 1
        self.pieces.add(body["params"][0] if method == "sendTransaction" else "")
        if self.refuse(method, number):
            return web.Response(status=429)
        if self.lose(method, number) and method == "sendTransaction":  # taken, and never seen again
            raw = VersionedTransaction.from_bytes(__import__("base64").b64decode(body["params"][0]))
            return web.json_response({"jsonrpc": "2.0", "id": body["id"], "result": str(raw.signatures[0])})
        async with self._session.post(self._to, json=body) as answer:
            return web.Response(body=await answer.read(), content_type="application/json")


def play(test, slot_ms=10, **settings):
    async def main():
        async with LocalServer(LocalChain(SlotClock(slot_ms), **settings)) as server:
            stumbling = Stumbling(server.url)
            async with stumbling.running() as url, AsyncClient(url, Confirmed) as client:
                world = World(server.chain, client)
                world.stumbling = stumbling
                return await asyncio.wait_for(test(world), 60)

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(deploying, "POLL", 0.01)
    monkeypatch.setattr(deploying, "PAUSE", 0.01)


def test_a_program_is_deployed_used_and_not_deployed_again():
    async def test(world):
        before = world.balance(world.payer)
        plan = await world.deploy()
        address = world.target().address
        assert not plan.upgrade
        assert world.uses(address)
        code = loader.read_code(world.chain.account(loader.code_address(address)))
        assert (code.authority, code.image) == (world.payer.public, IMAGE)
        assert world.told[-1] == (len(IMAGE), len(IMAGE))
        assert [done for done, _ in world.told] == sorted(done for done, _ in world.told)
        spent = before - world.balance(world.payer)
        assert plan.kept < spent <= plan.needed  # it says enough, and not much more
        assert plan.needed - spent < 890_880 + 100_000  # what a payer must be left with
        assert (await world.deployer().plan()).same

    play(test)


def test_an_upgrade_to_a_larger_program_by_its_authority_alone():
    async def test(world):
        await world.deploy()
        larger = IMAGE + b"x" * 5000
        with pytest.raises(DeployError, match=f"only {world.payer.public} may upgrade it"):
            await world.deployer(larger, payer=world.wallet(10**10), target=world.target()).plan()
        before = world.balance(world.payer)
        plan = await world.deploy(larger, priority=5000)
        assert (plan.upgrade, plan.more) == (True, 5000)
        spent = before - world.balance(world.payer)
        assert plan.kept < spent < plan.needed  # the buffer's lamports come back
        code = loader.read_code(world.chain.account(loader.code_address(world.target().address)))
        assert code.holds(larger)
        assert world.uses(world.target().address)
        plan = await world.deploy()  # back to the smaller one
        assert (plan.more, plan.kept) == (0, 0)
        assert loader.read_code(world.chain.account(loader.code_address(world.target().address))).holds(IMAGE)

    play(test)


def test_pieces_that_are_lost_are_sent_again():
    async def test(world):
        world.stumbling.lose = lambda method, number: number % 3 == 2
        world.stumbling.refuse = lambda method, number: number % 7 == 3
        await world.deploy()
        assert world.uses(world.target().address)

    play(test)


def test_broken_off_it_goes_on_with_the_same_buffer():
    async def test(world):
        world.stumbling.refuse = lambda method, number: method == "sendTransaction" and number > 12
        with pytest.raises(DeployError, match="Run the same command again"):
            await world.deploy()
        buffer, done = world.deployer()._buffer, world.told[-1][0]
        held = loader.read_buffer(world.chain.account(buffer))
        assert 0 < sum(map(bool, held.image)) < len(IMAGE)
        assert done > 0
        world.stumbling.refuse = lambda method, number: False
        world.stumbling.pieces.clear()
        plan = await world.deployer().plan()
        assert (plan.resumed, plan.buffer) == (True, buffer)
        await world.deploy()
        assert world.uses(world.target().address)
        # Pieces that are missing, each of more than 900 bytes, and the deployment.
        assert len(world.stumbling.pieces) <= -(-(len(IMAGE) - done) // 900) + 2

    play(test, slot_ms=5)  # so that a blockhash is soon over


def test_a_poor_wallet_is_told_how_much_it_needs():
    async def test(world):
        payer = world.wallet(10**7)
        deployer = world.deployer(payer=payer, target=Target(*world.target().__dict__.values()))
        plan = await deployer.plan()
        with pytest.raises(DeployError, match=r"has 0\.010000 SOL and needs (0\.\d{6}) .* send it 0\.\d{6} SOL more"):
            await deployer.run(plan)
        assert world.balance(payer) == 10**7
        exactly = world.wallet(plan.needed)
        address, seed = loader.seeded_address(exactly.public, b"program", b"memo")
        await world.deploy(payer=exactly, target=Target(address, seed=seed))
        assert world.uses(address)

    play(test)


def test_a_key_pair_of_its_own_and_a_program_that_does_not_verify():
    async def test(world):
        program = Wallet.generate()
        with pytest.raises(DeployError, match="there is no program"):
            await world.deployer(target=Target(program.public)).plan()
        broken = IMAGE[:4] + bytes(100) + IMAGE[104:]
        with pytest.raises(DeployError, match=r"refused: Transaction simulation failed.*invalid"):
            await world.deploy(broken, target=Target(program.public, program))
        assert world.chain.account(program.public) is None
        with pytest.raises(DeployError, match="is not a program"):
            await world.deployer(b"#!/bin/sh").plan()
        await world.deploy(target=Target(program.public, program))
        assert world.uses(program.public)
        with pytest.raises(DeployError, match="is no program of the upgradeable loader"):
            await world.deployer(target=Target(world.payer.public)).plan()

    play(test)


def test_a_cluster_that_does_not_answer():
    async def test(world):
        world.stumbling.refuse = lambda method, number: True
        with pytest.raises(DeployError, match=r"does not answer .*run the same command again"):
            await world.deployer().plan()

    play(test)


def test_the_chain_has_our_programs_from_the_start_and_finalized():
    now = 1_700_000_000_000
    chain = local_chain(SlotClock(running=False, unix_ms=now), seed=bytes(32))
    assert chain.clock.unix_ms() == now
    for name in ("authorizer", "coordinator", "treasurer"):
        address = local_program(name).pubkey()
        assert chain.account(address, "finalized").executable
        outcome = chain.submit(chain.sign([Instruction(address, b"", [])], chain.faucet))
        assert json.dumps(outcome.logs).count(f"Program {address} consumed") == 1  # it runs, and refuses
    assert chain.account(Keypair().pubkey()) is None
