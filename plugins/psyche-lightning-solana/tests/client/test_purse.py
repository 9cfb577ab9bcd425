"""A node's wallet that runs dry, and a chain that goes back."""

from itertools import pairwise

import pytest
from psyche_lightning_solana.client.cluster import Cluster, Options
from psyche_lightning_solana.client.feed import Feed, Snapshot
from psyche_lightning_solana.client.fees import SIGNATURE_FEE
from psyche_lightning_solana.client.purse import LAST
from psyche_lightning_solana.layout import COORDINATOR, COORDINATOR_SIZE
from solders.pubkey import Pubkey
from solders.system_program import TransferParams, transfer

from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.requests import GetRounds, Join
from psyche_lightning.protocol.state import Phase


def test_a_wallet_that_runs_dry_leaves_while_it_can_pay(run, play, player, manifest, caplog):
    async def test(world):
        owner = await world.owner(total_steps=1000, min_clients=1)
        rich, poor = world.node(), world.node(wallet=world.wallet(5 * 10**6))
        for client in (rich, poor):
            await client.request(Join("tcp://127.0.0.1:1", manifest, "eu-west"))
        assert "'eu-west'; a run on a chain has no place for it" in caplog.text
        assert "pays for about" in caplog.text, "the run has 1000 steps, and 0.005 SOL are fewer transactions"
        me = poor.run.wallet.public
        rest = await poor.run.reader.rent(0) + (LAST + 5) * SIGNATURE_FEE
        gone = world.balance(me) - SIGNATURE_FEE - rest
        spend = transfer(TransferParams(from_pubkey=me, to_pubkey=rich.run.wallet.public, lamports=gone))
        await poor.run.sender.send("spend", [spend])
        with pytest.raises(CoordinatorError, match="pays for only a few more transactions") as caught:
            await play([player(rich), player(poor)], lambda state: False)
        assert caught.value.code == "Unfunded"
        state = (await owner.look()).state
        assert [client.signer for client in state.healthy] == [rich.signer], "it withdrew, and the other goes on"
        assert world.balance(me) > await poor.run.reader.rent(0)

    caplog.set_level("WARNING", "psyche_lightning_solana")
    run(test, programs=True)


def shown(slot, nonce):
    """A run's accounts at a slot, after so many changes."""
    data = bytearray(COORDINATOR_SIZE)
    at = COORDINATOR.fields["nonce"][1]
    data[at : at + 8] = nonce.to_bytes(8, "little")
    return Snapshot(slot, bytes(data), b"")


def test_a_chain_that_went_back_is_told_and_followed(caplog):
    now = [0.0]
    cluster = Cluster("localnet", (), None, Options())
    feed = Feed(cluster, None, Pubkey.default(), Pubkey.default(), check=lambda found: None, clock=lambda: now[0])

    def take(time, slot, nonce):
        now[0] = time
        return feed._take(shown(slot, nonce)).nonce

    assert take(0, 10, 5) == 5
    # A service that lags: an older state at an older slot, until it has caught up.
    assert [take(1, 7, 3), take(3.5, 9, 4), take(4, 11, 5)] == [5, 5, 5]
    assert caplog.text.count("went back") == 0 or take(4.5, 12, 5) == 5
    caplog.clear()
    # An older state at a later slot is not believed at once, and not if it is gone soon.
    assert [take(10, 20, 3), take(11, 21, 5), take(14, 22, 3)] == [5, 5, 5]
    assert caplog.text == ""
    news = feed.news()
    assert take(17.5, 23, 3) == 5
    assert (
        "the chain localnet went back: at slot 23 it shows change 3 of the run, after change 5 at slot 21"
        in caplog.text
    )
    assert not news.is_set()
    assert take(18.5, 24, 3) == 3
    assert news.is_set()
    assert feed.returns == 1
    # So it is with a chain that begins again at an earlier slot, but later: a service may lag.
    assert take(20, 100, 9) == 9
    assert [take(30, 50, 4), take(40, 70, 4), take(46, 80, 4)] == [9, 9, 4]
    assert feed.returns == 2


def test_several_nodes_follow_a_chain_that_went_back(run, play, player, reached, manifest, caplog):
    async def test(world):
        owner = await world.owner(total_steps=9)
        clients = [world.node() for _ in range(3)]
        for client in clients:
            await client.request(Join("tcp://127.0.0.1:1", manifest))
        players = [player(client) for client in clients]
        await play(players, lambda state: state.step == 4)
        place = (await owner.run.keys()).coordinator_account
        kept = world.chain.account(place)
        await play(players, lambda state: state.step == 7)
        seen = [max(state.nonce for state in one.states) for one in players]
        world.chain.store({place: kept})  # the blocks since then are lost
        world.chain.advance(2)
        last = await play(players, reached(Phase.FINISHED))
        assert last.checkpoint.step == 9
        for one, nonce in zip(players, seen, strict=True):
            back = next(state for state in one.states[::-1] if state.nonce >= nonce)
            assert back.step > 6, "it went on beyond what was lost"
            nonces = [state.nonce for state in one.states]
            assert any(after < before for before, after in pairwise(nonces)), "it was shown less"
        assert caplog.text.count("now follows the chain localnet from change") >= len(clients)
        # What was trained twice is decided twice, once more after the other; the record has each step once.
        rounds = await clients[0].request(GetRounds(0, 0))
        assert [round_.step for round_ in rounds] == [*range(1, 10), 0]

    caplog.set_level("WARNING", "psyche_lightning_solana")
    run(test, programs=True)
