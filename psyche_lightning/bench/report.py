"""Writes figures and pictures for all benchmarks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from psyche_lightning.errors import ConfigError
from psyche_lightning.json_text import json_text


def check_folder(path: Path | None, option: str) -> None:
    """Refuse a file that cannot be written, before anything is measured.

    Raises:
        ConfigError: the file's folder does not exist.
    """
    if path is not None and not path.resolve().parent.is_dir():
        raise ConfigError(f"the folder of {option} {path} does not exist; create it first")


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Write figures as JSON."""
    if path is not None:
        path.write_text(json_text(figures, 2) + "\n")


def picture(path: Path | None, title: str, x: str, y: str, lines: dict[str, tuple[list[Any], list[float]]]) -> None:
    """Draw lines on logarithmic axes if x are numbers, else bars; NaN means a missing bar."""
    if path is None:
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for number, (label, (xs, ys)) in enumerate(lines.items()):
        if all(isinstance(value, str) for value in xs):
            width = 0.8 / len(lines)
            middle = (number - (len(lines) - 1) / 2) * width
            bars = axes.bar([place + middle for place in range(len(xs))], ys, width, label=label)
            axes.bar_label(bars, ["" if math.isnan(value) else f"{value:.3g}" for value in ys])
            axes.set_xticks(range(len(xs)), xs)
            axes.set_xlim(-0.6, len(xs) - 0.4)
        else:
            axes.plot(xs, ys, "o-" if len(xs) > 1 else "o", label=label)
            axes.set_xscale("log", base=2)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
