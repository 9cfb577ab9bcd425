"""Figures in the README follow from what they are said to follow from."""

from __future__ import annotations

import re
from pathlib import Path

from psyche_lightning.distro import DistroConfig, payload_size
from psyche_lightning.doctor.plan import ALL_REDUCE_LOSS, SETTINGS
from psyche_lightning.lightning.delta import SAVE_EVERY
from psyche_lightning.protocol.committee import MAX_WITNESSES, quorum
from psyche_lightning.protocol.open_ids import AGAIN_AFTER
from psyche_lightning.recipe import load_recipe
from psyche_lightning.recipe.estimate import estimate

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RECIPES = ("demo", "mla-200m", "consilience-40b")
NODES = (2, 3, 16, 64)


def amount(count: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}{units[-1]}"


def rows() -> list[str]:
    found = []
    for name in RECIPES:
        recipe = load_recipe(name)
        size = estimate(recipe)
        ratios = [size.allreduce_bytes_per_round(n) / size.bytes_per_round(n) for n in NODES]
        cells = [
            f"`{name}`, k = {recipe.distro.k}",
            amount(size.parameters, ("", " K", " M", " B")),
            amount(size.payload, (" B", " kB", " MB", " GB")),
            *(f"{ratio:,.0f}" for ratio in ratios),
        ]
        found.append(f"| {' | '.join(cells)} |")
        # The formula beside the table.
        assert all(
            abs(8 * size.trainable / (n * size.payload) / r - 1) < 1e-9 for n, r in zip(NODES, ratios, strict=True)
        )
    return found


def test_the_table_of_ratios_is_what_the_recipes_give() -> None:
    text = README.read_text()
    assert re.findall(r"^\| `.*? k = .*$", text, re.MULTILINE) == rows(), "put these rows in:\n" + "\n".join(rows())


def test_what_a_death_costs() -> None:
    section = (ROOT / "docs" / "joining.md").read_text().partition("## What a death costs")[2].partition("\n## ")[0]
    found = [tuple(map(int, row)) for row in re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \|$", section, re.MULTILINE)]
    assert found == [(n, quorum(n), n - quorum(n)) for n in (1, 2, 3, 4, 5, 8, 16, 32)]
    assert MAX_WITNESSES == 32
    assert (AGAIN_AFTER, SAVE_EVERY) == (3, 50), "the page says three rounds, and every 50 rounds"


def test_bits_beside_those_of_others() -> None:
    text = (ROOT / "docs" / "comparison.md").read_text()
    saved = []
    for k in (4, 8):
        chunks = 1 << 16
        ours = 8 * payload_size(chunks, DistroConfig(k=k)) / (chunks * 4096)
        theirs = k * 17 / 4096
        assert f"| psyche_lightning, k = {k} | {ours:.4f} | `psyche bench wire` |" in text
        assert f" | {theirs:.4f} | {k} × 17 / 4096" in text
        saved.append(1 - ours / theirs)
    assert [round(100 * share) for share in saved] == [30, 35]
    for page in ("comparison.md", "psyche.md"):
        assert "30 to 35 % fewer bytes" in re.sub(r"\s+", " ", (ROOT / "docs" / page).read_text())


def test_losses_that_plans_rest_on_are_on_the_page() -> None:
    text = (ROOT / "docs" / "distro.md").read_text()
    assert f"| AdamW, all-reduce |  | 0.004 | {ALL_REDUCE_LOSS[120]:.3f} ± " in text
    reduced = f"| AdamW, all-reduce | small, 4 | 1,920 | `allreduce` | 4e-3 (2e-3) | 3 | {ALL_REDUCE_LOSS[1920]:.3f} ± "
    assert reduced in text
    for one in SETTINGS:
        name = "local steps of Muon" if one.local_steps else "DisTrO" + ", Muon" * (one.optimizer == "muon")
        steps = f"H={one.local_steps}, " * bool(one.local_steps)
        name += ", overlap" * one.overlap
        if one.loss is not None:
            row = f"| {name} | {steps}k={one.k}, {one.chunk}x{one.chunk} | {one.rate:g} | {one.loss:.3f} ± "
            if one.trained != 120:
                row = f"| DisTrO, Muon | small, 4 | 1,920 | `distro:k={one.k},muon=true` | 4e-3 | 3 | {one.loss:.3f} ± "
            assert row in text, (
                f"docs/distro.md has no {row!r}: bring SETTINGS in psyche_lightning/doctor/plan.py up to date"
            )
