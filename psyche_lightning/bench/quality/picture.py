"""Draws loss against bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from psyche_lightning.bench.quality.comparison import Row


def frontier(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats, with no more bytes and no more loss; in ascending order of bytes."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda one: (one.sent, one.loss)):
        if not best or row.loss < best[-1].loss:
            best.append(row)
    return best


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Plot loss against bytes: a panel for each task, a line for each family with the spread over the seeds.

    A thick line is the frontier: what can be had for how many bytes.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(row.task for row in rows))
    lengths = sorted({task.steps for task in tasks})
    kinds = sorted({(task.size, task.nodes) for task in tasks}, key=lambda kind: (kind[0] != "small", kind))
    families = list(dict.fromkeys(row.method.family for row in rows))
    shape = len(kinds), len(lengths)
    figure, panels = pyplot.subplots(
        *shape, figsize=(8 * shape[1], 5.5 * shape[0]), layout="constrained", squeeze=False
    )
    for axes in panels.flat:
        axes.set_visible(False)
    for task in tasks:
        axes = panels[kinds.index((task.size, task.nodes))][lengths.index(task.steps)]
        axes.set_visible(True)
        _panel(axes, [row for row in rows if row.task == task], families)
        axes.set(
            title=f"{task.size} model, {task.nodes} nodes of {task.batch} samples, {task.steps:,} steps",
            xlabel="bytes that a node sends in all",
            ylabel="validation loss, nats per byte",
        )
    shown = {
        label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(shown.values(), shown.keys(), loc="outside right upper")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axes: Any, rows: Sequence[Row], families: Sequence[str]) -> None:
    best = frontier(rows)
    # Between two methods nothing can be had: the line goes down where the next one begins.
    edges = [(row.sent, row.loss) for row in best]
    axes.step(*zip(*edges, strict=True), where="post", color="0.75", linewidth=5, zorder=1, label="frontier")
    for number, family in enumerate(families):
        line = sorted((row for row in rows if row.method.family == family), key=lambda row: row.sent)
        if not line:
            continue
        sent, losses, spreads = zip(*((row.sent, row.loss, row.spread) for row in line), strict=True)
        axes.errorbar(sent, losses, spreads, fmt="o-", capsize=3, color=f"C{number}", label=family, zorder=2)
        for row in line:
            axes.annotate(
                row.method.setting, (row.sent, row.loss), xytext=(6, 4), textcoords="offset points", fontsize=7
            )
    axes.set_xscale("log")
    axes.grid(alpha=0.3)
