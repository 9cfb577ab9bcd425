"""The demo's final report: figures, a plot, JSON."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from psyche_lightning.errors import PsycheError, counted

Paces = dict[str, dict[int, tuple[float, float]]]
"""Of each node, by key and step: tokens per second while it trains, and its share of the round's samples."""


@dataclass
class Figures:
    """The demo's result.

    Attributes:
        parameters: trainable parameters of the model.
        all_reduce: bytes that a node would send each round for an all-reduce of fp32 gradients.
        rounds: training rounds of the run.
        seconds: time from the first to the last round.
        started: number of nodes that were started.
        nodes: each finished node's ``result.json``.
        history: a row per round.
        validation: ``(step, loss)`` of each validation.
        events: the events that the coordinator reported.
        paces: how fast each node was, step by step.
        seq_len: tokens of a sample.
    """

    parameters: int
    all_reduce: float
    rounds: int
    seconds: float
    started: int
    nodes: list[dict[str, Any]]
    history: list[dict[str, Any]]
    validation: list[tuple[int, float]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    paces: Paces = field(default_factory=dict)
    seq_len: int = 1

    @property
    def busiest(self) -> float:
        """Bytes per round of the busiest node, up or down, whichever is larger."""
        busiest: int = max(max(node["socket_bytes_up"], node["socket_bytes_down"]) for node in self.nodes)
        return busiest / self.rounds

    @property
    def ratio(self) -> float:
        """The bytes of an fp32 all-reduce divided by the busiest node's, overhead included."""
        return self.all_reduce / self.busiest if self.busiest else float("inf")

    @property
    def comparison(self) -> str:
        """The ratio as a text."""
        return f"{self.ratio:.0f} times fewer bytes than an fp32 all-reduce"

    @property
    def digests(self) -> set[str]:
        """The nodes' parameter digests; a single one if they are equal."""
        return {node["digest"] for node in self.nodes}

    @property
    def pace(self) -> dict[str, Any] | None:
        """How fast the run and its nodes were in the second half of its rounds; None if that is not known.

        ``tokens_per_second`` of the run, ``summed_speeds`` of its nodes while they train, the ``part`` of these that it
        used, and of each node its ``tokens_per_second`` and its ``share`` of the samples.
        """
        first = self.rounds // 2
        needed = {"time", "batch_size", "clients", "reports", "tokens_per_second"}  # which a chain does not have
        rows = [row for row in self.history if row["step"] > first and needed <= row.keys()]
        full = [row for row in rows if row["reports"] == row["clients"] and row["tokens_per_second"] > 0]
        seconds = rows[-1]["time"] - rows[0]["time"] if rows else 0.0
        if seconds <= 0 or not full:
            return None
        own = sum(row["batch_size"] for row in rows[:-1]) * self.seq_len / seconds
        # The mean over time: tokens by the seconds that all nodes together would take for them.
        tokens = sum(row["batch_size"] for row in full)
        summed = tokens / sum(row["batch_size"] / row["tokens_per_second"] for row in full)
        nodes = {}
        for key, seen in self.paces.items():
            late = [each for step, each in seen.items() if step > first]
            if late:
                speed, share = (statistics.median(each[at] for each in late) for at in (0, 1))
                nodes[key] = {"tokens_per_second": round(speed, 1), "share": round(share, 4)}
        return {
            "tokens_per_second": round(own, 1),
            "summed_speeds": round(summed, 1),
            "part": round(own / summed, 4),
            "nodes": nodes,
        }

    def as_json(self) -> dict[str, Any]:
        """The content of ``--json``."""
        losses = [row["loss"] for row in self.history if row["loss"] is not None]
        validation = [loss for _, loss in self.validation]
        return {
            "rounds": self.rounds,
            "parameters": self.parameters,
            "seconds": round(self.seconds, 2),
            "loss": {"train": [losses[0], losses[-1]] if losses else [], "validation": _ends(validation)},
            "ratio_to_fp32_allreduce": round(self.ratio, 2),
            "equal_digests": len(self.digests) == 1,
            "pace": self.pace,
            "nodes_started": self.started,
            "nodes": self.nodes,
            "validation": self.validation,
            "history": self.history,
            "events": self.events,
        }


def note_paces(paces: Paces, status: dict[str, Any]) -> None:
    """Note how fast the nodes are by the run's status."""
    for node in status["clients"]:
        if node.get("step") and node["tokens_per_second"] and type(node.get("share")) is float:
            paces.setdefault(node["key"], {})[node["step"]] = node["tokens_per_second"], node["share"]


def _ends(values: list[float]) -> list[float]:
    return [values[0], values[-1]] if values else []


def read_results(folders: list[Path]) -> list[dict[str, Any]]:
    """The ``result.json`` of each node that finished.

    Raises:
        PsycheError: no node did.
    """
    results = [json.loads(path.read_text()) for folder in folders if (path := folder / "result.json").exists()]
    if not results:
        raise PsycheError(f"no node finished; their logs are in {folders[0].parent}")
    return results


def read_validation(folder: Path) -> list[tuple[int, float]]:
    """The validation losses in a node's ``metrics.jsonl``."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(row["step"], row["validation_loss"]) for row in rows if row.get("validation_loss") is not None]


def plot(figures: Figures, path: Path, unit: str) -> None:
    """Draw training and validation loss over rounds, and bytes per round, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in figures.history if row["loss"] is not None]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[3, 1], layout="constrained")
    alone = "o" if len(rows) == 1 else None  # one point makes no line
    curve = [row["step"] for row in rows], [row["loss"] for row in rows]
    top.plot(*curve, color="#9db4d0", marker=alone, label="training")
    if figures.validation:
        steps, losses = zip(*figures.validation, strict=True)
        top.plot(steps, losses, color="#c2410c", marker="o", markersize=4, label="validation")
    top.set_ylabel(f"loss ({unit})")
    top.legend(frameon=False)
    title = f"{counted(figures.started, 'node')}, {figures.parameters / 1e6:.2f} M parameters"
    top.set_title(f"{title}: {figures.comparison}" if figures.started > 1 else title)
    per_round = [row["bytes_per_node"] / 1e3 for row in figures.history]
    bottom.plot([row["step"] for row in figures.history], per_round, color="#4d7c0f", marker=alone)
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("kB per node\nand round")
    bottom.set_xlabel("round")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
