"""The virtual machine: Solana's own runtime (``solders.litesvm``) with the parts that it lacks.

LiteSVM runs the programs. This module adds priority fees, the rule that each account must cover its rent, errors
instead of panics, and the choice of features. A run of a transaction changes no account; :meth:`Vm.store` stores its
result.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from solders.account import Account
from solders.clock import Clock
from solders.epoch_schedule import EpochSchedule
from solders.hash import Hash
from solders.litesvm import FeatureSet, LiteSVM
from solders.pubkey import Pubkey
from solders.rent import Rent
from solders.transaction import VersionedTransaction
from solders.transaction_metadata import FailedTransactionMetadata, InnerInstruction, TransactionMetadata
from solders.transaction_status import (
    InstructionErrorFieldless,
    TransactionErrorFieldless,
    TransactionErrorInstructionError,
    TransactionErrorInsufficientFundsForRent,
    TransactionErrorType,
)

from psyche_lightning_localnet.errors import LocalnetError
from psyche_lightning_localnet.tokens import native_mints
from psyche_lightning_localnet.transactions import Fee, Named, fee_of, require_locks

SLOTS_PER_EPOCH = 432_000
LOG_LIMIT = 10_000
SYSTEM_PROGRAM = Pubkey.from_string("11111111111111111111111111111111")
LOADER = Pubkey.from_string("BPFLoaderUpgradeab1e11111111111111111111111")
INCINERATOR = Pubkey.from_string("1nc1nerator11111111111111111111111111111111")
_PROGRAM_DATA = b"\x03\0\0\0"

# Features that LiteSVM enables, but clusters do not.
INACTIVE = (
    "EmhbpdVtZ2hWRGFWBDjn2i3SJD8Z36z4mpMcZJEnebnP",  # no more deployments with the upgradeable loader
    "8Cb77yHjPWe9wuWUfXeh6iszFGCDGNCoFk3tprViYHNm",  # its successor
)
# Errors that cost a fee before any instruction (SIMD-0082).
_FEES_ONLY = ("InvalidProgramForExecution", "ProgramAccountNotFound", "MaxLoadedAccountsDataSizeExceeded")


class VmPanicError(LocalnetError):
    """The runtime panicked on a transaction."""


@dataclass(frozen=True)
class Outcome:
    """The result of a run of a transaction.

    Attributes:
        err: the transaction's error, or None.
        fee: the transaction's fee.
        landed: whether it becomes part of the chain and pays its fee, even if it failed.
        logs: log lines of the runtime and the programs.
        units: compute units that it used.
        inner: the inner instructions of each instruction.
        return_data: a program and the bytes that it returned, or None.
        changes: the changed accounts; a failed transaction changes only the payer's.
    """

    err: TransactionErrorType | None
    fee: Fee
    landed: bool = False
    logs: tuple[str, ...] = ()
    units: int = 0
    inner: tuple[tuple[InnerInstruction, ...], ...] = ()
    return_data: tuple[Pubkey, bytes] | None = None
    changes: dict[Pubkey, Account] = field(default_factory=dict)


class Vm:
    """The current accounts, and the runtime."""

    def __init__(self) -> None:
        features = FeatureSet.all_enabled()
        off = {Pubkey.from_string(text) for text in INACTIVE}
        features = FeatureSet({key: 0 for key in features.active if key not in off}, off)
        self._svm = (
            LiteSVM.default()
            .with_sysvars()
            .with_builtins(features)
            .with_precompiles(features)
            .with_spl_programs()
            .with_sigverify(True)
            .with_blockhash_check(False)  # LiteSVM knows only one blockhash
            .with_transaction_history(0)
            .with_log_bytes_limit(LOG_LIMIT)
        )
        self._svm.set_epoch_schedule(EpochSchedule.without_warmup())
        for key, mint in native_mints().items():
            self._svm.set_account(key, mint)
        self._rent: Rent = self._svm.get_rent()
        self._slot = 0
        self._deployed: dict[Pubkey, int] = {}

    def account(self, key: Pubkey) -> Account | None:
        """An account; None if it is missing or has no lamports."""
        account = self._svm.get_account(key)
        return None if account is None or account.lamports == 0 else account

    def minimum_balance(self, size: int) -> int:
        """Lamports that an account of ``size`` bytes must hold to be rent-exempt."""
        return self._svm.minimum_balance_for_rent_exemption(size)

    def set_clock(self, slot: int, unix_time: int) -> None:
        """Set the clock that programs see."""
        self._slot = slot
        epoch = slot // SLOTS_PER_EPOCH
        self._svm.set_clock(
            Clock(
                slot=slot,
                epoch_start_timestamp=0,
                epoch=epoch,
                leader_schedule_epoch=epoch + 1,
                unix_timestamp=unix_time,
            )
        )

    def set_slot_hashes(self, hashes: list[tuple[int, Hash]]) -> None:
        """Set the sysvar with the hashes of recent slots, newest first."""
        self._svm.set_slot_hashes(hashes)

    def store(self, accounts: dict[Pubkey, Account]) -> None:
        """Replace accounts."""
        # The data of a program must exist before the program is loaded.
        for key, account in sorted(accounts.items(), key=lambda item: not _is_program_data(item[1])):
            self._svm.set_account(key, account if account.lamports else Account(0, b"", SYSTEM_PROGRAM))
        for key, account in accounts.items():
            if account.executable and account.owner == LOADER:
                code = self.account(Pubkey(bytes(account.data[4:36])))
                self._deployed[key] = -1 if code is None else int.from_bytes(bytes(code.data[4:12]), "little")

    def run(self, transaction: VersionedTransaction, names: Named, *, verify: bool = True) -> Outcome:
        """Run a transaction on the current accounts, without changing them.

        Args:
            transaction: a sane transaction; its blockhash is ignored.
            names: its accounts.
            verify: whether to check its signatures.

        Raises:
            VmPanicError: the runtime panicked, which is a defect of it.
        """
        fee = fee_of(transaction.message)
        conflict = require_locks(names.keys)
        if conflict is not None:
            return Outcome(getattr(TransactionErrorFieldless, conflict), fee)
        payer_key = names.keys[0]
        payer = self.account(payer_key)
        if payer is None:
            return Outcome(TransactionErrorFieldless.AccountNotFound, fee)
        if payer.lamports < fee.total:
            return Outcome(TransactionErrorFieldless.InsufficientFundsForFee, fee)
        self._svm.with_sigverify(verify)
        if fee.priority:  # LiteSVM does not charge it
            self._svm.set_account(payer_key, _with_lamports(payer, payer.lamports - fee.priority))
        try:
            result = self._svm.simulate_transaction(transaction)
        except Exception:
            raise
        except BaseException as panic:
            if type(panic).__name__ != "PanicException":
                raise
            raise VmPanicError(f"the runtime panicked on a transaction: {panic}") from None
        finally:
            if fee.priority:
                self._svm.set_account(payer_key, payer)
        paid = {payer_key: _with_lamports(payer, payer.lamports - fee.total)}
        if not isinstance(result, FailedTransactionMetadata) or result.meta().logs():
            for place, instruction in enumerate(transaction.message.instructions):
                if self._deployed.get(names.keys[instruction.program_id_index]) == self._slot:
                    err = TransactionErrorInstructionError(place, InstructionErrorFieldless.UnsupportedProgramId)
                    return Outcome(err, fee, landed=True, logs=("Program is not deployed",), changes=paid)
        if isinstance(result, FailedTransactionMetadata):
            landed = bool(result.meta().logs()) or str(result.err()).rpartition(".")[2] in _FEES_ONLY
            return _outcome(result.meta(), result.err(), fee, landed=landed, changes=paid if landed else {})
        changes = dict(result.post_accounts())
        poor = self._below_rent(names, changes)
        if poor is not None:
            rent = TransactionErrorInsufficientFundsForRent(poor)
            return _outcome(result.meta(), rent, fee, landed=True, changes=paid)
        return _outcome(result.meta(), None, fee, landed=True, changes=changes)

    def _below_rent(self, names: Named, changes: dict[Pubkey, Account]) -> int | None:
        """Index of the first account that would fall below its rent; None if none would (Agave's ``rent_state``)."""
        for index, key in enumerate(names.keys):
            after = changes.get(key)
            if after is None or after.lamports == 0 or key == INCINERATOR:
                continue
            size = len(after.data)
            if after.lamports >= self._rent.minimum_balance(size):
                continue
            before = self.account(key)
            poor_before = before is not None and before.lamports < self._rent.minimum_balance(len(before.data))
            if before is None or not poor_before or size != len(before.data) or after.lamports > before.lamports:
                return index
        return None


def _outcome(
    meta: TransactionMetadata,
    err: TransactionErrorType | None,
    fee: Fee,
    *,
    landed: bool,
    changes: dict[Pubkey, Account],
) -> Outcome:
    returned = meta.return_data()  # type: ignore[attr-defined]  # under another name in solders' stubs
    return Outcome(
        err=err,
        fee=fee,
        landed=landed,
        logs=tuple(meta.logs()),
        units=meta.compute_units_consumed(),
        inner=tuple(tuple(calls) for calls in meta.inner_instructions()),
        return_data=(returned.program_id, bytes(returned.data)) if returned.data else None,
        changes=changes,
    )


def _with_lamports(account: Account, lamports: int) -> Account:
    return Account(lamports, bytes(account.data), account.owner, account.executable, account.rent_epoch)


def _is_program_data(account: Account) -> bool:
    return account.owner == LOADER and bytes(account.data[:4]) == _PROGRAM_DATA
