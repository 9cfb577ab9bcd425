"""Signs a transaction once, and sends it until it lands or its blockhash expires. None lands twice.

A resent transaction has the same bytes, and a chain accepts those only once. The sender makes a new one, with a new
blockhash, only if the old one cannot land: every service refused it, or its last block passed without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from solders.commitment_config import CommitmentLevel
from solders.hash import Hash
from solders.instruction import Instruction
from solders.message import MessageV0
from solders.pubkey import Pubkey
from solders.rpc.config import RpcContextConfig
from solders.rpc.requests import GetLatestBlockhash
from solders.rpc.responses import GetLatestBlockhashResp
from solders.signature import Signature
from solders.transaction import VersionedTransaction

from psyche_lightning.errors import CoordinatorError
from psyche_lightning_solana.client.cluster import COMMITMENTS, MAX_COMPUTE_UNITS, Options
from psyche_lightning_solana.client.fees import SIGNATURE_FEE, Fees, sol
from psyche_lightning_solana.client.reader import Reader, Status
from psyche_lightning_solana.client.record import Log, Record
from psyche_lightning_solana.client.rpc import (
    ALREADY,
    UNFUNDED,
    PoolProvider,
    RpcProblem,
    Sleep,
    custom_code,
    error_name,
    is_retryable,
    unreachable,
)
from psyche_lightning_solana.client.wallet import Wallet
from psyche_lightning_solana.errors import code_of

MAX_TRANSACTION_SIZE = 1232
BLOCKHASH_AGE = 10.0
"""Seconds before a blockhash is renewed: a transaction needs most of its lifetime."""
RESEND_EVERY = 2.0
FIRST_LOOK, LONGEST_LOOK = 0.05, 1.0
HEIGHT_EVERY = 4
"""Status checks of a transaction per check of the chain's height."""
DETAIL_TRIES = 4
ANCHOR_ERROR = re.compile(r"Error Code: (\w+)\. Error Number: (\d+)\. Error Message: (.*)")


@dataclass(frozen=True)
class Blockhash:
    """Limits a transaction's lifetime.

    Attributes:
        value: the hash.
        last_valid: height of the last block that accepts it.
    """

    value: Hash
    last_valid: int


class Blockhashes:
    """The newest blockhash, cached: one is valid for 150 blocks, about a minute.

    Args:
        provider: the RPC services.
        commitment: how settled its block must be.
        clock: monotonic seconds.
    """

    def __init__(
        self, provider: PoolProvider, commitment: CommitmentLevel, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._provider = provider
        self._commitment = commitment
        self._clock = clock
        self._known: Blockhash | None = None
        self._at = float("-inf")
        self._lock = asyncio.Lock()

    async def get(self) -> Blockhash:
        """A fresh blockhash.

        Raises:
            RpcProblem: no service answers.
        """
        async with self._lock:
            if self._known is None or self._clock() - self._at > BLOCKHASH_AGE:
                answer = await self._provider.make_request(
                    GetLatestBlockhash(RpcContextConfig(commitment=self._commitment)), GetLatestBlockhashResp
                )
                self._known = Blockhash(answer.value.blockhash, answer.value.last_valid_block_height)
                self._at = self._clock()
            return self._known

    def forget(self, stale: Blockhash) -> None:
        """Stop giving out this one."""
        if self._known == stale:
            self._known = None


@dataclass(frozen=True)
class Receipt:
    """A successful transaction on the chain.

    Attributes:
        signature: its first signature.
        slot: its slot.
    """

    signature: Signature
    slot: int


class _Open(Exception):
    """A transaction's outcome is unknown so far."""


class Sender:
    """One wallet's transactions.

    Args:
        reader: the RPC services.
        wallet: signs, and pays.
        run: the run's name, for the log.
        options: limits.
        cluster: the chain's name, for messages.
        log: records each transaction.
        patience: seconds to wait for an unsettled transaction.
        clock: monotonic seconds.
        wall: Unix seconds.
        sleep: waits.
    """

    def __init__(
        self,
        reader: Reader,
        wallet: Wallet,
        run: str,
        options: Options,
        cluster: str,
        log: Log,
        *,
        patience: float = 180.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.wallet = wallet
        self.log = log
        self._reader = reader
        self._run = run
        self._options = options
        self._cluster = cluster
        self._patience = patience
        self._clock = clock
        self._wall = wall
        self._sleep = sleep
        self._blockhashes = Blockhashes(reader.provider, reader.level, clock)
        self._fees = Fees(reader.provider, options, clock)
        self._details: set[asyncio.Task[None]] = set()
        # Transactions that may still land; a repeated call resumes them.
        self._open: dict[tuple[str | bytes, ...], tuple[VersionedTransaction, Blockhash]] = {}

    async def send(
        self,
        name: str,
        instructions: Sequence[Instruction],
        *,
        units: int = MAX_COMPUTE_UNITS,
        signers: Sequence[Wallet] = (),
        min_slot: int | None = None,
    ) -> Receipt:
        """Send one transaction and wait until it counts.

        Args:
            name: its purpose, for log and messages.
            instructions: of the programs; the sender adds the compute budget's.
            units: compute units that it may need.
            signers: signers besides the wallet.
            min_slot: the slot that it builds on; services behind it are skipped.

        Raises:
            CoordinatorError: the program refused (``code`` is its name for the error), the wallet cannot pay
                (``Unfunded``), or no service could be reached for too long (``Unreachable``, retryable).
        """
        deadline = self._clock() + self._patience
        key: tuple[str | bytes, ...] = (name, *(bytes(part.data) for part in instructions))
        tries = 0
        while True:
            tries += 1
            try:
                if key not in self._open:
                    blockhash = await self._blockhashes.get()
                    self._open[key] = await self._build(name, instructions, units, signers, blockhash), blockhash
                transaction, blockhash = self._open[key]
                status = await self._land(name, transaction, blockhash, min_slot, deadline, tries)
                del self._open[key]
            except _Open:
                raise self._late(name, tries) from None
            except RpcProblem as problem:
                self._open.pop(key, None)
                raise unreachable(problem, name, self._cluster) from problem
            except CoordinatorError:
                self._open.pop(key, None)
                raise
            if status is not None:
                signature = transaction.signatures[0]
                self._note(name, transaction, status, tries)
                if status.error is not None:
                    raise await self._refused(name, signature, status.error)
                return Receipt(signature, status.slot)
            if self._clock() >= deadline:
                raise self._late(name, tries)
            self._blockhashes.forget(blockhash)

    @property
    def price(self) -> int:
        """Lamports that a transaction of this sender costs at most, by those so far."""
        return self._fees.highest

    async def close(self) -> None:
        """Briefly wait for pending log records."""
        if self._details:
            _, rest = await asyncio.wait(self._details, timeout=2.0)
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

    # --- one transaction ------------------------------------------------------------------------------------------

    async def _build(
        self,
        name: str,
        instructions: Sequence[Instruction],
        units: int,
        signers: Sequence[Wallet],
        blockhash: Blockhash,
    ) -> VersionedTransaction:
        written = dict.fromkeys(meta.pubkey for part in instructions for meta in part.accounts if meta.is_writable)
        budget = await self._fees.instructions(units, list(written))
        message = MessageV0.try_compile(self.wallet.public, [*budget, *instructions], [], blockhash.value)
        by_key: dict[Pubkey, Wallet] = {signer.public: signer for signer in (self.wallet, *signers)}
        keys = message.account_keys[: message.header.num_required_signatures]
        transaction = VersionedTransaction.populate(message, [by_key[key].sign(message) for key in keys])
        size = len(bytes(transaction))
        if size > MAX_TRANSACTION_SIZE:
            raise CoordinatorError(
                f"the transaction {name} has {size} bytes; a chain takes at most {MAX_TRANSACTION_SIZE}",
                code="TooLarge",
            )
        return transaction

    async def _land(
        self,
        name: str,
        transaction: VersionedTransaction,
        blockhash: Blockhash,
        min_slot: int | None,
        deadline: float,
        tries: int,
    ) -> Status | None:
        """Send it until it counts; None if it can no longer land.

        Raises:
            _Open: time is up, and it may still land.
        """
        signature, raw = transaction.signatures[0], bytes(transaction)
        try:
            await self._reader.send(raw, min_slot)
        except RpcProblem as problem:
            error = problem.transaction_error
            if error is not None and error_name(error) != ALREADY and not problem.lost:
                self._note_refusal(name, transaction, problem, tries)
                if not is_retryable(error):
                    raise self._refusal(name, error, problem.data.get("logs")) from problem
                await self._sleep(FIRST_LOOK * 4)
                return None
            if error is None and not problem.lost:
                raise
            # A service may have it: its end is known, not its beginning.
        sent, look, looks = self._clock(), FIRST_LOOK, 0
        while self._clock() < deadline:
            await self._sleep(look)
            look, looks = min(look * 1.5, LONGEST_LOOK), looks + 1
            with contextlib.suppress(RpcProblem):
                # A transaction missing after its last block never lands; a lagging service cannot show this.
                slot, height = await self._reader.height() if looks % HEIGHT_EVERY == 0 else (0, 0)
                over = height > blockhash.last_valid
                known, status = await self._reader.status(signature, past=over)
                if status is not None and COMMITMENTS.index(status.level) >= COMMITMENTS.index(
                    self._options.commitment
                ):
                    return status
                if over and status is None and known >= slot:
                    return None
                if status is None and self._clock() - sent >= RESEND_EVERY:
                    sent = self._clock()
                    await self._reader.send(raw, min_slot)
        raise _Open

    def _late(self, name: str, tries: int) -> CoordinatorError:
        return CoordinatorError(
            f"the transaction {name} did not land on {self._cluster} within {self._patience:.0f} s "
            f"({tries} blockhashes). The network may be busy, or the RPC service behind: a higher priority_fee_max "
            f"than {self._options.priority_fee_max} or another service may help.",
            code="Unreachable",
            retryable=True,
        )

    # --- what people see ------------------------------------------------------------------------------------------

    def _refusal(self, name: str, error: Any, logs: Any) -> CoordinatorError:
        """The reason of a failure, from the program's log."""
        if error_name(error) in UNFUNDED or (custom_code(error) == 1 and _mentions(logs, "insufficient lamports")):
            return CoordinatorError(
                f"the wallet {self.wallet.public} cannot pay for {name} on {self._cluster}: a transaction costs at "
                f"least {sol(SIGNATURE_FEE)}, and storage costs the rent of its bytes. Send it SOL"
                " (on a local chain and on devnet: `psyche solana airdrop`).",
                code="Unfunded",
            )
        found = next((match for line in _lines(logs) if (match := ANCHOR_ERROR.search(line))), None)
        if found is not None:
            return CoordinatorError(
                f"the program refused {name}: {found[3].rstrip('.')} ({found[2]})", code=code_of(found[1])
            )
        if error_name(error) == "InvalidProgramForExecution" or error_name(error) == "ProgramAccountNotFound":
            return CoordinatorError(
                f"{name} needs a program that is not deployed on {self._cluster}; `psyche solana deploy` puts it there",
                code="NotDeployed",
            )
        return CoordinatorError(f"the chain refused {name}: {error_name(error)}", code=error_name(error))

    async def _refused(self, name: str, signature: Signature, error: Any) -> CoordinatorError:
        """The failure of a landed transaction, read from its log."""
        details = await self._detail(signature)
        logs = details["meta"].get("logMessages") if details else None
        return self._refusal(name, error, logs)

    async def _detail(self, signature: Signature) -> dict[str, Any] | None:
        for _ in range(DETAIL_TRIES):
            with contextlib.suppress(RpcProblem):
                found = await self._reader.transaction(signature)
                if found is not None:
                    return found
            await self._sleep(0.5)
        return None

    def _note(self, name: str, transaction: VersionedTransaction, status: Status, tries: int) -> None:
        """Record a landed transaction once the chain reports its usage."""

        async def note() -> None:
            found = await self._detail(transaction.signatures[0])
            meta: dict[str, Any] = found["meta"] if found else {}
            result = "ok"
            if status.error is not None:
                result = self._refusal(name, status.error, meta.get("logMessages")).code
            units, fee = meta.get("computeUnitsConsumed"), meta.get("fee")
            self._write(name, transaction, result, True, status.slot, units, fee, tries)

        task = asyncio.ensure_future(note())
        self._details.add(task)
        task.add_done_callback(self._details.discard)

    def _note_refusal(self, name: str, transaction: VersionedTransaction, problem: RpcProblem, tries: int) -> None:
        code = self._refusal(name, problem.transaction_error, problem.data.get("logs")).code
        self._write(name, transaction, code, False, None, problem.data.get("unitsConsumed"), None, tries)

    def _write(
        self,
        name: str,
        transaction: VersionedTransaction,
        result: str,
        landed: bool,
        slot: int | None,
        units: Any,
        fee: Any,
        tries: int,
    ) -> None:
        self.log.write(
            Record(
                time=round(self._wall(), 3),
                run=self._run,
                instruction=name,
                signature=str(transaction.signatures[0]),
                result=result,
                landed=landed,
                slot=slot,
                units=units if isinstance(units, int) else None,
                fee=fee if isinstance(fee, int) else None,
                tries=tries,
                size=len(bytes(transaction)),
            )
        )


def _lines(logs: Any) -> list[str]:
    return [line for line in logs if isinstance(line, str)] if isinstance(logs, list) else []


def _mentions(logs: Any, text: str) -> bool:
    return any(text in line for line in _lines(logs))
