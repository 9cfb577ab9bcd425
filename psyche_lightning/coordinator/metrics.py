"""The figures of rounds that a coordinator keeps for people: whole for the newest rounds, means for the older ones."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from psyche_lightning.errors import WireError
from psyche_lightning.protocol.codec import from_json, to_json
from psyche_lightning.protocol.requests import MAX_FIGURES, Figure, Report

MAX_PAST = 1024
"""Means of older rounds that are kept; when there are more, each two become one."""


@dataclass(frozen=True)
class Mean:
    """The mean of a named figure over the nodes that reported it.

    Attributes:
        name: as of a :class:`~psyche_lightning.protocol.requests.Figure`.
        value: the mean.
        nodes: how many reported it.
    """

    name: str
    value: float
    nodes: int


@dataclass(frozen=True)
class Metrics:
    """The figures of one training round, from the reports of the nodes that trained its step.

    Attributes:
        epoch: the round's epoch.
        height: the round's height.
        step: the optimizer step that it trained, from 1.
        time: when it began, as in :class:`~psyche_lightning.coordinator.history.Event`.
        clients: members at its start.
        batch_size: its samples.
        reports: nodes that reported figures of this step.
        losses: reports with a loss.
        loss: mean of those losses; None without any.
        tokens_per_second: sum over the reports.
        bytes_up: mean bytes that a reporter wrote since its previous report.
        bytes_down: mean bytes that it read.
        figures: means of named figures of this step.
        seconds: how long it took; None until it is over.
    """

    epoch: int
    height: int
    step: int
    time: float
    clients: int
    batch_size: int
    reports: int = 0
    losses: int = 0
    loss: float | None = None
    tokens_per_second: float = 0.0
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    figures: tuple[Mean, ...] = ()
    seconds: float | None = None

    def plus(self, report: Report, before: Report | None) -> Metrics:
        """The figures with one more report; ``before`` is the previous report of the same sender."""
        loss, losses = self.loss, self.losses
        if math.isfinite(report.loss):
            losses += 1
            loss = report.loss if loss is None else loss + (report.loss - loss) / losses
        reports = self.reports + 1

        def mean(old: float, total: int, seen: int) -> float:
            # A sender that has restarted counts from zero.
            return old + ((total - seen if total >= seen else total) - old) / reports

        return replace(
            self,
            reports=reports,
            losses=losses,
            loss=loss,
            tokens_per_second=self.tokens_per_second + report.tokens_per_second,
            bytes_up=mean(self.bytes_up, report.bytes_up, before.bytes_up if before else 0),
            bytes_down=mean(self.bytes_down, report.bytes_down, before.bytes_down if before else 0),
        )

    def also(self, figures: Collection[Figure]) -> Metrics:
        """The figures with those of a node that belong to this step."""
        means = {mean.name: mean for mean in self.figures}
        for figure in figures:
            if figure.step == self.step and (figure.name in means or len(means) < MAX_FIGURES):
                old = means.get(figure.name, Mean(figure.name, 0.0, 0))
                nodes = old.nodes + 1
                means[figure.name] = Mean(figure.name, old.value + (figure.value - old.value) / nodes, nodes)
        return replace(self, figures=tuple(means.values()))


@dataclass(frozen=True)
class Stretch:
    """Means over several training rounds in a row.

    Attributes:
        first_step: the first round's step.
        step: the last round's step.
        epoch: the last round's epoch.
        time: when the first round began.
        rounds: how many they are.
        means: of ``loss``, ``seconds``, ``tokens_per_second``, ``bytes_up``, ``bytes_down`` and ``clients``, each over
            the rounds that have it.
        figures: of the named figures.
    """

    first_step: int
    step: int
    epoch: int
    time: float
    rounds: int
    means: tuple[Mean, ...] = ()
    figures: tuple[Mean, ...] = ()

    @classmethod
    def of(cls, row: Metrics) -> Stretch:
        """One round."""
        values = {"clients": float(row.clients), "loss": row.loss, "seconds": row.seconds}
        if row.reports:
            values |= {
                "tokens_per_second": row.tokens_per_second,
                "bytes_up": row.bytes_up,
                "bytes_down": row.bytes_down,
            }
        means = tuple(Mean(name, value, 1) for name, value in values.items() if value is not None)
        figures = tuple(replace(mean, nodes=1) for mean in row.figures)
        return cls(row.step, row.step, row.epoch, row.time, 1, means, figures)

    def plus(self, after: Stretch) -> Stretch:
        """This stretch and the one after it."""
        return Stretch(
            self.first_step,
            after.step,
            after.epoch,
            self.time,
            self.rounds + after.rounds,
            _joined(self.means, after.means),
            _joined(self.figures, after.figures)[:MAX_FIGURES],
        )


def _joined(some: Sequence[Mean], others: Sequence[Mean]) -> tuple[Mean, ...]:
    """Means over the rounds of both; their ``nodes`` count rounds."""
    found = {mean.name: mean for mean in some}
    for mean in others:
        old = found.get(mean.name, Mean(mean.name, 0.0, 0))
        count = old.nodes + mean.nodes
        found[mean.name] = Mean(mean.name, old.value + (mean.value - old.value) * mean.nodes / count, count)
    return tuple(found.values())


class Past:
    """The older rounds of a run in bounded size, however many they are.

    Args:
        width: rounds of a stretch.
        stretches: those so far, oldest first; only the newest may still grow.

    Attributes:
        width: rounds of a stretch. With :data:`MAX_PAST` stretches it doubles, and each two of them become one.
        stretches: as above.
    """

    def __init__(self, width: int = 1, stretches: list[Stretch] | None = None) -> None:
        self.width = width
        self.stretches = stretches or []

    def add(self, row: Metrics) -> None:
        """Add the next round."""
        last, new = self.stretches[-1] if self.stretches else None, Stretch.of(row)
        # After the owner went back, steps come again: they begin a stretch of their own.
        if last is not None and last.rounds < self.width and last.step < row.step:
            self.stretches[-1] = last.plus(new)
            return
        if len(self.stretches) >= MAX_PAST:
            self._fold()
        self.stretches.append(new)

    def _fold(self) -> None:
        pairs = zip(self.stretches[::2], self.stretches[1::2], strict=True)
        self.stretches = [one.plus(other) for one, other in pairs]
        self.width *= 2

    def dump(self, place: int = 0) -> dict[str, Any]:
        """The stretches from a place on as JSON values, which :meth:`load` reads."""
        return {"width": self.width, "first": place, "items": [to_json(one) for one in self.stretches[place:]]}

    @classmethod
    def load(cls, data: Any) -> Past:
        """Read what :meth:`dump` wrote.

        Raises:
            WireError: it is something else.
        """
        if not (isinstance(data, dict) and type(data.get("width")) is int and isinstance(data.get("items"), list)):
            raise WireError("the past of a run must have a width and items")
        return cls(max(1, data["width"]), [from_json(Stretch, item) for item in data["items"]])
