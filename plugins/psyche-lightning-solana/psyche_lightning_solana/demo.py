"""``psyche demo --coordinator solana``: the demo through a local chain, with a pause and, of three, a kill."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Coroutine, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from psyche_lightning import system
from psyche_lightning.cli.demo.processes import Child, Processes
from psyche_lightning.errors import CoordinatorError, PsycheError
from psyche_lightning.protocol.state import Phase
from psyche_lightning_solana.account import RunAccounts
from psyche_lightning_solana.client.admin import SolanaAdmin
from psyche_lightning_solana.client.cluster import parse
from psyche_lightning_solana.client.fees import LAMPORTS, sol
from psyche_lightning_solana.client.ledger import Ledger
from psyche_lightning_solana.client.rpc import RpcProblem
from psyche_lightning_solana.client.run import SolanaRun
from psyche_lightning_solana.client.story import Row, Story
from psyche_lightning_solana.client.translate import of_recipe
from psyche_lightning_solana.client.wallet import Wallet, create

SLOT_MS = 100
POCKET = 10 * LAMPORTS
"""Lamports for each wallet from the faucet; worthless."""
ROUND_TIME, WITNESS_TIME = 20.0, 4.0
"""Ceilings of a round's phases in seconds: the nodes' wait for the killed one."""
PAUSE_AFTER, KILL_AFTER = 0.4, 0.7
"""Shares of the run's steps."""
KILL_FROM = 3
"""Smallest run that can lose a node: a quorum is more than half, so one of two cannot decide."""

_Result = TypeVar("_Result")


class SolanaStage:
    """The demo's coordinator: the real programs on a local chain in a process of its own."""

    what = "a local chain with the programs"

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._folder = Path()
        self._names: dict[str, str] = {}
        self._wallets: list[Path] = []
        self._paused: dict[str, Any] | None = None
        self._resumed: dict[str, Any] | None = None
        self._asked = False
        self._killed: str | None = None
        self._ledger: Ledger | None = None
        self._story: Story | None = None
        self._taken = 0

    def _do(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return self._loop.run_until_complete(work)

    # --- beginning --------------------------------------------------------------------------------------------------

    def open(self, processes: Processes, folder: Path, nodes: int, console: Console) -> str:
        """Start the chain, and give each node a funded wallet."""
        self._folder = folder
        self._chain = processes.add(Child("local chain", self._serve(0), folder / "chain.log"))
        self._address = self._chain.url()
        console.print(f"the chain: {self._address}", highlight=False)
        owner = create(folder / "wallets" / "owner.json")
        self._wallets = [folder / "wallets" / f"node-{number}.json" for number in range(nodes)]
        holders = {"owner": owner, **{f"node {i}": create(path) for i, path in enumerate(self._wallets)}}
        self._names = {str(wallet.public): name for name, wallet in holders.items()}
        self._admin_wallet = owner
        self._url = f"solana:{self._address}"
        self._do(self._fund(holders))
        return self._url

    def _serve(self, port: int) -> list[str]:
        ledger = str(self._folder / "chain")
        return ["solana", "localnet", "--port", str(port), "--slot-ms", str(SLOT_MS), "--ledger", ledger]

    async def _fund(self, holders: Mapping[str, Wallet]) -> None:
        run = SolanaRun(parse(self._url), "demo")
        try:
            for wallet in holders.values():
                await run.provider.call("requestAirdrop", [str(wallet.public), POCKET])
            while any([await run.reader.balance(wallet.public) < POCKET for wallet in holders.values()]):
                await asyncio.sleep(0.05)
        except RpcProblem as problem:
            raise PsycheError(f"the local chain's faucet fails: {problem.text}") from problem
        finally:
            await run.close()

    def create(self, run_id: str, recipe: str, overrides: list[str], twin: bool) -> None:
        """Create the run and open it."""
        from psyche_lightning.recipe import load_recipe

        log = f"#log={self._folder / 'owner.jsonl'}"
        self._admin = SolanaAdmin(SolanaRun(parse(self._url + log), run_id, self._admin_wallet))
        values = of_recipe(load_recipe(recipe, overrides, twin=twin))
        config = values.pop("config")
        config["max_round_train_time"] = min(config["max_round_train_time"], ROUND_TIME)
        config["round_witness_time"] = min(config["round_witness_time"], WITNESS_TIME)
        self._do(self._create(config, values))

    async def _create(self, config: dict[str, Any], values: dict[str, Any]) -> None:
        await self._admin.create(config, everybody=True, **values)
        await self._admin.start()
        keys = await self._admin.run.keys()
        self._ledger = Ledger(self._admin.run.reader, keys.coordinator_account)
        self._story = Story(keys.program, keys.coordinator_account)

    def environment(self, node: int) -> Mapping[str, str]:
        """The node's wallet and transaction log."""
        log = self._folder / f"node-{node}" / "transactions.jsonl"
        return {"PSYCHE_WALLET": str(self._wallets[node].resolve()), "PSYCHE_SOLANA_LOG": str(log)}

    # --- on the way -------------------------------------------------------------------------------------------------

    def look(self, nodes: list[Child]) -> dict[str, Any] | None:
        """The chain's run; pauses and resumes it, and kills a node, at the set steps."""
        if self._chain.code is not None:
            self._chain.restart(self._serve(int(self._address.rpartition(":")[2])))  # the ledger has everything
        try:
            run, status = self._do(self._look())
            self._do(self._act(run, nodes))
        except RpcProblem:
            return None
        except CoordinatorError as error:
            if not error.retryable:
                raise
            return None
        return status

    async def _look(self) -> tuple[RunAccounts, dict[str, Any]]:
        assert self._story is not None
        run = await self._admin.look()
        await self._read_ledger()
        status = self._story.status(run)
        measured = [
            _measured(self._folder / f"node-{number}" / "metrics.jsonl") for number in range(len(self._wallets))
        ]
        by_step = measured[0] if measured else {}
        for client in (*status["clients"], *status["pending"], *status["exited"]):
            name = self._names.get(client["wallet"], "")
            rows = measured[int(name.split()[1])] if name.startswith("node ") else {}
            if rows:
                last = rows[max(rows)]
                client["bytes_up"], client["bytes_down"] = last["bytes_up"], last["bytes_down"]
        for row in status["metrics"]:
            before, now = by_step.get(row["step"] - 1), by_step.get(row["step"])
            for key in ("bytes_up", "bytes_down"):
                row[key] = now[key] - (before[key] if before else 0) if now else 0.0
        return run, status

    async def _read_ledger(self) -> None:
        assert self._ledger is not None
        assert self._story is not None
        entries = await self._ledger.entries()
        self._story.take(entries[self._taken :])
        self._taken = len(entries)

    async def _act(self, run: RunAccounts, nodes: list[Child]) -> None:
        state = run.state
        done = (state.step - 1) / state.config.total_steps
        if not self._asked and done >= PAUSE_AFTER and state.phase.active:
            self._asked = True
            await self._admin.pause()
        elif state.phase is Phase.PAUSED and self._paused is None:
            self._paused = {"step": state.checkpoint.step, "digest": state.checkpoint.digest.hex()}
            await self._admin.resume()
        elif self._paused is not None and self._resumed is None and state.epoch_digest and state.phase.active:
            self._resumed = {"epoch": state.epoch, "step": state.start_step - 1, "digest": state.epoch_digest.hex()}
            if (self._resumed["step"], self._resumed["digest"]) != (self._paused["step"], self._paused["digest"]):
                raise PsycheError(
                    f"the pause lost parameters: the run paused with {self._paused} and went on with {self._resumed}"
                )
        elif self._resumed is not None and self._killed is None and done >= KILL_AFTER and len(nodes) >= KILL_FROM:
            self._killed = nodes[-1].name
            nodes[-1].signal(system.KILL)

    # --- the end ----------------------------------------------------------------------------------------------------

    def finish(self, folders: list[Path]) -> dict[str, Any]:
        """The run's transactions and events."""
        time.sleep(3 * SLOT_MS / 1000)  # include the last transactions
        self._do(self._read_ledger())
        self._do(self._admin.run.close())
        self._loop.close()
        assert self._story is not None
        refused = [
            json.loads(line)
            for path in (self._folder / "owner.jsonl", *(folder / "transactions.jsonl" for folder in folders))
            if path.exists()
            for line in path.read_text().splitlines()
        ]
        self._refused = [row for row in refused if not row["landed"]]
        rows = [{**asdict(row), "wallet": self._names.get(row.payer, row.payer)} for row in self._story.rows]
        return {
            "solana": {
                "paused": self._paused,
                "resumed": self._resumed,
                "killed": self._killed,
                "transactions": rows,
                "refused": self._refused,
                "fees_lamports": sum(row.fee for row in self._story.rows),
            }
        }

    def show(self, console: Console) -> None:
        """Every transaction, then sums."""
        assert self._story is not None
        rows = self._story.rows
        table = Table("slot", "wallet", "instruction", "units", "bytes", "lamports", "result", box=None, pad_edge=False)
        for row in rows:
            name = self._names.get(row.payer, row.payer[:8])
            good = "green" if row.result == "ok" else "red"
            numbers = (f"{row.units:,}", str(row.size), f"{row.fee:,}")
            table.add_row(str(row.slot), name, row.instruction, *numbers, Text(row.result, style=good))
        console.print(table)
        console.print(summary(rows))
        fees = sum(row.fee for row in rows)
        console.print(
            f"{len(rows)} transactions of the run, {sol(fees)} in fees; {len(self._refused)} more were refused before "
            "they were sent",
            highlight=False,
        )
        if self._paused and self._resumed:
            console.print(
                f"paused after step {self._paused['step']} with parameters {self._paused['digest'][:16]}, and went on "
                f"from step {self._resumed['step']} with parameters {self._resumed['digest'][:16]}",
                highlight=False,
            )
        if self._killed:
            console.print(f"{self._killed} was killed on the way", highlight=False)


def summary(rows: list[Row]) -> Table:
    """A line for each instruction: count, compute units, fees, results."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.instruction].append(row)
    table = Table("instruction", "transactions", "units: mean", "most", "lamports", "not ok", box=None, pad_edge=False)
    for name, found in sorted(groups.items(), key=lambda item: -len(item[1])):
        units = [row.units for row in found]
        bad = sum(row.result != "ok" for row in found)
        fees = sum(row.fee for row in found)
        table.add_row(
            name, str(len(found)), f"{statistics.mean(units):,.0f}", f"{max(units):,}", f"{fees:,}", str(bad or "")
        )
    return table


def _measured(path: Path) -> dict[int, dict[str, Any]]:
    """A node's socket counters, by step."""
    if not path.exists():
        return {}
    rows = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # write in progress
        if row.get("bytes_up") is not None:
            rows[int(row["step"])] = row
    return rows
