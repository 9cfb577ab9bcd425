"""``psyche doctor``: what stands between this machine and a run, and how quick the run will be."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from psyche_lightning.bench.report import check_folder
from psyche_lightning.cli.console import stdout
from psyche_lightning.doctor.finding import Finding, Verdict
from psyche_lightning.errors import ConfigError, CoordinatorError, TransportError
from psyche_lightning.server.admin import URL_VARIABLE

if TYPE_CHECKING:
    from psyche_lightning.doctor.link import Invitation, Measured
    from psyche_lightning.doctor.prediction import Prediction
    from psyche_lightning.doctor.speed import Speed
    from psyche_lightning.doctor.surroundings import Reached
    from psyche_lightning.protocol.owner import ClockReading
    from psyche_lightning.recipe import Recipe
    from psyche_lightning.transports.base import Transport

STYLES = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.PROBLEM: "bold red", Verdict.UNKNOWN: "dim"}


def doctor(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [KEY=VALUE]...",
            help="A recipe, and values that replace its own, or the defaults of node.*, such as node.transport=iroh.",
        ),
    ] = None,
    twin: Annotated[bool, typer.Option("--twin", help="The recipe's CPU-sized twin.")] = False,
    coordinator: Annotated[
        str | None, typer.Option(envvar=URL_VARIABLE, metavar="URL", help="Look at this coordinator.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(envvar="PSYCHE_RUN", metavar="RUN", help="Look at this run and its participants.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes to predict for; those of the run or recipe unless given.")
    ] = None,
    listen: Annotated[
        bool, typer.Option("--listen", help="Wait for another doctor and be the other end of its link.")
    ] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="INVITATION", help="Measure the link to a doctor that listens; repeat it for several."),
    ] = None,
    megabytes: Annotated[float, typer.Option(min=1, max=1000, help="To send each way at most.")] = 32,
    seconds: Annotated[float, typer.Option(min=1, max=120, help="That each measurement takes at most, about.")] = 8,
    upload: Annotated[
        float | None, typer.Option(min=0.001, metavar="MBIT/S", help="Predict for this upload, not the measured one.")
    ] = None,
    download: Annotated[
        float | None, typer.Option(min=0.001, metavar="MBIT/S", help="Predict for this download.")
    ] = None,
    latency: Annotated[
        float | None, typer.Option(min=0, metavar="MS", help="Predict for this round trip to others.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Examine this machine, its links and a recipe, and predict the run's speed.

    Without anything: the machine alone. The exit code is 1 when there is a problem, and 0 with warnings.
    """
    check_folder(json_file, "--json")
    recipe, settings = _resolve(arguments or [], twin)
    if listen and (peer or json_file):
        raise ConfigError("--listen is the other machine's side; leave --peer and --json to the one that measures")
    if listen:
        asyncio.run(_listen(_transport(settings)))
        return
    if run and not coordinator:
        raise ConfigError(f"--run {run} lives on a coordinator: give --coordinator URL too, or set {URL_VARIABLE}")
    for name, value in (("--nodes", nodes), ("--upload", upload), ("--download", download), ("--latency", latency)):
        if value is not None and recipe is None:
            raise ConfigError(f"{name} is for predicting; name a recipe as well, such as `psyche doctor demo {name} 4`")
    invitations = _invitations(peer or [])
    console = stdout()
    given = _Given(coordinator, run or (recipe.name if recipe else None), run is not None, nodes, latency)
    given.upload, given.download = (None if rate is None else rate * 1e6 / 8 for rate in (upload, download))
    visit = _Visit(recipe, settings, given, int(megabytes * 1e6), seconds)
    with _progress(console) as visit.progress:
        visit.examine(invitations)
    _show(console, visit.findings)
    if json_file is not None:
        json_file.write_text(json.dumps(visit.as_json(), indent=2) + "\n")
    if any(finding.verdict is Verdict.PROBLEM for finding in visit.findings):
        raise typer.Exit(1)


@dataclass
class _Given:
    """What the command line says of the run; rates in bytes a second."""

    coordinator: str | None
    run: str | None
    run_named: bool
    nodes: int | None
    latency: float | None
    upload: float | None = None
    download: float | None = None


@dataclass
class _Visit:
    """One examination, part by part."""

    recipe: Recipe | None
    settings: Recipe
    given: _Given
    most_bytes: int
    seconds: float
    progress: Callable[[str, float], None] = lambda what, done: None
    findings: list[Finding] = field(default_factory=list)
    reading: ClockReading | None = None
    status: Mapping[str, Any] | None = None
    reached: list[Reached] = field(default_factory=list)
    links: list[Measured] = field(default_factory=list)
    speed: Speed | None = None
    prediction: Prediction | None = None

    def examine(self, invitations: list[Invitation]) -> None:
        """Look at everything that was asked for."""
        from psyche_lightning.doctor import machine

        self.progress("the machine", 0.0)
        self.findings += machine.examine(self.folder)
        if self.given.coordinator is not None:
            self._coordinator(self.given.coordinator)
        if self.status is not None:
            self._peers(self.status)
        for number, invitation in enumerate(invitations, 1):
            self._link(invitation, number)
        if self.recipe is not None:
            self._recipe(self.recipe)

    @property
    def folder(self) -> Path:
        """Of the node."""
        run = self.given.run
        return Path(self.settings.node.directory or (f"psyche-{run}" if run else "."))

    def _coordinator(self, url: str) -> None:
        from psyche_lightning.cli.owner import administer
        from psyche_lightning.doctor import surroundings

        self.progress("coordinator", 0.0)
        found, self.reading = surroundings.coordinator(url)
        self.findings += found
        if self.given.run is None or any(one.verdict is Verdict.PROBLEM for one in found):
            return
        area = surroundings.AREA
        try:
            self.status = administer(url, self.given.run).status()
        except CoordinatorError as error:
            missing = error.code == "UnknownRun" and not self.given.run_named
            verdict = Verdict.UNKNOWN if missing else Verdict.PROBLEM
            self.findings.append(Finding(area, "run", str(error), verdict, "give its name with --run"))
            return
        phase, members = self.status["phase"].replace("_", " "), surroundings.members(self.status)
        self.findings.append(Finding(area, self.given.run, f"{phase}, {len(members)} nodes"))

    def _peers(self, status: Mapping[str, Any]) -> None:
        from psyche_lightning.doctor import surroundings

        assert self.given.run is not None
        assert self.given.coordinator is not None
        run, far = self.given.run, surroundings.is_far(self.given.coordinator)
        make = _transport(self.settings)
        try:
            address = asyncio.run(surroundings.own_address(make, run))
            self.findings.append(surroundings.address_finding(address, far=far))
        except TransportError as error:
            self.findings.append(surroundings.listening_problem(error))
        own = surroundings.own_key(self.folder)
        members = surroundings.members(status)
        addresses = {key: row["address"] for key, row in members.items() if key != own and row["address"]}
        if not addresses:
            return
        try:  # another port: a node of this machine may have the usual one
            self.reached = asyncio.run(
                surroundings.reach(_transport(self.settings, port=0), run, addresses, self.progress)
            )
        except TransportError as error:
            self.findings.append(Finding(surroundings.AREA, "peers", str(error), Verdict.PROBLEM, "see own address"))
        self.findings += map(surroundings.peer_finding, self.reached)

    def _link(self, invitation: Invitation, number: int) -> None:
        from psyche_lightning.doctor import link, surroundings
        from psyche_lightning.plugins import load_plugins

        name = invitation.scheme if invitation.scheme in load_plugins().transports() else None
        area = surroundings.LINK if number == 1 else f"{surroundings.LINK} {number}"
        try:
            found = asyncio.run(
                link.call(
                    _transport(self.settings, name=name),
                    invitation,
                    most_bytes=self.most_bytes,
                    seconds=self.seconds,
                    progress=self.progress,
                )
            )
        except TransportError as error:
            self.findings.append(Finding(area, "peer", str(error), Verdict.PROBLEM))
            return
        self.links.append(found)
        self.findings += surroundings.link_findings(found, area)

    def _recipe(self, recipe: Recipe) -> None:
        from psyche_lightning.doctor import forecast, machine
        from psyche_lightning.doctor.speed import measure
        from psyche_lightning.recipe.estimate import estimate

        self.progress("the model's size", 0.0)
        size = estimate(recipe)
        shape = forecast.run_shape(recipe, self.status, self.given.nodes)
        device, there = machine.choose_device(recipe)
        needs = machine.needs(recipe, size, self.folder, shape.nodes, device)
        self.progress("disk", 0.0)
        written = machine.write_seconds(self.folder)
        self.findings += [machine.model_size(size), there, *needs, machine.write_finding(written)]
        fits = needs[0].verdict is not Verdict.PROBLEM
        self.speed = measure(
            recipe,
            size,
            device,
            nodes=shape.nodes,
            share=shape.share,
            fits=fits,
            seconds=self.seconds,
            progress=self.progress,
        )
        given = self.given
        network = forecast.network(
            self.settings.node.transport_options,
            links=self.links,
            reading=self.reading,
            url=given.coordinator,
            answered=[one.link.answered for one in self.reached if one.link.answered is not None],
            upload=given.upload,
            download=given.download,
            round_trip=None if given.latency is None else given.latency / 1e3,
        )
        conditions = forecast.conditions(recipe, shape, network, self.speed, size.payload, written)
        self.prediction, rows = forecast.findings(conditions, network, self.speed, shape)
        self.findings += rows

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        return {
            "findings": [finding.as_json() for finding in self.findings],
            "links": [_finite(asdict(link)) for link in self.links],
            **{
                name: None if value is None else _finite(asdict(value))
                for name, value in (
                    ("coordinator", self.reading),
                    ("speed", self.speed),
                    ("prediction", self.prediction),
                )
            },
        }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def _resolve(arguments: list[str], twin: bool) -> tuple[Recipe | None, Recipe]:
    """The recipe, if one is named, and what says how this node is connected."""
    from psyche_lightning.recipe import load_recipe, resolve
    from psyche_lightning.recipe.loading import parse_override

    name = arguments[0] if arguments and "=" not in arguments[0] else None
    overrides = arguments[name is not None :]
    for text in overrides:
        if "=" not in text:
            raise ConfigError(f"{text!r} is not of the form key=value; the recipe comes first")
    if name is not None:
        recipe = load_recipe(name, overrides, twin=twin)
        return recipe, recipe
    if twin:
        raise ConfigError("--twin is a form of a recipe; name the recipe as well")
    node: dict[str, Any] = {}
    for text in overrides:
        key, value = parse_override(text)
        section, *path = key.split(".")
        if section != "node":
            raise ConfigError(f"{text!r} belongs to a recipe; name one before it, or give only node.* values")
        place = node
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = value
    return None, resolve({"name": "doctor", "node": node}, source="psyche doctor")


def _invitations(texts: list[str]) -> list[Invitation]:
    from psyche_lightning.doctor.link import Invitation

    return [Invitation.parse(text) for text in texts]


def _transport(settings: Recipe, *, name: str | None = None, **options: Any) -> Callable[[], Transport]:
    """Makes transports with this machine's options; those given here win."""
    from psyche_lightning.plugins import load_plugins

    factory = load_plugins().transports()[name or settings.node.transport]
    given = {**settings.node.transport_options, **options}
    factory(given)  # a wrong option is an error before anything is measured
    return lambda: factory(given)


async def _listen(make: Callable[[], Transport]) -> None:
    from psyche_lightning.doctor.link import listen

    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)

    def announce(invitation: Invitation) -> None:
        print(f"on the other machine:\n\n    psyche doctor --peer '{invitation}'\n")
        print("Whoever has this line can measure the link until you press Ctrl-C.", flush=True)

    await listen(make, announce, lambda text: print(text, flush=True), stop)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, float], None]]:
    """Shows on a terminal what is being measured."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    bar = Progress(TextColumn("{task.description}"), BarColumn(), console=console, transient=True)
    bar.disable = not console.is_terminal
    with bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, done: bar.update(task, description=what, completed=done)


def _show(console: Console, findings: list[Finding]) -> None:
    """One table; what to do stands below what was found."""
    table = Table("", "", "found", "verdict", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.columns[2].ratio = 1
    table.expand = False
    area = ""
    for finding in findings:
        if area and finding.area != area:
            table.add_row()
        text = Text(finding.value)
        if finding.advice:
            text.append(f"\n→ {finding.advice}", style=STYLES[finding.verdict])
        head = finding.area if finding.area != area else ""
        verdict = Text(finding.verdict.value, style=STYLES[finding.verdict])
        table.add_row(Text(head, style="bold"), finding.name, text, verdict)
        area = finding.area
    console.print(table)
    counts = {verdict: sum(one.verdict is verdict for one in findings) for verdict in Verdict}
    problems, warnings = counts[Verdict.PROBLEM], counts[Verdict.WARNING]
    console.print(
        f"\n{_number(problems, 'problem')}, {_number(warnings, 'warning')}",
        style=STYLES[Verdict.PROBLEM if problems else Verdict.WARNING if warnings else Verdict.OK],
        highlight=False,
    )


def _number(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"
