"""Evaluations within a run: nodes measure shares of a task's documents, and their figures are merged.

The figures are what nodes say of themselves. They are for people, and decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from psyche_lightning.errors import CoordinatorError
from psyche_lightning.text import is_plain, plain

SECTION = "evals"
"""The manifest's section: the names of the run's ``tasks``, and the steps between two evaluations, ``every``."""
SHARES = 64
"""The most shares of a task. Share ``i`` has the documents ``i``, ``i + shares``, ..., so each is a sample of all."""
MAX_TASKS = 16
MAX_MEASURES = 16
MAX_NAME = 64
"""Characters of the name of a task or a figure."""
MAX_PROMPTS = 64
MAX_PROMPT = 1000
"""Characters of a beginning of a text."""
_MOST = 1e30
"""Figures of this size and more are no measurements, and sums of them might not be finite."""


@dataclass(frozen=True)
class Measure:
    """A metric over some documents, as sums that can be added up.

    Attributes:
        name: the metric's name, such as ``acc``.
        total: weighted sum over the documents.
        weight: sum of the weights: the number of documents where all weigh the same.
        perplexity: whether the metric is ``exp(-total / weight)`` and not ``total / weight``.
    """

    name: str
    total: float
    weight: float
    perplexity: bool = False

    @property
    def value(self) -> float:
        """The metric; NaN without any weight, infinite for a perplexity too large for a float."""
        mean = self.total / self.weight if self.weight else math.nan
        try:
            return math.exp(-mean) if self.perplexity else mean
        except OverflowError:
            return math.inf


def shares_of(documents: int) -> int:
    """The number of shares of a task."""
    return min(documents, SHARES)


@dataclass(frozen=True)
class Evaluation:
    """The merged figures of one task for the parameters of one step.

    Attributes:
        task: the task's name.
        step: training steps in the parameters.
        documents: documents of the whole task, at least 1.
        done: the shares that are measured, one bit each, share 0 the lowest.
        figures: over the documents of these shares.
        undone: whether the run has gone back to parameters before these.
    """

    task: str
    step: int
    documents: int
    done: int = 0
    figures: tuple[Measure, ...] = ()
    undone: bool = False

    @property
    def missing(self) -> list[int]:
        """The shares that are not measured yet, ascending."""
        return [share for share in range(shares_of(self.documents)) if not self.done >> share & 1]

    def next_share(self, mine: int, place: int, nodes: int) -> int | None:
        """The share that a node measures next: of its own part, then of the next nodes' parts, beginning with the last.

        Args:
            mine: the shares that the node has measured, as in ``done``; the coordinator may not know them yet.
            place: the node's place among all, from 0.
            nodes: how many nodes divide the task.

        Returns:
            None if nothing is left.
        """

        def order(share: int) -> tuple[int, int]:
            away = (share - place) % nodes
            return away, -share if away else share

        left = (share for share in self.missing if not mine >> share & 1)
        return min(left, key=order, default=None)

    @property
    def measured(self) -> int:
        """The number of documents that are measured."""
        shares = shares_of(self.documents)
        return sum(len(range(share, self.documents, shares)) for share in range(shares) if self.done >> share & 1)

    @property
    def values(self) -> dict[str, float]:
        """The metrics by name, without those that are no finite number."""
        return {figure.name: figure.value for figure in self.figures if math.isfinite(figure.value)}

    @property
    def main(self) -> float | None:
        """The figure that stands for the task where there is room for one only: acc_norm, acc, or the first."""
        values = self.values
        return next((values[name] for name in ("acc_norm", "acc", *values) if name in values), None)

    def plus(self, share: int, figures: Sequence[Measure]) -> Evaluation:
        """The evaluation with one more share; itself if that share is there already.

        Raises:
            CoordinatorError: the share does not exist, or has other metrics (``InvalidRequest``).
        """
        shares = shares_of(self.documents)
        if not 0 <= share < shares:
            raise CoordinatorError(f"{self.task} has no share {share}; it has {shares}", code="InvalidRequest")
        if self.done >> share & 1:
            return self
        before = self.figures or tuple(replace(figure, total=0.0, weight=0.0) for figure in figures)
        kinds = [(figure.name, figure.perplexity) for figure in before]
        if kinds != [(figure.name, figure.perplexity) for figure in figures]:
            raise CoordinatorError(
                f"{self.task} has the metrics {', '.join(name for name, _ in kinds)} so far; the share has "
                f"{', '.join(figure.name for figure in figures)}",
                code="InvalidRequest",
            )
        summed = tuple(
            replace(old, total=old.total + new.total, weight=old.weight + new.weight)
            for old, new in zip(before, figures, strict=True)
        )
        return replace(self, done=self.done | 1 << share, figures=summed)


def evaluated_tasks(manifest: Mapping[str, Any] | None) -> tuple[list[str], int]:
    """The names of a run's tasks, and the steps between evaluations; no names if the manifest has no valid section."""
    section = (manifest or {}).get(SECTION)
    if not isinstance(section, Mapping):
        return [], 0
    tasks, every = section.get("tasks"), section.get("every")
    if not isinstance(tasks, list) or len(tasks) > MAX_TASKS or type(every) is not int:
        return [], 0
    return [name for name in tasks if isinstance(name, str) and 0 < len(name) <= MAX_NAME], every


def measures_to_wire(figures: Sequence[Measure]) -> list[list[Any]]:
    """Figures as values for canonical msgpack: ``[name, total, weight, perplexity]`` each."""
    return [[figure.name, float(figure.total), float(figure.weight), figure.perplexity] for figure in figures]


def measures_from_wire(values: list[Any]) -> tuple[Measure, ...]:
    """Read what :func:`measures_to_wire` wrote.

    Raises:
        CoordinatorError: it is something else, a number is no measurement, or a name is none (``InvalidRequest``).
    """
    if not 0 < len(values) <= MAX_MEASURES:
        text = f"{len(values)} figures of a share; expected 1 to {MAX_MEASURES}"
        raise CoordinatorError(text, code="InvalidRequest")
    for value in values:
        if not isinstance(value, list) or [type(item) for item in value] != [str, float, float, bool]:
            raise CoordinatorError("a figure is [name, total, weight, perplexity]", code="InvalidRequest")
        name, total, weight, _ = value
        if not 0 < len(name) <= MAX_NAME or not is_plain(name):
            raise CoordinatorError(
                f"a figure's name has 1 to {MAX_NAME} printable characters; got {plain(name[:MAX_NAME])!r}",
                code="InvalidRequest",
            )
        if not (abs(total) < _MOST and 0 <= weight < _MOST):
            raise CoordinatorError(
                f"the figure {name!r} is {total} of weight {weight}; expected finite numbers, and a weight from 0 on",
                code="InvalidRequest",
            )
    figures = tuple(Measure(*value) for value in values)
    if len({figure.name for figure in figures}) < len(figures):
        raise CoordinatorError("two figures of a share have the same name", code="InvalidRequest")
    return figures
