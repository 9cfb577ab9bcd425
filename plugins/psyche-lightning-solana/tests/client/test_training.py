"""Real nodes train through the chain while their RPC services fail."""

import asyncio
import random
import threading

import pytest
import torch
from psyche_lightning_solana.client.cluster import Cluster, Endpoint, Options
from psyche_lightning_solana.client.coordinator import SolanaCoordinator

from psyche_lightning.distro import DisTrO, DistroConfig
from psyche_lightning.node.audit import audit
from psyche_lightning.node.journal import MemoryJournal
from psyche_lightning.node.ledger import Ledger, read_ledger
from psyche_lightning.node.parameters import ParameterReplica
from psyche_lightning.node.participant import Participant
from psyche_lightning.node.runtime import NodeParts
from psyche_lightning.node.settings import Settings
from psyche_lightning.node.store import MemoryBlobStore
from psyche_lightning.protocol.state import Phase
from psyche_lightning.transports.memory import MemoryNetwork, MemoryTransport
from psyche_lightning.wire.identity import Identity

KINDS = ["drop", "lost", "garbage", "status 500", "status 429", "error -32005 behind"]


def samples(start, stop):
    return torch.randn(stop - start, 24, generator=torch.Generator().manual_seed(start))


class Node:
    """A node with a linear layer, in a thread of its own, behind RPC services of its own."""

    def __init__(self, number, network, proxies, wallet, manifest):
        torch.manual_seed(number)
        self.number = number
        self.module = torch.nn.Linear(24, 12)
        self.optimizer = DisTrO(self.module.named_parameters(), lr=0.01, config=DistroConfig(k=8))
        self.replica = ParameterReplica(self.optimizer, self.module)
        self.wallet, self.manifest, self.network, self.proxies = wallet, manifest, network, proxies
        self.identity = Identity.generate()
        self.steps, self.error, self.client = [], None, None
        self.journal, self.store, self.ledger = MemoryJournal(), MemoryBlobStore(), None
        self.thread = threading.Thread(target=self.train, daemon=True)
        self.stopping = threading.Event()
        self.pace, self.linger, self.polite = 0.0, 1.0, False

    def participant(self):
        cluster = Cluster("localnet", tuple(Endpoint(p.url, p.ws_url) for p in self.proxies), None, Options(poll=0.2))
        client = SolanaCoordinator(cluster, "run", self.identity, wallet=self.wallet)
        client.run.provider._longest = 1.0
        self.client = client
        return Participant(
            NodeParts(
                identity=self.identity,
                run_id="run",
                coordinator=client,
                transport=MemoryTransport(self.network),
                replica=self.replica,
                manifest=self.manifest,
                settings=Settings(False, 2, self.replica.layout, self.replica.payload_size, retry=0.2),
                store=self.store,
                journal=self.journal,
                ledger=self.ledger,
            ),
            patience=60.0,
        )

    def again(self):
        """The node after it was killed: nothing but its wallet and what was in its folder is left."""
        node = Node(self.number, self.network, self.proxies, self.wallet, self.manifest)
        node.identity, node.journal, node.store, node.ledger = self.identity, self.journal, self.store, self.ledger
        return node

    async def kill(self):
        self.linger = 0.0
        self.stopping.set()
        while self.thread.is_alive():
            await asyncio.sleep(0.02)

    def train(self):
        torch.set_num_threads(1)
        node = self.participant()
        try:
            node.start()
            while not self.stopping.is_set() and (work := node.next_round()) is not None:
                self.steps.append(work.step)
                self.stopping.wait(self.pace)
                inputs = torch.cat([samples(start, stop) for start, stop in work.batch])
                loss = (self.module(inputs) - inputs[:, :12]).square().mean()
                self.optimizer.zero_grad()
                loss.backward()
                nonce, payload = self.optimizer.nonce, self.optimizer.encode()
                node.submit(work, payload, nonce=nonce, lrs=self.optimizer.lr_bits(), loss=loss.item(), tokens=1)
                node.wait_applied(work)
        except BaseException as error:
            self.error = error
        finally:
            node.stop(withdraw=self.polite, linger=self.linger)

    def digest(self):
        return self.replica.digest(MemoryBlobStore().put)


async def finished(nodes, timeout=120.0):
    end = asyncio.get_running_loop().time() + timeout
    while any(node.thread.is_alive() for node in nodes):
        await asyncio.sleep(0.05)
        assert asyncio.get_running_loop().time() < end, [(node.steps, node.error) for node in nodes]
    told = "\n".join(f"{node.error}\n  {node.steps}\n  {node.client.run.log.records}" for node in nodes)
    assert not any(node.error for node in nodes), told


async def begin(world, count, manifest, folder=None, **config):
    owner = await world.owner(init_min_clients=count, **config)
    network = MemoryNetwork()
    nodes = [Node(i, network, world.proxies[i : i + 1], world.wallet(), manifest) for i in range(count)]
    for node in nodes:
        node.ledger = None if folder is None else Ledger(folder / str(node.number) / "ledger.jsonl")
        node.thread.start()
    return owner, nodes


def test_nodes_train_on_while_their_services_stumble(run, manifest):
    choice = random.Random(3)

    async def test(world):
        owner, nodes = await begin(
            world, 3, manifest, total_steps=12, max_round_train_time=20, round_witness_time=5, cooldown_time=90
        )
        while not all(node.steps for node in nodes):
            await asyncio.sleep(0.02)
            assert not any(node.error for node in nodes), nodes
        for number, each in enumerate(world.proxies):
            each.stumble(0.25, KINDS, random.Random(number))
        cuts = 0
        while any(node.thread.is_alive() for node in nodes) and cuts < 50:
            await asyncio.sleep(1.2)
            await choice.choice(world.proxies).cut()
            cuts += 1
            if cuts == 2:  # nobody reaches the chain for a while
                for each in world.proxies:
                    each.down = True
                await asyncio.sleep(1.5)
                for each in world.proxies:
                    each.down = False
        await finished(nodes)
        for each in world.proxies:
            each.heal()
        assert len({node.digest() for node in nodes}) == 1
        state = (await owner.look()).state
        assert state.phase is Phase.FINISHED
        assert nodes[0].digest() == state.checkpoint.digest
        assert state.checkpoint.step == 12
        rows, story = await world.ledger(owner)
        # Whatever was lost on the way, no report landed twice.
        landed = [row for row in rows if row[1] == "ok"]
        assert len(story.rows) - len(landed) <= 2
        assert story.run.state.checkpoint == state.checkpoint

    run(test, programs=True, services=3)


@pytest.mark.slow
def test_a_node_that_comes_back_makes_the_rounds_again_from_the_ledger(run, manifest):
    """Killed in the middle of an epoch, with its store; what it missed only the chain remembers."""

    async def test(world):
        _, nodes = await begin(world, 3, manifest, total_steps=30, max_round_train_time=60, cooldown_time=30)
        while len(nodes[2].steps) < 6:
            await asyncio.sleep(0.02)
        await nodes[2].kill()
        for node in nodes[:2]:
            node.pace = 8.0  # who misses three rounds is dropped, and a new address is known after 15 s
        again = nodes[2].again()
        again.thread.start()
        while len(again.steps) < 3:
            await asyncio.sleep(0.02)
            assert again.error is None
        for node in nodes[:2]:
            node.pace = 0.3
        await finished([nodes[0], nodes[1], again])
        assert len({node.digest() for node in (nodes[0], nodes[1], again)}) == 1
        assert again.client._replayed[0] == 0
        assert again.steps

    run(test, programs=True, services=3)


@pytest.mark.slow
@pytest.mark.parametrize("polite", [False, True])
def test_after_all_were_away_the_run_goes_on_from_the_last_decided_round(run, manifest, tmp_path, polite):
    """All are killed in the middle of an epoch, and who comes back first ends it; or all leave, which ends it, too."""

    async def test(world):
        times = {"max_round_train_time": 20, "round_witness_time": 5, "cooldown_time": 30, "warmup_time": 60}
        owner, nodes = await begin(world, 3, manifest, total_steps=40, epoch_time=7200, folder=tmp_path, **times)
        while len(nodes[0].steps) < 14:
            await asyncio.sleep(0.02)
        for node in nodes:
            node.polite = polite
            node.stopping.set()
        for node in nodes:
            await node.kill()
        assert (await owner.look()).state.phase.active == (not polite)
        nodes = [node.again() for node in nodes]
        nodes[0].thread.start()
        while (state := (await owner.look()).state).phase.active:
            world.chain.advance_seconds(3)
            await asyncio.sleep(0.1)
            assert not nodes[0].error, nodes[0].error
        assert (state.epoch, state.settled) == (1, False)
        for node in nodes[1:]:
            node.thread.start()
            world.chain.advance_seconds(20)
        await finished(nodes)
        assert len({node.digest() for node in nodes}) == 1
        _, story = await world.ledger(owner)
        assert story.run.state.phase is Phase.FINISHED
        assert story.run.state.checkpoint.step == 40
        assert any(node.client._replayed[0] == 0 for node in nodes)
        found = audit(row for node in nodes for row in read_ledger(node.ledger.path))
        assert found.problems == []
        assert (found.last_step, found.missing) == (40, [])

    run(test, programs=True, services=3)
