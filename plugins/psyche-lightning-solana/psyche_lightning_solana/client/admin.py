"""The owner's operations on the chain: create and change a run, let wallets join, pay and close.

Every method does only the missing steps, so you can repeat an interrupted call.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from solders.instruction import Instruction
from solders.pubkey import Pubkey
from solders.system_program import ID as SYSTEM_PROGRAM
from solders.system_program import CreateAccountWithSeedParams, create_account_with_seed

from psyche_lightning.errors import ConfigError, CoordinatorError
from psyche_lightning.protocol.state import Phase
from psyche_lightning.wire.canonical import ZERO_HASH
from psyche_lightning_solana import instructions
from psyche_lightning_solana.account import RunAccounts
from psyche_lightning_solana.addresses import authorization_address
from psyche_lightning_solana.client import manifest as store
from psyche_lightning_solana.client.fees import SIGNATURE_FEE, sol, units
from psyche_lightning_solana.client.ledger import Call, Ledger
from psyche_lightning_solana.client.owner import MINT_SIZE, TOKEN_PROGRAM, Direct, Owner, Treasury, find_owner
from psyche_lightning_solana.client.rpc import RpcProblem, unreachable
from psyche_lightning_solana.client.run import EVERYBODY, SolanaRun, halted
from psyche_lightning_solana.client.sender import Receipt
from psyche_lightning_solana.client.translate import config_section, metadata_section, plain_model
from psyche_lightning_solana.errors import Refused
from psyche_lightning_solana.instructions import decode
from psyche_lightning_solana.interface import AUTHORIZER, CHECKPOINT_SCOPE, JOIN_SCOPE
from psyche_lightning_solana.layout import COORDINATOR_SIZE, INSTANCE_SIZE, MANIFEST_SIZE
from psyche_lightning_solana.types import CONFIG, METADATA, MODEL

AUTHORIZATION_SIZE = 8 + 1 + 32 + 32 + 4 + 20 + 1 + 4 + 8
SCOPES = {"join": JOIN_SCOPE, "checkpoint": CHECKPOINT_SCOPE}
MAX_SEED = 32
"""Longest seed of an address, in characters."""
RESERVE = 20
"""Upper bound for the transactions that create a run."""


@dataclass(frozen=True)
class Points:
    """A wallet's earnings.

    Attributes:
        wallet: its address.
        earned: points from successful epochs.
        slashed: points taken away.
        claimed: points that the treasurer has paid; 0 for a run without one.
    """

    wallet: Pubkey
    earned: int
    slashed: int
    claimed: int = 0


@dataclass(frozen=True)
class Authorization:
    """A permission to join a run.

    Attributes:
        place: address of its account.
        authorizer: the program that owns it.
        grantor: the run's join authority.
        grantee: who may join; zeros for everybody.
        active: whether it is not revoked.
        delegates: wallets that may join in the grantee's place.
    """

    place: Pubkey
    authorizer: Pubkey
    grantor: Pubkey
    grantee: Pubkey
    active: bool
    delegates: tuple[Pubkey, ...]


class SolanaAdmin:
    """The owner's side of one run; an asynchronous context manager.

    Args:
        run: access to it, with the owner's wallet.
        entropy: returns a number of random bytes.
    """

    def __init__(self, run: SolanaRun, *, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self.run = run
        self._entropy = entropy

    async def __aenter__(self) -> SolanaAdmin:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.run.close()

    # --- looking ----------------------------------------------------------------------------------------------------

    async def look(self) -> RunAccounts:
        """The current run.

        Raises:
            CoordinatorError: the run does not exist, or cannot be read or reached.
        """
        return self.run.decode(await self.run.snapshot())

    # --- making -----------------------------------------------------------------------------------------------------

    async def create(
        self,
        config: Mapping[str, Any],
        *,
        manifest: Mapping[str, Any] | None = None,
        model: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        max_seq_len: int = 1,
        client_version: str = "",
        everybody: bool = False,
        mint: Pubkey | None = None,
        rates: tuple[int | None, int | None] = (None, None),
    ) -> RunAccounts:
        """Create a run, not yet open to nodes: accounts, configuration, manifest.

        Args:
            config: durations and sizes, the fields of
                :class:`~psyche_lightning.protocol.state.CoordinatorConfig`.
            manifest: all nodes must agree on it; without one, no node can join until :meth:`update` sets it.
            model: Psyche's model section; by default derived from the run's name.
            metadata: name, description, ``num_parameters``, ``vocab_size``.
            max_seq_len: tokens of a sample, if ``model`` is not given.
            client_version: the plugin version that nodes need; empty accepts any.
            everybody: whether every wallet may join; otherwise :meth:`authorize` allows them.
            mint: the token that a treasurer pays for points; without one, points are only counted.
            rates: as in :meth:`update`; without any, nodes earn no points.

        Returns:
            The run.

        Raises:
            ConfigError: values that the layout has no room for.
            CoordinatorError: another wallet owns the run (``NotOwner``), it is open with other values
                (``UpdateConfigNotHalted``), the wallet cannot pay (``Unfunded``), ``mint`` is no token (``NoToken``),
                or the run exists and pays another one (``WrongToken``).
        """
        wanted = config_section(config)
        model = dict(model or plain_model(self.run.run_id, max_seq_len))
        metadata = dict(metadata or metadata_section(self.run.run_id))
        instance = await self.run.instance()
        if instance is None:
            if mint is not None:
                await self._check_mint(mint)
            await self._check_funds()
            await self._init(client_version, mint)
        elif mint is not None:
            await self._check_treasury(mint)
        await self.update(
            config=wanted,
            model=model,
            metadata=metadata,
            manifest=manifest,
            client_version=client_version,
            rates=rates,
        )
        if everybody:
            await self.authorize(None)
        return await self.look()

    async def _check_mint(self, mint: Pubkey) -> None:
        try:
            found = await self.run.reader.account(mint)
        except RpcProblem as problem:
            raise unreachable(problem, "the token", self.run.cluster.name) from problem
        if found is None or found.owner != TOKEN_PROGRAM or len(found.data) != MINT_SIZE:
            raise CoordinatorError(
                f"{mint} is no token on {self.run.cluster.name}; give the address of a mint of the SPL token program. "
                "`psyche solana mint` makes one.",
                code="NoToken",
            )

    async def _check_treasury(self, mint: Pubkey) -> None:
        treasury = await Treasury.of(self.run)
        if treasury is None or treasury.mint != mint:
            pays = "does not pay" if treasury is None else f"pays the token {treasury.mint}"
            raise CoordinatorError(
                f"run {self.run.run_id!r} exists and {pays}; what it pays is decided when it is created",
                code="WrongToken",
            )

    async def _init(self, client_version: str, mint: Pubkey | None) -> None:
        """Create the three accounts in one transaction: all of them or none.

        The coordinator account's address is new for every run, so it tells the run from a former one of its name.
        """
        me, seed = self.run.wallet.public, self._entropy(MAX_SEED // 2).hex()
        account = Pubkey.create_with_seed(me, seed, self.run.program)
        make = create_account_with_seed(
            CreateAccountWithSeedParams(
                from_pubkey=me,
                to_pubkey=account,
                base=me,
                seed=seed,
                lamports=await self._rent(COORDINATOR_SIZE),
                space=COORDINATOR_SIZE,
                owner=self.run.program,
            )
        )
        keys = self.run.anchored(self.run.keys_of(account))
        authorizer = self.run.cluster.program("authorizer")
        if mint is None:
            name, init = "init_coordinator", keys.init_coordinator(me, authorizer, me, me, client_version)
        else:
            name = "run_create"
            init = Treasury.create(self.run, keys, authorizer, mint, client_version)
        await self._transact(name, [make, init])

    # --- changing ---------------------------------------------------------------------------------------------------

    async def update(
        self,
        *,
        config: Mapping[str, Any] | None = None,
        model: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        progress: Mapping[str, Any] | None = None,
        manifest: Mapping[str, Any] | None = None,
        client_version: str | None = None,
        rates: tuple[int | None, int | None] = (None, None),
    ) -> RunAccounts:
        """Apply the given changes; all but metadata and rates need a halted run.

        Args:
            config: as in :meth:`create`.
            model: as in :meth:`create`.
            metadata: as in :meth:`create`.
            progress: ``epoch``, ``step`` and ``epoch_start_data_index`` where the run continues.
            manifest: as in :meth:`create`.
            client_version: as in :meth:`create`.
            rates: points of each future epoch: shared by all, and taken from an ejected node.

        Raises:
            ConfigError: values that the layout has no room for.
            CoordinatorError: ``NotOwner``, ``UpdateConfigNotHalted`` and the program's other refusals.
        """
        run, owner = await self._owned()
        changes: dict[str, Any] = {}
        if metadata is not None and METADATA.pack(dict(metadata)) != run.metadata:
            changes["metadata"] = dict(metadata)
        if config is not None:
            wanted = config_section(config)
            if CONFIG.pack(wanted) != CONFIG.pack({name: int(getattr(run.state.config, name)) for name in wanted}):
                changes["config"] = wanted
        # The checkpoint moves by itself; its initial value does not give its current place.
        if model is not None and _model(model) != _model(run.llm if any(run.model) else {}):
            changes["model"] = dict(model)
        if progress is not None:
            changes["progress"] = dict(progress)
        if changes:
            await self._command("update", owner.update(**changes), owner)
        if client_version is not None and client_version != run.client_version:
            await self._command("update_client_version", owner.version(client_version), owner)
        current = run.future_rates
        new = tuple(None if wanted == now else wanted for wanted, now in zip(rates, astuple(current), strict=True))
        if new != (None, None):
            await self._command("set_future_epoch_rates", owner.rates(*new), owner)
        if manifest is not None:
            await self._set_manifest(run, owner, dict(manifest))
        return await self.look()

    async def _set_manifest(self, run: RunAccounts, owner: Owner, manifest: dict[str, Any]) -> None:
        assert run.manifest is not None
        digest, _ = store.compress(manifest)
        try:
            if digest == run.manifest.digest and await self.run.run_manifest(run) is not None:
                return
        except CoordinatorError as error:
            if error.code != "InvalidManifest":
                raise
        try:
            digest, address = await store.store(self.run.sender, self.run.reader, self.run.run_id, manifest)
        except RpcProblem as problem:
            raise unreachable(problem, "the manifest", self.run.cluster.name) from problem
        if (digest, address) != (run.manifest.digest, run.manifest.address):
            await self._command("set_manifest", owner.manifest(digest, address), owner)

    async def start(self) -> RunAccounts:
        """Open a new or paused run to nodes.

        Raises:
            CoordinatorError: ``CannotResume`` when it is not halted, or finished; ``ConfigSanityCheckFailed`` and
                ``ModelSanityCheckFailed``.
        """
        run, owner = await self._owned()
        phase = run.state.phase
        if phase is Phase.FINISHED:
            raise CoordinatorError(
                f"run {self.run.run_id!r} is finished: all {run.state.config.total_steps} steps are trained. Create "
                "another run to train on.",
                code="CannotResume",
            )
        if not phase.halted:
            raise CoordinatorError(
                f"run {self.run.run_id!r} is open already, in phase {phase.name}", code="CannotResume"
            )
        await self._command("set_paused", owner.paused(False), owner)
        return await self.look()

    async def resume(self) -> RunAccounts:
        """Open a paused run to nodes again; the same as :meth:`start`."""
        return await self.start()

    async def restart_from(self, step: int, digest: bytes) -> RunAccounts:
        """Go on from other parameters than the newest; some member must hold them.

        Raises:
            CoordinatorError: ``NotOwner``; ``InvalidRunState`` while an epoch trains; ``InvalidCheckpoint``.
        """
        _, owner = await self._owned()
        await self._command("restart_from", owner.restart(step, digest), owner)
        return await self.look()

    async def named_after(self, step: int) -> bytes:
        """The digest of the parameters after a step, as most witnesses named them.

        Raises:
            CoordinatorError: nobody named any after that step (``InvalidCheckpoint``), or no service answers.
        """
        run, keys = await self.look(), await self.run.keys()
        if run.state.checkpoint.step == step and run.state.checkpoint.digest:
            return run.state.checkpoint.digest
        try:
            entries = await Ledger(self.run.reader, keys.coordinator_account).entries()
        except RpcProblem as problem:
            raise unreachable(problem, "the run's transactions", self.run.cluster.name) from problem
        named: Counter[bytes] = Counter()
        steps = set()
        for entry in entries:
            for call in entry.calls if entry.error is None else ():
                given = _witness(call, self.run.program)
                if given.get("digest", ZERO_HASH) != ZERO_HASH:
                    steps.add(given["step"])
                    named[given["digest"]] += given["step"] == step
        if not named.total():
            known = ", ".join(map(str, sorted(steps)[-5:])) or "none"
            raise CoordinatorError(
                f"no witness of run {self.run.run_id!r} named the parameters after step {step}; the last steps that "
                f"they named are {known}. With a checkpoint's digest: `psyche run restart-from "
                f"{self.run.run_id} DIGEST {step}`",
                code="InvalidCheckpoint",
            )
        return named.most_common(1)[0][0]

    async def pause(self) -> RunAccounts:
        """Halt the run after its epoch, or at once between epochs. A halted run stays halted.

        Raises:
            CoordinatorError: ``NotOwner``; ``Halted`` if it was never started or is finished.
        """
        run, owner = await self._owned()
        phase = run.state.phase
        if phase in (Phase.UNINITIALIZED, Phase.FINISHED):
            words = "was never started" if phase is Phase.UNINITIALIZED else "is finished"
            raise CoordinatorError(f"run {self.run.run_id!r} {words}; there is nothing to pause", code="Halted")
        if phase is not Phase.PAUSED and not run.state.pending_pause:
            await self._command("set_paused", owner.paused(True), owner)
        return await self.look()

    async def set_checkpoint(self, checkpoint: Mapping[str, Any]) -> RunAccounts:
        """Set a checkpoint's place, as ``{"Hub": {"repo_id": ...}}``: as the owner, or with an authorization."""
        run = await self.look()
        owner = await find_owner(self.run)
        if owner is None:
            keys, instance = self.run.anchored(await self.run.keys()), await self.run.instance()
            assert instance is not None
            assert run.manifest is not None
            me = self.run.wallet.public
            place = authorization_address(
                Pubkey(run.manifest.authorizer), instance.main_authority, me, CHECKPOINT_SCOPE
            )
            await self._transact("checkpoint", [keys.checkpoint(me, dict(checkpoint), place)])
        else:
            await self._command("checkpoint", owner.checkpoint(dict(checkpoint)), owner)
        return await self.look()

    async def close(self) -> int:
        """Close a halted run and recover its accounts' balance; returns the recovered lamports.

        Raises:
            CoordinatorError: ``CloseCoordinatorNotHalted`` if it is open; ``NotOwner``.
        """
        run, owner = await self._owned()
        if not run.state.phase.halted:
            raise CoordinatorError(
                f"run {self.run.run_id!r} is open, in phase {run.state.phase.name}; pause it first: "
                f"`psyche run pause {self.run.run_id}`",
                code="CloseCoordinatorNotHalted",
            )
        me, reader = self.run.wallet.public, self.run.reader
        assert run.manifest is not None
        authorizer = Pubkey(run.manifest.authorizer)
        try:
            before = await reader.balance(me)
            await self._close_authorization(authorizer, EVERYBODY, JOIN_SCOPE)
            await store.discard(self.run.sender, reader, run.manifest.address)
            await self._command("free_coordinator", owner.free(), owner)
            return await reader.balance(me) - before
        except RpcProblem as problem:
            raise unreachable(problem, "closing the run", self.run.cluster.name) from problem

    # --- who may join -----------------------------------------------------------------------------------------------

    async def authorize(self, wallet: Pubkey | None, scope: str = "join") -> None:
        """Let a wallet or everybody (None) join, or set the checkpoint (scope ``checkpoint``).

        Raises:
            ConfigError: the scope is unknown.
            CoordinatorError: this wallet is not the run's join authority, or main authority for the checkpoint.
        """
        authorizer, name = await self._grantor(scope)
        me, grantee = self.run.wallet.public, wallet or EVERYBODY
        place = authorization_address(authorizer, me, grantee, name)
        held = await self._authorization(place)
        parts, names = [], []
        if held is None:
            parts.append(instructions.authorization_create(authorizer, me, me, grantee, name))
            names.append("authorization_create")
        if held is None or not held["active"]:
            parts.append(instructions.authorization_grantor_update(authorizer, me, place, True))
            names.append("authorization_grantor_update")
        if parts:
            await self._transact("+".join(names), parts)

    async def revoke(self, wallet: Pubkey | None, scope: str = "join") -> bool:
        """Revoke an authorization; returns whether it was active. Clients stay until their epoch ends."""
        authorizer, name = await self._grantor(scope)
        grantee = wallet or EVERYBODY
        held = await self._authorization(authorization_address(authorizer, self.run.wallet.public, grantee, name))
        await self._close_authorization(authorizer, grantee, name)
        return held is not None and bool(held["active"])

    async def kick(self, wallet: Pubkey) -> bool:
        """Revoke a wallet's authorization and remove it at once, also from the epoch; returns whether it was there.

        Raises:
            CoordinatorError: this wallet is not the run's join authority.
        """
        await self.revoke(wallet)
        run, keys = await self.look(), await self.run.keys()
        if all(client.signer != bytes(wallet) for client in (*run.state.healthy, *run.pending)):
            return False
        await self._transact("kick", [self.run.anchored(keys).kick(self.run.wallet.public, wallet)])
        return True

    async def authorization(self, grantee: Pubkey | None) -> Authorization | None:
        """A wallet's or everybody's (None) authorization to join; None without one."""
        run, instance = await self.look(), await self.run.instance()
        assert instance is not None
        assert run.manifest is not None
        authorizer, grantor = Pubkey(run.manifest.authorizer), instance.join_authority
        place = authorization_address(authorizer, grantor, grantee or EVERYBODY, JOIN_SCOPE)
        held = await self._authorization(place)
        if held is None:
            return None
        delegates = tuple(Pubkey(key) for key in held["delegates"])
        return Authorization(place, authorizer, grantor, grantee or EVERYBODY, bool(held["active"]), delegates)

    async def delegate(self, wallets: Sequence[Pubkey], *, clear: bool = False) -> Authorization:
        """Let wallets join with this wallet's authorization; ``clear`` first takes it from the former ones.

        Raises:
            CoordinatorError: this wallet has no authorization of its own (``NotAuthorized``).
        """
        me = self.run.wallet.public
        held = await self.authorization(me)
        if held is None:
            raise CoordinatorError(
                f"the wallet {me} has no authorization of its own for run {self.run.run_id!r}, so it can delegate "
                f"none. The run's owner grants one: `psyche run authorize {self.run.run_id} {me}`",
                code="NotAuthorized",
            )
        part = instructions.authorization_grantee_update(held.authorizer, me, me, held.place, wallets, clear)
        await self._transact("authorization_grantee_update", [part])
        after = await self.authorization(me)
        assert after is not None
        return after

    async def can_join(self) -> str:
        """Check what a join needs of the run and of this wallet, besides a node; returns in words what the run does.

        Raises:
            CoordinatorError: ``Halted``, ``NoManifest``, ``WrongVersion`` or ``NotAuthorized``.
        """
        run, instance = await self.look(), await self.run.instance()
        assert instance is not None
        if run.state.phase.halted:
            raise halted(run.state)
        if await self.run.run_manifest(run) is None:
            raise CoordinatorError(f"run {self.run.run_id!r} has no manifest, so nodes cannot join", code="NoManifest")
        self.run.check_version(run)
        await self.run.authorization(run, instance)
        phase = run.state.phase.name.lower().replace("_", " ")
        return f"the wallet {self.run.wallet.public} can join run {self.run.run_id}: {phase}, epoch {run.state.epoch}"

    async def _grantor(self, scope: str) -> tuple[Pubkey, bytes]:
        """The authorizer's program and the scope's name, if this wallet may grant them."""
        if scope not in SCOPES:
            raise ConfigError(f"there is no scope {scope!r}; choose {', '.join(SCOPES)}")
        run, instance = await self.look(), await self.run.instance()
        assert instance is not None
        assert run.manifest is not None
        needed = instance.join_authority if scope == "join" else instance.main_authority
        if needed != self.run.wallet.public:
            raise CoordinatorError(
                f"the wallet {self.run.wallet.public} cannot authorize anybody for run {self.run.run_id!r}: its "
                f"{scope} authority is {needed}",
                code="NotOwner",
            )
        return Pubkey(run.manifest.authorizer), SCOPES[scope]

    async def _authorization(self, place: Pubkey) -> dict[str, Any] | None:
        try:
            found = await self.run.reader.account(place)
        except RpcProblem as problem:
            raise unreachable(problem, "an authorization", self.run.cluster.name) from problem
        if found is None:
            return None
        values: dict[str, Any] = AUTHORIZER.accounts["Authorization"].decode(found.data[8:])
        return values

    async def _close_authorization(self, authorizer: Pubkey, grantee: Pubkey, scope: bytes) -> None:
        """Revoke, and recover the storage at once if possible."""
        me = self.run.wallet.public
        place = authorization_address(authorizer, me, grantee, scope)
        held = await self._authorization(place)
        if held is None:
            return
        parts, names = [], []
        if held["active"]:
            parts.append(instructions.authorization_grantor_update(authorizer, me, place, False))
            names.append("authorization_grantor_update")
        if not held["delegates"]:
            parts.append(instructions.authorization_close(authorizer, me, me, place))
            names.append("authorization_close")
        if parts:
            await self._transact("+".join(names), parts)

    # --- points -----------------------------------------------------------------------------------------------------

    async def points(self) -> list[Points]:
        """Each wallet's earnings, in joining order."""
        run = await self.look()
        treasury = await Treasury.of(self.run)
        claimed = await treasury.claimed([Pubkey(m.signer) for m in run.members]) if treasury else {}
        return [Points(Pubkey(m.signer), m.earned, m.slashed, claimed.get(Pubkey(m.signer), 0)) for m in run.members]

    async def fund(self, amount: int) -> int:
        """Give the treasurer tokens of this wallet; returns the base units that it then holds.

        Raises:
            CoordinatorError: the run has no treasurer (``NoTreasurer``), or the wallet has too few (``Unfunded``).
        """
        treasury = await self._treasury()
        held = await treasury.held(self.run.wallet.public)
        if held < amount:
            raise CoordinatorError(
                f"the wallet {self.run.wallet.public} holds {held:,} base units of the token {treasury.mint}, and "
                f"{amount:,} were to be given",
                code="Unfunded",
            )
        await self._transact("transfer", [treasury.fund(self.run.wallet.public, amount)])
        return await treasury.vault()

    async def _treasury(self) -> Treasury:
        treasury = await Treasury.of(self.run)
        if treasury is None:
            raise CoordinatorError(
                f"run {self.run.run_id!r} has no treasurer: its points are counted, but not paid",
                code="NoTreasurer",
            )
        return treasury

    async def claim(self, points: int | None = None) -> int:
        """Have the treasurer pay this wallet's points: all, or the given number; returns the paid points.

        Raises:
            CoordinatorError: the run has no treasurer (``NoTreasurer``), or points are lacking.
        """
        run, treasury = await self.look(), await self._treasury()
        me = self.run.wallet.public
        mine = next((member for member in run.members if member.signer == bytes(me)), None)
        claimed = (await treasury.claimed([me])).get(me, 0)
        earned = mine.earned if mine else 0
        wanted = min(earned - claimed, await treasury.vault()) if points is None else points
        if not 0 <= wanted <= earned - claimed:
            raise CoordinatorError(
                f"the wallet {me} earned {earned} points of run {self.run.run_id!r} and claimed {claimed} of them; "
                f"{points} cannot be claimed",
                code="InvalidParameter",
            )
        if wanted:
            names, parts = await treasury.claim(me, wanted)
            await self._transact(names, parts)
        return wanted

    # --- sending ----------------------------------------------------------------------------------------------------

    async def _owned(self) -> tuple[RunAccounts, Owner]:
        """The run and its controller.

        Raises:
            CoordinatorError: another wallet owns it (``NotOwner``).
        """
        run = await self.look()
        owner = await find_owner(self.run)
        if owner is None:
            instance = await self.run.instance()
            assert instance is not None
            raise CoordinatorError(
                f"run {self.run.run_id!r} on {self.run.cluster.name} belongs to {instance.main_authority}, and this "
                f"wallet is {self.run.wallet.public}. Use the owner's wallet, or another run id.",
                code="NotOwner",
            )
        return run, owner

    async def _command(self, name: str, part: Instruction, owner: Owner) -> Receipt:
        return await self._transact(name if isinstance(owner, Direct) else f"treasurer:{name}", [part])

    async def _transact(self, name: str, parts: list[Instruction]) -> Receipt:
        receipt = await self.run.sender.send(name, parts, units=units(name))
        # Later steps build on it; a lagging service would miss it.
        await self._settled(receipt)
        return receipt

    async def _settled(self, receipt: Receipt) -> None:
        try:
            await self.run.reader.accounts([SYSTEM_PROGRAM], receipt.slot)
        except RpcProblem as problem:
            raise unreachable(problem, "what was just changed", self.run.cluster.name) from problem

    async def _rent(self, size: int) -> int:
        try:
            return await self.run.reader.rent(size)
        except RpcProblem as problem:
            raise unreachable(problem, "the price of storage", self.run.cluster.name) from problem

    async def _check_funds(self) -> None:
        """Check before the first transaction that the wallet can pay."""
        sizes = (COORDINATOR_SIZE, INSTANCE_SIZE, MANIFEST_SIZE, AUTHORIZATION_SIZE, 2048, 0)
        needed = sum([await self._rent(size) for size in sizes]) + RESERVE * SIGNATURE_FEE
        try:
            balance = await self.run.reader.balance(self.run.wallet.public)
        except RpcProblem as problem:
            raise unreachable(problem, "the wallet's balance", self.run.cluster.name) from problem
        if balance < needed:
            raise CoordinatorError(
                f"the wallet {self.run.wallet.public} holds {sol(balance)} on {self.run.cluster.name}; creating a run "
                f"needs {sol(needed)}, of which all but the fees come back when it is closed. On a local chain and on "
                "devnet `psyche solana airdrop` gives SOL away.",
                code="Unfunded",
            )


def _witness(call: Call, program: Pubkey) -> dict[str, Any]:
    """The arguments of a witness instruction; empty for another call."""
    with contextlib.suppress(Refused):
        if call.program == program:
            name, given = decode(call.data)
            return given if name == "witness" else {}
    return {}


def _model(model: Mapping[str, Any]) -> bytes:
    """A model section as bytes, without its checkpoint."""
    if not model:
        return b""
    llm = {**model["LLM"], "checkpoint": "Ephemeral"}
    return MODEL.pack({"LLM": llm})
