"""A run's accounts as they change: subscriptions with every RPC service, and polling when they fail.

The coordinator account has a nonce, and only a higher one counts: some services lag, answers can arrive out of order,
and intermediate states are skipped. The manifest account has no nonce, so both are read together at one slot. Within
one round that trains, nothing that a node acts on changes in the manifest account, so a notification of the coordinator
account is enough.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from solders.pubkey import Pubkey
from websockets.asyncio.client import connect

from psyche_lightning.errors import CoordinatorError
from psyche_lightning.logs import Outage
from psyche_lightning.protocol.state import Phase
from psyche_lightning_solana.client.cluster import Cluster, Endpoint
from psyche_lightning_solana.client.reader import Account, Reader, account_of, slot_of
from psyche_lightning_solana.client.rpc import RpcProblem, Sleep, from_error, unreachable
from psyche_lightning_solana.layout import COORDINATOR, view_coordinator

logger = logging.getLogger(__name__)

CLOCK = Pubkey.from_string("SysvarC1ock11111111111111111111111111111111")
MAX_NOTIFICATION = 1024 * 1024
OPEN_TIMEOUT = 10.0
HEARTBEAT = 10.0
LONGEST_GAP = 30.0
"""Seconds between subscription attempts; each failure adds two."""
SLOW_POLL = 15.0
"""Seconds between polls while a subscription works: it may have died silently."""
SAID_AFTER, BELIEVED_AFTER, LAGGED_AFTER = 3.0, 4.0, 15.0
"""Seconds of an older state until it is said, until it counts at a later slot, and at an earlier one."""
CLOCK_JUMP = 2.0
"""Seconds by which the chain's clock may differ from its expected time without a notification."""
ROUNDS = (Phase.ROUND_TRAIN, Phase.ROUND_WITNESS)


@dataclass(frozen=True)
class Snapshot:
    """A run's accounts as of one moment.

    Attributes:
        slot: the newest slot it shows.
        coordinator: bytes of the coordinator account.
        manifest: bytes of the manifest account; empty if it has none.
    """

    slot: int
    coordinator: bytes
    manifest: bytes

    @property
    def nonce(self) -> int:
        """Changes so far."""
        return _number(self.coordinator, "nonce", 8)

    @property
    def training_round(self) -> tuple[int, int] | None:
        """Epoch and height of the round that trains, or None."""
        return _training_round(self.coordinator)


def _number(coordinator: bytes, field: str, size: int) -> int:
    fields = COORDINATOR.fields
    assert fields is not None
    offset = fields[field][1]
    return int.from_bytes(coordinator[offset : offset + size], "little")


def _training_round(coordinator: bytes) -> tuple[int, int] | None:
    if _number(coordinator, "run_state", 1) not in ROUNDS or _number(coordinator, "last_step", 4):
        return None
    record = view_coordinator(coordinator)
    return int(record["epoch"]), int(record["rounds"][record["rounds_head"] % 4]["height"])


class Feed:
    """Follows one run's accounts.

    Args:
        cluster: the chain.
        reader: the RPC services.
        coordinator: address of the coordinator account.
        manifest: address of the manifest account.
        check: rejects bytes that are no longer the run's account.
        patience: seconds without any answer before it gives up; once one came, it tries as long as it takes.
        clock: monotonic seconds.
        sleep: waits.

    Attributes:
        latest: the newest snapshot; None before the first.
        failure: why it ended; None before.
        subscriptions: number working now.
        polls: number of polls.
        away: the chain and why it cannot be reached at the moment; None if it can.
        returns: how often the chain went back.
    """

    def __init__(
        self,
        cluster: Cluster,
        reader: Reader,
        coordinator: Pubkey,
        manifest: Pubkey,
        *,
        check: Callable[[Account | None], None],
        patience: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.latest: Snapshot | None = None
        self.failure: CoordinatorError | None = None
        self.subscriptions = 0
        self.polls = 0
        self._cluster = cluster
        self._reader = reader
        self._coordinator = coordinator
        self._manifest = manifest
        self._check = check
        self.away: str | None = None
        self._patience = patience
        self._outage = Outage(logger, f"the chain {cluster.name}", clock=clock)
        self._clock = clock
        self._sleep = sleep
        self._chain_time = 0
        self._chain_time_at = clock()
        self._heard = clock()
        self._wanted, self._wanted_slot = 0, 0
        self.returns = 0
        self._odd_since: float | None = None
        self._odd_said = False
        self._look = asyncio.Event()
        self._news: set[asyncio.Event] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped = False
        self._reading = asyncio.Lock()

    def start(self) -> None:
        """Start following; :meth:`stop` ends it."""
        if not self._tasks:
            self._spawn(self._poll())
            for endpoint in self._cluster.endpoints:
                self._spawn(self._subscribe(endpoint))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.get_running_loop().create_task(work))

    async def stop(self) -> None:
        """Stop following."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def news(self) -> asyncio.Event:
        """An event that is set at every change and on failure; release it with :meth:`forget`."""
        event = asyncio.Event()
        self._news.add(event)
        return event

    def forget(self, event: asyncio.Event) -> None:
        """Stop setting it."""
        self._news.discard(event)

    def look(self) -> None:
        """Poll soon."""
        self._look.set()

    def chain_time(self) -> float:
        """The chain's clock now, estimated from the last poll."""
        return self._chain_time + self._clock() - self._chain_time_at

    async def refresh(self, min_slot: int | None = None) -> Snapshot:
        """Poll now; returns the newest snapshot, maybe from another call.

        Args:
            min_slot: services behind this slot are ignored.

        Raises:
            RpcProblem: no service answers.
            CoordinatorError: the account is gone, or no longer a run's.
        """
        async with self._reading:
            slot, found = await self._reader.accounts([self._coordinator, self._manifest, CLOCK], min_slot)
        coordinator, manifest, clock = found
        self._check(coordinator)
        assert coordinator is not None
        if clock is not None:
            expected = self.chain_time()
            self._chain_time, self._chain_time_at = int.from_bytes(clock.data[32:40], "little"), self._clock()
            if abs(self._chain_time - expected) > CLOCK_JUMP:
                self._tell()  # waiters for a time check again
        self._heard = self._clock()
        return self._take(Snapshot(slot, coordinator.data, b"" if manifest is None else manifest.data))

    def _take(self, snapshot: Snapshot) -> Snapshot:
        if self.latest is not None and self._went_back(snapshot, self.latest):
            self.returns += 1
            self._wanted, self._wanted_slot, self._odd_since = 0, 0, None
            self.latest = snapshot
            self._tell()
        elif self.latest is None or snapshot.nonce > self.latest.nonce:
            self.latest = snapshot
            self._tell()
        elif snapshot.nonce == self.latest.nonce and snapshot.slot >= self.latest.slot:
            # No nonce of its own: the owner set the manifest.
            changed, self.latest = snapshot.manifest != self.latest.manifest, snapshot
            if changed:
                self._tell()
        return self.latest

    def _went_back(self, snapshot: Snapshot, latest: Snapshot) -> bool:
        """Whether the chain lost changes that it had shown, as a local chain that was killed, or one with forks.

        A service that lags shows an older state at an older slot, and catches up. An older state at a later slot cannot
        be: but one odd answer is not believed, only what is still so a little later.
        """
        if snapshot.nonce >= latest.nonce:
            if snapshot.slot >= latest.slot:
                self._odd_since = None
            return False
        now = self._clock()
        if self._odd_since is None:
            self._odd_since = now
            return False
        odd = now - self._odd_since
        if odd >= SAID_AFTER and not self._odd_said:
            self._odd_said = True
            logger.warning(
                "the chain %s went back: at slot %d it shows change %d of the run, after change %d at slot %d. This "
                "node goes on with what the chain has, unless a service that lags catches up soon.",
                self._cluster.name,
                snapshot.slot,
                snapshot.nonce,
                latest.nonce,
                latest.slot,
            )
        back = odd >= (BELIEVED_AFTER if snapshot.slot >= latest.slot else LAGGED_AFTER)
        if back:
            self._odd_said = False
            logger.warning("this node now follows the chain %s from change %d on", self._cluster.name, snapshot.nonce)
        return back

    def _tell(self) -> None:
        for event in self._news:
            event.set()

    def fail(self, error: CoordinatorError) -> None:
        """End with this error."""
        self.failure = error
        self._tell()

    # --- looking --------------------------------------------------------------------------------------------------

    async def _poll(self) -> None:
        while self.failure is None:
            self.polls += 1
            try:
                behind = self.latest is None or self.latest.nonce < self._wanted
                await self.refresh(self._wanted_slot if behind and self._odd_since is None else None)
                self._outage.works()
                self.away = None
                if self.latest is not None and self.latest.nonce < self._wanted:
                    await self._sleep(0.05)  # a notification is newer than this answer
                    continue
            except RpcProblem as problem:
                self._outage.fails(f"{problem.endpoint}: {problem.text}")
                self.away = f"the chain {self._cluster.name}: {problem.endpoint}: {problem.text}"
                never = self.latest is None and self._clock() - self._heard > self._patience
                self._wanted, self._wanted_slot = 0, 0  # what a chain told before it went away may be lost
                if not problem.retryable or never:
                    self.fail(unreachable(problem, "the run's account", self._cluster.name))
                    return
            except CoordinatorError as error:
                self.fail(error)
                return
            self._look.clear()
            odd = self._odd_since is not None
            wait = SLOW_POLL if self.subscriptions and not odd else self._cluster.options.poll
            pause = asyncio.ensure_future(self._sleep(wait))
            look = asyncio.ensure_future(self._look.wait())
            try:
                await asyncio.wait((pause, look), return_when=asyncio.FIRST_COMPLETED)
            finally:
                pause.cancel()
                look.cancel()

    # --- being told -----------------------------------------------------------------------------------------------

    async def _subscribe(self, endpoint: Endpoint) -> None:
        failed = 0
        # Polling replaces subscriptions, so this alone is harmless.
        outage = Outage(logger, f"the subscription with {endpoint.name}", level=logging.INFO, clock=self._clock)
        while self.failure is None and not self._stopped:
            try:
                await self._listen(endpoint, outage)
            except Exception as error:  # any answer of a service
                if self._stopped:
                    return
                failed += 1
                outage.fails(f"{type(error).__name__}; polling every {self._cluster.options.poll:g} s meanwhile")
                self._look.set()
            else:
                failed = 0
            await self._sleep(min(LONGEST_GAP, 2.0 * failed) if failed else 0.5)

    async def _listen(self, endpoint: Endpoint, outage: Outage) -> None:
        """Subscribe and read notifications until the connection ends."""
        wanted = {"encoding": "base64+zstd", "commitment": self._cluster.options.commitment}
        request = {"jsonrpc": "2.0", "id": 1, "method": "accountSubscribe", "params": [str(self._coordinator), wanted]}
        async with connect(
            endpoint.ws,
            open_timeout=OPEN_TIMEOUT,
            ping_interval=HEARTBEAT,
            ping_timeout=HEARTBEAT,
            close_timeout=1.0,
            max_size=MAX_NOTIFICATION,
            proxy=None,
        ) as socket:
            await socket.send(json.dumps(request))
            subscribed = False
            try:
                while self.failure is None:
                    message = json.loads(await socket.recv())
                    if message.get("method") == "accountNotification":
                        self._notified(message["params"]["result"])
                    elif "error" in message:
                        raise from_error(message["error"], endpoint.name)
                    elif "result" not in message:
                        raise RpcProblem("it sent something that is no notification", retryable=True)
                    elif not subscribed:
                        subscribed = True
                        self.subscriptions += 1
                        outage.works()
                        self._look.set()  # for earlier changes
            finally:
                if subscribed:
                    self.subscriptions -= 1

    def _notified(self, result: Any) -> None:
        found = account_of(result["value"])
        data = b"" if found is None else found.data
        slot, latest = slot_of(result), self.latest
        self._heard = self._clock()
        if len(data) != COORDINATOR.itemsize:
            self._look.set()  # perhaps closed: a poll shows it
            return
        nonce = _number(data, "nonce", 8)
        if latest is not None and nonce <= latest.nonce:
            return
        place = _training_round(data)
        if latest is not None and place is not None and latest.training_round == place:
            self._take(Snapshot(slot, data, latest.manifest))
        else:
            self._wanted, self._wanted_slot = max(self._wanted, nonce), slot
            self._look.set()
