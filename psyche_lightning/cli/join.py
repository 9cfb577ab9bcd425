"""``psyche join``: takes part in a run of which only the link is known."""

from __future__ import annotations

from typing import Annotated

import typer

from psyche_lightning.cli.console import say
from psyche_lightning.cli.train import MetricsPort
from psyche_lightning.errors import ConfigError, counted


def join(
    link: Annotated[str, typer.Argument(metavar="LINK", help="The run's join link, or its coordinator's URL.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Values for keys of this machine, such as trainer.micro_batch_size=4 or trainer.accelerator=cpu.",
        ),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(envvar="PSYCHE_RUN", metavar="RUN", help="The run's name, where the link has none."),
    ] = None,
    metrics_port: MetricsPort = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the run's recipe, its size, memory and bytes per round.")
    ] = False,
) -> None:
    """Join a run: model, data and settings come from the run itself.

    The node's folder is psyche-RUN in the current one. Started again there, the node goes on as the same one.

    Example: psyche join 'https://train.example.org#my-run:KEY:SECRET' trainer.micro_batch_size=4
    """
    from psyche_lightning.lightning.entry import terms_of
    from psyche_lightning.protocol.link import JoinLink
    from psyche_lightning.recipe.joining import recipe_of

    name = run or JoinLink.parse(link).run
    if not name:
        raise ConfigError(
            f"{JoinLink.parse(link).url} is a coordinator, and not the link of a run. Name the run with --run; `psyche "
            "run list --coordinator URL` lists its runs."
        )
    terms = terms_of(link, name)
    recipe = recipe_of(name, terms, overrides or ())
    if dry_run:
        from psyche_lightning.cli.dry_run import print_dry_run

        print_dry_run(recipe)
        return
    from psyche_lightning.train.runner import train_recipe

    steps = "" if "total_steps" in terms.unset else f", {counted(terms.config.total_steps, 'step')}"
    say(f"joining run {name}: the model {recipe.model.name!r} on the data {recipe.data.name!r}{steps}")
    train_recipe(recipe, coordinator_url=link, run_id=name, metrics_port=metrics_port)
