"""The chain: blockhashes, slots, landed transactions, and their commitment. No I/O."""

from __future__ import annotations

import hashlib
import os
import struct
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from solders.account import Account
from solders.hash import Hash
from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.message import Message, MessageV0
from solders.pubkey import Pubkey
from solders.system_program import TransferParams, transfer
from solders.transaction import VersionedTransaction
from solders.transaction_status import TransactionErrorFieldless

from psyche_lightning_localnet.clock import SlotClock
from psyche_lightning_localnet.encoding import inner_json, return_data_json
from psyche_lightning_localnet.errors import LocalnetError, error_json
from psyche_lightning_localnet.state import Accounts, History, Record
from psyche_lightning_localnet.tokens import token_balances
from psyche_lightning_localnet.transactions import Named, fee_of, memo_of, named
from psyche_lightning_localnet.vm import LOADER, SYSTEM_PROGRAM, Outcome, Vm

COMMITMENTS = ("processed", "confirmed", "finalized")
MAX_PROCESSING_AGE = 150
"""Slots for which a blockhash is valid."""
RECENT_SLOTS = 300
"""Slots for which memory keeps statuses, as in a validator's status cache."""
SLOT_HASHES = 512
CONFIRMED_LAG, FINALIZED_LAG = 1, 32
"""Slots until a slot is confirmed, and until it is finalized, as on a cluster without failures."""
MAX_ANNOUNCED = 64
"""The most slots that are announced when many pass at once: the last ones."""
GENESIS = Hash(hashlib.sha256(b"psyche-lightning localnet genesis").digest())
"""Hash of the first block of every local chain. It tells clients that the chain is a local one."""
MEMO = Pubkey.from_string("MemoSq4gqABAXKb96qnH8TysNcWxMyWCqXgDLGmfcHr")
_NOTHING = Account(0, b"", SYSTEM_PROGRAM)
_CODE_META = 45
"""Number of bytes before the code in a program's data account."""
_LOOKUP_TABLES = Pubkey.from_string("AddressLookupTab1e1111111111111111111111111")
_SLOT_HASHES = Pubkey.from_string("SysvarS1otHashes111111111111111111111111111")


FAUCET_LAMPORTS = 500_000_000 * 10**9


def faucet_keypair() -> Keypair:
    """The faucet of every local chain, which may upgrade the initial programs. Its seed is public."""
    return Keypair.from_seed(hashlib.sha256(b"psyche-lightning localnet faucet").digest())


@dataclass
class Block:
    """The events of a slot.

    Attributes:
        slot: the slot's number.
        records: its transactions, in order.
        changed: the accounts that they changed.
    """

    slot: int
    records: list[Record] = field(default_factory=list)
    changed: dict[Pubkey, None] = field(default_factory=dict)


class Observer(Protocol):
    """Receives events as they happen."""

    def received(self, signature: str) -> None:
        """A transaction has arrived."""

    def settled(self, commitment: str, block: Block) -> None:
        """The events of a block are now visible at a commitment."""

    def slot(self, slot: int, parent: int, root: int) -> None:
        """A slot has begun."""


class LocalChain:
    """A Solana cluster with one node, in this process.

    Args:
        clock: counts slots and time; None for slots of 400 ms by the wall clock.
        confirmed_lag: slots after which a transaction counts as confirmed.
        finalized_lag: slots after which a transaction counts as finalized.
        max_transactions: the most transactions that the chain remembers.
        seed: determines the blockhashes; None for a random seed.
        programs: address and ELF shared object of each initial program.

    Attributes:
        clock: as given.
        vm: the current accounts, and the runtime.
        accounts: the accounts that transactions changed.
        history: the transactions that landed.
        observer: receives events, or None.
        healthy: the answer of ``getHealth``; if false, the server refuses transactions, like a validator that lags.
        faucet: the key pair that pays airdrops.
    """

    def __init__(
        self,
        clock: SlotClock | None = None,
        *,
        confirmed_lag: int = CONFIRMED_LAG,
        finalized_lag: int = FINALIZED_LAG,
        max_transactions: int = 20_000,
        seed: bytes | None = None,
        programs: Mapping[Pubkey, bytes] | None = None,
    ) -> None:
        self.clock = clock or SlotClock()
        self.vm = Vm()
        self.accounts = Accounts()
        self.history = History(max_transactions)
        self.observer: Observer | None = None
        self.healthy = True
        self.faucet = faucet_keypair()
        self.seed = os.urandom(32) if seed is None else seed
        self.lags = {"processed": 0, "confirmed": confirmed_lag, "finalized": max(confirmed_lag, finalized_lag)}
        self._blockhashes: OrderedDict[Hash, int] = OrderedDict()
        self._statuses: OrderedDict[str, int] = OrderedDict()
        self._blocks: deque[Block] = deque()
        self._airdrops = 0
        self._slot_of_vm = -1
        self._remember_blockhashes()
        self.store({self.faucet.pubkey(): Account(FAUCET_LAMPORTS, b"", SYSTEM_PROGRAM)})
        for address, image in (programs or {}).items():
            self.add_program(address, image)
        if self.slot == 0:  # the genesis block has no transactions and is one slot older
            self.clock.begin(0, self.clock.unix_ms() - self.clock.slot_ms)
            self.advance()

    # -----------------------------------------------------------------------------------------------------------------
    # Time
    # -----------------------------------------------------------------------------------------------------------------

    @property
    def slot(self) -> int:
        """The current slot."""
        return self.clock.slot

    def slot_at(self, commitment: str) -> int:
        """The newest slot at a commitment. It is also the block height, because each slot has a block."""
        return max(0, self.clock.slot - self.lags[commitment])

    def advance(self, slots: int = 1) -> None:
        """Let slots pass at once; the time advances with them."""
        before = self.clock.slot
        self.clock.advance(slots)
        self._passed(before)

    def advance_seconds(self, seconds: float) -> None:
        """Let slots of this total time pass at once, at least one."""
        self.advance(max(1, -(-int(seconds * 1000) // self.clock.slot_ms)))

    def keep_time(self) -> int:
        """Let all due slots pass; returns their number."""
        due = self.clock.due()
        if due:
            before = self.clock.slot
            self.clock.passed(due)
            self._passed(before)
        return due

    def follow_wall(self) -> None:
        """Let all slots pass up to the wall clock's time, and follow the wall clock from then on."""
        self.clock.follow_wall()
        self.keep_time()

    def _passed(self, before: int) -> None:
        now = self.clock.slot
        self._remember_blockhashes()
        while self._statuses and next(iter(self._statuses.values())) < now - RECENT_SLOTS:
            self._statuses.popitem(last=False)
        finalized = self.slot_at("finalized")
        if self.observer is not None:
            for slot in range(max(before + 1, now - MAX_ANNOUNCED + 1), now + 1):
                self.observer.slot(slot, slot - 1, max(0, slot - self.lags["finalized"]))
            for commitment in ("confirmed", "finalized"):
                since = before - self.lags[commitment]
                for block in self._blocks:
                    if since < block.slot <= self.slot_at(commitment):
                        self.observer.settled(commitment, block)
        self.accounts.settle(finalized)
        while self._blocks and self._blocks[0].slot <= finalized:
            self._blocks.popleft()

    # -----------------------------------------------------------------------------------------------------------------
    # Blockhashes
    # -----------------------------------------------------------------------------------------------------------------

    def blockhash(self, slot: int) -> Hash:
        """The hash of a slot's block."""
        return GENESIS if slot == 0 else Hash(hashlib.sha256(self.seed + slot.to_bytes(8, "little")).digest())

    def blockhash_slot(self, blockhash: Hash, commitment: str = "processed") -> int | None:
        """The slot of a blockhash that is valid at a commitment; None if it is unknown or too old."""
        slot = self._blockhashes.get(blockhash)
        now = self.slot_at(commitment)
        return slot if slot is not None and slot <= now <= slot + MAX_PROCESSING_AGE else None

    def _remember_blockhashes(self) -> None:
        now = self.clock.slot
        newest = next(reversed(self._blockhashes.values()), -1)
        for slot in range(max(newest + 1, now - RECENT_SLOTS), now + 1):
            self._blockhashes[self.blockhash(slot)] = slot
        while len(self._blockhashes) > RECENT_SLOTS:
            self._blockhashes.popitem(last=False)

    # -----------------------------------------------------------------------------------------------------------------
    # Accounts
    # -----------------------------------------------------------------------------------------------------------------

    def account(self, key: Pubkey, commitment: str = "processed") -> Account | None:
        """An account at a commitment, or None."""
        if key in self.accounts:
            return self.accounts.get(self.slot_at(commitment), key)
        self._sync_clock()
        return self.vm.account(key)  # a built-in program or a sysvar

    def store(self, accounts: dict[Pubkey, Account]) -> None:
        """Store accounts without a transaction."""
        self.vm.store(accounts)
        for key, account in accounts.items():
            self.accounts.put(self.clock.slot, key, account)

    def add_program(self, address: Pubkey, image: bytes, authority: Pubkey | None = None) -> bool:
        """Install a program without a transaction and a key pair. The runtime verifies it.

        Like a deployed program, it is usable from the next slot on.

        Args:
            address: the program's address; replaces a program that is there already.
            image: an ELF shared object.
            authority: the key that may upgrade it; None for the faucet's.

        Returns:
            Whether anything changed: False if the same program is there already.

        Raises:
            LocalnetError: the runtime rejects it.
        """
        place = Pubkey.find_program_address([bytes(address)], LOADER)[0]
        present = self.account(place)
        if present is not None and bytes(present.data[_CODE_META:]) == image:
            return False
        owner = self.faucet.pubkey() if authority is None else authority
        code = struct.pack("<IQB", 3, self.slot, 1) + bytes(owner) + image
        program = struct.pack("<I", 2) + bytes(place)
        made = {
            key: Account(self.vm.minimum_balance(len(data)), data, LOADER, executable)
            for key, data, executable in ((place, code, False), (address, program, True))
        }
        try:
            self.store(made)
        except Exception as error:  # LiteSVMError, which solders does not export
            self.vm.store({place: present or _NOTHING})
            raise LocalnetError(
                f"the runtime does not take the program for {address}: {error}; expected an ELF shared object that "
                "Solana's loader verifies"
            ) from error
        return True

    # -----------------------------------------------------------------------------------------------------------------
    # Transactions
    # -----------------------------------------------------------------------------------------------------------------

    def names(self, transaction: VersionedTransaction) -> Named:
        """The accounts of a transaction.

        Raises:
            RpcError: a lookup table is missing.
        """
        return named(transaction.message, self.account)

    def simulate(
        self,
        transaction: VersionedTransaction,
        *,
        commitment: str = "processed",
        verify: bool = True,
        fresh: bool = True,
    ) -> Outcome:
        """Simulate a transaction.

        The simulation uses the newest accounts, because the virtual machine has no others. But it checks the blockhash
        at ``commitment``, and so reveals a client that fetches and checks blockhashes at different commitments.

        Args:
            transaction: a sane transaction.
            commitment: the commitment for the check of its blockhash.
            verify: whether to check its signatures.
            fresh: whether to check its blockhash.
        """
        names = self.names(transaction)
        stopped = None
        if fresh and self.blockhash_slot(transaction.message.recent_blockhash, commitment) is None:
            stopped = TransactionErrorFieldless.BlockhashNotFound
        elif str(transaction.signatures[0]) in self._statuses:
            stopped = TransactionErrorFieldless.AlreadyProcessed
        if stopped is not None:
            return Outcome(stopped, fee_of(transaction.message))
        self._sync_clock()
        if _LOOKUP_TABLES in names.keys or _SLOT_HASHES in names.keys:
            newest = self.clock.slot - 1
            slots = range(newest, max(-1, newest - SLOT_HASHES), -1)
            self.vm.set_slot_hashes([(slot, self.blockhash(slot)) for slot in slots])
        return self.vm.run(transaction, names, verify=verify)

    def submit(self, transaction: VersionedTransaction, preflight: Outcome | None = None) -> Outcome:
        """Let a valid transaction land.

        Args:
            transaction: sane.
            preflight: result of a simulation with its signatures just now; None simulates.

        Raises:
            RpcError: a lookup table is missing.
            VmPanicError: a defect of the runtime.
        """
        signature = str(transaction.signatures[0])
        if self.observer is not None:
            self.observer.received(signature)
        outcome = preflight
        if outcome is None or self.blockhash_slot(transaction.message.recent_blockhash) is None:
            outcome = self.simulate(transaction)
        if outcome.landed:
            self._land(signature, transaction, outcome)
        return outcome

    def airdrop(self, to: Pubkey, lamports: int) -> tuple[str, Outcome]:
        """Send lamports from the faucet; returns the transaction's signature and result."""
        self._airdrops += 1
        # The memo makes two equal airdrops in one slot different: a chain takes equal transactions only once.
        memo = Instruction(MEMO, f"airdrop {self._airdrops}".encode(), [])
        gift = transfer(TransferParams(from_pubkey=self.faucet.pubkey(), to_pubkey=to, lamports=lamports))
        # A legacy transaction, as a validator's faucet sends: clients that know no newer ones must be able to read it.
        message = Message.new_with_blockhash([gift, memo], self.faucet.pubkey(), self.blockhash(self.slot))
        transaction = VersionedTransaction(message, [self.faucet])
        return str(transaction.signatures[0]), self.submit(transaction)

    def sign(self, instructions: Sequence[Instruction], *signers: Keypair) -> VersionedTransaction:
        """Build and sign a transaction with the newest blockhash. The first signer pays."""
        newest = self.blockhash(self.slot)
        message = MessageV0.try_compile(signers[0].pubkey(), list(instructions), [], newest)
        return VersionedTransaction(message, list(signers))

    def status_slot(self, signature: str) -> int | None:
        """The slot in which a recent transaction landed, or None."""
        return self._statuses.get(signature)

    def commitment_of(self, slot: int) -> str:
        """The highest commitment at which a slot is visible."""
        return next(name for name in reversed(COMMITMENTS) if slot <= self.slot_at(name))

    def _sync_clock(self) -> None:
        if self._slot_of_vm != self.clock.slot:
            self._slot_of_vm = self.clock.slot
            self.vm.set_clock(self.clock.slot, self.clock.unix_time())

    def _land(self, signature: str, transaction: VersionedTransaction, outcome: Outcome) -> None:
        names = self.names(transaction)
        before = [self.vm.account(key) for key in names.keys]
        tokens_before = token_balances(names.keys, before, self.vm.account)
        self.vm.store(outcome.changes)
        for key, account in outcome.changes.items():
            self.accounts.put(self.clock.slot, key, account)
        after = [self.vm.account(key) for key in names.keys]
        record = Record(
            signature=signature,
            slot=self.clock.slot,
            time=self.clock.unix_time(),
            transaction=bytes(transaction),
            addresses=tuple(str(key) for key in names.keys),
            static=names.static,
            writable_loaded=names.writable_loaded,
            err=error_json(outcome.err),
            logs=outcome.logs,
            units=outcome.units,
            fee=outcome.fee.total,
            price=outcome.fee.price,
            before=_balances(before),
            after=_balances(after),
            tokens_before=tokens_before,
            tokens_after=token_balances(names.keys, after, self.vm.account),
            inner=inner_json(outcome.inner),
            return_data=return_data_json(outcome.return_data),
            memo=memo_of(list(transaction.message.instructions), names.keys),
        )
        self._statuses[signature] = self.clock.slot
        self.history.add(record)
        if not self._blocks or self._blocks[-1].slot != self.clock.slot:
            self._blocks.append(Block(self.clock.slot))
        self._blocks[-1].records.append(record)
        self._blocks[-1].changed.update(dict.fromkeys(outcome.changes))
        if self.observer is not None:
            block = Block(self.clock.slot, [record], dict.fromkeys(outcome.changes))
            for commitment in COMMITMENTS:
                if self.lags[commitment] == 0:
                    self.observer.settled(commitment, block)

    # -----------------------------------------------------------------------------------------------------------------
    # Saved state
    # -----------------------------------------------------------------------------------------------------------------

    def restore(self, accounts: dict[Pubkey, Account], records: Sequence[Record], *, count: int, airdrops: int) -> None:
        """Load a saved state into a new chain that has the saved seed and clock. The whole state counts as finalized.

        Args:
            accounts: all accounts.
            records: the remembered transactions, oldest first.
            count: number of all transactions, including forgotten ones.
            airdrops: number of airdrops among them.
        """
        self._airdrops = airdrops
        self.accounts = Accounts()
        self.vm.store(accounts)
        for key, account in accounts.items():
            self.accounts.put(0, key, account)
        for record in records:
            self.history.add(record)
            if record.slot >= self.clock.slot - RECENT_SLOTS:
                self._statuses[record.signature] = record.slot
        self.history.count = count

    @property
    def airdrops(self) -> int:
        """The number of airdrops."""
        return self._airdrops


def _balances(accounts: Sequence[Account | None]) -> tuple[int, ...]:
    return tuple(0 if account is None else account.lamports for account in accounts)
