"""The conformance kit of coordinators, with the real programs on a local chain."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import asdict, replace

import pytest
from psyche_lightning_localnet import LocalServer, SlotClock
from psyche_lightning_solana.client.admin import SolanaAdmin
from psyche_lightning_solana.client.cluster import parse
from psyche_lightning_solana.client.coordinator import SolanaCoordinator
from psyche_lightning_solana.client.run import SolanaRun
from psyche_lightning_solana.client.wallet import Wallet
from psyche_lightning_solana.localnet import local_chain

from psyche_lightning.protocol.requests import GetTerms
from psyche_lightning.protocol.state import CoordinatorConfig
from psyche_lightning.testing.coordinators import Connect, CoordinatorContract
from psyche_lightning.testing.walking import MANIFEST


@pytest.mark.slow
class TestSolana(CoordinatorContract):
    limit = 200.0
    # The layout has whole seconds, and room for no fewer samples than nodes.
    config = replace(
        CoordinatorContract.config,
        waiting_for_members_extra_time=1,
        global_batch_size_start=4,
        global_batch_size_end=4,
    )

    @contextlib.asynccontextmanager
    async def open_run(self, run_id: str, config: CoordinatorConfig) -> AsyncIterator[Connect]:
        chain = local_chain(SlotClock(40))
        async with LocalServer(chain) as server:
            cluster = parse(f"solana:{server.url}")

            def wallet() -> Wallet:
                fresh = Wallet.generate()
                chain.airdrop(fresh.public, 10**10)
                return fresh

            async with SolanaAdmin(SolanaRun(cluster, run_id, wallet())) as owner:
                chain.advance(2)
                await owner.create(asdict(config), manifest=MANIFEST, everybody=True)
                await owner.start()
                wallets = [wallet() for _ in range(6)]
                chain.advance(2)
                yield lambda identity: SolanaCoordinator(cluster, run_id, identity, wallet=wallets.pop())

    def test_terms_are_the_run_s_and_asking_does_not_join(self) -> None:
        """Here the owner, and not the first node, fixes the manifest."""

        async def scene(new):  # type: ignore[no-untyped-def]
            first = new()
            terms = await first.request(GetTerms())
            assert terms.config == replace(self.config, init_min_clients=2)
            assert (terms.unset, terms.manifest) == ((), MANIFEST)

        self.play(scene)
