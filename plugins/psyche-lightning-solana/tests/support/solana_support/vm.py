"""Programs in Solana's real virtual machine (``solders.litesvm``), one transaction at a time, without a server."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from solders.account import Account
from solders.clock import Clock
from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.litesvm import FeatureSet, LiteSVM
from solders.message import MessageV0
from solders.pubkey import Pubkey
from solders.system_program import ID as SYSTEM_PROGRAM
from solders.system_program import CreateAccountParams, create_account
from solders.sysvar import CLOCK, RENT
from solders.transaction import VersionedTransaction
from solders.transaction_metadata import FailedTransactionMetadata
from solders.transaction_status import InstructionErrorCustom, TransactionErrorInstructionError

LOADER = Pubkey.from_string("BPFLoaderUpgradeab1e11111111111111111111111")
START_TIME = 1_700_000_000
MAX_TRANSACTION_BYTES = 1232
_CHUNK_BYTES = 1000


@dataclass(frozen=True)
class Outcome:
    """What one transaction did.

    Attributes:
        error: None when it succeeded; the number of a program's own error, else the error's text.
        failed_instruction: index of the instruction that failed.
        logs: the programs' logs.
        units: compute units consumed.
        size: bytes of the transaction.
    """

    error: int | str | None
    failed_instruction: int | None
    logs: list[str]
    units: int
    size: int


class Vm:
    """A chain of one process: accounts, a clock that stands until it is moved, and the SPL programs.

    Args:
        features: switch on every feature of the runtime, also those that no cluster has yet. Programs are then placed
            without the loader, which these features retire.
        tokens: have the SPL programs; a chain without them is made faster.
    """

    def __init__(self, *, features: bool = False, tokens: bool = True) -> None:
        self.features = features
        if features:
            self.svm = LiteSVM()
        else:
            base = LiteSVM.default().with_sysvars().with_builtins(FeatureSet.default()).with_lamports(1 << 60)
            base = base.with_sigverify(True).with_blockhash_check(True)
            self.svm = base.with_spl_programs() if tokens else base
        self._wallets = 0
        self.slot = 0
        self.time = START_TIME
        self.advance(0)
        self.payer = self.wallet()

    def advance(self, seconds: int, slots: int = 1) -> None:
        """Move the clock."""
        self.time += seconds
        self.slot += slots
        self.svm.set_clock(Clock(self.slot, START_TIME, 0, 0, self.time))

    def keypair(self) -> Keypair:
        """A new key, the same in every run of a test."""
        self._wallets += 1
        return Keypair.from_seed(sha256(b"psyche-lightning test wallet %d" % self._wallets).digest())

    def wallet(self, lamports: int = 10**12) -> Keypair:
        """A new key with lamports."""
        key = self.keypair()
        self.svm.airdrop(key.pubkey(), lamports)
        return key

    def data(self, address: Pubkey) -> bytes:
        """The bytes of an account; none if there is no account."""
        account = self.svm.get_account(address)
        return b"" if account is None else bytes(account.data)

    def lamports(self, address: Pubkey) -> int:
        """The balance of an account."""
        return self.svm.get_balance(address) or 0

    def put(self, address: Pubkey, owner: Pubkey, data: bytes, lamports: int | None = None) -> None:
        """Place an account as it could not come to be by transactions, for attacks."""
        rent = self.svm.minimum_balance_for_rent_exemption(len(data))
        self.svm.set_account(address, Account(rent if lamports is None else lamports, data, owner))

    def create_account(self, owner: Pubkey, space: int, key: Keypair | None = None) -> Keypair:
        """A rent-free account of zeros."""
        key = key or self.keypair()
        must(self.send([self._create(key, owner, space)], [key]))
        return key

    def send(self, instructions: Sequence[Instruction], signers: Sequence[Keypair] = ()) -> Outcome:
        """Run one transaction, paid by :attr:`payer`."""
        self.svm.expire_blockhash()  # or the same transaction twice would be a duplicate
        message = MessageV0.try_compile(self.payer.pubkey(), list(instructions), [], self.svm.latest_blockhash())
        keys = {key.pubkey(): key for key in (self.payer, *signers)}
        needed = message.account_keys[: message.header.num_required_signatures]
        transaction = VersionedTransaction(message, [keys[address] for address in needed])
        result = self.svm.send_transaction(transaction)
        size = len(bytes(transaction))
        if not isinstance(result, FailedTransactionMetadata):
            return Outcome(None, None, result.logs(), result.compute_units_consumed(), size)
        error, meta = result.err(), result.meta()
        code: int | str = str(error)
        index = None
        if isinstance(error, TransactionErrorInstructionError):
            index = error.index
            code = error.err.code if isinstance(error.err, InstructionErrorCustom) else str(error.err)
        return Outcome(code, index, meta.logs(), meta.compute_units_consumed(), size)

    def deploy(self, image: bytes, program: Keypair | None = None) -> Pubkey:
        """Deploy a program as on any cluster: a buffer, writes, and the upgradeable loader, which verifies it.

        Args:
            image: the shared object.
            program: the key of its address; a new one if not given.
        """
        program = program or self.keypair()
        if self.features:
            self.svm.add_program(program.pubkey(), image)
            return program.pubkey()
        payer, buffer = self.payer.pubkey(), self.keypair()
        initialize = Instruction(LOADER, struct.pack("<I", 0), _metas(buffer.pubkey(), write=1) + _metas(payer))
        must(self.send([self._create(buffer, LOADER, 37 + len(image)), initialize], [buffer]))
        for start in range(0, len(image), _CHUNK_BYTES):
            chunk = image[start : start + _CHUNK_BYTES]
            metas = [*_metas(buffer.pubkey(), write=1), AccountMeta(payer, True, False)]
            must(self.send([Instruction(LOADER, struct.pack("<IIQ", 1, start, len(chunk)) + chunk, metas)]))
        data = Pubkey.find_program_address([bytes(program.pubkey())], LOADER)[0]
        metas = [
            AccountMeta(payer, True, True),
            *_metas(data, program.pubkey(), buffer.pubkey(), write=3),
            *_metas(RENT, CLOCK, SYSTEM_PROGRAM),
            AccountMeta(payer, True, False),
        ]
        deploy = Instruction(LOADER, struct.pack("<IQ", 2, len(image)), metas)
        must(self.send([self._create(program, LOADER, 36), deploy], [program]))
        self.advance(0)  # a program runs from the slot after its deployment
        return program.pubkey()

    def _create(self, key: Keypair, owner: Pubkey, space: int) -> Instruction:
        return create_account(
            CreateAccountParams(
                from_pubkey=self.payer.pubkey(),
                to_pubkey=key.pubkey(),
                lamports=self.svm.minimum_balance_for_rent_exemption(space),
                space=space,
                owner=owner,
            )
        )


def must(outcome: Outcome) -> Outcome:
    """The outcome of a transaction that has to succeed."""
    assert outcome.error is None, f"{outcome.error} in instruction {outcome.failed_instruction}\n" + "\n".join(
        outcome.logs
    )
    return outcome


def _metas(*addresses: Pubkey, write: int = 0) -> list[AccountMeta]:
    """Accounts that do not sign, the first ``write`` of them writable."""
    return [AccountMeta(address, False, index < write) for index, address in enumerate(addresses)]
