"""``psyche train``: runs one node of a run that a recipe describes."""

from __future__ import annotations

from typing import Annotated

import typer

from psyche_lightning.cli.link import read_link
from psyche_lightning.recipe import load_recipe

MetricsPort = Annotated[
    int | None,
    typer.Option(min=0, max=65535, metavar="PORT", help="Port where Prometheus reads the node's figures."),
]
MetricsHost = Annotated[
    str,
    typer.Option(
        metavar="HOST",
        help="Address of that port. Who reaches it can read the figures; 0.0.0.0 is for networks of your own.",
    ),
]
LOOPBACK = "127.0.0.1"
"""Where figures are shown unless asked otherwise."""


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of an installed recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values for the recipe's keys, such as lr=1e-3."),
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(
            envvar="PSYCHE_COORDINATOR",
            metavar="LINK",
            help="Join this run: its join link, its coordinator's URL, or @FILE with one. Without it, train alone.",
            callback=read_link,
        ),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            envvar="PSYCHE_RUN", metavar="RUN", help="The run's name; by default the link's, or the recipe's."
        ),
    ] = None,
    twin: Annotated[bool, typer.Option("--twin", help="Train the recipe's CPU-sized twin.")] = False,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = LOOPBACK,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the resolved recipe, its size, memory and bytes per round.")
    ] = False,
) -> None:
    """Train as one node: join a run on a coordinator, or train alone.

    Examples:
        psyche train demo
        psyche train mla-200m --dry-run
        psyche train hf-llama model.path=/models/llama lr=2e-5 --coordinator 'LINK'
    """
    resolved = load_recipe(recipe, overrides or (), twin=twin)
    if dry_run:
        from psyche_lightning.cli.dry_run import print_dry_run

        print_dry_run(resolved)
        return
    from psyche_lightning.protocol.link import JoinLink
    from psyche_lightning.train.runner import train_recipe

    train_recipe(
        resolved,
        coordinator_url=coordinator,
        run_id=run or JoinLink.parse(coordinator or "").run or resolved.name,
        metrics_port=metrics_port,
        metrics_host=metrics_host,
    )
