"""How the other ranks of a node follow rank 0, which alone takes part in the run.

Rank 0 tells them each round, each agreed set of payloads and the end. They train their part of the share, and apply the
same payloads, so all ranks hold the same published bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from psyche_lightning.distro import DisTrO
from psyche_lightning.errors import PsycheError, WireError
from psyche_lightning.lightning.world import RankError, World
from psyche_lightning.node.notices import Finished, Outcome
from psyche_lightning.node.parameters import named_parameters, persistent_buffers
from psyche_lightning.node.participant import RoundWork
from psyche_lightning.node.replica import Replica
from psyche_lightning.node.snapshot import Get, Put
from psyche_lightning.node.spare import SpareTime
from psyche_lightning.protocol.codec import state_from_json, state_to_json
from psyche_lightning.protocol.open_ids import OpenIds
from psyche_lightning.protocol.requests import Answer, Figure, Request
from psyche_lightning.protocol.state import RunState
from psyche_lightning.wire.canonical import sha256

APPLY, LOADED, COMPARE, ROUND, APPLIED, END = "apply", "loaded", "compare", "round", "applied", "end"
STARTED = "started"
DIGEST, SNAPSHOT, PRINTS, LOAD, LOAD_BUFFERS = "digest", "snapshot", "prints", "load", "load buffers"
FIGURES = "figures"
"""What all ranks do to the parts that they have of one model."""
WORK, GO_ON = "work", "go on"
"""What a program has them do besides, and the end of a wait for it."""


class Mirrored:
    """Rank 0's replica: the other ranks do to theirs what is done to it. Implements ``Replica``.

    Args:
        replica: rank 0's.
        world: the ranks.
        hand_on: gives all ranks the parameters and buffers of rank 0; all call it at once.
        sharded: whether each rank has a part of the model, so that all do what rank 0 does.
    """

    def __init__(self, replica: Replica, world: World, hand_on: Callable[[], None], *, sharded: bool = False) -> None:
        self.layout, self.groups, self.has_buffers = replica.layout, replica.groups, replica.has_buffers
        self.size, self.tensors = replica.size, replica.tensors
        self.payload_size, self.check, self.check_index = replica.payload_size, replica.check, replica.check_index
        self.snapshot_buffers = replica.snapshot_buffers
        self._replica = replica
        self._world = world
        self._hand_on = hand_on
        self._sharded = sharded

    def snapshot(self, put: Put, open_ids: OpenIds = ()) -> bytes:
        """As of the replica."""
        if self._sharded:
            self._world.tell(SNAPSHOT)
        with self._world.computing():
            return self._replica.snapshot(put, open_ids)

    def prints(self) -> bytes:
        """As of the replica."""
        if self._sharded:
            self._world.tell(PRINTS)
        with self._world.computing():
            return self._replica.prints()

    def apply(self, payloads: Sequence[bytes], lrs: tuple[int, ...], step: int) -> None:
        """Apply an agreed set of payloads of a step, on all ranks."""
        self._world.tell(APPLY, list(payloads), list(lrs), step)
        with self._world.computing():
            self._replica.apply(payloads, lrs, step)

    def digest(self, put: Put, open_ids: OpenIds = ()) -> bytes:
        """As of the replica; the other ranks compare their parameters with rank 0's."""
        if self._sharded:
            self._world.tell(DIGEST)
        else:
            self._world.tell(COMPARE, sha256(self._replica.prints()))
        with self._world.computing():
            return self._replica.digest(put, open_ids)

    def load(self, digest: bytes, get: Get) -> None:
        """Replace the parameters of all ranks."""
        self._load(LOAD, self._replica.load, digest, get)

    def load_buffers(self, index: bytes, get: Get) -> None:
        """Replace the buffers of all ranks."""
        self._load(LOAD_BUFFERS, self._replica.load_buffers, index, get)

    def _load(self, kind: str, load: Callable[[bytes, Get], None], digest: bytes, get: Get) -> None:
        """Load on all ranks at once if each has a part; else on rank 0, which hands everything on."""
        if self._sharded:
            self._world.tell(kind)
        with self._world.computing():
            load(digest, get)
        if not self._sharded:
            self._world.tell(LOADED)
            self._hand_on()


def hand_on_model(world: World, optimizer: DisTrO, module: torch.nn.Module) -> None:
    """Give all ranks the parameters and buffers of rank 0, one tensor at a time; all ranks call it at once."""
    trained = {entry.name for entry in optimizer.layout.entries}
    for name, tensor in optimizer.published():
        value = tensor if world.rank == 0 else torch.empty_like(tensor)
        world.hand_on(value)
        if world.rank:
            optimizer.load_published(name, value)
    for name, tensor in sorted({**named_parameters(module), **persistent_buffers(module)}.items()):
        if name not in trained:
            world.hand_on(tensor)


def tell_round(world: World, work: RoundWork | None, state: RunState | None, finished: Finished | None) -> None:
    """On rank 0: tell the others the next round, or that none follows."""
    if work is None:
        world.watch = None  # their programs may end from here on
    place = None if work is None else [work.epoch, work.height, work.step, [list(ids) for ids in work.batch]]
    known = None if state is None else json.dumps(state_to_json(state))
    end = None if finished is None else [int(finished.outcome.value), finished.parameters]
    world.tell(ROUND, place, known, end)


class Follower:
    """Takes the part of a ``Participant`` on the ranks other than 0.

    Args:
        world: the ranks.
        replica: this rank's parameters.
        hand_on: as for :class:`Mirrored`.
        figures: computes this rank's part of a step's figures, with the others.
        works: what rank 0 may have this rank do, by name.

    Attributes:
        finished: how the run ended; None until it ends.
        loss: training loss of the newest applied round; None before the first.
        state: the state of the run in the newest round.
        left: whether rank 0 left the run before its end.
        spare: other work, for which rank 0 alone has time.
        transfer: None: rank 0 downloads.
        waited: 0: rank 0 counts.
        applying: 0: rank 0 counts.
    """

    def __init__(
        self,
        world: World,
        replica: Replica,
        hand_on: Callable[[], None],
        *,
        figures: Callable[[], object] = lambda: None,
        works: Mapping[str, Callable[..., object]] | None = None,
    ) -> None:
        self._works = {} if works is None else works
        self.finished: Finished | None = None
        self.loss: float | None = None
        self.state: RunState | None = None
        self.left = False
        self.spare = SpareTime()
        self.transfer = None
        self.waited = self.applying = 0.0
        self._world = world
        self._replica = replica
        self._hand_on = hand_on
        self._figures = figures
        self._over = False
        self._interruption: BaseException | None = None

    def start(self) -> None:
        """Do what rank 0 does while it joins."""
        self._until(STARTED)

    def stop(self, why: str = "") -> None:
        """Wait until rank 0 has left as well, unless there was an error; idempotent.

        Args:
            why: what went wrong here.
        """
        if not (why or self._over or self._interruption is not None):
            self._until(END)
        self._over = True

    def interrupt(self, error: BaseException) -> None:
        """End the current or next wait with ``error``; a signal handler may call this."""
        self._interruption = error

    def waiting(self) -> str:
        """Whom this rank waits for, in one line."""
        return "the node's rank 0"

    def ask(self, request: Request[Answer]) -> Future[Answer]:
        """Always fails: rank 0 asks."""
        answer: Future[Answer] = Future()
        answer.set_exception(PsycheError("only rank 0 of a node asks the run's coordinator"))
        return answer

    def tell(self, figures: tuple[Figure, ...]) -> None:
        """Rank 0 tells the node's figures."""

    def wrote(self, prompt: int, token: int) -> None:
        """Rank 0 writes its texts."""

    def next_round(self) -> RoundWork | None:
        """Wait for rank 0's next round, and do meanwhile what it does; None when none follows."""
        _, place, known, end = self._until(ROUND)
        if known is not None:
            self.state = state_from_json(json.loads(known))
        if end is not None:
            outcome, parameters = end
            self.finished = Finished(Outcome(outcome), parameters)
        if place is None:
            self.left = end is None
            return None
        epoch, height, step, batch = place
        return RoundWork(epoch, height, step, tuple((start, stop) for start, stop in batch))

    def submit(
        self,
        work: RoundWork,
        payload: bytes,
        *,
        nonce: int,
        lrs: tuple[int, ...],
        loss: float = math.nan,
        tokens: int = 0,
    ) -> None:
        """Rank 0 hands in the node's update."""

    def wait_applied(self, work: RoundWork) -> bool:
        """Wait until rank 0 has applied the round's results, or goes on without them; returns as there."""
        _, whole, loss = self._until(APPLIED)
        self.loss = None if loss is None else float.fromhex(loss)
        return bool(whole)

    def meet(self) -> None:
        """Do as rank 0 does, until it comes to the same place."""
        self._until(GO_ON)

    def _until(self, wanted: str) -> list[Any]:
        """Do as rank 0 does, until its message of that kind."""
        while True:
            kind, *values = self._hear()
            with self._world.computing():
                if self._done(kind, values):
                    continue
            if kind == wanted:
                return [kind, *values]
            if kind == END:
                self._over = self.left = True
                return [kind, None, None, None] if wanted == ROUND else [kind, False, None]
            raise PsycheError(
                f"rank {self._world.rank} of this node is at {wanted!r} and its rank 0 at {kind!r}: they do not do the "
                "same. Start all ranks with the same program, and let all of them decide the same when to stop (by "
                "trainer.strategy.broadcast)."
            )

    def _done(self, kind: str, values: list[Any]) -> bool:
        """Do here what rank 0 does; False if its message says something else."""
        match kind:
            case "apply":
                payloads, lrs, step = values
                self._replica.apply(payloads, tuple(lrs), step)
            case "digest":
                self._replica.digest(sha256)
            case "snapshot":
                self._replica.snapshot(sha256)
            case "prints":
                self._replica.prints()
            case "figures":
                self._figures()
            case "load" | "load buffers":
                load = self._replica.load if kind == LOAD else self._replica.load_buffers
                with contextlib.suppress(WireError):  # rank 0 has it as well, and says what follows
                    load(b"", _nothing)
            case "loaded":
                self._hand_on()
            case "work":
                name, given = values
                self._works[name](*given)
            case "compare":
                if sha256(self._replica.prints()) != values[0]:
                    raise RankError(
                        f"rank {self._world.rank} of this node holds other parameters than its rank 0; something "
                        "changed them besides the run's updates. Look for code that only some ranks run."
                    )
            case _:
                return False
        return True

    def _hear(self) -> list[Any]:
        def check() -> None:
            if self._interruption is not None:
                raise self._interruption

        check()
        try:
            return self._world.hear(check)
        except RankError:
            check()
            raise


def _nothing(digest: bytes) -> bytes:
    raise PsycheError("only rank 0 of a node has blobs")
