"""``psyche train``: runs one node of a run that a recipe describes."""

from __future__ import annotations

from typing import Annotated

import typer

from psyche_lightning.recipe import load_recipe

MetricsPort = Annotated[
    int | None,
    typer.Option(min=0, max=65535, metavar="PORT", help="Port on 127.0.0.1 where Prometheus reads the node's figures."),
]


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
            help="Join this run: its join link, or its coordinator's URL. Without it, train alone.",
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the resolved recipe, its size, memory and bytes per round.")
    ] = False,
) -> None:
    """Train as one node: join a run on a coordinator, or train alone."""
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
    )
