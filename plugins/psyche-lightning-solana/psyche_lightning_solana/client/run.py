"""Finds and checks one run on one chain; builds its instructions."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from solders.pubkey import Pubkey

from psyche_lightning.errors import CoordinatorError, WireError
from psyche_lightning.protocol.limits import check_run_id
from psyche_lightning.protocol.state import Phase, RunState
from psyche_lightning.version import __version__
from psyche_lightning_solana import account
from psyche_lightning_solana.account import RunAccounts
from psyche_lightning_solana.addresses import (
    authorization_address,
    incarnation,
    instance_address,
    manifest_address,
    node_address,
)
from psyche_lightning_solana.client import manifest
from psyche_lightning_solana.client.cluster import CLUSTERS, Cluster, parse
from psyche_lightning_solana.client.feed import Snapshot
from psyche_lightning_solana.client.reader import Account, Reader
from psyche_lightning_solana.client.record import Log
from psyche_lightning_solana.client.rpc import PoolProvider, RpcProblem, Sleep, unreachable
from psyche_lightning_solana.client.sender import Sender
from psyche_lightning_solana.client.wallet import Wallet
from psyche_lightning_solana.instructions import RunKeys
from psyche_lightning_solana.interface import AUTHORIZER, COORDINATOR, JOIN_SCOPE
from psyche_lightning_solana.layout import discriminator, view_coordinator

EVERYBODY = Pubkey.default()
"""The grantee of an authorization for everyone."""


@dataclass(frozen=True)
class Instance:
    """The contents of a run's instance account.

    Attributes:
        main_authority: may change the run.
        join_authority: authorizes wallets to join.
        coordinator_account: holds the state.
    """

    main_authority: Pubkey
    join_authority: Pubkey
    coordinator_account: Pubkey


class SolanaRun:
    """Access to one run.

    Args:
        cluster: the chain.
        run_id: the run.
        wallet: signs; None loads it on first use.
        clock: monotonic seconds.
        wall: Unix seconds.
        sleep: waits.
        randomness: spreads the waits of many nodes.

    Attributes:
        cluster: as given.
        run_id: as given.
        program: address of the coordinator program.
        reader: the RPC services.
        log: results of this client's transactions.

    Raises:
        ConfigError: the name is invalid, no program is given, or the log cannot be written.
    """

    def __init__(
        self,
        cluster: Cluster,
        run_id: str,
        wallet: Wallet | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        sleep: Sleep = asyncio.sleep,
        randomness: random.Random | None = None,
    ) -> None:
        check_run_id(run_id)
        self.cluster = cluster
        self.run_id = run_id
        self.program = cluster.program()
        self.log = Log(cluster.options.log)
        self.provider = PoolProvider(cluster.endpoints, sleep=sleep, randomness=randomness)
        self.reader = Reader(self.provider, cluster.options.commitment)
        self.clock = clock
        self.sleep = sleep
        self._wall = wall
        self._wallet = wallet
        self._sender: Sender | None = None
        self._instance: Instance | None = None
        self._checked = False
        self._anchor: Any = None
        self._manifests: dict[bytes, dict[str, Any]] = {}

    @classmethod
    def at(cls, url: str, run_id: str, wallet: Wallet | None = None, **given: Any) -> SolanaRun:
        """Access by a ``solana:`` URL."""
        return cls(parse(url), run_id, wallet, **given)

    # --- addresses --------------------------------------------------------------------------------------------------

    @property
    def instance_address(self) -> Pubkey:
        """Address of the instance account."""
        return instance_address(self.program, self.run_id)

    @property
    def manifest_address(self) -> Pubkey:
        """Address of the manifest account."""
        return manifest_address(self.program, self.run_id)

    @property
    def wallet(self) -> Wallet:
        """The signer.

        Raises:
            ConfigError: no wallet is usable.
        """
        if self._wallet is None:
            self._wallet = Wallet.load(self.cluster.options.wallet)
        return self._wallet

    @property
    def sender(self) -> Sender:
        """Sends the wallet's transactions."""
        if self._sender is None:
            self._sender = Sender(
                self.reader,
                self.wallet,
                self.run_id,
                self.cluster.options,
                self.cluster.name,
                self.log,
                clock=self.clock,
                wall=self._wall,
                sleep=self.sleep,
            )
        return self._sender

    # --- finding and checking ---------------------------------------------------------------------------------------

    async def check_chain(self) -> None:
        """Check once that this is the intended chain and has the program.

        Raises:
            CoordinatorError: another chain (``WrongCluster``), no program (``NotDeployed``), or no answer.
        """
        if self._checked:
            return
        try:
            await self._check_genesis()
            program = await self.reader.account(self.program)
        except RpcProblem as problem:
            raise unreachable(problem, "a first look", self.cluster.name) from problem
        if program is None or not program.executable:
            what = "is no program" if program else "is not there"
            raise CoordinatorError(
                f"the coordinator program {self.program} {what} on {self.cluster.name}. Put it there with "
                "`psyche solana deploy`, or name another one with #program=ADDRESS after the URL.",
                code="NotDeployed",
            )
        self._checked = True

    async def _check_genesis(self) -> None:
        found = str(await self.reader.genesis())
        if self.cluster.genesis not in (None, found):
            known = next((name for name, (_, genesis) in CLUSTERS.items() if genesis == found), "another chain")
            raise CoordinatorError(
                f"the RPC service at {self.provider.endpoint.name} is not on {self.cluster.name}: its first block is "
                f"{found} ({known}), and that of {self.cluster.name} is {self.cluster.genesis}. Give the URL of a "
                f"service of {self.cluster.name}, or name the intended cluster.",
                code="WrongCluster",
            )
        if len(self.cluster.endpoints) == 1:
            return
        for endpoint in self.cluster.endpoints:
            alone = PoolProvider([endpoint], tries=1, sleep=self.sleep)
            try:
                other = str(await Reader(alone, self.cluster.options.commitment).genesis())
            except RpcProblem:
                continue  # a service that is down is asked again when needed
            finally:
                await alone.close()
            if other != found:
                raise CoordinatorError(
                    f"the RPC services are of different chains: {endpoint.name} has the first block {other}, another "
                    f"has {found}. Give services of one cluster.",
                    code="WrongCluster",
                )

    async def instance(self) -> Instance | None:
        """The instance account's contents; None if the run does not exist.

        Raises:
            CoordinatorError: as in :meth:`check_chain`, or the account is another kind (``WrongAccount``).
        """
        await self.check_chain()
        if self._instance is None:
            try:
                found = await self.reader.account(self.instance_address)
            except RpcProblem as problem:
                raise unreachable(problem, f"run {self.run_id!r}", self.cluster.name) from problem
            if found is None:
                return None
            self._instance = self._decode_instance(found)
        return self._instance

    def _decode_instance(self, found: Account) -> Instance:
        kind = COORDINATOR.accounts["CoordinatorInstance"]
        try:
            if found.owner != self.program or found.data[:8] != discriminator(kind.name):
                raise WireError("it is not the program's instance")
            values = kind.decode(found.data[8:].rstrip(b"\0").ljust(_instance_size(found.data) - 8, b"\0"))
        except WireError as error:
            raise CoordinatorError(
                f"the account {self.instance_address} of run {self.run_id!r} cannot be read: {error}. Is "
                f"{self.program} the right program?",
                code="WrongAccount",
            ) from error
        return Instance(*(Pubkey(values[name]) for name in ("main_authority", "join_authority", "coordinator_account")))

    async def keys(self) -> RunKeys:
        """The run's addresses, which build its instructions.

        Raises:
            CoordinatorError: as in :meth:`instance`; the run does not exist (``NoSuchRun``).
        """
        instance = await self.instance()
        if instance is None:
            raise CoordinatorError(
                f"there is no run {self.run_id!r} of the program {self.program} on {self.cluster.name}; create it with "
                f"`psyche run create {self.run_id} RECIPE`",
                code="NoSuchRun",
            )
        return self.keys_of(instance.coordinator_account)

    def keys_of(self, coordinator_account: Pubkey) -> RunKeys:
        """The run's addresses with that coordinator account."""
        return RunKeys(self.program, self.run_id, coordinator_account)

    def anchored(self, keys: RunKeys) -> RunKeys:
        """The same addresses; anchorpy builds the instructions.

        An owner sends few instructions, and each one matters. A node sends some in every round and builds the same
        bytes itself, twenty times faster: anchorpy takes a second to import and a millisecond for each.
        """
        from psyche_lightning_solana.client import anchor

        if self._anchor is None:
            self._anchor = anchor.program(self.program, self.provider, self.cluster.options.commitment)
        return anchor.AnchorKeys(keys.program, keys.run_id, keys.coordinator_account, self._anchor)

    def check_account(self, found: Account | None) -> None:
        """Reject a coordinator account of another run, version or size.

        Raises:
            CoordinatorError: ``WrongAccount``; ``Closed`` when the account is gone.
        """
        if found is None:
            raise CoordinatorError(f"run {self.run_id!r} was closed on {self.cluster.name}", code="Closed")
        problem = ""
        if found.owner != self.program:
            problem = f"it belongs to the program {found.owner}, not to {self.program}"
        else:
            try:
                record = view_coordinator(found.data)
                name = record["run_id"].tobytes().rstrip(b"\0")
                if name != self.run_id.encode():
                    problem = f"it is of the run {name.decode('utf-8', 'replace')!r}"
            except WireError as error:
                problem = str(error)
        if problem:
            raise CoordinatorError(
                f"the coordinator account of run {self.run_id!r} cannot be used: {problem}. Install the version of "
                "psyche-lightning-solana with which the run was created, or name the right program.",
                code="WrongAccount",
            )

    def decode(self, snapshot: Snapshot) -> RunAccounts:
        """The run in a snapshot.

        Raises:
            CoordinatorError: the accounts are damaged, or the manifest account is missing (``WrongAccount``).
        """
        if not snapshot.manifest:
            raise CoordinatorError(
                f"run {self.run_id!r} has no manifest account: another program than psyche_lightning's created it. It "
                "can be looked at (`psyche run status`), not joined.",
                code="WrongAccount",
            )
        try:
            run = account.read(snapshot.coordinator, snapshot.manifest)
        except WireError as error:
            raise CoordinatorError(f"run {self.run_id!r} cannot be read: {error}", code="WrongAccount") from error
        assert run.manifest is not None
        return replace(run, state=replace(run.state, incarnation=incarnation(run.manifest.coordinator_account)))

    async def snapshot(self, min_slot: int | None = None) -> Snapshot:
        """The run's current accounts.

        Raises:
            CoordinatorError: the run does not exist or is unreadable, or no service answers.
        """
        keys = await self.keys()
        try:
            slot, found = await self.reader.accounts([keys.coordinator_account, self.manifest_address], min_slot)
        except RpcProblem as problem:
            raise unreachable(problem, f"run {self.run_id!r}", self.cluster.name) from problem
        coordinator, beside = found
        self.check_account(coordinator)
        assert coordinator is not None
        return Snapshot(slot, coordinator.data, b"" if beside is None else beside.data)

    async def run_manifest(self, run: RunAccounts) -> dict[str, Any] | None:
        """The run's manifest; None until its owner sets one.

        Raises:
            CoordinatorError: it is missing from its place (``InvalidManifest``), or no service answers.
        """
        fixed = run.manifest
        if fixed is None or not fixed.digest:
            return None
        if fixed.digest not in self._manifests:
            try:
                self._manifests[fixed.digest] = await manifest.fetch(self.reader, fixed.digest, fixed.address)
            except RpcProblem as problem:
                raise unreachable(problem, "the run's manifest", self.cluster.name) from problem
        return self._manifests[fixed.digest]

    def check_version(self, run: RunAccounts) -> None:
        """Check that the run takes this version; ``test`` and nothing stand for any, as in Psyche.

        Raises:
            CoordinatorError: it wants another one (``WrongVersion``).
        """
        wanted = run.client_version
        if wanted not in ("", "test", __version__):
            raise CoordinatorError(
                f"run {self.run_id!r} wants version {wanted} of psyche-lightning, and this is {__version__}. Install "
                "that one with its plugins, or ask the run's owner.",
                code="WrongVersion",
            )

    async def authorization(self, run: RunAccounts, instance: Instance) -> Pubkey:
        """The authorization that lets the wallet join: its own, everybody's, or a delegating grantee's.

        Raises:
            CoordinatorError: none is valid (``NotAuthorized``), or no service answers.
        """
        assert run.manifest is not None
        authorizer = Pubkey(run.manifest.authorizer)
        given = self.cluster.options.grantee
        grantees = [Pubkey.from_string(given)] if given else [self.wallet.public, EVERYBODY]
        places = [
            authorization_address(authorizer, instance.join_authority, grantee, JOIN_SCOPE) for grantee in grantees
        ]
        try:
            _, found = await self.reader.accounts(places)
        except RpcProblem as problem:
            raise unreachable(problem, "the authorization to join", self.cluster.name) from problem
        kind = AUTHORIZER.accounts["Authorization"]
        for place, grantee, held in zip(places, grantees, found, strict=True):
            if held is None or held.owner != authorizer:
                continue
            values = kind.decode(held.data[8:])
            delegates = [Pubkey(key) for key in values["delegates"]]
            mine = grantee in (EVERYBODY, self.wallet.public) or self.wallet.public in delegates
            if values["active"] and mine:
                return place
        raise CoordinatorError(
            f"the wallet {self.wallet.public} may not join run {self.run_id!r}: its join authority "
            f"{instance.join_authority} has given it no authorization, or revoked it. Ask the run's owner for "
            f"`psyche run authorize {self.run_id} {self.wallet.public}`"
            + ("" if given else "; if another key was authorized and delegated to this wallet, name it with #grantee=")
            + ".",
            code="NotAuthorized",
        )

    def node_address(self, wallet: bytes) -> Pubkey:
        """The account that holds the address of that wallet's node."""
        return node_address(self.program, self.run_id, Pubkey(wallet))

    async def close(self) -> None:
        """Close connections and finish the log."""
        if self._sender is not None:
            await self._sender.close()
        await self.provider.close()


def _instance_size(data: bytes) -> int:
    """The used bytes of an instance account: the name at its end varies in length."""
    at = 8 + 1 + 3 * 32
    return at + 4 + min(int.from_bytes(data[at : at + 4], "little"), len(data))


def halted(state: RunState) -> CoordinatorError:
    """Why a run takes no nodes now."""
    text = {
        Phase.UNINITIALIZED: f"is not started yet; its owner starts it with `psyche run start {state.run_id}`",
        Phase.PAUSED: f"is paused; its owner resumes it with `psyche run resume {state.run_id}`",
        Phase.FINISHED: f"is finished: all {state.config.total_steps} steps are trained",
    }[state.phase]
    return CoordinatorError(
        f"run {state.run_id!r} {text}. A node that joins now would have nothing to do.", code="Halted"
    )
