"""Evaluations within a run: nodes divide a task's documents, and measure them while they wait for others."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from psyche_lightning.errors import ConfigError, CoordinatorError
from psyche_lightning.lightning.session import Session
from psyche_lightning.node.spare import COMPARED
from psyche_lightning.protocol.evals import Evaluation, Measure, shares_of
from psyche_lightning.protocol.requests import Evaluated
from psyche_lightning.train.tasks import Task, evaluated_copy, harness_of, saved_tokenizer

logger = logging.getLogger(__name__)

PATIENCE = 20.0
"""Seconds to wait for the coordinator's last answers when training is over."""
Write = Callable[[int, Mapping[str, float]], None]


class Evals:
    """Evaluates the tasks of a recipe, a document at a time (:class:`~psyche_lightning.node.spare.SpareWork`).

    An evaluation is one of the parameters of one step, of which the node keeps a copy until the next evaluation begins:
    after each ``evals.every`` steps, and after the last one. Each node begins with its part of a task's shares, then
    does those that others have not reported, the last ones first. So the slowest node holds up nobody.

    Args:
        tasks: the recipe's.
        every: steps between evaluations; 0 for one at the end.
        model: the model that will be trained, on its device.
        tokenizer: the tokenizer of its data.
        write: takes a step and figures of its parameters, for the node's metrics and loggers.

    Raises:
        ConfigError: lm-eval cannot ask a task's questions to the model.
    """

    def __init__(self, tasks: Sequence[Task], every: int, model: torch.nn.Module, tokenizer: Any, write: Write) -> None:
        self._every = every
        self._write = write
        self._model = evaluated_copy(model)
        # One question at a time: with more, padding would change the last digits.
        harness = harness_of(self._model, saved_tokenizer(tokenizer), batch_size=1)
        self._tasks = [_Progress(task, harness) for task in tasks]
        self._now: _Progress | None = None
        self._step = 0
        self._session: Session | None = None
        for each in self._tasks:
            try:
                with isolate_rng():
                    each.try_out()
            except Exception as error:  # a task's own code raises many types
                raise ConfigError(f"the task {each.name!r} cannot be evaluated: {error}") from error
        logger.info("evaluates %s", ", ".join(f"{each.name} ({each.documents:,} questions)" for each in self._tasks))

    @property
    def figures(self) -> dict[str, Any]:
        """The newest evaluation of each task, as far as known: ``step``, ``documents``, ``measured``, ``figures``."""
        return {
            one.task: {"step": one.step, "documents": one.documents, "measured": one.measured, "figures": one.values}
            for one in (each.known for each in self._tasks)
            if one.done
        }

    def begin(self, session: Session) -> None:
        """Use the waits of a session from now on."""
        self._session = session
        session.spare.give(self)

    def after_round(self, session: Session, model: torch.nn.Module) -> None:
        """Begin another evaluation if the parameters are of a step that has one."""
        standing = session.standing if self._every else None
        # A node that missed that step takes part in the next evaluation.
        if standing is not None and standing.step % self._every == 0 and standing.step != self._step:
            self._evaluate(standing.step, session, model)

    def at_the_end(self, session: Session, model: torch.nn.Module, step: int) -> None:
        """Evaluate the last parameters, together with the nodes that do so now; returns when all is measured."""
        spare = session.spare
        spare.withdraw(self)
        if spare.used:
            text = "evaluations took %.1f s of this node's waits, and delayed its rounds by %.2f s"
            logger.info(text, spare.used, spare.late)
        if self._step != step:
            self._evaluate(step, session, model)
        while True:
            while self.estimate() is not None:
                self.work()
            if not any(each.asked for each in self._tasks):
                break
            for each in self._tasks:
                each.wait(PATIENCE)
        self._tell(last=True)

    def _evaluate(self, step: int, session: Session, model: torch.nn.Module) -> None:
        self._tell(last=True)
        ours = itertools.chain(self._model.parameters(), self._model.buffers())
        with torch.no_grad():
            for mine, its in zip(ours, itertools.chain(model.parameters(), model.buffers()), strict=True):
                if mine is not its:
                    mine.copy_(its)
        state = session.state
        nodes = [client.signer for client in state.healthy] if state else []
        place = nodes.index(session.signer) if session.signer in nodes else 0
        for each in self._tasks:
            each.begin(step, place, max(1, len(nodes)))
        self._step, self._now, self._session = step, None, session

    # --- spare work -------------------------------------------------------------------------------------------------

    def estimate(self) -> float | None:
        """The longest of the latest times of a document, of the task that is quickest now; None if all is measured."""
        if not self._step:
            return None
        for each in self._tasks:
            each.look()
        self._tell()
        left = [each for each in self._tasks if each.share is not None]
        self._now = min(left, key=lambda each: each.longest, default=None)
        return None if self._now is None else self._now.longest

    def work(self) -> None:
        """Measure one document; a task that fails is left out from then on, and training goes on."""
        assert self._now is not None
        assert self._session is not None
        try:
            with isolate_rng():
                self._now.measure(self._session)
        except Exception as error:  # a task's own code raises many types
            logger.warning("the task %s is evaluated no further: %s", self._now.name, error)
            self._now.failed = True

    def _tell(self, *, last: bool = False) -> None:
        """Tell the figures of what is complete, once; or, if the evaluation ends, of what there is."""
        for each in self._tasks:
            if each.told or not each.known.done or not (last or not each.known.missing):
                continue
            each.told, one = True, each.known
            measured = {f"eval/{one.task}/{name}": value for name, value in one.values.items()}
            self._write(one.step, {**measured, f"eval/{one.task}/documents": float(one.measured)})
            shown = "  ".join(f"{name} {value:.4f}" for name, value in one.values.items())
            text = "step %d  %s  %s  (%s of %s questions)"
            logger.info(text, one.step, one.task, shown, f"{one.measured:,}", f"{one.documents:,}")


class _Progress:
    """How far one task is measured, for the parameters of one step.

    Attributes:
        name: the task's name.
        documents: its number of documents.
        known: the run's evaluation, as the coordinator told it last.
        share: the share in work; None if nothing is left to do.
        asked: whether answers are outstanding.
        told: whether its figures were told.
        failed: whether it cannot be measured any more.
    """

    def __init__(self, task: Task, harness: Any) -> None:
        self.name, self.documents = task.name, len(task)
        self.known = Evaluation(self.name, 0, self.documents)
        self.told = self.failed = False
        self._task, self._harness = task, harness
        self._seconds: deque[float] = deque(maxlen=COMPARED)
        self._answers: list[Future[Evaluation]] = []
        self._mine = 0
        self._place, self._nodes = 0, 1
        self._share: int | None = None
        self._left: deque[int] = deque()
        self._sums: dict[str, Measure] = {}
        self._empty: dict[str, Measure] = {}

    @property
    def longest(self) -> float:
        """The longest of the latest times of a document, in seconds."""
        return max(self._seconds)

    @property
    def asked(self) -> bool:
        return bool(self._answers) and not self.failed

    @property
    def share(self) -> int | None:
        if self.failed or not self.known.step:
            return None
        if self._share is None:
            self._choose()
        return self._share

    def try_out(self) -> None:
        """Measure the first document, to know that it works, how long it takes, and which metrics there are."""
        for figure in self._timed(0):
            self._empty[figure.name] = replace(figure, total=0.0, weight=0.0)
        if not self._empty:
            raise ConfigError("it has no metric that is a mean over its documents; use psyche eval")

    def begin(self, step: int, place: int, nodes: int) -> None:
        """Begin anew, as one of so many nodes."""
        self.known = Evaluation(self.name, step, self.documents)
        self.told, self._mine, self._answers = False, 0, []
        self._place, self._nodes, self._share = place, nodes, None

    def look(self) -> None:
        """Take the answers that have come."""
        ready = [answer for answer in self._answers if answer.done()]
        self._answers = [answer for answer in self._answers if not answer.done()]
        for answer in ready:
            self._take(answer)

    def wait(self, seconds: float) -> None:
        """Wait for all answers; without them the task is measured no further."""
        deadline = time.monotonic() + seconds
        waiting, self._answers = self._answers, []
        for answer in waiting:
            try:
                answer.exception(max(0.0, deadline - time.monotonic()))
            except FutureTimeoutError:
                logger.warning("the coordinator does not take the figures of %s; they are not complete", self.name)
                self.failed = True
                return
            self._take(answer)

    def measure(self, session: Session) -> None:
        """Measure the next document of the share, and report the share after its last one."""
        share = self.share
        assert share is not None
        for figure in self._timed(self._left.popleft()):
            if figure.name in self._sums:
                sums = self._sums[figure.name]
                self._sums[figure.name] = replace(
                    sums, total=sums.total + figure.total, weight=sums.weight + figure.weight
                )
        if not self._left:
            self._mine |= 1 << share
            self._share = None
            done = Evaluated(self.name, self.known.step, self.documents, share, tuple(self._sums.values()))
            self._answers.append(session.ask(done))

    def _choose(self) -> None:
        """Take up the next share: first this node's part, then, from the last on, what others have not reported."""
        self._share = self.known.next_share(self._mine, self._place, self._nodes)
        if self._share is None:
            return
        shares = shares_of(self.documents)
        self._left = deque(range(self._share, self.documents, shares))
        self._sums = dict(self._empty)

    def _timed(self, number: int) -> list[Measure]:
        began = time.monotonic()
        figures = self._task.measure(self._harness, number)
        self._seconds.append(time.monotonic() - began)
        return figures

    def _take(self, answer: Future[Evaluation]) -> None:
        try:
            known = answer.result()
        except CoordinatorError as error:
            logger.warning("the task %s is evaluated no further: %s", self.name, error)
            self.failed = True
            return
        if (known.task, known.step) == (self.name, self.known.step) and known.measured >= self.known.measured:
            self.known = known
