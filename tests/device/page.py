"""Puts the figures of ``tests/device/results`` into docs/performance.md.

    python tests/device/measure.py --out tests/device/results/NAME.json
    python tests/device/page.py

Each file of the folder is one device. The page is written anew between two marks; a test compares it with the files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("results")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
BEGIN, END = "<!-- device: begin -->\n", "<!-- device: end -->\n"
FORMAT = 1
NOTHING = "No GPU has been measured yet.\n"


def section(folder: Path = FOLDER) -> str:
    """The page's part on devices: a section for each file, or a line that there is none.

    Raises:
        ValueError: a file has another format.
    """
    files = sorted(folder.glob("*.json"))
    return "\n".join(_device(json.loads(file.read_text()), file.name) for file in files) or NOTHING


def _device(found: dict[str, Any], name: str) -> str:
    if found.get("format") != FORMAT:
        raise ValueError(f"{name} has the format {found.get('format')!r}, not {FORMAT}: measure again")
    about, parts = found["machine"], found["parts"]
    memory = f", {about['memory'] / 1e9:.0f} GB" if "memory" in about else ""
    runtime = f", runtime {about['runtime']}" if "runtime" in about else ""
    lines = [f"### {about['name']}", "", f"Measured {found['date']}{memory}, torch {about['torch']}{runtime}.", ""]
    lines += ["| part | | |", "|---|---|---|"]
    lines += [f"| {part} | {figures['state']} | {_figures(figures)} |" for part, figures in parts.items()]
    rows = parts.get("speed", {}).get("rows", [])
    if rows:
        lines += ["", *_table([row for row in rows if "step" in row])]
    return "\n".join(lines) + "\n"


def _figures(figures: dict[str, Any]) -> str:
    """What a part says in one cell."""
    told = []
    if "why" in figures:
        told.append(figures["why"].splitlines()[0])
    if "checks" in figures:
        told.append(f"{figures['checks']} comparisons")
    if "most votes" in figures:
        told.append(f"at most {figures['most votes']:,} votes a chunk")
    if "equal to the CPU's" in figures:
        equal = list(figures["equal to the CPU's"].values())
        told.append(f"{sum(equal)} of {len(equal)} are the CPU's to the byte")
    if "bytes a second" in figures:
        told.append(f"copy {figures['bytes a second'] / 1e9:,.0f} GB/s")
    for kind, rate in figures.get("multiply-adds a second", {}).items():
        told.append(f"{kind} {rate / 1e12:,.2f} T multiply-adds/s")
    if "tokens a second" in figures:
        first, last = figures["loss"]["train"]
        told.append(f"{figures['rounds']} rounds in {figures['seconds']:.0f} s, loss {first:.2f} to {last:.2f}")
    told += figures.get("notes", [])
    return "; ".join(told).replace("|", "\\|")


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """A column for each model: the step's time in parts and beside others, and memory."""
    heads = [f"{row['parameters'] / 1e6:,.0f} M, {row['form']}" for row in rows]

    def line(name: str, *values: str) -> str:
        return f"| {name} | {' | '.join(values)} |"

    def times(name: str) -> list[str]:
        return ["-" if name not in row else f"{1e3 * row[name]:,.1f}" for row in rows]

    def ratios(above: str, below: str) -> list[str]:
        return ["-" if above not in row or below not in row else f"{row[above] / row[below]:.2f}" for row in rows]

    def memory(name: str, kind: str = "peak memory of a step") -> list[str]:
        found = [row[kind].get(name, 0) / row["parameters"] for row in rows]
        return [f"{value:.2f}" if value else "-" for value in found]

    return [
        line("", *heads),
        f"|---|{'--:|' * len(rows)}",
        line("encode, ms", *times("encode")),
        line("apply the payloads of 4 peers, ms", *times("apply")),
        line("step / larger of traffic and arithmetic", *ratios("step", "bound")),
        line("AdamW's step / step", *ratios("adamw", "step")),
        line("reference's step / step", *ratios("reference", "step")),
        line("state, bytes a parameter", *memory("step", "memory of the state")),
        line("peak memory beside the state, bytes a parameter", *memory("step")),
        line("AdamW's", *memory("adamw")),
        line("the reference's", *memory("reference")),
    ]


def placed(page: str, text: str) -> str:
    """The page with that text between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, f"{PAGE.name} has lost its marks"
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> None:
    """Write the page."""
    PAGE.write_text(placed(PAGE.read_text(), section()))


if __name__ == "__main__":
    main()
