"""Takes part in a run for a training loop, which gets rounds and hands in compressed updates.

The network runs on an asyncio loop in a background thread. The training thread calls :meth:`Participant.next_round`,
which also does all work on the parameters, so that two threads never touch a model.
"""

from __future__ import annotations

import asyncio
import math
import queue
import signal
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, TypeVar

from psyche_lightning.errors import PsycheError, UnfinishedError
from psyche_lightning.node.download import Transfer
from psyche_lightning.node.events import Apply, Event, Train, Trained
from psyche_lightning.node.journal import SMALL
from psyche_lightning.node.notices import Finished
from psyche_lightning.node.runtime import NodeParts, Runtime, TrainerTask
from psyche_lightning.node.spare import SpareTime
from psyche_lightning.protocol.messages import Result
from psyche_lightning.protocol.open_ids import Interval, closed, count
from psyche_lightning.protocol.requests import Answer, Figure, Report, Request
from psyche_lightning.protocol.state import RunState

_T = TypeVar("_T")
START_TIMEOUT = 120.0
LOOK_EVERY = 0.5
"""Seconds between checks of the patience, and of whether the training thread wants to stop."""


@dataclass(frozen=True)
class RoundWork:
    """One round's work for this node.

    Attributes:
        epoch: epoch of the run.
        height: round within the epoch.
        step: optimizer step over the run, from 1.
        batch: data ids to train: the node's share of the round, then ids of earlier rounds whose trainer failed.
    """

    epoch: int
    height: int
    step: int
    batch: tuple[Interval, ...]


def reason_to_leave(error: BaseException) -> str:
    """Why a node leaves whose training ends with ``error``, for people."""
    if isinstance(error, KeyboardInterrupt):
        return "Ctrl-C"
    if isinstance(error, SystemExit):  # which Trainer and Fabric raise on the signal
        signalled = type(error).__name__ == "SIGTERMException" or error.code == 128 + signal.SIGTERM
        return "SIGTERM" if signalled else "the program ends"
    return str(error) if isinstance(error, PsycheError) else f"{type(error).__name__}: {error}"


def result_of(
    work: RoundWork,
    payload: bytes,
    size: int,
    layout: bytes,
    *,
    nonce: int,
    lrs: tuple[int, ...],
    loss: float,
    tokens: int,
) -> Result:
    """What a node announces of its part in a round.

    Args:
        work: the round.
        payload: digest of its payload.
        size: bytes of that.
        layout: digest of what the payload's positions mean.
        nonce: as of :meth:`Participant.submit`, like the following.
        lrs: fp32 bits of the learning rate of each parameter group.
        loss: mean training loss.
        tokens: tokens or samples trained on.
    """
    (start, end), *again = closed(work.batch)
    where = work.epoch, work.height, work.step, start, end
    return Result(*where, nonce, payload, size, layout, lrs, loss_bits(loss), tokens, tuple(again))


def loss_bits(loss: float) -> int:
    """The bits of a loss as float32."""
    return int.from_bytes(struct.pack("<f", loss), "little")


class Participant:
    """Takes part in one run.

    Args:
        node: the node's parts; its parameters are only touched on the thread that calls :meth:`next_round` and
            :meth:`wait_applied`.
        patience: longest wait for a round, in seconds; then an error names the missing nodes.
        stops: returns whether the training thread wants to stop; asked during its waits, on that thread.
        applied: called on the training thread when a round's results are applied, before the coordinator hears of it.

    Attributes:
        node: as given.
        loss: training loss of the newest applied round, the same on every node; None before the first.
        spare: other work for the training thread's waits; it has none at first.
        waited: seconds in which the training thread had nothing else to do than that, as it waited for others.
        applying: seconds in which it applied the results of rounds.
    """

    def __init__(
        self,
        node: NodeParts,
        *,
        patience: float = 24 * 3600.0,
        stops: Callable[[], bool] = lambda: False,
        applied: Callable[[Apply], None] = lambda task: None,
    ) -> None:
        self.node = node
        self.loss: float | None = None
        self._patience = patience
        self._stops = stops
        self._applied = applied
        self.spare = SpareTime()
        self.waited = self.applying = 0.0
        self._inbox: queue.SimpleQueue[tuple[float, TrainerTask]] = queue.SimpleQueue()
        self._last = ""  # the kind of the task before, which tells what the next wait is for
        self._next: RoundWork | None = None
        self._finished: Finished | None = None
        self._started_at: dict[int, float] = {}
        self._trained = 0.0
        self._runtime = Runtime(node, self._post)
        self._loop = asyncio.SelectorEventLoop()  # Windows' default loop would bypass sockets that count bytes
        self._thread = threading.Thread(target=self._run_loop, name="psyche-node", daemon=True)
        self._running = False
        self._starting: Future[None] | None = None
        self._interruption: BaseException | None = None

    # --- life -----------------------------------------------------------------------------------------------------

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _on_loop(self, work: Any, timeout: float) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def start(self) -> None:
        """Connect and ask to join.

        Raises:
            PsycheError: the transport cannot listen, or the coordinator cannot be reached or refuses this node.
        """
        self._thread.start()
        self._running = True
        with self._runtime.speaking():  # also covers work started on the loop
            self._starting = asyncio.run_coroutine_threadsafe(self._runtime.start(), self._loop)
        if self._interruption is not None:
            self._starting.cancel()
        try:
            self._starting.result(START_TIMEOUT)
        except PsycheError:
            self.stop(withdraw=False)
            raise
        except FutureTimeoutError:
            what = self._runtime.waiting()
            late = f"the coordinator did not let this node join within {START_TIMEOUT:.0f} s: {what}"
            self.stop(late, withdraw=True)
            raise PsycheError(f"{late}. Try again later.") from None
        except BaseException as error:  # interrupted, perhaps after the coordinator let this node join
            cause = (self._interruption if isinstance(error, CancelledError) else None) or error
            self.stop(reason_to_leave(cause), withdraw=True)
            if cause is not error:
                raise cause from None
            raise

    def stop(self, why: str = "", *, withdraw: bool | None = None, linger: float = 15.0) -> None:
        """Leave the run and close everything within seconds; idempotent.

        Args:
            why: reason for people; a finished run needs none.
            withdraw: whether to tell the coordinator; default: unless the run is finished.
            linger: longest time to serve peers that have not reported the last parameters, in seconds.
        """
        if not self._running:
            return
        self._running = False
        leave = self._finished is None if withdraw is None else withdraw
        try:
            reason = why or str(self._finished or "its training ended here")
            with self._runtime.speaking():
                self._on_loop(self._runtime.stop(reason, withdraw=leave, linger=linger), linger + 15.0)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5.0)
            if not self._thread.is_alive():
                self._loop.close()

    def interrupt(self, error: BaseException) -> None:
        """End the training thread's current or next wait with ``error``; a signal handler may call this."""
        self._interruption = error
        self._post(error)
        if self._starting is not None:
            self._starting.cancel()

    @property
    def finished(self) -> Finished | None:
        """How the run ended for this node; None until it ends."""
        return self._finished

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes ``(up, down)`` counted at the node's sockets."""
        return self.node.traffic()

    @property
    def transfer(self) -> Transfer | None:
        """The parameters that this node is downloading, or None."""
        return self._runtime.downloads.transfer

    @property
    def state(self) -> RunState | None:
        """The newest run state that this node saw; None before the first."""
        return self._runtime.core.state

    def waiting(self) -> str:
        """Whom the node waits for, in one line."""
        return self._runtime.waiting()

    # --- rounds -----------------------------------------------------------------------------------------------------

    def next_round(self) -> RoundWork | None:
        """Wait for this node's next batch and apply the results of others meanwhile.

        Returns:
            The work, or None when the run is over and the parameters are its last (:attr:`finished`), or when
            ``stops`` says so.

        Raises:
            UnfinishedError: the run is over, but this node does not hold its last parameters.
            PsycheError: the coordinator refused this node, or nothing came within the node's patience.
        """
        while self._next is None and not self._over():
            if self._pump() is None:
                return None
        work, self._next = self._next, None
        if work is not None:
            self._started_at = {work.step: time.monotonic()}
        return work

    def wait_applied(self, work: RoundWork) -> bool:
        """Wait until a round's results are applied; returns at once if results overlap training.

        Returns:
            False when ``stops`` said so first.

        Raises:
            PsycheError: as :meth:`next_round`.
        """
        while not self.node.settings.overlap and self._next is None and not self._over():
            task = self._pump()
            if task is None:
                return False
            if isinstance(task, Apply) and (task.epoch, task.height) >= (work.epoch, work.height):
                break
        return True

    def submit(
        self,
        work: RoundWork,
        payload: bytes | None,
        *,
        nonce: int,
        lrs: tuple[int, ...],
        loss: float = math.nan,
        tokens: int = 0,
    ) -> None:
        """Hand in a round's compressed update, which is stored durably and then announced.

        Args:
            work: the round.
            payload: the encoded update; None if the batch gave none (non-finite gradients).
            nonce: count of updates this trainer encoded before.
            lrs: fp32 bits of the learning rate of each parameter group.
            loss: mean training loss, for people.
            tokens: tokens or samples trained on. 0 means none: another node trains the ids again.
        """
        result = None
        seconds = max(time.monotonic() - self._started_at.get(work.step, time.monotonic()), 1e-6)
        self._trained += seconds
        self.node.spans.end(work.step, "compute")
        if payload is not None:
            self.node.spans.begin(work.step, "send", **{"psyche.bytes": len(payload)})
            self._runtime.report = Report(work.step, loss, tokens / seconds, seconds=self._trained)
            # What is small becomes durable with the promise that names it.
            stored, layout = self.node.store.put(payload, len(payload) > SMALL), self.node.settings.layout
            result = result_of(work, stored, len(payload), layout, nonce=nonce, lrs=lrs, loss=loss, tokens=tokens)
        self._handle(Trained(work.epoch, work.height, result))

    def tell(self, figures: tuple[Figure, ...]) -> None:
        """Have this node's reports carry named figures, for people, from now on and in place of those before."""
        self._runtime.figures = figures

    def wrote(self, prompt: int, token: int) -> None:
        """Have the next report carry a token that this node added to a text."""
        self._runtime.written.append((prompt, token))

    def _over(self) -> bool:
        """Whether the run is over and this node holds its last parameters.

        Raises:
            UnfinishedError: the run is over, and this node holds other parameters.
        """
        if self._finished is None:
            return False
        if not self._finished.whole:
            raise UnfinishedError(
                f"this node does not hold the last parameters of run {self.node.run_id!r}: {self._finished}. "
                f"{self._finished.advice}."
            )
        return True

    def ask(self, request: Request[Answer]) -> Future[Answer]:
        """Ask the coordinator while the training thread goes on; the answer, or a CoordinatorError, comes later."""
        with self._runtime.speaking():
            return asyncio.run_coroutine_threadsafe(self.node.coordinator.request(request), self._loop)

    def _post(self, task: TrainerTask) -> None:
        self._inbox.put((time.monotonic(), task))

    def _handle(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._runtime.handle, event)

    def _pump(self) -> TrainerTask | None:
        """Do one task from the loop; waits with reminders and a time limit. None when the thread wants to stop."""
        began = time.monotonic()
        self._runtime.busy_since = None
        self._runtime.wait.rest(began)
        self.spare.rest(self._last)
        while True:
            try:
                worked = self.spare.use(here=not self._inbox.empty())
                arrived, task = self._inbox.get(timeout=0.0 if worked else min(LOOK_EVERY, self._patience))
                break
            except queue.Empty:
                if self._stops():
                    self._rested(began)
                    return None
                waited = time.monotonic() - began
                if waited > self._patience:
                    raise PsycheError(
                        f"nothing happened in run {self.node.run_id!r} for {waited:.0f} s: {self.waiting()}. "
                        "Start the missing nodes, or raise the node's patience."
                    ) from None
        self._rested(began)
        self.spare.resume(arrived)
        self._last = type(task).__name__
        match task:
            case Train(epoch, height, step, batch):
                self._runtime.wait.over()
                self._runtime.busy_since = time.monotonic()
                self._next = RoundWork(epoch, height, step, batch)
                self.node.spans.begin(step, "compute", **{"psyche.samples": count(batch)})
            case Finished():
                self._finished = task
            case BaseException():
                raise task
            case _:
                if isinstance(task, Apply) and task.loss is not None:
                    self.loss = task.loss
                at = time.monotonic()
                done = self._runtime.run_replica_task(task)
                if isinstance(task, Apply):
                    self.applying += time.monotonic() - at
                    self._applied(task)
                self._handle(done)
        return task

    def _rested(self, began: float) -> None:
        now = time.monotonic()
        self._runtime.wait.resume(now)
        self.waited += now - began
