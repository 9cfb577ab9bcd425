"""Joining a run with authorizations, good and bad: the authorizer and the coordinator together."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from psyche_lightning_solana.interface import AUTHORIZER, CHECKPOINT_SCOPE, COORDINATOR, JOIN_SCOPE
from psyche_lightning_solana.programs import image
from solana_support.calls import call
from solana_support.treasury import CONFIG, MODEL, PROGRESS, Treasury
from solana_support.vm import Outcome, Vm, must
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.system_program import ID as SYSTEM_PROGRAM

ANYBODY = Pubkey.default()
CREATE, GRANT, DELEGATE, CLOSE = (
    AUTHORIZER.instructions[f"authorization_{name}"] for name in ("create", "grantor_update", "grantee_update", "close")
)


@dataclass
class Gate:
    """A run that waits for members; ``world.joiner`` is its join authority, ``world.user`` wants to join."""

    world: Treasury

    def authorize(
        self,
        grantee: Pubkey,
        *,
        scope: bytes = JOIN_SCOPE,
        grantor: Keypair | None = None,
        active: bool = True,
        program: Pubkey | None = None,
    ) -> Pubkey:
        grantor, program = grantor or self.world.joiner, program or self.world.authorizer
        seeds = [b"Authorization", bytes(grantor.pubkey()), bytes(grantee), scope]
        address = Pubkey.find_program_address(seeds, program)[0]
        accounts = {
            "payer": self.world.vm.payer.pubkey(),
            "grantor": grantor.pubkey(),
            "authorization": address,
            "system_program": SYSTEM_PROGRAM,
        }
        create = call(program, CREATE, accounts, {"grantee": bytes(grantee), "scope": list(scope)})
        grant = call(program, GRANT, accounts, {"active": active})
        must(self.world.vm.send([create, grant], [grantor]))
        return address

    def join(self, authorization: Pubkey, user: Keypair | None = None) -> Outcome:
        user = user or self.world.user
        identity = {"signer": bytes(user.pubkey()), "p2p_identity": bytes(user.pubkey())}
        accounts = {
            "user": user.pubkey(),
            "authorization": authorization,
            "coordinator_instance": self.world.instance,
            "coordinator_account": self.world.account,
            "manifest": self.world.manifest,
            "node": user.pubkey(),
        }
        instruction = call(
            self.world.coordinator, COORDINATOR.instructions["join_run"], accounts, {"client_id": identity}
        )
        return self.world.vm.send([instruction], [user])


@pytest.fixture
def gate() -> Gate:
    world = Treasury(Vm(features=True))
    must(world.create())
    many = CONFIG | {"init_min_clients": 3, "min_clients": 3, "witness_nodes": 0}
    must(world.update(config=many, model=MODEL, progress=PROGRESS, paused=False))
    return Gate(world)


def test_by_name_as_anybody_and_as_a_delegate(gate: Gate) -> None:
    world, user, delegate = gate.world, gate.world.user, gate.world.vm.wallet()
    named = gate.authorize(user.pubkey())
    must(gate.join(named))
    assert gate.join(named, delegate).error == 2003
    accounts = {
        "payer": world.vm.payer.pubkey(),
        "grantee": user.pubkey(),
        "authorization": named,
        "system_program": SYSTEM_PROGRAM,
    }
    others = [bytes([7]) * 32, bytes(delegate.pubkey())]
    add = call(world.authorizer, DELEGATE, accounts, {"delegates_clear": False, "delegates_added": others})
    must(world.vm.send([add], [user]))
    must(gate.join(named, delegate))
    clear = call(world.authorizer, DELEGATE, accounts, {"delegates_clear": True, "delegates_added": []})
    must(world.vm.send([clear], [user]))
    assert gate.join(named, delegate).error == 2003
    must(gate.join(gate.authorize(ANYBODY), delegate))


def test_what_does_not_let_one_in(gate: Gate) -> None:
    world, user, stranger = gate.world, gate.world.user.pubkey(), gate.world.vm.wallet()
    assert gate.join(gate.authorize(stranger.pubkey())).error == 2003, "another's"
    assert gate.join(gate.authorize(user, grantor=stranger)).error == 2003, "of one who has no say"
    assert gate.join(gate.authorize(user, grantor=world.user)).error == 2003, "one's own"
    assert gate.join(gate.authorize(user, grantor=world.authority)).error == 2003, (
        "the run's authority is not the joins'"
    )
    assert gate.join(gate.authorize(user, scope=CHECKPOINT_SCOPE)).error == 2003, "for something else"
    assert gate.join(gate.authorize(user, scope=JOIN_SCOPE[:-1] + b"m")).error == 2003, (
        "for something of the same length"
    )
    assert gate.join(gate.authorize(user, scope=JOIN_SCOPE + b"!")).error == 2003, "for something longer"
    assert gate.join(gate.authorize(user, active=False)).error == 2003, "revoked"
    fake = world.vm.deploy(image("authorizer"))
    assert gate.join(gate.authorize(user, program=fake)).error == 3007, "of another authorizer"
    assert gate.join(world.vm.keypair().pubkey()).error == 3007, "nothing"
    assert gate.join(world.manifest).error == 3007
    assert world.state.members == ()


def test_a_revoked_and_a_closed_one(gate: Gate) -> None:
    world, user = gate.world, gate.world.user
    granted = gate.authorize(user.pubkey())
    must(gate.join(granted))
    accounts = {
        "grantor": world.joiner.pubkey(),
        "spill": world.vm.payer.pubkey(),
        "authorization": granted,
        "system_program": SYSTEM_PROGRAM,
    }
    must(world.vm.send([call(world.authorizer, GRANT, accounts, {"active": False})], [world.joiner]))
    assert gate.join(granted).error == 2003
    must(world.vm.send([call(world.authorizer, GRANT, accounts, {"active": True})], [world.joiner]))
    must(gate.join(granted))
    revoke = call(world.authorizer, GRANT, accounts, {"active": False})
    must(world.vm.send([revoke, call(world.authorizer, CLOSE, accounts)], [world.joiner]))
    assert gate.join(granted).error == 3007
