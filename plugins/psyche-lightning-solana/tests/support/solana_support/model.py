"""The coordinator program in Python: instructions in, accounts' bytes or an error number out.

With :mod:`psyche_lightning_solana.hosting` it hosts :mod:`psyche_lightning.coordinator.machine` exactly as the program
in ``program/`` does. Where the two disagree, one of them is wrong: the differential test runs both on the same
instructions. Balances are left out.

The order of refusals is the order of the code: the discriminator and the arguments, the accounts, each fully and in
their order, then the rules of the instruction.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from psyche_lightning_solana import hosting
from psyche_lightning_solana.account import (
    ManifestAccount,
    RunAccounts,
    at_rest,
    read,
    write_coordinator,
    write_manifest,
)
from psyche_lightning_solana.borsh import Reader, Struct
from psyche_lightning_solana.errors import NUMBERS, Refused, require
from psyche_lightning_solana.hosting import Clock
from psyche_lightning_solana.instructions import decode
from psyche_lightning_solana.interface import (
    AUTHORIZER,
    CHECKPOINT_SCOPE,
    COORDINATOR,
    JOIN_SCOPE,
    MAX_RUN_ID,
)
from psyche_lightning_solana.layout import (
    ADDRESS_SIZE,
    COORDINATOR_DISCRIMINATOR,
    COORDINATOR_SIZE,
    INSTANCE_SIZE,
    MANIFEST_DISCRIMINATOR,
    MANIFEST_SIZE,
    discriminator,
    view_manifest,
)
from solders.instruction import AccountMeta
from solders.pubkey import Pubkey

from psyche_lightning.coordinator.machine import MachineError
from psyche_lightning.errors import WireError
from psyche_lightning.protocol.state import CoordinatorConfig, RunState
from psyche_lightning.wire.canonical import ZERO_HASH

SYSTEM_PROGRAM = bytes(32)


@dataclass
class Account:
    """An account of the chain."""

    owner: bytes
    data: bytes = b""
    executable: bool = False


class _Given(NamedTuple):
    """An account as the instruction gives it."""

    key: bytes
    signer: bool
    writable: bool
    account: Account


class _Context(NamedTuple):
    """A run that an instruction works on, and who asks."""

    user: bytes
    instance: dict[str, Any]
    keys: tuple[bytes, bytes, bytes]
    run: RunAccounts


class ModelProgram:
    """The coordinator program over a chain of plain accounts.

    Args:
        program_id: its address.
        accounts: the chain: key to account; the program's effects show there.
        remember: keep decoded runs between instructions; without, each one reads its accounts anew.
    """

    def __init__(self, program_id: bytes, accounts: dict[bytes, Account], *, remember: bool = True) -> None:
        self.program_id = program_id
        self.accounts = accounts
        self._known: dict[bytes, tuple[bytes, bytes, RunAccounts]] = {}
        self._remember = remember
        self._clock = Clock(0, 0)

    def execute(self, data: bytes, metas: Sequence[AccountMeta], clock: Clock) -> int | None:
        """Run one instruction.

        Args:
            data: discriminator and arguments.
            metas: its accounts.
            clock: the clock sysvar.

        Returns:
            None when it succeeded, else the number of the error; then nothing changed.
        """
        self._clock = clock
        try:
            name, arguments = decode(data)
            handler: Callable[..., None] = getattr(self, f"_{name}")
            handler([self._given(meta.pubkey, metas) for meta in metas], **arguments)
        except Refused as refused:
            return refused.number
        except MachineError as error:
            return NUMBERS[error.code]
        return None

    # Accounts.

    def _given(self, key: Pubkey, metas: Sequence[AccountMeta]) -> _Given:
        same = [meta for meta in metas if meta.pubkey == key]
        account = self.accounts.get(bytes(key)) or Account(SYSTEM_PROGRAM)
        signer, writable = any(meta.is_signer for meta in same), any(meta.is_writable for meta in same)
        return _Given(bytes(key), signer, writable, account)

    def _derived(self, *seeds: bytes) -> tuple[bytes, int]:
        address, bump = Pubkey.find_program_address(seeds, Pubkey(self.program_id))
        return bytes(address), bump

    def _is_derived(self, key: bytes, *seeds: bytes) -> bool:
        try:
            return bytes(Pubkey.create_program_address(seeds, Pubkey(self.program_id))) == key
        except ValueError:  # on the curve
            return False

    def _owned(self, given: _Given, owner: bytes, start: bytes, size: int) -> bytes:
        data = given.account.data
        require(given.account.owner == owner, "AccountOwnedByWrongProgram")
        require(len(data) >= 8, "AccountDiscriminatorNotFound")
        require(data[:8] == start, "AccountDiscriminatorMismatch")
        require(len(data) >= size, "AccountDidNotDeserialize")
        return data

    def _instance(
        self, user: _Given, given: _Given, *, owner: bool, joins: bool = False, closing: bool = False
    ) -> dict[str, Any]:
        require(user.signer, "AccountNotSigner")
        require(given.writable or not closing, "AccountNotMutable")
        kind = COORDINATOR.accounts["CoordinatorInstance"]
        data = self._owned(given, self.program_id, discriminator(kind.name), INSTANCE_SIZE)
        instance = _read(kind, data[8:], "AccountDidNotDeserialize")
        seeds = (b"coordinator", instance["run_id"].encode(), bytes([instance["bump"]]))
        require(self._is_derived(given.key, *seeds), "ConstraintSeeds")
        require(not owner or user.key == instance["main_authority"], "ConstraintRaw")
        require(not joins or user.key == instance["join_authority"], "ConstraintRaw")
        return instance

    def _context(self, given: list[_Given], at: int = 1, *, owner: bool = False, **how: bool) -> _Context:
        """The instance at place ``at``, coordinator account and manifest account after it; the user first."""
        require(len(given) >= at + 3, "AccountNotEnoughKeys")
        instance_at, coordinator, manifest = given[at : at + 3]
        instance = self._instance(
            given[0], instance_at, owner=owner, joins=how.get("joins", False), closing=how.get("closing", False)
        )
        require(coordinator.writable or how.get("read_only", False), "AccountNotMutable")
        data = self._owned(coordinator, self.program_id, COORDINATOR_DISCRIMINATOR, 16)
        require(len(data) == COORDINATOR_SIZE, "CoordinatorAccountIncorrectSize")
        require(data[8:16] == struct.pack("<Q", 1), "AccountDidNotDeserialize")
        require(coordinator.key == instance["coordinator_account"], "ConstraintRaw")
        require(manifest.writable, "AccountNotMutable")
        more = self._owned(manifest, self.program_id, MANIFEST_DISCRIMINATOR, MANIFEST_SIZE)
        record = view_manifest(more)
        seeds = (b"manifest", instance["run_id"].encode(), bytes([int(record["bump"])]))
        require(self._is_derived(manifest.key, *seeds), "ConstraintSeeds")
        require(record["coordinator_account"].tobytes() == coordinator.key, "ConstraintRaw")
        keys = (instance_at.key, coordinator.key, manifest.key)
        run = self.run(coordinator.key, manifest.key) if self._remember else read(data, more)
        return _Context(given[0].key, instance, keys, run)

    def run(self, coordinator: bytes, manifest: bytes) -> RunAccounts:
        """The run whose accounts have these keys."""
        data, more = self.accounts[coordinator].data, self.accounts[manifest].data
        known = self._known.get(coordinator)
        if known is None or known[0] is not data or known[1] is not more:
            known = self._known[coordinator] = (data, more, read(data, more))
        return known[2]

    def _store(self, context: _Context, run: RunAccounts) -> None:
        """Write the run; its nonce grows if any byte changed."""
        coordinator, manifest = (self.accounts[key] for key in context.keys[1:])
        run = at_rest(hosting.flagged(replace(run, state=replace(run.state, nonce=context.run.state.nonce))))
        data, more = write_coordinator(run), write_manifest(run)
        if (data, more) != (coordinator.data, manifest.data):
            run = replace(run, state=replace(run.state, nonce=(run.state.nonce + 1) & hosting.MAX_U64))
            data = data[:-8] + struct.pack("<Q", run.state.nonce)
        coordinator.data, manifest.data = data, more
        self._known[context.keys[1]] = (data, more, run)

    def _authorized(self, context: _Context, given: _Given, grantor: bytes, scope: bytes) -> None:
        """Refuse unless the authorization lets the user do what ``scope`` names."""
        manifest = context.run.manifest
        assert manifest is not None
        kind = AUTHORIZER.accounts["Authorization"]
        data = self._owned(given, manifest.authorizer, discriminator(kind.name), 8)
        held = _read(kind, data[8:], "AccountDidNotDeserialize")
        anybody = held["grantee"] == bytes(32)
        valid = held["active"] and held["grantor"] == grantor and bytes(held["scope"]) == scope
        require(valid and (anybody or context.user in [held["grantee"], *held["delegates"]]), "ConstraintRaw")

    # The instructions.

    def _init_coordinator(
        self, given: list[_Given], main_authority: bytes, join_authority: bytes, run_id: str, client_version: str
    ) -> None:
        require(0 < len(run_id.encode()) <= MAX_RUN_ID, "RunIdInvalidLength")
        require(len(given) >= 6, "AccountNotEnoughKeys")
        payer, instance, coordinator, system, authorizer, manifest = given[:6]
        require(payer.signer, "AccountNotSigner")
        require(payer.writable, "AccountNotMutable")
        require(coordinator.writable, "AccountNotMutable")
        require(coordinator.account.owner == self.program_id, "AccountOwnedByWrongProgram")
        require(len(coordinator.account.data) == COORDINATOR_SIZE, "CoordinatorAccountIncorrectSize")
        require(coordinator.account.data[:8] == bytes(8), "AccountDiscriminatorAlreadySet")
        require(system.key == SYSTEM_PROGRAM, "InvalidProgramId")
        require(authorizer.account.executable, "InvalidProgramExecutable")
        bumps = [
            self._create(place, seed, run_id.encode())
            for place, seed in ((instance, b"coordinator"), (manifest, b"manifest"))
        ]
        kind = COORDINATOR.accounts["CoordinatorInstance"]
        values = {
            "bump": bumps[0],
            "main_authority": main_authority,
            "join_authority": join_authority,
            "coordinator_account": coordinator.key,
            "run_id": run_id,
        }
        data = (discriminator(kind.name) + kind.write(values)).ljust(INSTANCE_SIZE, b"\0")
        self.accounts[instance.key] = Account(self.program_id, data)
        run = RunAccounts(
            RunState(run_id, config=CoordinatorConfig(*[0] * 14), max_seq_len=0, step=0, start_step=0),
            client_version=client_version,
            manifest=ManifestAccount(bumps[1], coordinator.key, authorizer.key),
        )
        coordinator.account.data = write_coordinator(run)
        self.accounts[manifest.key] = Account(self.program_id, write_manifest(run))

    def _create(self, given: _Given, *seeds: bytes) -> int:
        """The bump of an account that can be made at the address of these seeds."""
        address, bump = self._derived(*seeds)
        require(address == given.key, "ConstraintSeeds")
        require(given.writable, "AccountNotMutable")
        fresh = given.account.owner == SYSTEM_PROGRAM and not given.account.data
        require(fresh, "AccountDiscriminatorAlreadySet")
        return bump

    def _free_coordinator(self, given: list[_Given]) -> None:
        context = self._context(given, 2, owner=True, closing=True)
        spill = given[1]
        require(spill.writable, "AccountNotMutable")
        require(spill.key not in context.keys, "ConstraintDuplicateMutableAccount")
        require(context.run.state.phase.halted, "CloseCoordinatorNotHalted")
        for key in context.keys:
            del self.accounts[key]

    def _update(self, given: list[_Given], **what: Any) -> None:
        context = self._context(given, owner=True)
        self._store(context, hosting.update(context.run, **what))

    def _update_client_version(self, given: list[_Given], client_version: str) -> None:
        context = self._context(given, owner=True)
        require(context.run.state.phase.halted, "UpdateConfigNotHalted")
        self._store(context, replace(context.run, client_version=client_version))

    def _set_future_epoch_rates(self, given: list[_Given], **rates: int | None) -> None:
        context = self._context(given, owner=True)
        self._store(context, hosting.set_rates(context.run, *rates.values()))

    def _set_paused(self, given: list[_Given], paused: bool) -> None:
        context = self._context(given, owner=True)
        change = hosting.pause if paused else hosting.resume
        self._store(context, change(context.run, self._clock))

    def _join_run(self, given: list[_Given], client_id: dict[str, bytes]) -> None:
        require(len(given) >= 6, "AccountNotEnoughKeys")
        context = self._context(given, 2)
        self._authorized(context, given[1], context.instance["join_authority"], JOIN_SCOPE)
        require(given[5].signer, "AccountNotSigner")
        signer, p2p = client_id["signer"], client_id["p2p_identity"]
        require(p2p == given[5].key, "SignerMismatch")
        self._store(context, hosting.join(context.run, context.user, signer, p2p, self._clock))

    def _withdraw(self, given: list[_Given]) -> None:
        context = self._context(given)
        self._store(context, hosting.withdraw(context.run, context.user, self._clock))

    def _restart_from(self, given: list[_Given], step: int, digest: bytes) -> None:
        context = self._context(given, owner=True)
        self._store(context, hosting.restart_from(context.run, step, digest, self._clock))

    def _kick(self, given: list[_Given], signer: bytes) -> None:
        context = self._context(given, joins=True)
        self._store(context, hosting.kick(context.run, signer, self._clock))

    def _tick(self, given: list[_Given]) -> None:
        context = self._context(given)
        self._store(context, hosting.tick(context.run, self._clock))

    def _witness(self, given: list[_Given], **said: Any) -> None:
        context = self._context(given)
        record = {name: said.pop(name) for name in COORDINATOR.instructions["witness"].arguments.fields}
        self._store(context, hosting.witness(context.run, context.user, record, said, self._clock))

    def _warmup_witness(self, given: list[_Given], epoch: int | None = None, **record: Any) -> None:
        context = self._context(given)
        index, digest = record["proof"]["index"], record["broadcast_merkle"]
        self._store(context, hosting.warmup_witness(context.run, context.user, index, digest, epoch, self._clock))

    def _health_check(self, given: list[_Given], id: dict[str, bytes], **seat: Any) -> None:
        context = self._context(given)
        self._store(context, hosting.health_check(context.run, context.user, id["signer"], **seat, clock=self._clock))

    def _checkpoint(self, given: list[_Given], repo: Any) -> None:
        context = self._context(given)
        owner = context.instance["main_authority"]
        if context.user != owner:
            require(len(given) > 4, "InvalidCheckpoint")
            self._authorized(context, given[4], owner, CHECKPOINT_SCOPE)
        self._store(context, hosting.set_checkpoint(context.run, repo, self._clock))

    def _set_manifest(self, given: list[_Given], digest: bytes, address: str) -> None:
        context = self._context(given, owner=True, read_only=True)
        manifest = context.run.manifest
        assert manifest is not None
        require(context.run.state.phase.halted or not manifest.digest, "UpdateConfigNotHalted")
        digest = b"" if digest == ZERO_HASH else digest
        run = replace(context.run, manifest=replace(manifest, digest=digest, address=address))
        self.accounts[context.keys[2]].data = write_manifest(run)

    def _set_address(self, given: list[_Given], address: str) -> None:
        require(len(given) >= 4, "AccountNotEnoughKeys")
        user, account, instance_at, system = given[:4]
        require(user.signer, "AccountNotSigner")
        require(user.writable, "AccountNotMutable")
        exists = account.account.owner != SYSTEM_PROGRAM
        if not address:  # whether or not the run still exists
            if exists:
                self._address(user, account)
                del self.accounts[account.key]
            return
        instance = self._instance(user, instance_at, owner=False)
        require(system.key == SYSTEM_PROGRAM, "InvalidProgramId")
        seeds = (b"address", instance["run_id"].encode(), user.key)
        if exists:
            bump = self._address(user, account)[8]
            require(self._is_derived(account.key, *seeds, bytes([bump])), "ConstraintSeeds")
        else:
            bump = self._create(account, *seeds)
        text = address.encode()
        values = {
            "bump": bump,
            "pad": bytes(7),
            "wallet": user.key,
            "len": len(text),
            "address": text.ljust(126, b"\0"),
        }
        kind = COORDINATOR.accounts["NodeAddress"]
        self.accounts[account.key] = Account(self.program_id, discriminator(kind.name) + kind.write(values))

    def _address(self, user: _Given, given: _Given) -> bytes:
        require(given.writable, "AccountNotMutable")
        data = self._owned(given, self.program_id, discriminator("NodeAddress"), ADDRESS_SIZE)
        require(data[16:48] == user.key, "ConstraintRaw")
        return data


def _read(kind: Struct, data: bytes, name: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = kind.read(Reader(data))
    except WireError as error:
        raise Refused(name) from error
    return values
