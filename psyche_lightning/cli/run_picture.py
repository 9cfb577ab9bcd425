"""How ``psyche run status`` shows a run."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from psyche_lightning.errors import counted
from psyche_lightning.text import plain

if TYPE_CHECKING:
    from rich.console import RenderableType

EVENTS = 10
"""The most events that are shown, the newest."""


def words(phase: str) -> str:
    """A phase for people."""
    return phase.replace("_", " ")


def picture(found: dict[str, Any]) -> RenderableType:
    """A run's status, as its coordinator describes it, in 80 columns."""
    from datetime import datetime

    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from psyche_lightning.doctor.finding import size

    height = "" if found["height"] is None else f", round {found['height']}"
    head = (
        f"{plain(words(found['phase']))}, epoch {found['epoch']}{height}, "
        f"{max(0, found['step'] - 1)} of {found['total_steps'] or '?'} steps trained"
    )
    parts: list[RenderableType] = [Text.assemble((plain(found["run_id"]), "bold"), ": ", head)]
    if found.get("waits_for"):
        parts.append(Text(plain(found["waits_for"]), style="yellow"))
    if found.get("problem"):
        parts.append(Text(plain(found["problem"]), style="bold red"))
    parts += [Text(plain(f"{name}: {value}")) for name, value in found.get("about", {}).items()]
    parts += [Text(plain(line)) for line in _compression(found.get("settings"))]
    losses = [row["loss"] for row in found["metrics"] if row["loss"] is not None]
    if losses:
        parts.append(Text(f"training loss {losses[-1]:.4f}, first {losses[0]:.4f}"))
    named = next((row for row in reversed(found["metrics"]) if row.get("figures")), None)
    if named:
        means = ", ".join(f"{plain(name).replace('_', ' ')} {mean:.4g}" for name, mean in named["figures"].items())
        parts.append(Text(f"at step {named['step']}: {means}"))
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for name in ("node", "status", "step", "loss", "tokens/s", "share", "up", "down"):
        table.add_column(name, justify="left" if name in ("node", "status") else "right")
    styles = {"key": "bold", "address": "dim"}
    for node in (*found["clients"], *found["pending"], *found["exited"]):
        loss, rate, share = node["loss"], node["tokens_per_second"], node.get("share")  # a chain's has no share
        table.add_row(
            Text("\n").join(Text(plain(node[name]), style) for name, style in styles.items() if node[name]),
            plain(node["status"]),
            str(node["step"] or ""),
            "" if loss is None else f"{loss:.4f}",
            "" if rate is None else f"{rate:,.0f}",
            f"{share:.0%}" if type(share) is float else "",
            *("" if node[name] is None else size(node[name]) for name in ("bytes_up", "bytes_down")),
        )
    if table.row_count:
        parts.append(table)
    regions = Counter(str(node["region"]) for node in (*found["clients"], *found["pending"]) if node.get("region"))
    if regions:
        parts.append(Text("regions: " + ", ".join(f"{plain(name)} {count}" for name, count in regions.most_common())))
    if found.get("evaluations"):
        parts.append(_evaluations(found["evaluations"]))
    for event in found["events"][-EVENTS:]:
        parts.append(Text(f"{datetime.fromtimestamp(event['time']):%H:%M:%S}  {plain(event['text'])}"))
    return Group(*parts)


def _compression(settings: dict[str, Any] | None) -> list[str]:
    """How updates are compressed now, and what comes next, in a line; none where that is not known, as on a chain."""
    if not settings or settings["k"] is None:
        return []

    def votes(k: int, steps: int | None) -> str:
        return f"k {k}" + (f", {counted(steps, 'local step')}" if steps else "")

    line = votes(settings["k"], settings["local_steps"])
    later = settings.get("next")
    if later:
        line += f"; from step {later['from_step']} on {votes(later['k'], later['local_steps'])}"
    return [line]


def _evaluations(found: list[dict[str, Any]]) -> RenderableType:
    """The newest evaluation of each task."""
    from rich.table import Table

    table = Table("task", "after step", "documents", "figures")
    for one in {one["task"]: one for one in found}.values():
        figures = ", ".join(f"{plain(name)} {value:.4f}" for name, value in one["figures"].items())
        asked = "" if one["documents"] is None else f"{one['measured']:,} of {one['documents']:,}"
        table.add_row(plain(one["task"]), str(one["step"]), asked, figures)
    return table
