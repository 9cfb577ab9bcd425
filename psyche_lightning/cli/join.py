"""``psyche join``: takes part in a run of which only the link is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from psyche_lightning.cli.console import say
from psyche_lightning.cli.link import read_link
from psyche_lightning.cli.train import LOOPBACK, MetricsHost, MetricsPort
from psyche_lightning.errors import ConfigError, counted


def join(
    link: Annotated[
        str,
        typer.Argument(
            metavar="LINK", help="The run's join link, its coordinator's URL, or @FILE with one.", callback=read_link
        ),
    ],
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
    region: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Where this machine is, for the run's page, such as eu-west."),
    ] = None,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = LOOPBACK,
    service: Annotated[
        bool,
        typer.Option(
            "--service", help="Write and start a service of systemd that does this: yours, or the machine's for root."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the run's recipe, its size, memory and bytes per round.")
    ] = False,
) -> None:
    """Join a run: model, data and settings come from the run itself.

    The node's folder is psyche-RUN in the current one. Started again there, the node goes on as the same one.

    Examples:
        psyche join 'https://train.example.org#my-run:KEY:SECRET'
        psyche join 'https://train.example.org#my-run:KEY:SECRET' --region eu-west
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
    given = [*(overrides or ()), *([] if region is None else [f"node.region={region}"])]
    recipe = recipe_of(name, terms, given)
    if dry_run:
        from psyche_lightning.cli.dry_run import print_dry_run

        print_dry_run(recipe)
        return
    if service:
        ports = () if metrics_port is None else ("--metrics-port", str(metrics_port), "--metrics-host", metrics_host)
        _start_service(name, link, Path(recipe.node.directory or f"psyche-{name}"), [*given, *ports])
        return
    from psyche_lightning.train.runner import train_recipe

    steps = "" if "total_steps" in terms.unset else f", {counted(terms.config.total_steps, 'step')}"
    say(f"joining run {name}: the model {recipe.model.name!r} on the data {recipe.data.name!r}{steps}")
    train_recipe(recipe, coordinator_url=link, run_id=name, metrics_port=metrics_port, metrics_host=metrics_host)


def _start_service(run: str, link: str, folder: Path, options: Sequence[str]) -> None:
    from psyche_lightning.deploy.service import install, node_service

    service = node_service(run, link, folder, options)
    install(service)
    control, who = ("systemctl --user", "--user ") if service.owner is None else ("systemctl", "")
    say(f"the service {service.name} is started, as {service.path} says; it goes on in {service.folder}")
    say(f"  look:    journalctl {who}-fu {service.name}")
    say(f"  stop:    {control} stop {service.name}    (start goes on)")
    say(f"  remove:  {control} disable --now {service.name} && rm {service.path}")
    if service.owner is None:
        say("it runs while you are logged in; for longer, and from the machine's start on: loginctl enable-linger")
    elif service.owner == "root":
        say("it runs as root, whose folder this is; called in a folder of another user, it runs as that one")
