"""A node's client of a run on the chain: the :class:`~psyche_lightning.protocol.requests.Coordinator` protocol."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from solders.instruction import Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from psyche_lightning import aio
from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.committee import round_selection
from psyche_lightning.protocol.evals import Evaluation
from psyche_lightning.protocol.manifest import fix_values, merge
from psyche_lightning.protocol.requests import (
    Accuse,
    Answer,
    Evaluated,
    GetRounds,
    GetTerms,
    HealthCheck,
    Join,
    Report,
    Request,
    Terms,
    WarmupWitness,
    Withdraw,
    Witness,
)
from psyche_lightning.protocol.state import Phase, Round, RunState
from psyche_lightning.wire.canonical import ZERO_HASH
from psyche_lightning.wire.identity import Identity
from psyche_lightning_solana.account import Member, RunAccounts
from psyche_lightning_solana.client import timekeeper
from psyche_lightning_solana.client.addressbook import MAX_AGE, AddressBook
from psyche_lightning_solana.client.cluster import Cluster
from psyche_lightning_solana.client.feed import Feed, Snapshot
from psyche_lightning_solana.client.fees import sol, units
from psyche_lightning_solana.client.ledger import Ledger
from psyche_lightning_solana.client.purse import FEW, Purse
from psyche_lightning_solana.client.rounds import History, precedes, replay, with_former_clients
from psyche_lightning_solana.client.rpc import RpcProblem, Sleep, unreachable
from psyche_lightning_solana.client.run import SolanaRun, halted
from psyche_lightning_solana.client.sender import Receipt
from psyche_lightning_solana.client.wallet import Wallet
from psyche_lightning_solana.instructions import RunKeys
from psyche_lightning_solana.interface import MAX_NODE_ADDRESS
from psyche_lightning_solana.layout import ADDRESS_SIZE

logger = logging.getLogger(__name__)

LARGEST_FLOAT = 3.0e38
BUSY_STEPS = 16
"""Steps over which a report says how much of the time the node trained, as in Psyche."""
EVALS, EVAL_NAME = 8, 32
"""Evaluations in a report, and the bytes of a name, as in Psyche's ``WitnessMetadata``."""

_Result = TypeVar("_Result")


class SolanaCoordinator:
    """A client of one run (a :class:`~psyche_lightning.protocol.requests.Coordinator`).

    The wallet is the signer; each join also carries the node's own key. The program requires a new join for each epoch.
    When services fail, calls raise ``retryable`` errors and the state keeps its last known value.

    Args:
        cluster: the chain and the options.
        run_id: the run.
        identity: the node's key.
        wallet: signs and pays; None loads it according to the options.
        patience: seconds without an answer from any service before :meth:`watch` gives up, if none ever came.
        clock: monotonic seconds.
        sleep: waits.
        randomness: spreads the waits of many nodes.
    """

    def __init__(
        self,
        cluster: Cluster,
        run_id: str,
        identity: Identity,
        *,
        wallet: Wallet | None = None,
        patience: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Sleep = asyncio.sleep,
        randomness: random.Random | None = None,
    ) -> None:
        self.run = SolanaRun(cluster, run_id, wallet, clock=clock, sleep=sleep, randomness=randomness)
        self._node = identity.public
        self._node_key = Wallet(Keypair.from_seed(identity.secret_bytes()), "the node's key")
        self._patience = patience
        self._clock = clock
        self._sleep = sleep
        self._own_purse: Purse | None = None
        self._feed: Feed | None = None
        self._keys: RunKeys | None = None
        self._book = AddressBook(self.run, clock)
        self._history = History()
        self._ledger: Ledger | None = None
        self._decoded: tuple[Snapshot, RunAccounts] | None = None
        self._joined = False
        self._bytes: tuple[float, int] | None = None
        self._evaluations: dict[str, Evaluation] = {}  # of this node alone, the newest of each task
        self._busy: deque[tuple[float, int, float]] = deque(maxlen=BUSY_STEPS + 1)  # when, step, seconds trained so far
        self._told: tuple[int, float, tuple[int, int]] | None = None  # step, loss, and where they were reported
        self._in_flight: dict[Hashable, asyncio.Task[Any]] = {}
        self._ticker: asyncio.Task[None] | None = None
        self._landed: set[tuple[Hashable, ...]] = set()
        self._replayed = (-1, 0)  # epoch, and transactions that did not suffice
        self._returns = 0
        self._closed = False

    @property
    def away(self) -> str | None:
        """The chain and why it cannot be reached at the moment; None if it can."""
        return None if self._feed is None else self._feed.away

    @property
    def signer(self) -> bytes:
        """The wallet's address, which identifies this client.

        Raises:
            ConfigError: no wallet is usable.
        """
        return bytes(self.run.wallet.public)

    # --- the protocol -----------------------------------------------------------------------------------------------

    async def request(self, request: Request[Answer]) -> Answer:
        """Ask the program or read its accounts, and return the answer."""
        answer: Any = None
        match request:
            case GetTerms():
                answer = await self._terms()
            case GetRounds(epoch, first):
                answer = await self._rounds(epoch, first)
            case Join(address, manifest, region):
                if region:
                    logger.warning("node.region is %r; a run on a chain has no place for it, so nobody sees it", region)
                await self._become_member(address, dict(manifest))
            case Withdraw():
                await self._withdraw()
            case WarmupWitness(epoch, index, digest):
                await self._report(
                    "warmup_witness", lambda keys, me: keys.warmup_witness(me, index, digest, epoch), request
                )
            case Witness():
                await self._witness(request)
            case HealthCheck(epoch, height, signers):
                # Each costs a transaction, so the witnesses take turns, only as needed.
                answer = await self._once(("health", epoch, height), lambda: self._health_check(epoch, height, signers))
            case Accuse():
                # Every node still ignores both results.
                text = "a run on a chain cannot eject a node that signed two results"
                raise CoordinatorError(text, code="Unsupported")
            case Evaluated():
                answer = self._evaluated(request)
            case _:
                raise CoordinatorError(f"a run on a chain has no request {request!r:.80}", code="Unsupported")
        return answer  # type: ignore[no-any-return] # each branch gives what its request declares

    def _evaluated(self, request: Evaluated) -> Evaluation:
        """Keep what this node measured for its next reports; the program merges nothing of others."""
        before = self._evaluations.get(request.task)
        if before is None or before.step != request.step:
            before = Evaluation(request.task, request.step, request.documents)
        self._evaluations[request.task] = after = before.plus(request.share, request.figures)
        return after

    async def _terms(self) -> Terms:
        """The run's fixed terms."""
        run = await self._look()
        return Terms(run.state.config, (), await self.run.run_manifest(run), run.state.incarnation)

    async def _become_member(self, address: str, manifest: dict[str, Any]) -> None:
        """Become a member of the next epoch and publish the node's address; sends only what is missing.

        Raises:
            ManifestMismatchError: the run has another manifest.
            CoordinatorError: ``NoManifest``, ``WrongVersion``, ``NotAuthorized``, ``Unfunded``; ``Halted`` when this
                node is new and the run is not open; ``Replaced`` when another process uses the wallet.
        """
        run = await self._look()
        await self._check_manifest(run, manifest)
        self.run.check_version(run)
        if run.state.phase.halted:
            if not self._joined:
                raise halted(run.state)
            return  # earlier members wait; a join counts only once the run is open again
        await self._once("join", lambda: self._join(address))
        self._joined = True

    async def _withdraw(self) -> None:
        """Leave the run; fails without a transaction if this node is not a member."""
        run = await self._look()
        if all(client.signer != self.signer for client in (*run.state.healthy, *run.pending)):
            raise CoordinatorError(f"{self.run.wallet.public} is not a member of this run", code="InvalidWithdraw")
        await self._send("withdraw", lambda keys, me: keys.withdraw(me))

    async def _witness(self, request: Witness) -> None:
        """Report as a witness."""
        at = request.epoch, request.height
        figures = await self._figures(request.report, *at)
        held = request.step, request.digest or ZERO_HASH
        await self._report(
            "witness",
            lambda keys, me: keys.witness(
                me,
                request.proof,
                request.merkle,
                request.participants,
                request.broadcasts,
                metadata=figures,
                at=at,
                held=held,
            ),
            replace(request, report=Report()),
        )

    async def _rounds(self, epoch: int, first: int) -> tuple[Round, ...]:
        """The rounds of an epoch from height ``first`` on: as seen, or rebuilt from the ledger."""
        run = await self._look()
        self._history.observe(run.state)
        if self._history.missing(epoch, first):
            await self._once(("replay", epoch), lambda: self._replay(run))
        return tuple(self._history.rounds(epoch, first))

    async def watch(self) -> AsyncIterator[RunState]:
        """The state now and after every change, newest only."""
        feed = await self._open()
        feed.start()
        if self._ticker is None:
            keeper = timekeeper.Timekeeper(feed, self._decode, self.signer, lambda: self._joined, self._tick)
            self._ticker = asyncio.get_running_loop().create_task(keeper.run())
        news = feed.news()
        shown: RunState | None = None
        try:
            while True:
                if feed.failure is not None:
                    raise feed.failure
                if self._closed:
                    raise CoordinatorError("this coordinator client was closed", code="Closed")
                news.clear()
                if feed.latest is not None:
                    run = self._decode(feed.latest)
                    self._follow_back(feed)
                    self._check_alone(run)
                    self._history.observe(run.state)
                    await self._look_up(run)
                    state = self._book.fill(with_former_clients(run))
                    if state != shown:
                        shown = state
                        yield state
                await aio.wait_or_set(news, MAX_AGE)
        finally:
            feed.forget(news)

    async def close(self) -> None:
        """Stop following the run and release connections; the log is finished first."""
        self._closed = True
        tasks = [*self._in_flight.values(), *([self._ticker] if self._ticker else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._feed is not None:
            await self._feed.stop()
        await self.run.close()

    # --- looking ----------------------------------------------------------------------------------------------------

    async def _open(self) -> Feed:
        if self._closed:
            raise CoordinatorError("this coordinator client was closed", code="Closed")
        if self._feed is None:
            self._keys = await self.run.keys()
            self._feed = Feed(
                self.run.cluster,
                self.run.reader,
                self._keys.coordinator_account,
                self.run.manifest_address,
                check=self.run.check_account,
                patience=self._patience,
                clock=self._clock,
                sleep=self._sleep,
            )
        return self._feed

    async def _look(self, min_slot: int | None = None) -> RunAccounts:
        """The run as it is now."""
        feed = await self._open()
        try:
            return self._decode(await feed.refresh(min_slot))
        except RpcProblem as problem:
            raise unreachable(problem, f"run {self.run.run_id!r}", self.run.cluster.name) from problem

    def _decode(self, snapshot: Snapshot) -> RunAccounts:
        if self._decoded is None or self._decoded[0] is not snapshot:
            self._decoded = snapshot, self.run.decode(snapshot)
        return self._decoded[1]

    async def _look_up(self, run: RunAccounts) -> None:
        """Look up the relevant addresses; keeps the old ones when services fail."""
        gathering = run.state.phase in (Phase.WAITING_FOR_MEMBERS, Phase.WARMUP)
        clients = run.pending if run.state.phase is Phase.WAITING_FOR_MEMBERS else run.state.clients
        with contextlib.suppress(RpcProblem):
            await self._book.update((client.signer for client in clients), all_of_them=gathering)

    def _follow_back(self, feed: Feed) -> None:
        """Forget what a chain that went back undid."""
        if feed.returns != self._returns:
            self._returns = feed.returns
            self._history, self._ledger, self._replayed = History(), None, (-1, 0)
            self._landed.clear()

    def _check_alone(self, run: RunAccounts) -> None:
        """Raise an error if another process joined with this wallet."""
        mine = self._member(run)
        if self._joined and mine is not None and mine.p2p != self._node:
            raise CoordinatorError(
                f"another process joined run {self.run.run_id!r} with the wallet {self.run.wallet.public}. Give each "
                "node a wallet of its own.",
                code="Replaced",
            )

    def _member(self, run: RunAccounts) -> Member | None:
        return next((member for member in run.members if member.signer == self.signer), None)

    async def _replay(self, run: RunAccounts) -> None:
        state, epoch = run.state, run.state.rounds_epoch
        assert self._keys is not None
        program, account = self.run.program, self._keys.coordinator_account
        if self._ledger is None:
            self._ledger = Ledger(self.run.reader, account)
        try:
            entries = await self._ledger.entries(
                since=int(state.epoch_start) if state.phase.active else 0,
                enough=lambda entry: precedes(entry, epoch, program, account),
            )
        except RpcProblem as problem:
            raise unreachable(problem, "the transactions of the epoch", self.run.cluster.name) from problem
        if self._replayed == (epoch, len(entries)):
            return  # they did not suffice before
        self._replayed = epoch, len(entries)
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(None, replay, run, entries, program, account)
        if not found:
            logger.warning(
                "the chain's transactions do not give the earlier rounds of epoch %d; this node waits for somebody who "
                "has the parameters after them",
                epoch,
            )
        height = state.current.height if state.current else 0
        self._history.fill(epoch, [round_ for round_ in found if round_.height < height])

    # --- joining ----------------------------------------------------------------------------------------------------

    async def _check_manifest(self, run: RunAccounts, manifest: dict[str, Any]) -> None:
        held = await self.run.run_manifest(run)
        if held is None:
            raise CoordinatorError(
                f"run {self.run.run_id!r} has no manifest, so nodes cannot join. Its owner sets it with "
                f"`psyche run update {self.run.run_id} RECIPE`.",
                code="NoManifest",
            )
        offered, _ = fix_values({}, manifest)
        merge(held, offered)

    async def _join(self, address: str) -> None:
        run = await self._look()
        me, state = self.run.wallet.public, run.state
        self._check_alone(run)
        if len(address.encode()) > MAX_NODE_ADDRESS:
            raise CoordinatorError(
                f"the transport's address has {len(address.encode())} bytes; the chain keeps {MAX_NODE_ADDRESS}",
                code="InvalidMember",
            )
        with contextlib.suppress(RpcProblem):
            await self._book.update([self.signer], all_of_them=True)
        keys, parts, names = self._keys, [], []
        assert keys is not None
        if address != self._book.get(self.signer):
            parts.append(keys.set_address(me, address))
            names.append("set_address")
        mine = self._member(run)
        waits = mine is not None and mine.active == run.next_active and mine.p2p == self._node
        inside = any(c.signer == self.signer and c.node == self._node for c in state.healthy)
        formed = state.phase is Phase.WARMUP or state.phase.active
        if not waits and not (inside and formed):
            instance = await self.run.instance()
            assert instance is not None
            parts.append(keys.join_run(me, self._node, await self.run.authorization(run, instance)))
            names.append("join_run")
        if not parts:
            return
        await self._check_funds(new_address=bool(address) and not self._book.get(self.signer))
        with contextlib.suppress(RpcProblem):
            await self._purse.foresee(max(0, state.config.total_steps - state.step + 1))
        signers = [self._node_key] if "join_run" in names else []
        receipt = await self._transact("+".join(names), parts, run, signers)
        await self._book.update([self.signer], all_of_them=True)
        await self._look(receipt.slot)

    async def _check_funds(self, *, new_address: bool) -> None:
        """Check before the first transaction that the wallet can pay for a hundred."""
        try:
            balance = await self.run.reader.balance(self.run.wallet.public)
            needed = await self.run.reader.rent(0) + FEW * self.run.sender.price
            needed += await self.run.reader.rent(ADDRESS_SIZE) if new_address else 0
        except RpcProblem as problem:
            raise unreachable(problem, "the wallet's balance", self.run.cluster.name) from problem
        if balance < needed:
            raise CoordinatorError(
                f"the wallet {self.run.wallet.public} holds {sol(balance)} on {self.run.cluster.name}; a node needs at "
                f"least {sol(needed)} to begin: storage for its address, which comes back, and {FEW} "
                "transactions. `psyche solana cost RECIPE` shows a whole run's cost; on a local chain and on devnet "
                f"`psyche solana airdrop` gives SOL away.",
                code="Unfunded",
            )

    # --- sending ----------------------------------------------------------------------------------------------------

    async def _once(self, key: Hashable, work: Callable[[], Awaitable[_Result]]) -> _Result:
        """Do ``work``, or wait for work in progress under that key, so that nothing is sent twice."""
        task = self._in_flight.get(key)
        if task is None:
            task = asyncio.ensure_future(work())
            self._in_flight[key] = task
            task.add_done_callback(lambda done: self._ended(key, done))
        result: _Result = await asyncio.shield(task)
        return result

    def _ended(self, key: Hashable, task: asyncio.Future[Any]) -> None:
        self._in_flight.pop(key, None)
        if not task.cancelled():
            task.exception()  # the caller may be gone by now

    async def _report(self, name: str, build: Callable[[RunKeys, Pubkey], Instruction], *place: Hashable) -> None:
        """Send a report that counts once; a repeated call before the state shows it sends nothing."""
        began = self._decode(self._feed.latest).state.epoch_start if self._feed and self._feed.latest else None
        key = (name, began, *place)
        if key in self._landed:
            raise CoordinatorError(f"this node's {name} has landed already", code="DuplicateWitness")
        try:
            await self._send(name, build, *place)
        except CoordinatorError as error:
            if error.code == "SignerNotAClient":  # the machine's error for wallets that never joined
                raise CoordinatorError(str(error), code="InvalidWitness") from error
            raise
        self._landed = {other for other in self._landed if other[1] == began} | {key}

    async def _send(self, name: str, build: Callable[[RunKeys, Pubkey], Instruction], *place: Hashable) -> None:
        async def work() -> None:
            feed = await self._open()
            assert self._keys is not None
            run = self._decode(feed.latest) if feed.latest is not None else await self._look()
            await self._transact(name, [build(self._keys, self.run.wallet.public)], run)

        await self._once((name, *place), work)

    async def _tick(self, nonce: int) -> None:
        await self._send("tick", lambda keys, me: keys.tick(me), nonce)

    async def _transact(
        self, name: str, parts: list[Instruction], run: RunAccounts, signers: Sequence[Wallet] = ()
    ) -> Receipt:
        assert self._feed is not None
        slot = self._feed.latest.slot if self._feed.latest is not None else None
        try:
            receipt = await self.run.sender.send(name, parts, units=units(name), signers=signers, min_slot=slot)
        except CoordinatorError as error:
            if not error.retryable:
                self._feed.look()  # the run may have moved on
            raise
        if self._joined and name != "withdraw" and await self._purse.sent():
            await self._once("dry", self._leave_dry)
        return receipt

    @property
    def _purse(self) -> Purse:
        if self._own_purse is None:
            self._own_purse = Purse(self.run.reader, self.run.sender, self.run.cluster.name)
        return self._own_purse

    async def _leave_dry(self) -> None:
        """Leave while the wallet can pay for it: the others go on at once, and do not wait for a silent node."""
        assert self._feed is not None
        me = self.run.wallet.public
        logger.warning("the wallet %s runs dry: the node leaves the run", me)
        with contextlib.suppress(CoordinatorError):
            await self._withdraw()
        self._feed.fail(
            CoordinatorError(
                f"the wallet {me} on {self.run.cluster.name} pays for only a few more transactions, so the node left "
                "the run while it could. Send the wallet SOL and start the node again: it goes on from its folder. On a"
                " local chain and on devnet `psyche solana airdrop` gives SOL away.",
                code="Unfunded",
            )
        )

    async def _figures(self, report: Report, epoch: int, height: int) -> dict[str, Any]:
        """A report in the form of Psyche's metadata: the run's step, and the newest loss, sent once.

        The step is always the run's, even when an epoch drains or the figures belong to the previous step (results
        overlap training): the program accepts no other, and Psyche's website drops all steps after a lower one.
        """
        now, total = self._clock(), report.bytes_up + report.bytes_down
        before, self._bytes = self._bytes, (now, total)
        rate = (total - before[1]) / max(now - before[0], 1e-3) if before is not None else 0.0
        latest = self._feed.latest if self._feed is not None else None
        state = (await self._look() if latest is None else self._decode(latest)).state
        round_ = state.round_at(height) if state.epoch == epoch else None
        if self._told is None or self._told[:2] != (report.step, report.loss):
            self._told = report.step, report.loss, (epoch, height)
        if report.seconds > 0 and (not self._busy or report.step > self._busy[-1][1]):
            self._busy.append((now, report.step, report.seconds))
        return {
            "efficency": _single(_efficiency(self._busy)),
            "step": (round_.step if round_ is not None else 0) or state.step,
            "tokens_per_sec": _single(report.tokens_per_second),
            "bandwidth_per_sec": _single(rate),
            "loss": _single(report.loss) if self._told[2] == (epoch, height) else math.inf,
            "evals": [
                {"name": task.encode()[:EVAL_NAME].ljust(EVAL_NAME, b"\0"), "value": _single(one.main)}
                for task, one in self._evaluations.items()
                if one.main is not None
            ][:EVALS],
            "prompt_index": report.prompt,
            "prompt_results": list(report.tokens),
        }

    async def _health_check(self, epoch: int, height: int, signers: tuple[bytes, ...]) -> int:
        run = await self._look()
        if not await self._my_turn(run, epoch, height):
            return 0
        dropped = 0
        for listed in signers:
            run = await self._look()
            state, before = run.state, run.state.round_at(height - 1)
            if not _at(state, epoch, height) or before is None or listed not in before.clients:
                break
            client = next((client for client in state.healthy if client.signer == listed), None)
            if client is None:
                continue
            index = before.clients.index(listed)
            selection = round_selection(before, state.config)
            position, committee = selection.committee_position(index), selection.committee(index)
            assert self._keys is not None
            part = self._keys.health_check(self.run.wallet.public, listed, client.node, position, index, committee)
            await self._transact("health_check", [part], run)
            dropped += 1
        return dropped

    async def _my_turn(self, run: RunAccounts, epoch: int, height: int) -> bool:
        """Wait for this node's turn in that round; returns False if the round ends first."""
        assert self._feed is not None
        end = self._clock() + timekeeper.STAGGER * timekeeper.turn(run, self.signer)
        while self._clock() < end:
            await self._sleep(timekeeper.STAGGER / 4)
            latest = self._feed.latest
            if latest is not None and not _at(self._decode(latest).state, epoch, height):
                return False
        return True


def _efficiency(steps: Sequence[tuple[float, int, float]]) -> float:
    """The part of the time in which the node trained; 0 before its second step.

    Args:
        steps: of each when it was told, its number, and the seconds of all training up to its end.
    """
    if len(steps) < 2:
        return 0.0
    (began, _, before), (ended, _, after) = steps[0], steps[-1]
    return min(1.0, max(0.0, after - before) / max(ended - began, 1e-6))


def _at(state: RunState, epoch: int, height: int) -> bool:
    return state.epoch == epoch and state.current is not None and state.current.height == height


def _single(value: float) -> float:
    """The value clamped to a 32-bit float; NaN becomes infinity, as in Psyche."""
    if math.isnan(value):
        return math.inf
    return struct.unpack("<f", struct.pack("<f", min(max(value, -LARGEST_FLOAT), LARGEST_FLOAT)))[0]  # type: ignore[no-any-return]
