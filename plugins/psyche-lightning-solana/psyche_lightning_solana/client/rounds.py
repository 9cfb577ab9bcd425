"""The rounds of an epoch: as this node saw them, or rebuilt from the run's transactions.

The account keeps four rounds; the ledger keeps all transactions. The epoch's first state follows from the account, each
transaction has its slot and time, and the program's model in Python repeats the program's steps.

Nodes need the rounds of the epoch under way. If that ended before its last parameters were named, they need them later,
too: the run's parameters are those of the checkpoint after these rounds. By then the account may show the next warm-up.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from solders.pubkey import Pubkey

from psyche_lightning.coordinator import machine
from psyche_lightning.coordinator.history import plain_round
from psyche_lightning.protocol.state import Checkpoint, Client, ClientStatus, Phase, Round, RunState
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
        epoch = state.rounds_epoch
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

    def kept(self, epoch: int) -> list[Round]:
        """All rounds of that epoch that are kept; empty if one is missing."""
        return self.rounds(epoch, max(0, self._newest.height - MAX_ROUNDS + 1) if self._newest else 0)

    def rounds(self, epoch: int, first: int) -> list[Round]:
        """The rounds from height ``first`` to the newest (still growing) one; empty if one is missing."""
        if epoch != self.epoch or self._newest is None or first > self._newest.height or self.missing(epoch, first):
            return []
        return [*(self._settled[height] for height in range(first, self._newest.height)), self._newest]


class Step(NamedTuple):
    """An accepted instruction of the run: its name, its first signer, its arguments, and when."""

    name: str
    user: bytes
    given: dict[str, Any]
    clock: Clock


def steps_of(entries: Iterable[Entry], program: Pubkey, account: Pubkey) -> Iterator[Step]:
    """The run's accepted instructions, in order.

    Args:
        entries: transactions of the account.
        program: the coordinator program.
        account: the run's coordinator account.
    """
    for entry in entries:
        if entry.error is None:
            yield from _steps(entry, program, account)


def _steps(entry: Entry, program: Pubkey, account: Pubkey) -> Iterator[Step]:
    for call in entry.calls:
        if call.program == program and account in call.accounts:
            with contextlib.suppress(Refused):  # another version's instruction
                yield Step(*_named(call), Clock(entry.time, entry.slot))


def _named(call: Call) -> tuple[str, bytes, dict[str, Any]]:
    name, given = decode(call.data)
    return name, bytes(call.accounts[0]), given


def precedes(entry: Entry, epoch: int, program: Pubkey, account: Pubkey) -> bool:
    """Whether a transaction shows that the run had not come to that epoch yet."""
    return entry.error is None and any(_before(step, epoch) for step in _steps(entry, program, account))


def _before(step: Step, epoch: int) -> bool:
    return "epoch" in step.given and step.given["epoch"] < epoch


def replay(run: RunAccounts, entries: Iterable[Entry], program: Pubkey, account: Pubkey) -> list[Round]:
    """All rounds of the current epoch, or of the last one while none is under way.

    Args:
        run: the run now.
        entries: transactions of the account, oldest first, at least from the epoch's formation on.
        program: the coordinator program.
        account: the run's coordinator account.

    Returns:
        The rounds from the first to the newest, without Bloom filters; empty if no result is what the account shows,
        which means that the ledger is incomplete.
    """
    steps = list(steps_of(entries, program, account))
    for formation in _formations(run.state, steps):
        rounds = _rounds_since(run, steps[formation].clock.now, steps[formation + 1 :])
        if rounds and _shows(run.state, rounds):
            return rounds
    return []


def _formations(state: RunState, steps: Sequence[Step]) -> Iterator[int]:
    """The steps that may have formed the epoch, newest first.

    A warm-up that failed may precede the right one, and its time is only known while the epoch is the current one.
    """
    epoch = state.rounds_epoch
    begun = next(
        (i for i, step in enumerate(steps) if step.name == "witness" and step.given.get("epoch") == epoch), len(steps)
    )
    former = next((i for i in reversed(range(begun)) if _before(steps[i], epoch)), 0)
    for place in reversed(range(former, begun)):
        if not state.phase.active or steps[place].clock.now == state.epoch_start:
            yield place


def _rounds_since(run: RunAccounts, formed: int, steps: Sequence[Step]) -> list[Round]:
    """The epoch's rounds if it was formed at that time; empty if the program would have refused a step."""
    history, epoch = History(), run.state.rounds_epoch
    now = _beginning(run, formed, steps)
    for step in steps:
        try:
            now = act(now, *step)
        except (Refused, machine.MachineError):
            return []
        history.observe(now.state)
        if now.state.epoch != epoch:
            break
    return history.kept(epoch)


def _beginning(run: RunAccounts, formed: int, steps: Sequence[Step]) -> RunAccounts:
    """The run when the epoch was formed, at that time."""
    state, epoch = run.state, run.state.rounds_epoch
    signers = _clients(run, steps)
    return replace(
        run,
        # Who waits for a later epoch now did not wait for it then.
        members=tuple(replace(member, active=0) for member in run.members),
        next_active=1,
        state=replace(
            state,
            epoch=epoch,
            phase=Phase.WARMUP,
            phase_start=formed,
            epoch_start=formed,
            gathered_at=None,
            step=state.start_step,
            epoch_start_data_index=_first_data_index(state),
            last_step=0,
            head=0,
            rounds=(),
            warmup_witnesses=(),
            # The chain took these reports, so none is compared with the checkpoint of then.
            checkpoint=Checkpoint(state.epoch_digest, -1),
            clients=tuple(Client(member.signer, member.p2p) for member in run.members if member.signer in signers),
            exited_clients=(),
            checkpoint_votes=(),
            pending_pause=False,
        ),
    )


def _clients(run: RunAccounts, steps: Sequence[Step]) -> set[bytes]:
    """The signers that formed the epoch."""
    state = run.state
    if state.phase.active:
        return {client.signer for client in (*state.clients, *state.exited_clients)}
    # The clients may be the next epoch's. Whoever was in the last one holds its parameters, and either stayed to its
    # end or left.
    found, joined = {signer for round_ in state.rounds for signer in round_.clients}, set()
    for step in steps:
        if step.name == "join_run":
            joined.add(step.user)
        leaver = _leaver(step)
        if leaver in state.holders and leaver not in joined:
            found.add(leaver)
    return found


def _leaver(step: Step) -> bytes | None:
    match step.name:
        case "withdraw":
            return step.user
        case "kick":
            return bytes(step.given["signer"])
        case "health_check":
            return bytes(step.given["id"]["signer"])
        case _:
            return None


def _first_data_index(state: RunState) -> int:
    """The first sample of the epoch's first round: the oldest stored round's less those between."""
    if state.phase.active:
        return state.epoch_start_data_index
    oldest = min(state.rounds, key=lambda round_: round_.height)

    def reached(index: int) -> int:
        for _ in range(oldest.height):
            index += machine.batch_size(state.config, index * state.max_seq_len)
        return index

    return bisect.bisect_left(range(oldest.data_index + 1), oldest.data_index, key=reached)


def with_former_clients(run: RunAccounts) -> RunState:
    """The run's state, in which whoever trained the last epoch's rounds has a node key, also in the next warm-up."""
    state = run.state
    if state.phase.active:
        return state
    listed = {client.signer for client in (*state.clients, *state.exited_clients)}
    former = tuple(
        Client(member.signer, member.p2p, status=ClientStatus.WITHDRAWN)
        for member in run.members
        if member.signer in state.holders and member.signer not in listed
    )
    return replace(state, exited_clients=(*state.exited_clients, *former))


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
    """Whether the account's own rounds are among ``rounds``; the newest may have gone on since."""
    made = {round_.height: round_ for round_ in rounds}
    for round_ in state.rounds:
        found, grows = made.get(round_.height), state.phase.active and round_ is state.current
        if found is None or _told(found, grows) != _told(round_, grows):
            return False
    return bool(state.rounds)


def _told(round_: Round, grows: bool) -> tuple[Any, ...]:
    records = () if grows else tuple((record.proof, record.merkle) for record in round_.witnesses)
    return (round_.height, round_.seed, round_.data_index, round_.step, round_.clients, records)
