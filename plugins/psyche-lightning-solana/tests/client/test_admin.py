"""The owner's side, interrupted wherever it can be."""

import pytest
from psyche_lightning_solana.client.admin import SolanaAdmin
from psyche_lightning_solana.client.owner import Treasury, token_account
from psyche_lightning_solana.client.translate import config_section, of_recipe
from psyche_lightning_solana.client.wallet import Wallet
from psyche_lightning_solana.types import CONFIG, METADATA, MODEL, model_problem
from solders.system_program import CreateAccountParams, create_account
from spl.token.constants import TOKEN_PROGRAM_ID
from spl.token.instructions import InitializeMintParams, MintToParams, initialize_mint, mint_to

from psyche_lightning.errors import ConfigError, CoordinatorError
from psyche_lightning.protocol.requests import GetRounds, Join
from psyche_lightning.protocol.state import Phase
from psyche_lightning.recipe import load_recipe
from psyche_lightning.wire.canonical import sha256

MANIFEST = {"run": {"overlap": False, "seed": 1}, "model": {"names": [f"layer.{i}" for i in range(3000)]}}


async def create(admin, config, **given):
    return await admin.create(config, manifest=MANIFEST, everybody=True, **given)


def count(admin, most=None):
    """Count what an administrator sends, and interrupt it before one transaction too many."""
    sender, sent = admin.run.sender, []
    send = sender.send

    async def counting(name, *given, **more):
        if len(sent) == most:
            raise CoordinatorError("interrupted")
        receipt = await send(name, *given, **more)
        sent.append(name)
        return receipt

    sender.send = counting
    return lambda: len(sent)


def test_an_interrupted_creation_is_picked_up(run, config):
    """The process ends before its k-th transaction, for each k; the next call goes on from there."""

    async def test(world):
        admin = SolanaAdmin(world.access("whole"))
        sent = count(admin)
        whole = await create(admin, config)
        total = sent()
        assert total >= 6  # accounts, configuration, manifest in pieces, its digest, authorization
        for k in range(total):
            wallet, name = world.wallet(), f"run-{k}"
            interrupted = SolanaAdmin(world.access(name, wallet))
            count(interrupted, k)
            with pytest.raises(CoordinatorError, match="interrupted"):
                await create(interrupted, config)
            world.chain.advance(2)
            second = SolanaAdmin(world.access(name, wallet))
            sent = count(second)
            again = await create(second, config)
            assert sent() == total - k
            assert (again.state.config, again.manifest.digest) == (whole.state.config, whole.manifest.digest)
            assert again.state.phase is Phase.UNINITIALIZED
            # And once it is done, calling it again does nothing at all.
            third = SolanaAdmin(world.access(name, wallet))
            sent = count(third)
            await create(third, config)
            assert sent() == 0

    run(test, programs=True)


def test_updating_pausing_and_closing(run, config):
    async def test(world):
        admin = await world.owner()
        access = admin.run
        with pytest.raises(CoordinatorError, match="open already"):
            await admin.start()
        with pytest.raises(CoordinatorError) as caught:
            await admin.update(config={**config, "total_steps": 9})
        assert caught.value.code == "UpdateConfigNotHalted"
        with pytest.raises(CoordinatorError, match="pause it first"):
            await admin.close()
        await admin.update(metadata={"name": "n", "description": "d", "num_parameters": 3, "vocab_size": 4})
        assert (await admin.look()).described["num_parameters"] == 3
        assert (await admin.pause()).state.phase is Phase.PAUSED
        assert (await admin.pause()).state.phase is Phase.PAUSED
        changed = await admin.update(config={**config, "total_steps": 9, "warmup_time": 1.5}, rates=(700, 3))
        assert (changed.state.config.total_steps, changed.state.config.warmup_time) == (9, 2)
        assert changed.future_rates.earning_total_shared == 700
        assert (await admin.resume()).state.phase is Phase.WAITING_FOR_MEMBERS
        await admin.pause()
        former = (await admin.look()).state.incarnation
        held = [access.instance_address, access.manifest_address, (await access.keys()).coordinator_account]
        assert await admin.close() > 900_000_000
        world.chain.advance(2)
        assert all(world.chain.account(key) is None for key in held)
        fresh = SolanaAdmin(world.access(wallet=access.wallet))
        again = (await fresh.create(config, manifest=MANIFEST)).state
        assert again.phase is Phase.UNINITIALIZED
        assert len(again.incarnation) == len(former) == 16
        assert again.incarnation != former, "what nodes signed for the former run of this name would count"

    run(test, programs=True)


def test_only_the_owner_may(run, config):
    async def test(world):
        await world.owner()
        other = SolanaAdmin(world.access())
        for call in (other.pause, other.close, other.start, lambda: other.update(rates=(1, 1))):
            with pytest.raises(CoordinatorError, match="belongs to") as caught:
                await call()
            assert caught.value.code == "NotOwner"
        with pytest.raises(CoordinatorError, match="belongs to"):
            await create(other, config)
        with pytest.raises(CoordinatorError, match="cannot authorize"):
            await other.authorize(None)
        poor = SolanaAdmin(world.access("new", world.wallet(10_000_000)))
        with pytest.raises(CoordinatorError, match=r"holds 0\.01 SOL .* needs 0\.9") as caught:
            await create(poor, config)
        assert caught.value.code == "Unfunded"

    run(test, programs=True)


def test_wallets_join_by_authorization_and_lose_it(run, manifest):
    async def test(world):
        admin = await world.owner(everybody=False)
        client, other = world.node(), world.node()
        with pytest.raises(CoordinatorError, match="may not join"):
            await client.request(Join("", manifest))
        await admin.authorize(client.run.wallet.public)
        await admin.authorize(client.run.wallet.public)
        world.chain.advance(2)
        await client.request(Join("", manifest))
        with pytest.raises(CoordinatorError, match="may not join"):
            await other.request(Join("", manifest))
        assert await admin.revoke(client.run.wallet.public)
        assert not await admin.revoke(client.run.wallet.public)
        with pytest.raises(ConfigError, match="join, checkpoint"):
            await admin.authorize(None, "everything")

    run(test, programs=True)


def test_points_are_counted_and_paid_by_a_treasurer(run, play, player, reached, config, manifest):
    async def test(world):
        admin = SolanaAdmin(world.access())
        me, mint = admin.run.wallet.public, Wallet.generate()
        rent = await admin.run.reader.rent(82)
        make = create_account(
            CreateAccountParams(from_pubkey=me, to_pubkey=mint.public, lamports=rent, space=82, owner=TOKEN_PROGRAM_ID)
        )
        begin = initialize_mint(
            InitializeMintParams(decimals=0, mint=mint.public, program_id=TOKEN_PROGRAM_ID, mint_authority=me)
        )
        await admin.run.sender.send("mint", [make, begin], signers=[mint])
        world.chain.advance(2)
        one = {**config, "total_steps": 1}
        for _ in range(2):
            await admin.create(one, manifest=manifest, everybody=True, mint=mint.public)
        await admin.update(rates=(901, None))
        await admin.start()
        clients = [world.node() for _ in range(2)]
        for client in clients:
            await client.request(Join("", manifest))
        await play([player(client) for client in clients], reached(Phase.FINISHED))
        earned = {row.wallet: (row.earned, row.claimed) for row in await admin.points()}
        assert earned == {client.run.wallet.public: (450, 0) for client in clients}
        node = SolanaAdmin(world.access(wallet=clients[0].run.wallet))
        assert await node.claim() == 0  # the treasury is empty
        treasury = await Treasury.of(admin.run)
        vault = token_account(treasury.place, mint.public)
        fill = mint_to(
            MintToParams(program_id=TOKEN_PROGRAM_ID, mint=mint.public, dest=vault, mint_authority=me, amount=600)
        )
        await admin.run.sender.send("fill", [fill])
        world.chain.advance(2)
        with pytest.raises(CoordinatorError, match="451 cannot be claimed"):
            await node.claim(451)
        assert await node.claim(50) == 50
        assert await node.claim() == 400
        assert await node.claim() == 0
        paid = world.chain.account(token_account(clients[0].run.wallet.public, mint.public))
        assert int.from_bytes(bytes(paid.data)[64:72], "little") == 450
        assert {row.claimed for row in await admin.points()} == {450, 0}
        with pytest.raises(CoordinatorError, match="still claim"):
            await admin.close()
        plain = await world.owner("plain")
        with pytest.raises(CoordinatorError, match="no treasurer"):
            await plain.claim()

    run(test, programs=True)


def test_the_parameters_after_a_step_are_found_in_the_ledger(run, play, player, reached, manifest):
    async def test(world):
        admin = await world.owner(init_min_clients=1, min_clients=1)
        node = world.node()
        await node.request(Join("", manifest))
        await play([player(node)], reached(Phase.FINISHED))
        world.chain.advance(2)
        assert await admin.named_after(2) == sha256(bytes([3])), "as the player names them"
        assert await admin.named_after(4) == (await admin.look()).state.checkpoint.digest
        with pytest.raises(CoordinatorError, match="after step 9; the last steps that they named are 0, 1, 2, 3, 4"):
            await admin.named_after(9)

    run(test, programs=True)


def test_a_recipe_in_psyches_form():

    values = of_recipe(load_recipe("demo", ["total_steps=50", "max_round_train_time=0.5"]))
    config = config_section(values["config"])
    assert (config["total_steps"], config["max_round_train_time"]) == (50, 1)
    assert CONFIG.pack(config)
    assert MODEL.pack(values["model"])
    assert METADATA.pack(values["metadata"])
    assert model_problem(values["model"]) == ""
    assert "data" not in values["manifest"]
    with pytest.raises(ConfigError, match="65535"):
        config_section({**values["config"], "global_batch_size_end": 70_000})


def test_a_run_goes_on_from_an_earlier_step(run, play, player, reached, manifest):
    """What ``psyche run update --restart-from-step`` does, between two epochs, and the nodes' epoch after it."""

    async def test(world):
        owner = await world.owner(epoch_time=601, total_steps=6)
        clients = [world.node() for _ in range(2)]
        players = [player(client) for client in clients]
        for client in clients:
            await client.request(Join("tcp://127.0.0.1:1", manifest))
        await play(players, lambda state: state.step >= 4)
        await owner.pause()
        paused = await play(players, reached(Phase.PAUSED))
        assert paused.checkpoint.step >= 3
        digest = await owner.named_after(2)
        assert digest == sha256(bytes([3])), "the witnesses of step 3 named what they held after step 2"
        with pytest.raises(CoordinatorError, match="named the parameters after step 77"):
            await owner.named_after(77)
        state = (await owner.restart_from(2, digest)).state
        assert (state.checkpoint.step, state.checkpoint.digest, state.step) == (2, digest, 3)
        await owner.resume()
        for one in players:
            one.states.clear()
        last = await play(players, reached(Phase.FINISHED))
        assert last.checkpoint.step == 6
        seen = [state for state in players[0].states if state.phase is Phase.ROUND_TRAIN]
        assert (seen[0].epoch_digest, seen[0].step) == (digest, 3)
        assert [round_.step for round_ in await clients[0].request(GetRounds(seen[0].epoch, 0))] == [3, 4, 5, 6, 0]
        _, story = await world.ledger(owner)
        assert any(
            "goes back to the parameters" in event["text"] for event in story.status(await owner.look())["events"]
        )

    run(test, programs=True)
