"""Nodes for tests of coordinators: they join and report in every phase, but train nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.bloom import participants_bloom
from psyche_lightning.protocol.committee import round_selection, starting_digest
from psyche_lightning.protocol.requests import Coordinator, Figure, Join, Report, WarmupWitness, Witness
from psyche_lightning.protocol.state import Phase, RunState
from psyche_lightning.wire.canonical import sha256

MANIFEST: dict[str, Any] = {"model": {"name": "none", "layers": 2}}
LATE = {"InvalidWitness", "InvalidRunState", "DuplicateWitness", "Halted"}
"""Codes of the refusal of a report that came too late; a node ignores these."""
START = sha256(b"start")

Until = Callable[[RunState], bool]


def finished(state: RunState) -> bool:
    """Whether the run is finished."""
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
        client: the node's client.
        manifest: the node's manifest; None for :data:`MANIFEST`.
        seen: called with each state.
        until: the condition; by default, that the run is finished.

    Raises:
        CoordinatorError: the coordinator refused a report that did not come too late.
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
    """Send the report that is due in this state from a node that misses nothing, unless it has already been sent."""
    me, round_ = client.signer, state.current
    signers = [member.signer for member in state.clients]
    if me not in signers:
        return
    index = signers.index(me)
    if state.phase is Phase.WARMUP and all(record.proof.index != index for record in state.warmup_witnesses):
        held = starting_digest(state) or (end_digest(state.step - 1) if state.checkpoint.digest else START)
        if held != START or index == 0 or state.warmup_witnesses:  # the first member names those of a fresh run
            await client.request(WarmupWitness(state.epoch, index, held))
    elif state.phase.active and round_ is not None and me in round_.clients:
        index = round_.clients.index(me)
        due = round_selection(round_, state.config).is_witness(index)
        if due and all(record.proof.index != index for record in round_.witnesses):
            await witness(client, state, digest=end_digest(state.step - 1) if state.draining else b"")


def list_root(height: int) -> bytes:
    """The Merkle root that walking nodes report for a round."""
    return sha256(b"list", bytes([height % 256]))


def end_digest(step: int) -> bytes:
    """The digest of the parameters that walking nodes have after so many steps, when an epoch ends."""
    return sha256(b"end", bytes([step % 256]))


async def witness(
    client: Coordinator,
    state: RunState,
    *,
    root: bytes | None = None,
    digest: bytes = b"",
    heard: Sequence[bytes] | None = None,
    ahead: int = 0,
    as_client: bytes | None = None,
) -> None:
    """Report as a witness that heard all clients.

    Args:
        client: the client of the node that reports.
        state: a state with a round in progress.
        root: the Merkle root that it reports; None for that of all walking nodes.
        digest: digest of the parameters before the round's step, or empty.
        heard: signers whose results it has; None for everybody's.
        ahead: number of rounds to add to the height in the report; not 0 in a wrong report.
        as_client: signer whose seat the report claims; None for the node's own.
    """
    round_ = state.current
    assert round_ is not None
    index = round_.clients.index(as_client or client.signer)
    bloom = participants_bloom(round_.seed, round_.clients if heard is None else heard)
    trained = round_.step or state.step - 1  # a draining round repeats the figures of the last step
    norms = tuple(Figure(f"norm/{group}", trained, 1.0 + group) for group in range(2) if trained)
    figures = Report(trained, 3.0 - 0.01 * trained, 1000.0, 100 * round_.height, 100 * round_.height, norms)
    await client.request(
        Witness(
            state.epoch,
            round_.height + ahead,
            round_selection(round_, state.config).witness_proof(index),
            list_root(round_.height) if root is None else root,
            bloom,
            bloom,
            state.step - 1 if digest else 0,
            digest,
            figures,
        )
    )


async def state_when(client: Coordinator, condition: Until) -> RunState:
    """Watch until the condition holds; returns that state."""
    async for state in client.watch():
        if condition(state):
            return state
    raise AssertionError("the stream of states ended")
