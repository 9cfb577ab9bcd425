"""A run's history from its transactions: events, each round's figures, and the senders and prices.

The account shows a run's current state; only the ledger has the past and the figures of witness reports. The program's
model in Python replays each transaction, so the history comes from the chain and needs no observer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from solders.pubkey import Pubkey

from psyche_lightning.coordinator import machine
from psyche_lightning.coordinator.history import History
from psyche_lightning.errors import counted
from psyche_lightning.protocol.requests import Report
from psyche_lightning.protocol.state import MISSED_ROUNDS, Client, CoordinatorConfig, Phase, RunState
from psyche_lightning.server.nodes import member
from psyche_lightning.server.status import metrics_row
from psyche_lightning.wire.identity import short
from psyche_lightning_solana.account import ManifestAccount, RunAccounts
from psyche_lightning_solana.addresses import incarnation
from psyche_lightning_solana.client.ledger import Call, Entry
from psyche_lightning_solana.client.rounds import act
from psyche_lightning_solana.client.sender import ANCHOR_ERROR
from psyche_lightning_solana.errors import Refused
from psyche_lightning_solana.hosting import Clock
from psyche_lightning_solana.instructions import decode
from psyche_lightning_solana.interface import AUTHORIZER, TREASURER

COMPUTE_BUDGET = Pubkey.from_string("ComputeBudget111111111111111111111111111111")
NAMES = {spec.discriminator: spec.name for program in (AUTHORIZER, TREASURER) for spec in program.instructions.values()}


@dataclass(frozen=True)
class Row:
    """One transaction in readable form.

    Attributes:
        signature: its first signature in base58.
        slot: its slot.
        time: the chain's clock there.
        payer: its sender.
        instruction: its instructions; several names are separated by ``+``.
        units: compute units that it used.
        fee: lamports that it cost.
        size: bytes.
        result: ``ok``, or the error's name.
    """

    signature: str
    slot: int
    time: int
    payer: str
    instruction: str
    units: int
    fee: int
    size: int
    result: str


class Story:
    """Replays a run's transactions in order.

    Args:
        program: the coordinator program.
        account: the run's coordinator account.

    Attributes:
        run: the run after them; None before its creation.
        history: notable events.
        rows: a line for each.
    """

    def __init__(self, program: Pubkey, account: Pubkey) -> None:
        self.run: RunAccounts | None = None
        self.history = History()
        self._measured: dict[bytes, tuple[int, dict[str, float]]] = {}  # what each witness told last
        self.rows: list[Row] = []
        self._program = program
        self._account = account

    def take(self, entries: Iterable[Entry]) -> None:
        """Replay the next transactions."""
        for entry in entries:
            names = []
            for call in entry.calls:
                name = self._name(call)
                if name:
                    names.append(name)
                if call.program == self._program and self._account in call.accounts and entry.error is None:
                    self._apply(call, Clock(entry.time, entry.slot))
            self.rows.append(
                Row(
                    entry.signature,
                    entry.slot,
                    entry.time,
                    str(entry.payer),
                    "+".join(names),
                    entry.units,
                    entry.fee,
                    entry.size,
                    _result(entry),
                )
            )

    def _name(self, call: Call) -> str:
        if call.program == self._program:
            try:
                return decode(call.data)[0]
            except Refused as error:
                return error.code
        return NAMES.get(call.data[:8], "")

    def _apply(self, call: Call, clock: Clock) -> None:
        user = bytes(call.accounts[0])
        try:
            name, given = decode(call.data)
            if name == "init_coordinator":
                self._begin(call, given)
            elif self.run is not None:
                self._step(name, user, given, clock)
        except (Refused, machine.MachineError):
            pass  # the chain accepted it, so the history has a gap; the account shows the state

    def _begin(self, call: Call, given: dict[str, Any]) -> None:
        self.run = RunAccounts(
            RunState(given["run_id"], config=CoordinatorConfig(*[0] * 14), max_seq_len=0, step=0, start_step=0),
            client_version=given["client_version"],
            manifest=ManifestAccount(0, bytes(self._account), bytes(call.accounts[4])),
        )

    def _step(self, name: str, user: bytes, given: dict[str, Any], clock: Clock) -> None:
        assert self.run is not None
        before, state = self.run, self.run.state
        if name == "witness" and state.current is not None:
            figures = given["metadata"]
            # While an epoch drains, a loss still belongs to the last step; without a loss, skip the report.
            step = figures["step"] if state.current.step else state.step - 1
            if figures["step"] and (state.current.step or math.isfinite(figures["loss"])):
                report = Report(step, figures["loss"], figures["tokens_per_sec"])
                self.history.report(given.get("epoch", state.epoch), user, report)
            if figures["evals"]:
                self._measured[user] = state.step, {_task(one["name"]): one["value"] for one in figures["evals"]}
        self.run = act(self.run, name, user, given, clock)
        after = self.run.state
        self._note(before, name, user, given, clock.now)
        self.history.observe(state, after, clock.now)

    def _note(self, before: RunAccounts, name: str, user: bytes, given: dict[str, Any], now: float) -> None:
        assert self.run is not None
        state = self.run.state
        if name == "join_run" and all(member.signer != user for member in before.members):
            self.history.note(state, now, "joined", f"{short(user)} joined", user)
        elif name == "withdraw":
            self.history.note(state, now, "left", f"{short(user)} left", user)
        elif name == "restart_from":
            text = f"the owner goes back to the parameters {given['digest'][:4].hex()} of step {given['step']}"
            self.history.note(state, now, "run", text)
        elif name == "kick":
            text = f"{short(given['signer'])} was removed by the run's owner"
            self.history.note(state, now, "kicked", text, given["signer"])
        elif name == "health_check":
            gone = given["id"]["signer"]
            if any(client.signer == gone for client in before.state.healthy):
                text = f"{short(gone)} is dropped: it delivered nothing in the last {MISSED_ROUNDS} rounds"
                self.history.note(state, now, "dropped", text, gone)

    # --- for people and programs ------------------------------------------------------------------------------------

    def status(self, run: RunAccounts, *, address: str = "") -> dict[str, Any]:
        """A run as JSON, in the form of :func:`psyche_lightning.server.status.run_status`.

        Args:
            run: the run's current accounts.
            address: of its coordinator account.
        """
        state, reports = run.state, self.history.reports
        clients = () if state.phase is Phase.WAITING_FOR_MEMBERS else state.clients
        known = {client.signer for client in clients}
        pending = [client for client in run.pending if client.signer not in known] if not state.phase.halted else []
        events, metrics = self.history.events, self.history.metrics
        return {
            "run_id": state.run_id,
            "phase": state.phase.name.lower(),
            "epoch": state.epoch,
            "height": state.current.height if state.current and state.phase.active else None,
            "step": state.step,
            "total_steps": state.config.total_steps,
            "clients": [_member(client, client.status.name.lower(), reports) for client in clients],
            "incarnation": incarnation(bytes(self._account)).hex(),
            "nonce": state.nonce,
            "pending_pause": state.pending_pause,
            "checkpoint": {"step": state.checkpoint.step, "digest": state.checkpoint.digest.hex()},
            "manifest_digest": run.manifest.digest.hex() if run.manifest and run.manifest.digest else None,
            "config": asdict(state.config),
            "exited": [_member(client, client.status.name.lower(), reports) for client in state.exited_clients],
            "pending": [_member(client, "pending", reports) for client in pending],
            "event_count": events.count,
            "metric_count": metrics.count,
            "events": [asdict(event) for event in events.since(0)],
            "metrics": [metrics_row(row) for row in metrics.since(0)],
            "evaluations": self._evaluations(),
            "account": address,
        }

    def _evaluations(self) -> list[dict[str, Any]]:
        """The mean of what the witnesses measured last of each task; how much that was, no report says."""
        found: dict[str, list[tuple[int, float]]] = {}
        for step, values in self._measured.values():
            for task, value in values.items():
                if math.isfinite(value):
                    found.setdefault(task, []).append((step, value))
        return [
            {
                "task": task,
                "step": max(step for step, _ in told),
                "documents": None,
                "measured": None,
                "figures": {f"mean of {counted(len(told), 'node')}": sum(value for _, value in told) / len(told)},
            }
            for task, told in found.items()
        ]


def _member(client: Client, status: str, reports: Mapping[bytes, Report]) -> dict[str, Any]:
    # A report on the chain counts no bytes.
    unknown = {"bytes_up": None, "bytes_down": None}
    return {**member(client, status, reports), **unknown, "wallet": str(Pubkey(client.signer))}


def _task(name: bytes) -> str:
    return bytes(name).rstrip(b"\0").decode("utf-8", "replace")


def _result(entry: Entry) -> str:
    if entry.error is not None:
        found = next((match for line in entry.logs if (match := ANCHOR_ERROR.search(line))), None)
        if found is not None:
            return found[1]
    return entry.result
