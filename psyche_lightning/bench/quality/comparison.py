"""Compares methods: finds the best learning rate of each, trains with several seeds, goes on where it was killed."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

import torch

from psyche_lightning.bench.quality.methods import Method
from psyche_lightning.bench.quality.training import Outcome, Task, Training, all_reduced, key, train
from psyche_lightning.errors import ConfigError
from psyche_lightning.json_text import json_text

FIRST_RATES = (2e-3, 4e-3, 8e-3)
LEAST_RATE, HIGHEST_RATE = 2.5e-4, 6.4e-2


@dataclass(frozen=True)
class Case:
    """One method on one task, with its best learning rate and several seeds.

    Attributes:
        task: model and tokens.
        method: how nodes train together.
        seeds: trainings with the best rate.
        rates: learning rates to try with the first seed; empty to search for the best on a grid of factors of two.
    """

    task: Task
    method: Method
    seeds: int
    rates: tuple[float, ...] = ()

    def of(self, rate: float, seed: int = 0) -> Training:
        """One of its trainings."""
        return Training(self.task, self.method, rate, seed)

    def missing(self, known: Mapping[Training, Outcome]) -> list[Training]:
        """What is to be trained next, given what is known; nothing once all is.

        The first seed finds the rate. Without given rates, the search ends at one that is better than its half and its
        double, or at a bound that is the same for all methods.
        """
        rates = [rate for rate in self.rates or FIRST_RATES if self.of(rate) not in known]
        if not rates and not self.rates:
            best = self.best(known)
            around = (best / 2, best * 2)
            rates = [r for r in around if LEAST_RATE <= r <= HIGHEST_RATE and self.of(r) not in known]
        if rates:
            return [self.of(rate) for rate in rates]
        best = self.best(known)
        return [one for seed in range(1, self.seeds) if (one := self.of(best, seed)) not in known]

    def best(self, known: Mapping[Training, Outcome]) -> float:
        """The rate with the lowest loss of the first seed; one with which the training diverged is never the best."""
        mine = {one.rate: out.loss for one, out in known.items() if self.of(one.rate) == one}
        tried = {rate: loss for rate, loss in mine.items() if not self.rates or rate in self.rates}
        return min(tried, key=lambda rate: (math.isnan(tried[rate]), tried[rate]))

    def row(self, known: Mapping[Training, Outcome]) -> Row:
        """Its result, once nothing is missing."""
        rate = self.best(known)
        outcomes = [known[self.of(rate, seed)] for seed in range(self.seeds)]
        losses = [outcome.loss for outcome in outcomes]
        spread = stdev(losses) if len(losses) > 1 else 0.0
        return Row(self.task, self.method, rate, mean(losses), spread, outcomes[0].sent)


@dataclass(frozen=True)
class Row:
    """The result of one method on one task.

    Attributes:
        task: model and tokens.
        method: how nodes trained together.
        rate: the learning rate that was best with the first seed.
        loss: mean validation loss over the seeds, in nats per byte.
        spread: standard deviation of the loss over the seeds.
        sent: bytes that a node sends in all: those of a ring for an all-reduce, else its own payloads once.
    """

    task: Task
    method: Method
    rate: float
    loss: float
    spread: float
    sent: float

    @property
    def ratio(self) -> float:
        """Bytes of an all-reduce at every step for each byte of this method."""
        return all_reduced(self.task) / self.sent

    def figures(self) -> dict[str, object]:
        """As JSON values."""
        return {
            **asdict(self.task),
            "method": str(self.method),
            "family": self.method.family,
            "setting": self.method.setting,
            "rate": self.rate,
            "loss": self.loss,
            "spread": self.spread,
            "sent": self.sent,
            "ratio": self.ratio,
        }


class Results:
    """Outcomes of trainings, each a line of a file as soon as it is known.

    A line is used again where everything is the same on which its outcome depends; other lines stay.

    Args:
        path: the file, which is made if it is missing; None keeps them in memory.

    Attributes:
        known: outcomes of trainings in this process, also of those that were not repeated.

    Raises:
        ConfigError: the file cannot be read, or has a line of another kind.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known: dict[Training, Outcome] = {}
        self._found: dict[str, Outcome] = {}
        self._ends = True
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"cannot read the results in {path}: {error}") from error
        self._ends = lines[-1] == ""
        for number, line in enumerate(lines, 1):
            try:
                if line:
                    value = json.loads(line)
                    outcome = Outcome(*(float(math.nan if value[name] is None else value[name]) for name in _FIELDS))
                    self._found[_text(value["training"])] = outcome
            except (ValueError, TypeError, LookupError) as error:
                if line.startswith(_BEGINNING[: len(line)]) and not line.endswith("}"):
                    continue  # the process was killed while it wrote
                raise ConfigError(
                    f"line {number} of {path} is no result of psyche bench quality; name another file, or remove it"
                ) from error

    def recall(self, training: Training) -> bool:
        """Whether the outcome of a training is known, also from another process."""
        if training not in self.known and (found := self._found.get(_text(key(training)))) is not None:
            self.known[training] = found
        return training in self.known

    def add(self, training: Training, outcome: Outcome) -> None:
        """Note the outcome of a training, durably."""
        self.known[training] = outcome
        if self.path is None:
            return
        line = json_text({"training": key(training), **{name: getattr(outcome, name) for name in _FIELDS}})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("" if self._ends else "\n") + line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._ends = True


_FIELDS = ("loss", "sent", "seconds")
_BEGINNING = '{"training": '


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def compare(compared: Sequence[Case], results: Results, workers: int = 2) -> Iterator[tuple[Case, Row]]:
    """Train what is missing, several trainings at a time in processes of one thread.

    Yields:
        Each case with its result, as soon as that is known; earlier cases are trained first.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin_worker)
    running: dict[Future[Outcome], Training] = {}
    waiting = list(compared)
    try:
        while waiting:
            for case in list(waiting):
                wanted = _wanted(case, results)
                for one in wanted:
                    if len(running) < workers and one not in running.values():
                        running[pool.submit(train, one)] = one
                if not wanted:
                    waiting.remove(case)
                    yield case, case.row(results.known)
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                results.add(running.pop(done), done.result())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _wanted(case: Case, results: Results) -> list[Training]:
    """What is to be trained next for a case, without what another process has trained."""
    while True:
        missing = case.missing(results.known)
        wanted = [one for one in missing if not results.recall(one)]
        if wanted or not missing:
            return wanted


def _begin_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that began it is gone, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
