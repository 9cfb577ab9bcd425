"""Deploys a program to any cluster: buffer, pieces, deployment or upgrade; continues an interrupted one.

Wallet, program and image give the buffer's address, so the same call finds it again and writes only missing pieces.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from solana.exceptions import SolanaRpcException
from solana.rpc.async_api import AsyncClient
from solana.rpc.commitment import Confirmed
from solana.rpc.core import RPCException
from solana.rpc.types import TxOpts
from solders.account import Account
from solders.compute_budget import set_compute_unit_limit, set_compute_unit_price
from solders.hash import Hash
from solders.instruction import Instruction
from solders.message import MessageV0
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.system_program import (
    CreateAccountParams,
    CreateAccountWithSeedParams,
    create_account,
    create_account_with_seed,
)
from solders.transaction import VersionedTransaction
from solders.transaction_status import TransactionConfirmationStatus

from psyche_lightning.errors import PsycheError
from psyche_lightning_solana.client.wallet import Wallet
from psyche_lightning_solana.deploy import loader

LAMPORTS = 10**9
MAX_TRANSACTION = 1232
SIGNATURE_FEE = 5000
WRITE_UNITS, DEPLOY_UNITS = 3_000, 20_000
STATUS_BATCH = 256
POLL = 0.2
"""Seconds between status checks."""
LOOKS = 10
"""Checks before missing ones are resent."""
MAX_IDLE_ROUNDS = 2
"""Blockhashes without a landed transaction before it gives up; the same call continues."""
MAX_TRIES = 6
PAUSE = 0.25
"""Seconds before the second try; each further wait doubles."""

_Answer = TypeVar("_Answer")


class DeployError(PsycheError):
    """A deployment failed; the text explains what to do."""


@dataclass(frozen=True)
class Target:
    """A program's destination.

    Attributes:
        address: the program's.
        wallet: signs for the address, if a key pair gives it; needed once.
        seed: derives the address from the payer's wallet, if given.
    """

    address: Pubkey
    wallet: Wallet | None = None
    seed: str | None = None


@dataclass(frozen=True)
class Plan:
    """A deployment's plan.

    Attributes:
        upgrade: whether the program exists already.
        same: whether it is the same program, which needs no deployment.
        buffer: the buffer's address.
        resumed: whether the buffer exists already.
        needed: lamports that the payer must have.
        kept: lamports of those that stay in the program's accounts.
        balance: lamports that it has.
        more: bytes by which the program must grow.
    """

    upgrade: bool
    same: bool
    buffer: Pubkey
    resumed: bool
    needed: int
    kept: int
    balance: int
    more: int


class Deployer:
    """Deploys one program.

    Args:
        client: of the cluster.
        payer: pays, and becomes the authority that may upgrade.
        target: where the program goes.
        image: an ELF shared object.
        authority: may upgrade the program, instead of the payer.
        priority: micro-lamports offered for each compute unit.
        parallel: parallel requests.
        progress: receives the written and the total bytes.
    """

    def __init__(
        self,
        client: AsyncClient,
        payer: Wallet,
        target: Target,
        image: bytes,
        *,
        authority: Wallet | None = None,
        priority: int = 0,
        parallel: int = 16,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._client = client
        self._payer = payer
        self._target = target
        self._image = image
        self._authority = authority or payer
        self._priority = priority
        self._slots = asyncio.Semaphore(parallel)
        self._progress = progress
        self._buffer, self._seed = loader.seeded_address(payer.public, b"buffer", bytes(target.address), image)

    async def plan(self) -> Plan:
        """Read the cluster without changing it.

        Raises:
            DeployError: the file is no program, or the address belongs to another owner.
        """
        image, address = self._image, self._target.address
        if image[:4] != b"\x7fELF":
            raise DeployError(
                "the file is not a program; expected an ELF shared object, the .so file that a build of it makes"
            )
        program = await self._account(address)
        code = loader.read_code(await self._account(loader.code_address(address)))
        if program is not None and not (loader.is_program(program) and code is not None):
            raise DeployError(
                f"{address} is no program of the upgradeable loader, or it was closed; choose another address"
            )
        if code is not None and code.authority != self._authority.public:
            owner = "nobody may upgrade it" if code.authority is None else f"only {code.authority} may upgrade it"
            raise DeployError(f"the program {address} is there already, and {owner}, not {self._authority.public}")
        if program is None and self._target.wallet is None and self._target.seed is None:
            raise DeployError(f"there is no program {address}; to make it, give its key pair and not only its address")
        buffer = loader.read_buffer(await self._account(self._buffer))
        if buffer is not None and buffer.authority != self._authority.public:
            raise DeployError(
                f"the buffer {self._buffer} belongs to {buffer.authority}, not to {self._authority.public}"
            )
        size = len(image)
        rent_buffer = await self._rent(loader.BUFFER_META + size)
        rent_program = await self._rent(loader.PROGRAM_SIZE)
        more = max(0, size - len(code.image)) if code is not None else 0
        if code is None:
            kept = await self._rent(loader.CODE_META + size) + rent_program
        else:
            grown = loader.CODE_META + len(code.image)
            kept = await self._rent(grown + more) - await self._rent(grown)
        missing = sum(1 for _ in self._pieces(b"" if buffer is None else buffer.image))
        signature = SIGNATURE_FEE * (1 if self._authority is self._payer else 2)
        fees = missing * (signature + self._fee(WRITE_UNITS)) + 3 * (2 * signature + self._fee(DEPLOY_UNITS))
        # A deployment refunds the buffer's lamports before it takes the program's; an upgrade refunds them afterwards.
        held = 0 if buffer is None else rent_buffer
        needed = fees + (max(rent_buffer, kept) if code is None else rent_buffer + kept) - held
        lowest = await self._rent(0)  # a payer must keep at least this, or nothing
        balance = (await self._retried(lambda: self._client.get_balance(self._payer.public, Confirmed))).value
        same = code is not None and code.holds(image)
        return Plan(
            code is not None, same, self._buffer, buffer is not None, max(0, needed) + lowest, kept, balance, more
        )

    async def run(self, plan: Plan) -> None:
        """Deploy as planned.

        Raises:
            DeployError: the payer has too little, or the loader or the cluster refuses the program.
        """
        if plan.balance < plan.needed:
            raise DeployError(
                f"{self._payer.public} has {plan.balance / LAMPORTS:.6f} SOL and needs {plan.needed / LAMPORTS:.6f} "
                f"({plan.kept / LAMPORTS:.6f} of it stay in the program's accounts); send it "
                f"{(plan.needed - plan.balance) / LAMPORTS:.6f} SOL more"
            )
        payer, authority = self._payer.public, self._authority.public
        if not plan.resumed:
            size = loader.BUFFER_META + len(self._image)
            await self._transact(
                [await self._made(self._buffer, size, self._seed), loader.initialize_buffer(self._buffer, authority)]
            )
        await self._write()
        address = self._target.address
        if plan.upgrade:
            if plan.more:
                await self._transact([loader.extend(address, payer, plan.more)])
                await self._next_slot()
            await self._transact([loader.upgrade(address, self._buffer, authority, payer)])
        else:
            made = await self._made(address, loader.PROGRAM_SIZE, self._target.seed)
            await self._transact([made, loader.deploy(payer, address, self._buffer, authority, len(self._image))])
        await self._next_slot()

    # -----------------------------------------------------------------------------------------------------------------
    # Writing
    # -----------------------------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        """Write pieces until the buffer is complete, each round with a fresh blockhash."""
        idle = 0
        while True:
            buffer = loader.read_buffer(await self._account(self._buffer))
            if buffer is None:
                raise DeployError(f"the buffer {self._buffer} is gone; run the same command again")
            missing = list(self._pieces(buffer.image))
            if not missing:
                self._progress(len(self._image), len(self._image))
                return
            if idle >= MAX_IDLE_ROUNDS:
                raise DeployError(
                    f"the cluster accepts no transactions; {len(missing)} pieces are missing in the buffer "
                    f"{self._buffer}. Run the same command again to go on, perhaps with a higher --priority-fee."
                )
            landed = await self._write_round(missing)
            idle = 0 if landed else idle + 1

    async def _write_round(self, missing: list[tuple[int, bytes]]) -> int:
        """Resend pieces until they land or their blockhash expires; returns how many landed."""
        blockhash, last = await self._blockhash()
        waiting: dict[Signature, tuple[bytes, int]] = {}
        for offset, piece in missing:
            instruction = loader.write(self._buffer, self._authority.public, offset, piece)
            transaction = self._signed(self._priced([instruction], WRITE_UNITS), blockhash)
            waiting[transaction.signatures[0]] = (bytes(transaction), len(piece))
        while True:
            await asyncio.gather(*(self._offer(raw) for raw, _ in waiting.values()))
            for _ in range(LOOKS):
                await self._collect(waiting)
                self._progress(len(self._image) - sum(size for _, size in waiting.values()), len(self._image))
                height = (await self._retried(lambda: self._client.get_block_height(Confirmed))).value
                if not waiting or height > last:
                    return len(missing) - len(waiting)
                await asyncio.sleep(POLL)

    async def _offer(self, raw: bytes) -> None:
        """Send a transaction once; a later status shows whether it landed."""
        async with self._slots:
            try:
                await self._client.send_raw_transaction(raw, TxOpts(skip_preflight=True, skip_confirmation=True))
            except RPCException as error:
                raise DeployError(f"the cluster refused a piece of the program: {_reason(error)}") from error
            except SolanaRpcException:
                return

    async def _collect(self, waiting: dict[Signature, tuple[bytes, int]]) -> None:
        """Remove confirmed ones."""
        signatures = list(waiting)
        for start in range(0, len(signatures), STATUS_BATCH):
            some = signatures[start : start + STATUS_BATCH]
            for signature, status in zip(some, await self._statuses(some), strict=True):
                if status:
                    del waiting[signature]

    async def _statuses(self, signatures: list[Signature]) -> list[bool]:
        """Which of these transactions are confirmed."""
        found = (await self._retried(lambda: self._client.get_signature_statuses(signatures))).value
        for signature, status in zip(signatures, found, strict=True):
            if status is not None and status.err is not None:
                raise DeployError(f"the cluster took the transaction {signature}, and it failed: {status.err}")
        levels = (TransactionConfirmationStatus.Confirmed, TransactionConfirmationStatus.Finalized)
        return [status is not None and status.confirmation_status in levels for status in found]

    def _pieces(self, present: bytes) -> list[tuple[int, bytes]]:
        empty = loader.write(self._buffer, self._authority.public, 0, b"")
        overhead = len(bytes(self._signed(self._priced([empty], WRITE_UNITS), Hash.default())))
        # A data length over 127 takes a second byte.
        return list(loader.pieces(self._image, MAX_TRANSACTION - overhead - 1, present))

    # -----------------------------------------------------------------------------------------------------------------
    # Transactions
    # -----------------------------------------------------------------------------------------------------------------

    async def _made(self, address: Pubkey, size: int, seed: str | None) -> Instruction:
        payer, rent = self._payer.public, await self._rent(size)
        if seed is None:
            return create_account(
                CreateAccountParams(
                    from_pubkey=payer, to_pubkey=address, lamports=rent, space=size, owner=loader.LOADER
                )
            )
        return create_account_with_seed(
            CreateAccountWithSeedParams(
                from_pubkey=payer,
                to_pubkey=address,
                base=payer,
                seed=seed,
                lamports=rent,
                space=size,
                owner=loader.LOADER,
            )
        )

    async def _transact(self, instructions: list[Instruction]) -> None:
        """Send a transaction again with fresh blockhashes until it is confirmed or refused."""
        for _ in range(MAX_TRIES):
            blockhash, last = await self._blockhash()
            transaction = self._signed(self._priced(instructions, DEPLOY_UNITS), blockhash)
            options = TxOpts(skip_confirmation=True, preflight_commitment=Confirmed)
            await self._retried(lambda: self._client.send_raw_transaction(bytes(transaction), options))  # noqa: B023
            signature = transaction.signatures[0]
            while not (await self._statuses([signature]))[0]:
                if (await self._retried(lambda: self._client.get_block_height(Confirmed))).value > last:
                    break
                await asyncio.sleep(POLL)
            else:
                return
        raise DeployError("the cluster accepts no transactions; run the same command again to go on")

    async def _next_slot(self) -> None:
        """A program is usable from the slot after its deployment."""
        slot = (await self._retried(lambda: self._client.get_slot(Confirmed))).value
        while (await self._retried(lambda: self._client.get_slot(Confirmed))).value <= slot:
            await asyncio.sleep(POLL)

    def _priced(self, instructions: Sequence[Instruction], units: int) -> list[Instruction]:
        if not self._priority:
            return list(instructions)
        return [set_compute_unit_limit(units), set_compute_unit_price(self._priority), *instructions]

    def _fee(self, units: int) -> int:
        return -(-self._priority * units // 10**6)

    def _signed(self, instructions: Sequence[Instruction], blockhash: Hash) -> VersionedTransaction:
        message = MessageV0.try_compile(self._payer.public, list(instructions), [], blockhash)
        wallets = {self._payer.public: self._payer, self._authority.public: self._authority}
        if self._target.wallet is not None:
            wallets[self._target.wallet.public] = self._target.wallet
        signers = message.account_keys[: message.header.num_required_signatures]
        return VersionedTransaction.populate(message, [wallets[key].sign(message) for key in signers])

    async def _blockhash(self) -> tuple[Hash, int]:
        value = (await self._retried(lambda: self._client.get_latest_blockhash(Confirmed))).value
        return value.blockhash, value.last_valid_block_height

    async def _account(self, key: Pubkey) -> Account | None:
        return (await self._retried(lambda: self._client.get_account_info(key, Confirmed))).value

    async def _rent(self, size: int) -> int:
        return (await self._retried(lambda: self._client.get_minimum_balance_for_rent_exemption(size))).value

    async def _retried(self, request: Callable[[], Awaitable[_Answer]]) -> _Answer:
        """Retry with growing waits while the connection fails."""
        for attempt in range(MAX_TRIES):
            try:
                return await request()
            except RPCException as error:
                raise DeployError(f"the cluster refused: {_reason(error)}") from error
            except SolanaRpcException as error:
                problem = error
            await asyncio.sleep(PAUSE * 2**attempt)
        raise DeployError(
            f"the cluster does not answer ({_reason(problem)}); run the same command again to go on where it stopped"
        )


def _reason(error: Exception) -> str:
    for item in error.args:
        message = getattr(item, "message", None)
        if message:
            logs = getattr(getattr(item, "data", None), "logs", None) or []
            return " ".join([str(message), *logs[-3:]])
    cause = error.__cause__ or error
    return (str(cause) or type(cause).__name__).splitlines()[0]
