"""Nodes that only go through the motions of a run: they join and report in every phase, and train nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.bloom import participants_bloom
from psyche_lightning.protocol.committee import round_selection
from psyche_lightning.protocol.requests import Coordinator, Join, Report, Vote, WarmupWitness, Witness
from psyche_lightning.protocol.state import Phase, RunState
from psyche_lightning.wire.canonical import sha256

MANIFEST: dict[str, Any] = {"model": {"name": "none", "layers": 2}}
LATE = {"InvalidWitness", "InvalidRunState", "DuplicateWitness", "Halted", "InvalidCheckpoint"}
"""What a coordinator answers to a report that the run has overtaken: a node goes on."""
START = sha256(b"start")

Until = Callable[[RunState], bool]


def finished(state: RunState) -> bool:
    """Whether the run is at its end."""
    return state.phase is Phase.FINISHED


async def walk(
    client: Coordinator,
    *,
    manifest: dict[str, Any] | None = None,
    seen: Callable[[RunState], None] = lambda state: None,
    until: Until = finished,
) -> RunState:
    """Be a node: join, report in every phase, and return the state in which ``until`` holds.

    Args:
        client: the node's own.
        manifest: its manifest.
        seen: called with every state.
        until: by default, whether the run is finished.

    Raises:
        CoordinatorError: a report was refused for another reason than that it came too late.
    """
    await client.request(Join("nowhere", manifest or MANIFEST))
    async for state in client.watch():
        seen(state)
        if until(state):
            return state
        try:
            await report(client, state)
        except CoordinatorError as error:
            if error.code not in LATE:
                raise
    raise AssertionError("the stream of states ended")


async def report(client: Coordinator, state: RunState) -> None:
    """Report what a node that has everything would report in this state, if it did not yet."""
    me, round_ = client.signer, state.current
    signers = [member.signer for member in state.clients]
    if me not in signers:
        return
    index = signers.index(me)
    if state.phase is Phase.WARMUP and all(record.proof.index != index for record in state.warmup_witnesses):
        await client.request(WarmupWitness(state.epoch, index, state.checkpoint.digest or START))
    elif state.phase in (Phase.ROUND_TRAIN, Phase.ROUND_WITNESS) and round_ is not None and me in round_.clients:
        index = round_.clients.index(me)
        due = round_selection(round_, state.config).is_witness(index)
        if due and all(record.proof.index != index for record in round_.witnesses):
            await witness(client, state)
    elif state.phase is Phase.COOLDOWN and all(vote[0] != me for vote in state.checkpoint_votes):
        await client.request(Vote(state.epoch, state.step - 1, sha256(b"end", bytes([state.step % 256]))))


async def witness(client: Coordinator, state: RunState, *, ahead: int = 0, as_client: bytes | None = None) -> None:
    """Report as a witness that heard from everyone.

    Args:
        client: who reports.
        state: with a round under way.
        ahead: how many rounds later than the current one the report claims to be about.
        as_client: the signer whose seat it claims, when it is not its own.
    """
    round_ = state.current
    assert round_ is not None
    index = round_.clients.index(as_client or client.signer)
    bloom = participants_bloom(round_.seed, round_.clients)
    trained = round_.step or state.step - 1  # in a round that drains, the figures are still those of the last step
    figures = Report(trained, 3.0 - 0.01 * trained, 1000.0, 100 * round_.height, 100 * round_.height)
    await client.request(
        Witness(
            state.epoch,
            round_.height + ahead,
            round_selection(round_, state.config).witness_proof(index),
            sha256(b"list", bytes([round_.height % 256])),
            bloom,
            bloom,
            figures,
        )
    )


async def state_when(client: Coordinator, condition: Until) -> RunState:
    """The first state that ``client`` sees in which the condition holds."""
    async for state in client.watch():
        if condition(state):
            return state
    raise AssertionError("the stream of states ended")
