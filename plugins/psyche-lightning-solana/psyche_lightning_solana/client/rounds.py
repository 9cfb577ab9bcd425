"""The rounds of an epoch: as this node saw them, or rebuilt from the run's transactions.

The account keeps four rounds; the ledger keeps all transactions. The epoch's first state follows from its present one,
each transaction has its slot and time, and the program's model in Python repeats the program's steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from solders.pubkey import Pubkey

from psyche_lightning.coordinator import machine
from psyche_lightning.coordinator.history import plain_round
from psyche_lightning.protocol.state import Checkpoint, ClientStatus, Phase, Round, RunState
from psyche_lightning_solana import hosting
from psyche_lightning_solana.account import RunAccounts
from psyche_lightning_solana.client.ledger import Call, Entry
from psyche_lightning_solana.errors import Refused
from psyche_lightning_solana.hosting import Clock
from psyche_lightning_solana.instructions import decode
from psyche_lightning_solana.interface import WITNESS_TRAILER

MAX_ROUNDS = 4096
"""Kept rounds of an epoch; a node that needs older ones takes a newer snapshot instead."""


class History:
    """The seen rounds of the newest epoch, without Bloom filters.

    A round is settled once a later one exists: its records no longer change.
    """

    def __init__(self) -> None:
        self.epoch = -1
        self._settled: dict[int, Round] = {}
        self._newest: Round | None = None

    def observe(self, state: RunState) -> None:
        """Add the rounds of a state."""
        current = state.current
        if current is None:
            return
        over = not state.phase.active
        epoch = state.epoch - over
        if epoch < self.epoch:
            return
        if epoch > self.epoch:
            self.epoch, self._settled = epoch, {}
        self._newest = plain_round(current)
        for round_ in state.rounds:
            if round_.height < current.height and round_.height not in self._settled:
                self._settled[round_.height] = plain_round(round_)
        for height in range(current.height - MAX_ROUNDS, -1, -1):
            if self._settled.pop(height, None) is None:
                break

    def fill(self, epoch: int, rounds: list[Round]) -> None:
        """Add settled rounds from elsewhere."""
        if epoch == self.epoch:
            for round_ in rounds:
                self._settled.setdefault(round_.height, plain_round(round_))

    def missing(self, epoch: int, first: int) -> bool:
        """Whether some round of that epoch, from height ``first`` on, is incomplete."""
        if epoch != self.epoch or self._newest is None:
            return False
        return any(height not in self._settled for height in range(first, self._newest.height))

    def rounds(self, epoch: int, first: int) -> list[Round]:
        """The rounds from height ``first`` to the newest (still growing) one; empty if one is missing."""
        if epoch != self.epoch or self._newest is None or first > self._newest.height or self.missing(epoch, first):
            return []
        return [*(self._settled[height] for height in range(first, self._newest.height)), self._newest]


def beginning(run: RunAccounts) -> RunAccounts:
    """The run when the current epoch was formed."""
    state = run.state
    order = {member.signer: place for place, member in enumerate(run.members)}
    everyone = sorted((*state.clients, *state.exited_clients), key=lambda client: order.get(client.signer, len(order)))
    return replace(
        run,
        state=replace(
            state,
            phase=Phase.WARMUP,
            phase_start=state.epoch_start,
            gathered_at=None,
            step=state.start_step,
            last_step=0,
            head=0,
            rounds=(),
            warmup_witnesses=(),
            # The chain took these reports, so none is compared with the checkpoint of then.
            checkpoint=Checkpoint(state.epoch_digest, -1),
            clients=tuple(replace(client, status=ClientStatus.HEALTHY, exited_height=0) for client in everyone),
            exited_clients=(),
            checkpoint_votes=(),
            pending_pause=False,
        ),
    )


def replay(run: RunAccounts, entries: Iterable[Entry], program: Pubkey, account: Pubkey) -> list[Round]:
    """All rounds of the current epoch.

    Args:
        run: the run now, within an epoch.
        entries: transactions of the account, oldest first, at least from the epoch's formation on.
        program: the coordinator program.
        account: the run's coordinator account.

    Returns:
        The rounds from the first to the newest, without Bloom filters; empty if the result differs from the account,
        which means that the ledger is incomplete.
    """
    history = History()
    now = beginning(run)
    for entry in entries:
        if entry.error is not None or entry.time < run.state.epoch_start:
            continue
        for call in entry.calls:
            if call.program == program and account in call.accounts:
                now = _apply(now, call, Clock(entry.time, entry.slot))
        if now.state.epoch != run.state.epoch:
            break
        history.observe(now.state)
    rounds = history.rounds(run.state.epoch, 0)
    return rounds if _shows(run.state, rounds) else []


def _apply(run: RunAccounts, call: Call, clock: Clock) -> RunAccounts:
    user = bytes(call.accounts[0])
    try:
        name, given = decode(call.data)
        return act(run, name, user, given, clock)
    except (Refused, machine.MachineError):
        return run  # it precedes the epoch within the same second


def act(run: RunAccounts, name: str, user: bytes, given: dict[str, Any], clock: Clock) -> RunAccounts:
    """The run after an accepted instruction, without new checks of accounts and authority.

    Raises:
        Refused: the run differs from the program's.
        MachineError: likewise.
    """
    if name == "witness":
        place = {key: given[key] for key in WITNESS_TRAILER.fields if key in given}
        return hosting.witness(run, user, given, place, clock)
    if name == "warmup_witness":
        index, digest = given["proof"]["index"], given["broadcast_merkle"]
        return hosting.warmup_witness(run, user, index, digest, given.get("epoch"), clock)
    if name == "health_check":
        listed = given["id"]["signer"]
        return hosting.health_check(run, user, listed, given["committee"], given["position"], given["index"], clock)
    if name == "withdraw":
        return hosting.withdraw(run, user, clock)
    if name == "restart_from":
        return hosting.restart_from(run, given["step"], given["digest"], clock)
    if name == "kick":
        return hosting.kick(run, given["signer"], clock)
    if name == "join_run":
        return hosting.join(run, user, given["client_id"]["signer"], given["client_id"]["p2p_identity"], clock)
    if name == "tick":
        return hosting.tick(run, clock)
    if name == "set_paused":
        return hosting.pause(run, clock) if given["paused"] else hosting.resume(run, clock)
    if name == "checkpoint":
        return hosting.set_checkpoint(run, given["repo"], clock)
    if name == "update":
        return hosting.update(run, given["metadata"], given["config"], given["model"], given["progress"])
    if name == "set_future_epoch_rates":
        rates = given["epoch_earning_rate_total_shared"], given["epoch_slashing_rate_per_client"]
        return hosting.set_rates(run, *rates)
    return run


def _shows(state: RunState, rounds: list[Round]) -> bool:
    """Whether the account's own rounds are the last of ``rounds``."""
    current = state.current
    if current is None or not rounds or rounds[-1].height < current.height:
        return False
    return all(_told(round_) == _told(rounds[round_.height]) for round_ in state.rounds)


def _told(round_: Round) -> tuple[Any, ...]:
    records = tuple((record.proof, record.merkle) for record in round_.witnesses)
    return (round_.height, round_.seed, round_.data_index, round_.step, round_.clients, records)
