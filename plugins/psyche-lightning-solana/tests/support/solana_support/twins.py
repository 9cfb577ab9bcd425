"""The deployed coordinator program and its model, side by side: nothing may differ between what they do."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from psyche_lightning_solana.account import RunAccounts
from psyche_lightning_solana.hosting import Clock
from psyche_lightning_solana.instructions import RunKeys
from psyche_lightning_solana.interface import COORDINATOR
from psyche_lightning_solana.layout import COORDINATOR_SIZE
from psyche_lightning_solana.programs import image
from solders.compute_budget import set_compute_unit_limit
from solders.instruction import AccountMeta, Instruction
from solders.message import MessageV0
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.transaction import VersionedTransaction
from solders.transaction_metadata import FailedTransactionMetadata
from solders.transaction_status import InstructionErrorCustom, TransactionErrorInstructionError

from solana_support.model import Account, ModelProgram
from solana_support.native import NativeAccount, NativeProgram
from solana_support.vm import Vm

MAX_UNITS = 1_400_000


class Disagreement(AssertionError):
    """The program and its model did not do the same."""


@dataclass
class Seen:
    """What a run of instructions reached.

    Attributes:
        instructions: how often each was accepted.
        refusals: how often each instruction was refused with each number.
        phases: how often the run was in each phase after an instruction.
        units: the most compute units of each instruction.
        epochs: epochs that ended.
    """

    instructions: Counter[str] = field(default_factory=Counter)
    refusals: Counter[tuple[str, int]] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    units: Counter[str] = field(default_factory=Counter)
    epochs: int = 0

    @property
    def total(self) -> int:
        """Instructions, accepted and refused."""
        return sum(self.instructions.values()) + sum(self.refusals.values())

    def add(self, other: Seen) -> None:
        """Take up what another run reached."""
        self.instructions += other.instructions
        self.refusals += other.refusals
        self.phases += other.phases
        self.units |= other.units
        self.epochs += other.epochs


class Twins:
    """A chain with the program, and the same chain with the model.

    Args:
        remember: see :class:`~solana_support.model.ModelProgram`.
        native: run everything on the native build, too.
    """

    def __init__(self, *, remember: bool = True, native: NativeProgram | None = None) -> None:
        self.vm = Vm(tokens=False)
        self.native = native
        self.vm.svm = self.vm.svm.with_sigverify(False)
        self.program, self.authorizer = (self._place(name) for name in ("coordinator", "authorizer"))
        executable = {bytes(key): Account(bytes(32), executable=True) for key in (self.program, self.authorizer)}
        self.chain: dict[bytes, Account] = executable
        self.model = ModelProgram(bytes(self.program), self.chain, remember=remember)
        self.wallets: set[Pubkey] = set()
        self.seen = Seen()
        self.logs: list[str] = []
        self._sent = 0

    def _place(self, name: str) -> Pubkey:
        address = self.vm.keypair().pubkey()
        self.vm.svm.add_program(address, image(name))
        return address

    @property
    def clock(self) -> Clock:
        """What the clock sysvar says."""
        return Clock(self.vm.time, self.vm.slot)

    def wallet(self) -> Pubkey:
        """A new wallet with lamports."""
        key = self.vm.wallet().pubkey()
        self.wallets.add(key)
        return key

    def put(self, address: Pubkey, owner: Pubkey, data: bytes) -> None:
        """Place an account on both chains."""
        self.vm.put(address, owner, data)
        self.chain[bytes(address)] = Account(bytes(owner), data)

    def blank(self) -> Pubkey:
        """A new coordinator account, full of zeros."""
        address = self.vm.keypair().pubkey()
        self.put(address, self.program, bytes(COORDINATOR_SIZE))
        return address

    def run(self, keys: RunKeys) -> RunAccounts:
        """The run as it stands."""
        return self.model.run(bytes(keys.coordinator_account), bytes(keys.manifest))

    def send(self, instruction: Instruction) -> int | None:
        """Run an instruction on all of them.

        Returns:
            The number of the error, None when it succeeded.

        Raises:
            Disagreement: they did not do the same.
        """
        before = {meta.pubkey: self.chain.get(bytes(meta.pubkey)) for meta in instruction.accounts}
        before = {
            key: account and Account(account.owner, account.data, account.executable) for key, account in before.items()
        }
        error = self._on_chain(instruction)
        expected = self.model.execute(instruction.data, instruction.accounts, self.clock)
        name = self.name(instruction)
        if error != expected:
            raise Disagreement(f"{name}: the program says {error}, the model {expected}\n" + "\n".join(self.logs))
        for key in before:
            self._compare(name, key)
        if self.native is not None:
            self._on_native(name, instruction, before, expected)
        if expected is None:
            self.seen.instructions[name] += 1
        else:
            self.seen.refusals[name, expected] += 1
        return expected

    def name(self, instruction: Instruction) -> str:
        """The instruction's name."""
        specs = COORDINATOR.instructions.values()
        start = bytes(instruction.data[:8])
        return next((spec.name for spec in specs if spec.discriminator == start), "unknown")

    def _on_chain(self, instruction: Instruction) -> int | str | None:
        """The program's error; signatures are not checked, so that whoever is listed as a signer has signed."""
        svm = self.vm.svm
        listed = [set_compute_unit_limit(MAX_UNITS), instruction]
        message = MessageV0.try_compile(self.vm.payer.pubkey(), listed, [], svm.latest_blockhash())
        self._sent += 1  # the first signature names the transaction
        signatures = [Signature(self._sent.to_bytes(64, "big"))] * message.header.num_required_signatures
        result = svm.send_transaction(VersionedTransaction.populate(message, signatures))
        name = self.name(instruction)
        if not isinstance(result, FailedTransactionMetadata):
            self.seen.units[name] = max(self.seen.units[name], result.compute_units_consumed())
            return None
        self.logs = result.meta().logs()
        error = result.err()
        if isinstance(error, TransactionErrorInstructionError) and isinstance(error.err, InstructionErrorCustom):
            return error.err.code
        return str(error)

    def _compare(self, name: str, key: Pubkey) -> None:
        account, model = self.vm.svm.get_account(key), self.chain.get(bytes(key))
        real = bytes(account.data) if account is not None and account.owner == self.program else b""
        expected = model.data if model is not None and model.owner == bytes(self.program) else b""
        if real == expected:
            return
        places = [i for i, (a, b) in enumerate(zip(real, expected, strict=False)) if a != b]
        shown = ", ".join(f"{i}: {real[i]} for {expected[i]}" for i in places[:12])
        raise Disagreement(
            f"{name} leaves other bytes in {key} ({len(real)} for {len(expected)} bytes); "
            f"{len(places)} differ, the program's for the model's: {shown}"
        )

    def _on_native(
        self, name: str, instruction: Instruction, before: dict[Pubkey, Account | None], expected: int | None
    ) -> None:
        """The native build starts from the accounts of before, and must leave the same."""
        assert self.native is not None
        accounts = {
            meta.pubkey: self._native_account(meta, instruction.accounts, before[meta.pubkey])
            for meta in instruction.accounts
        }
        listed = [accounts[meta.pubkey] for meta in instruction.accounts]
        number, log = self.native.run(
            bytes(self.program), listed, instruction.data, self.clock.slot, self.clock.unix_timestamp
        )
        if (number or None) != expected:
            raise Disagreement(f"{name}: the native program says {number}, the model {expected}\n{log}")
        for key, account in accounts.items():
            after = self.chain.get(bytes(key), Account(bytes(32)))
            if after.owner == bytes(self.program) and account.data != after.data:
                raise Disagreement(f"{name}: the native program leaves other bytes in {key}")

    def _native_account(self, meta: AccountMeta, metas: list[AccountMeta], account: Account | None) -> NativeAccount:
        same = [other for other in metas if other.pubkey == meta.pubkey]
        held = account or Account(bytes(32))
        lamports = 10**9 if account is not None or meta.pubkey in self.wallets else 0
        return NativeAccount(
            bytes(meta.pubkey),
            held.owner,
            lamports,
            held.data,
            any(other.is_signer for other in same),
            any(other.is_writable for other in same),
            held.executable,
        )
