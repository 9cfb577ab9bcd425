"""Whatever the authorizer and the treasurer are sent, they answer: they never touch memory that is not theirs."""

from __future__ import annotations

import random

import pytest
from psyche_lightning_solana.interface import AUTHORIZER, TREASURER
from solana_support.treasury import CONFIG, MODEL, PROGRESS, Treasury
from solana_support.vm import Vm
from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey


@pytest.mark.parametrize("seed", range(4))
def test_damaged_instructions_are_answered(seed: int) -> None:
    chance = random.Random(seed)
    world = Treasury(Vm(features=seed % 2 == 0)).ready()
    known = [account for account in world.accounts().values() if isinstance(account, Pubkey)]
    signers = {world.vm.payer.pubkey(), world.authority.pubkey(), world.user.pubkey(), world.joiner.pubkey()}
    update = {"config": CONFIG, "model": MODEL, "progress": PROGRESS, "paused": False, "client_version": "v"}
    data = [
        (world.treasurer, bytes(world.instruction("run_create", world.creation()).data)),
        (world.treasurer, bytes(world.instruction("run_update", update).data)),
        *((world.treasurer, spec.discriminator + bytes(8)) for spec in TREASURER.instructions.values()),
        *((world.authorizer, spec.discriminator + bytes(37)) for spec in AUTHORIZER.instructions.values()),
    ]
    answers = set()
    for _ in range(150):
        program, body = chance.choice(data)
        changed = bytearray(body)
        for _ in range(chance.choice([0, 0, 1, 3])):
            changed[chance.randrange(len(changed))] = chance.choice([0, 1, 2, 255, chance.randrange(256)])
        if chance.random() < 0.3:
            changed = changed[: chance.randrange(len(changed) + 1)] + chance.randbytes(chance.choice([0, 1, 40]))
        addresses = [chance.choice(known) for _ in range(chance.randrange(20))]
        if chance.random() < 0.5:
            addresses[:0] = [meta.pubkey for meta in world.instruction("run_update", update).accounts]
        metas = [
            AccountMeta(each, each in signers and chance.random() < 0.9, chance.random() < 0.8) for each in addresses
        ]
        outcome = world.send(Instruction(program, bytes(changed), metas))
        text = "\n".join([str(outcome.error), *outcome.logs])
        assert "ProgramFailedToComplete" not in text, text
        assert "violation" not in text.lower(), text
        answers.add(outcome.error)
    assert {101, 102, 3005} <= answers
