"""``psyche train --dry-run``: prints the resolved recipe and what it needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.table import Table

from psyche_lightning.cli.console import stdout
from psyche_lightning.doctor.finding import scaled
from psyche_lightning.doctor.finding import size as size_text
from psyche_lightning.errors import counted
from psyche_lightning.plugins import load_plugins
from psyche_lightning.recipe import Recipe
from psyche_lightning.recipe.estimate import AT_WORK, Estimate, estimate


def print_dry_run(recipe: Recipe) -> None:
    """Check that the recipe's plugins are installed, build its model on the meta device, and print tables.

    Raises:
        PluginError: a plugin that the recipe names is missing.
        ConfigError: the model's configuration is wrong, or lm-eval lacks a task that the recipe names.
    """
    plugins = load_plugins()
    plugins.data_providers()[recipe.data.name]
    plugins.transports()[recipe.node.transport]
    if recipe.evals.tasks:
        from psyche_lightning.train.tasks import known_tasks

        known_tasks(recipe.evals.tasks, recipe.evals.tasks_from, "evals.tasks_from")
    from psyche_lightning.train.activations import activations

    size = estimate(recipe)
    console = stdout()
    console.print(_keys(recipe))
    console.print(_learning_rates(recipe))
    console.print(_size(recipe, size, activations(recipe)))
    console.print(_traffic(recipe, size))
    if len(size.stages) > 1:
        console.print(_stages(recipe, size))


def _keys(recipe: Recipe) -> Table:
    table = Table("Key", "Value", title=f"Recipe {recipe.name}")
    for section, values in asdict(recipe).items():
        if isinstance(values, dict):
            for key, value in _leaves(values, f"{section}."):
                table.add_row(key, str(value))
            table.add_section()
    return table


def _leaves(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None and value != {}:
            yield f"{prefix}{key}", value


def _learning_rates(recipe: Recipe) -> Table:
    total, warmup = recipe.run.total_steps, recipe.optimizer.schedule.warmup_steps
    table = Table("Step", "Learning rate", title="Schedule")
    for step in sorted({1, min(max(warmup, 1), total), (total + 1) // 2, total}):
        table.add_row(f"{step:,}", f"{recipe.schedule(step):.4g}")
    return table


def _size(recipe: Recipe, size: Estimate, active: int | None) -> Table:
    trainer, micro = recipe.trainer, counted(recipe.trainer.micro_batch_size, "sample")
    table = Table("What", "Amount", title="Size of one node")
    table.add_row("parameters", f"{size.parameters:,} ({_short(size.parameters)})")
    if size.trainable != size.parameters:
        table.add_row("trainable parameters", f"{size.trainable:,}")
    if trainer.devices > 1:
        table.add_row("memory of each of its devices", f"{trainer.devices}, {trainer.inner}")
    for what, amount in size.memory.items():
        table.add_row(f"memory: {what}", size_text(amount))
    known = sum(size.memory.values())
    each = f" ({known / size.parameters:.3g} bytes a parameter)"
    table.add_row("total memory, without activations", size_text(known) + each, style="bold")
    gone = ", which are gone when Muon computes" if AT_WORK in size.memory else ""
    table.add_row(f"activations of {micro}", "not known" if active is None else f"about {size_text(active)}{gone}")
    if trainer.device_memory is not None:
        table.add_row(
            f"a device with {trainer.device_memory:g} GB",
            _fits(trainer.device_memory * 1e9, size, active),
            style="bold",
        )
    where = "main memory, while a checkpoint is written" + " (first rank)" * (trainer.devices > 1)
    table.add_row(where, f"{size_text(size.copied)} more, for a copy of the model")
    first, last = (batch * recipe.data.seq_len for batch in _batches(recipe))
    table.add_row("tokens of a round", f"{first:,}" if first == last else f"{first:,} to {last:,}")
    return table


def _fits(there: float, size: Estimate, active: int | None) -> str:
    """Whether a device can hold this."""
    rest = there - size.with_activations(active or 0)
    if rest < 0:
        return f"lacks {size_text(-rest)}"
    without = "" if active is not None else ", without activations"
    return f"fits{without}, and leaves {size_text(rest)} for the framework"


def _batches(recipe: Recipe) -> tuple[int, int]:
    return recipe.run.global_batch_size_start, recipe.run.global_batch_size_end


def _traffic(recipe: Recipe, size: Estimate) -> Table:
    table = Table("Nodes", "Up", "Down", "fp32 all-reduce", "Ratio", title="Payload bytes of a node and round")
    for column in table.columns:
        column.justify = "right"
    for nodes in sorted({2, 3, 16, recipe.run.init_min_clients} - {1}):
        own, dense = size.bytes_per_round(nodes), size.allreduce_bytes_per_round(nodes)
        table.add_row(str(nodes), size_text(own), size_text(own), size_text(dense), f"{dense / own:,.0f} x")
    table.caption = f"One payload has {size.payload:,} bytes, {8 * size.payload / size.trainable:.3g} bits a parameter."
    if size.steps > 1:
        table.caption += f" With local steps, there is an all-reduce for each that a node makes: {size.steps}, or fewer"
        table.caption += " if its share has fewer samples."
    return table


def _stages(recipe: Recipe, size: Estimate) -> Table:
    table = Table("From step", "k", "Steps of a round", "Payload", "Rounds", title="Schedule of k")
    for column in table.columns:
        column.justify = "right"
    for stage in size.stages:
        numbers = (stage.first, stage.k, stage.steps, stage.payload, stage.rounds)
        table.add_row(*(f"{number:,}" for number in numbers))
    mean = size.published / recipe.run.total_steps
    table.caption = (
        f"Over {recipe.run.total_steps:,} rounds a node publishes {size_text(size.published)}, {mean:,.0f} bytes a "
        "round in the mean. The table above counts the largest payload."
    )
    return table


def _short(count: float) -> str:
    return scaled(count, ("", " K", " M", " B", " T"))
