"""``psyche run ...`` on a chain: the owner's side of a run, and runs that are only shown."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from typing import Any, TypeVar

from solders.pubkey import Pubkey

from psyche_lightning.errors import ConfigError, CoordinatorError, WireError
from psyche_lightning.protocol.manifest import START
from psyche_lightning.protocol.owner import Creation
from psyche_lightning.protocol.state import CoordinatorConfig, Phase
from psyche_lightning.wire.canonical import HASH_SIZE
from psyche_lightning_solana import account
from psyche_lightning_solana.account import Rates, RunAccounts
from psyche_lightning_solana.client.admin import SolanaAdmin
from psyche_lightning_solana.client.directory import runs_of
from psyche_lightning_solana.client.fees import sol
from psyche_lightning_solana.client.ledger import Ledger
from psyche_lightning_solana.client.rpc import RpcProblem, unreachable
from psyche_lightning_solana.client.run import SolanaRun
from psyche_lightning_solana.client.story import Story
from psyche_lightning_solana.client.translate import described, of_recipe
from psyche_lightning_solana.layout import COORDINATOR_SIZE

NOWHERE = Pubkey.default()
_Result = TypeVar("_Result")


class SolanaRunAdmin:
    """The owner's side of one run (:class:`~psyche_lightning.protocol.owner.RunAdmin`).

    Args:
        url: a ``solana:`` URL.
        run_id: the run; to show one, also the address of its coordinator account.
    """

    def __init__(self, url: str, run_id: str) -> None:
        self._url = url
        self._run = run_id

    def _do(self, work: Callable[[SolanaAdmin], Coroutine[Any, Any, _Result]]) -> _Result:
        async def run() -> _Result:
            async with SolanaAdmin(SolanaRun.at(self._url, self._run)) as admin:
                return await work(admin)

        return asyncio.run(run())

    def create(self, wanted: Creation) -> dict[str, Any]:
        """Create the run's accounts; :meth:`start` opens it."""

        async def work(admin: SolanaAdmin) -> dict[str, Any]:
            mint = None if wanted.mint is None else address_of(wanted.mint, "a token's address")
            await admin.create(
                _config(wanted), everybody=wanted.everybody, mint=mint, rates=wanted.rates, **_described(wanted)
            )
            return await self._status(admin)

        return self._do(work)

    def update(self, wanted: Creation) -> dict[str, Any]:
        """Apply the differences; an open run accepts none."""

        async def work(admin: SolanaAdmin) -> dict[str, Any]:
            before = await admin.look()
            if wanted.recipe is not None:
                values = {"config": _config(wanted), **_described(wanted)}
            else:
                values = {"config": {**asdict(before.state.config), **wanted.config}} if wanted.config else {}
            texts = {"name": wanted.name, "description": wanted.description}
            given = {field: text for field, text in texts.items() if text is not None}
            if given:
                values["metadata"] = described({**before.described, **values.get("metadata", {}), **given})
            await admin.update(**values, client_version=wanted.client_version)
            return await self._status(admin)

        return self._do(work)

    def start(self) -> dict[str, Any]:
        """Open the run."""
        return self._act(lambda admin: admin.start())

    def pause(self) -> dict[str, Any]:
        """Halt the run after its epoch."""
        return self._act(lambda admin: admin.pause())

    def resume(self) -> dict[str, Any]:
        """Open the paused run."""
        return self._act(lambda admin: admin.resume())

    def _act(self, action: Callable[[SolanaAdmin], Coroutine[Any, Any, Any]]) -> dict[str, Any]:
        async def work(admin: SolanaAdmin) -> dict[str, Any]:
            await action(admin)
            return await self._status(admin)

        return self._do(work)

    def status(self) -> dict[str, Any]:
        """The run's state and its transactions' history; for an address, the account's contents."""
        try:
            address = Pubkey.from_string(self._run)
        except ValueError:
            return self._do(self._status)

        async def look() -> dict[str, Any]:
            run = SolanaRun.at(self._url, "none")  # any name will do: only the chain is asked
            try:
                await run.check_chain()
                found = await run.reader.account(address)
            except RpcProblem as problem:
                raise unreachable(problem, f"the account {address}", run.cluster.name) from problem
            finally:
                await run.close()
            if found is None:
                raise CoordinatorError(f"there is no account {address} on {run.cluster.name}", code="NoSuchRun")
            return read_account(found.data, str(address))

        return asyncio.run(look())

    async def _status(self, admin: SolanaAdmin) -> dict[str, Any]:
        keys, snapshot = await admin.run.keys(), await admin.run.snapshot()
        run = account.read(snapshot.coordinator, snapshot.manifest or None)
        story = Story(keys.program, keys.coordinator_account)
        try:
            story.take(await Ledger(admin.run.reader, keys.coordinator_account).entries())
        except RpcProblem as problem:  # services forget old transactions; the account itself is here
            story.history.note(run.state, run.state.phase_start, "run", f"no transactions: {problem.text}")
        return {**story.status(run, address=str(keys.coordinator_account)), "about": _about(run)}

    def close(self) -> str:
        """Close the accounts and recover their lamports."""
        back = self._do(lambda admin: admin.close())
        return f"run {self._run} is closed; {sol(back)} came back"

    def authorize(self, node: str | None) -> str:
        """Let a wallet join."""
        self._do(lambda admin: admin.authorize(wallet_of(node)))
        return f"{node or 'everybody'} may join run {self._run}"

    def revoke(self, node: str | None) -> str:
        """Revoke it."""
        held = self._do(lambda admin: admin.revoke(wallet_of(node)))
        who = node or "everybody"
        return f"{who} may not join run {self._run} again" if held else f"{who} had no authorization"

    def kick(self, node: str) -> str:
        """Remove a wallet at once, and revoke it."""
        wallet = wallet_of(node)
        assert wallet is not None
        there = self._do(lambda admin: admin.kick(wallet))
        text = f"{node} is removed from run {self._run}" if there else f"{node} takes no part in run {self._run} now"
        return f"{text}. Where everybody may join, it may come back: `psyche run revoke {self._run} everybody`."

    def link(self, *, new: bool = False) -> str:
        """The URL: wallets, not links, decide who joins a run on a chain."""
        if new:
            raise CoordinatorError(
                f"run {self._run} on a chain has no join link; `psyche run revoke` takes wallets out", code="NoLink"
            )
        return self._url

    def restart_from(self, digest: str | None, step: int) -> str:
        """Go on from other parameters than the newest."""
        if digest is None:
            digest = self._do(lambda admin: admin.named_after(step)).hex()
        try:
            raw = bytes.fromhex(digest)
        except ValueError:
            raw = b""
        if len(raw) != HASH_SIZE:
            raise ConfigError(f"{digest!r} is no digest of parameters: expected {2 * HASH_SIZE} hexadecimal digits")
        self._do(lambda admin: admin.restart_from(step, raw))
        return (
            f"run {self._run} goes on from the parameters {digest[:8]} of step {step}, once a node that has them joins"
        )

    def points(self) -> list[dict[str, Any]]:
        """Each wallet's earnings."""
        found = self._do(lambda admin: admin.points())
        return [
            {"node": str(row.wallet), "earned": row.earned, "slashed": row.slashed, "claimed": row.claimed}
            for row in found
        ]

    def rates(self, earned: int | None, slashed: int | None) -> str:
        """The points of future epochs, changed if given."""

        async def work(admin: SolanaAdmin) -> RunAccounts:
            if (earned, slashed) == (None, None):
                return await admin.look()
            return await admin.update(rates=(earned, slashed))

        run = self._do(work)
        now, then = run.current_rates, run.future_rates
        text = f"an epoch of run {self._run} gives {_points(then)}"
        return text if now == then else f"{text}; the running one, or the last, {_points(now)}"

    def fund(self, amount: int) -> str:
        """Give tokens of the wallet to the treasurer."""
        held = self._do(lambda admin: admin.fund(amount))
        return f"the treasurer of run {self._run} holds {held:,} base units of its token, to pay as many points"

    def claim(self, points: int | None) -> str:
        """Have the treasurer pay this wallet."""
        paid = self._do(lambda admin: admin.claim(points))
        return f"{paid:,} points were paid" if paid else "there is nothing to pay"


def _points(rates: Rates) -> str:
    return (
        f"{rates.earning_total_shared:,} points to all together and takes {rates.slashing_per_client:,} when ejecting"
    )


def list_runs(url: str) -> list[dict[str, Any]]:
    """The runs of the coordinator program at a ``solana:`` URL, by name.

    Raises:
        CoordinatorError: no service answers, or none lists a program's accounts.
    """

    async def work() -> list[dict[str, Any]]:
        run = SolanaRun.at(url, "none")  # any name will do: only the chain is asked
        try:
            await run.check_chain()
            return await runs_of(run.reader, run.program)
        except RpcProblem as problem:
            raise unreachable(problem, "the list of runs", run.cluster.name) from problem
        finally:
            await run.close()

    return asyncio.run(work())


def read_account(data: bytes, name: str) -> dict[str, Any]:
    """The status from a coordinator account alone, also for Psyche's own runs.

    Args:
        data: the account's bytes, or their JSON from ``solana account --output json`` or an RPC service.
        name: the account's name in messages.

    Raises:
        CoordinatorError: the account has another kind, size or version, or is damaged (``WrongAccount``).
    """
    if len(data) != COORDINATOR_SIZE and data.lstrip()[:1] == b"{":
        data = _from_json(data, name)
    try:
        run = account.read(data)
    except WireError as error:
        raise CoordinatorError(f"{name} cannot be read: {error}", code="WrongAccount") from error
    return {**Story(NOWHERE, NOWHERE).status(run, address=name), "about": _about(run)}


def _from_json(text: bytes, name: str) -> bytes:
    try:
        value = json.loads(text)
        for key in ("result", "value", "account"):
            value = value.get(key, value)
        encoded, encoding = value["data"]
        if encoding != "base64":
            raise ValueError(f"its encoding is {encoding!r}, expected base64")
        return base64.b64decode(encoded, validate=True)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CoordinatorError(f"{name} is no account in JSON: {error}", code="WrongAccount") from error


def _about(run: RunAccounts) -> dict[str, str]:
    """The values of Psyche's own fields, if set."""
    described, about = run.described, {}
    for field in ("name", "description"):
        if described[field]:
            about[field] = str(described[field])
    if described["num_parameters"]:
        about["parameters"] = f"{described['num_parameters']:,}"
    if any(run.model):
        model = run.llm.get("LLM", {})
        for field in ("architecture", "checkpoint", "data_location", "optimizer", "lr_schedule"):
            about[field.replace("_", " ")] = _short(model[field])
        about["tokens of a sample"] = str(model["max_seq_len"])
    if run.client_version:
        about["client version"] = run.client_version
    if run.state.phase is Phase.UNINITIALIZED:
        about["note"] = "it was never started"
    return about


def _short(value: Any) -> str:
    """``{"Hub": {"repo_id": "x"}}`` as ``Hub repo_id=x``."""
    if not isinstance(value, dict):
        return str(value)
    words = []
    for key, inner in value.items():
        if isinstance(inner, dict):
            words.append(f"{key} {_short(inner)}")
        elif inner not in (None, ""):
            words.append(f"{key}={inner}")
    return " ".join(words)


def wallet_of(node: str | None) -> Pubkey | None:
    """A wallet's address; None for everybody."""
    if node is None:
        return None
    return address_of(node, "a wallet's address")


def address_of(text: str, what: str) -> Pubkey:
    """An address that a user typed.

    Raises:
        ConfigError: it is none.
    """
    try:
        return Pubkey.from_string(text)
    except ValueError:
        raise ConfigError(f"{text!r} is not {what}: expected 32 bytes in base58") from None


def _config(wanted: Creation) -> dict[str, Any]:
    if wanted.recipe is None and not {"total_steps", "global_batch_size_start"} <= wanted.config.keys():
        raise ConfigError(
            "a run on a chain needs a recipe, or at least total_steps and global_batch_size_start: there is no first "
            "node that could fix them"
        )
    if START in (wanted.manifest or {}):
        raise ConfigError(
            "a run on a chain begins with step 1 and cannot take checkpoint.resume; take a checkpoint's parameters "
            "with model.path=ADDRESS"
        )
    return asdict(CoordinatorConfig(**wanted.config))


def _described(wanted: Creation) -> dict[str, Any]:
    """Manifest, model and metadata."""
    if wanted.recipe is None:
        return {"manifest": dict(wanted.manifest or {})}
    found = of_recipe(wanted.recipe)
    del found["config"]
    return found
