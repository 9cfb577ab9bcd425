"""The coordinator program against its model: the same bytes and the same refusals, whatever is sent."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from psyche_lightning_solana import hosting
from psyche_lightning_solana.account import Member, RunAccounts, at_rest, read, write_coordinator, write_manifest
from psyche_lightning_solana.errors import NUMBERS
from psyche_lightning_solana.interface import COORDINATOR
from psyche_lightning_solana.layout import MAX_CLIENTS
from solana_support.native import NativeProgram
from solana_support.traffic import Traffic, Trial, World
from solana_support.twins import MAX_UNITS, Disagreement, Seen

from psyche_lightning.protocol.state import Phase as RunPhase
from psyche_lightning.wire.canonical import sha256

INSTRUCTIONS = 20_000
# ClientsFull needs 257 wallets and has a test of its own. The machine refuses earlier than the others, or they are
# Psyche's alone.
UNREACHED = {
    "CoordinatorAccountIncorrectSize",
    "ClientsFull",
    "ProgressSanityCheckFailed",
    "CloseCoordinatorNotHalted",
    "NoActiveRound",
    "WitnessesFull",
    "InvalidCommitteeSelection",
    "RunIdInvalidLength",
}


@pytest.mark.timeout(1800)
def test_the_program_and_its_model_never_differ() -> None:
    seen = Seen()

    # A failure is shortened by the trial itself.
    @settings(
        max_examples=40,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32), st.sampled_from([1, 2, 3, 6, 9, 40]), st.booleans())
    def small(seed: int, wallets: int, remember: bool) -> None:
        seen.add(Trial(seed, 450, wallets, remember=remember).run())

    small()
    large = Seen()
    for seed in (1, 2):
        large.add(Trial(seed, 1200, wallets=256, patient=True, remember=seed == 1).run())
    assert seen.total + large.total >= INSTRUCTIONS
    # The traffic went everywhere.
    assert set(seen.instructions) == set(COORDINATOR.instructions)
    assert set(seen.phases) == {phase.name for phase in RunPhase}
    assert seen.epochs > 100
    assert large.epochs > 1
    assert large.instructions["witness"] > 100
    numbers = {number for _, number in seen.refusals}
    assert {number for name, number in NUMBERS.items() if number >= 6000 and name not in UNREACHED} <= numbers
    assert {101, 102, 2003, 2006, 3000, 3001, 3002, 3003, 3005, 3006, 3007, 3010} <= numbers
    assert max((seen.units | large.units).values()) < MAX_UNITS


def test_a_disagreement_is_found_and_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    real = hosting.withdraw

    def forgetful(run: RunAccounts, user: bytes, clock: hosting.Clock) -> RunAccounts:
        """A member that leaves stays pending."""
        changed = real(run, user, clock)
        return run if run.pending != changed.pending else changed

    monkeypatch.setattr(hosting, "withdraw", forgetful)
    with pytest.raises(Disagreement, match=r"(?s)withdraw leaves other bytes.*shortest:") as found:
        Trial(0, 600).run()
    steps = str(found.value).split("shortest:\n")[1].splitlines()
    assert Counter(step.split()[1] for step in steps)["withdraw"] >= 1
    assert len(steps) < 20, "what is not needed to show it is left out"


@pytest.mark.parametrize("seed", [3, 4])
def test_a_list_of_members_that_is_full(seed: int) -> None:
    """Wallets that left have all places but a few; newcomers get the places of some."""
    world = World(9)
    traffic = Traffic(seed, world)
    while not (world.exists and world.twins.run(world.keys).state.phase is RunPhase.WAITING_FOR_MEMBERS):
        world.take(traffic.next())
    run = world.twins.run(world.keys)
    gone = [Member(sha256(bytes([i])), sha256(bytes([i, 1])), earned=i % 50 and 1) for i in range(MAX_CLIENTS)]
    full = replace(run, members=(*run.members, *gone)[:MAX_CLIENTS])
    world.twins.put(world.keys.coordinator_account, world.twins.program, write_coordinator(full))
    for _ in range(400):
        world.take(traffic.next())
    numbers = {number for _, number in world.twins.seen.refusals}
    assert NUMBERS["ClientsFull"] in numbers
    assert world.twins.seen.phases[RunPhase.ROUND_TRAIN.name]


@pytest.mark.parametrize(("seed", "wallets"), [(1, 6), (2, 3), (4, 40)])
def test_the_accounts_hold_all_that_decides(seed: int, wallets: int) -> None:
    world = World(wallets)
    traffic = Traffic(seed, world)
    compared = 0
    for _ in range(250):
        world.take(traffic.next())
        if not world.exists:
            continue
        run = world.twins.run(world.keys)
        assert read(write_coordinator(run), write_manifest(run)) == run == at_rest(run)
        compared += 1
    assert compared > 100


@pytest.mark.slow
@pytest.mark.clang(native=True)
def test_the_sanitizers_find_nothing_and_the_native_build_does_the_same(tmp_path: Path) -> None:
    seen = Seen()
    with NativeProgram("coordinator", tmp_path) as native:
        for seed in range(24):
            seen.add(Trial(seed, 300, wallets=[1, 3, 6, 40][seed % 4]).run(native))
        seen.add(Trial(7, 800, wallets=256, patient=True).run(native))
    assert set(seen.phases) == {phase.name for phase in RunPhase}
    assert seen.total > 7000
