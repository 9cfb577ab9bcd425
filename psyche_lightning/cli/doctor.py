"""``psyche doctor``: checks whether a machine is ready for a run, and predicts the run's speed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from psyche_lightning import system
from psyche_lightning.bench.report import check_folder
from psyche_lightning.cli.console import stdout
from psyche_lightning.cli.link import is_link, read_link
from psyche_lightning.doctor.finding import Finding, Verdict
from psyche_lightning.errors import ConfigError, CoordinatorError, TransportError, counted
from psyche_lightning.json_text import json_text
from psyche_lightning.logs import redirections
from psyche_lightning.protocol.link import JoinLink
from psyche_lightning.server.admin import URL_VARIABLE

if TYPE_CHECKING:
    from psyche_lightning.doctor.connectivity import Reached
    from psyche_lightning.doctor.link import Invitation, MeasuredLink
    from psyche_lightning.doctor.round_time import Prediction
    from psyche_lightning.doctor.speed import TrainingSpeed
    from psyche_lightning.protocol.owner import ClockReading
    from psyche_lightning.recipe import Recipe
    from psyche_lightning.transports.base import Transport

STYLES = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.PROBLEM: "bold red", Verdict.UNKNOWN: "dim"}


def doctor(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE | LINK] [KEY=VALUE]...",
            help="A recipe, or a run's join link (or @FILE with it), which brings its recipe, and values for keys; or "
            "values for node.* alone, such as node.transport=iroh.",
        ),
    ] = None,
    twin: Annotated[bool, typer.Option("--twin", help="Use the recipe's CPU-sized twin.")] = False,
    coordinator: Annotated[
        str | None, typer.Option(envvar=URL_VARIABLE, metavar="URL", help="Examine this coordinator.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(envvar="PSYCHE_RUN", metavar="RUN", help="Examine this run and its participants.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes to predict for; by default those of the run or recipe.")
    ] = None,
    listen: Annotated[
        bool, typer.Option("--listen", help="Wait for a doctor on another machine that measures the link to this one.")
    ] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="INVITATION", help="Measure the link to a doctor that listens; repeatable."),
    ] = None,
    megabytes: Annotated[float, typer.Option(min=1, max=1000, help="The most MB to send each way.")] = 32,
    seconds: Annotated[float, typer.Option(min=1, max=120, help="About the most seconds for each measurement.")] = 8,
    upload: Annotated[
        float | None, typer.Option(min=0.001, metavar="MBIT/S", help="Predict for this upload, not the measured one.")
    ] = None,
    download: Annotated[
        float | None, typer.Option(min=0.001, metavar="MBIT/S", help="Predict for this download.")
    ] = None,
    latency: Annotated[
        float | None, typer.Option(min=0, metavar="MS", help="Predict for this round trip to peers.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Check whether this machine is ready for a run, and predict the run's speed.

    Without arguments it examines only the machine. The exit code is 1 if there is a problem, and 0 with warnings.

    Examples:
        psyche doctor
        psyche doctor mla-200m --nodes 4 --upload 20 --download 100 --latency 0.1
    """
    check_folder(json_file, "--json")
    arguments = [*(arguments or [])]
    found: list[Finding] = []
    if arguments and is_link(arguments[0]):
        coordinator = read_link(arguments.pop(0))
        assert coordinator is not None
        recipe, settings, found = _of_run(coordinator, run, arguments)
    else:
        recipe, settings = _resolve(arguments, twin)
    if listen and (peer or json_file):
        raise ConfigError("--listen is for the other machine; use --peer and --json on the machine that measures")
    if listen:
        asyncio.run(_listen(_transport(settings), _transport(settings, port=0)))
        return
    link = JoinLink.parse(coordinator or "")
    run = run or link.run or None
    if run and not coordinator:
        raise ConfigError(f"--run {run} needs its coordinator: also give --coordinator URL, or set {URL_VARIABLE}")
    for name, value in (("--nodes", nodes), ("--upload", upload), ("--download", download), ("--latency", latency)):
        if value is not None and recipe is None:
            raise ConfigError(f"{name} is for a prediction; also name a recipe, such as `psyche doctor demo {name} 4`")
    invitations = _invitations(peer or [])
    console = stdout()
    options = _Options(coordinator, run or (recipe.name if recipe else None), run is not None, nodes, latency)
    options.upload, options.download = (None if rate is None else rate * 1e6 / 8 for rate in (upload, download))
    examination = _Examination(recipe, settings, options, int(megabytes * 1e6), seconds, findings=found)
    with progress_bar(console) as examination.progress:
        examination.examine(invitations)
    _show(console, examination.findings)
    if json_file is not None:
        json_file.write_text(json_text(examination.as_json(), 2) + "\n")
    if any(finding.verdict is Verdict.PROBLEM for finding in examination.findings):
        raise typer.Exit(1)


@dataclass
class _Options:
    """The command line's values for the run; rates in bytes a second."""

    coordinator: str | None
    run: str | None
    run_named: bool
    nodes: int | None
    latency: float | None
    upload: float | None = None
    download: float | None = None


@dataclass
class _Examination:
    """One examination, part by part."""

    recipe: Recipe | None
    settings: Recipe
    options: _Options
    most_bytes: int
    seconds: float
    progress: Callable[[str, float], None] = lambda what, done: None
    findings: list[Finding] = field(default_factory=list)
    reading: ClockReading | None = None
    status: Mapping[str, Any] | None = None
    reached: list[Reached] = field(default_factory=list)
    links: list[MeasuredLink] = field(default_factory=list)
    speed: TrainingSpeed | None = None
    prediction: Prediction | None = None

    def examine(self, invitations: list[Invitation]) -> None:
        """Examine everything that was requested."""
        from psyche_lightning.doctor import machine

        self.progress("the machine", 0.0)
        self.findings += machine.examine(self.folder)
        if self.options.coordinator is not None:
            self._coordinator(self.options.coordinator)
        if self.status is not None:
            self._peers(self.status)
        for number, invitation in enumerate(invitations, 1):
            self._link(invitation, number)
        self._nat()
        if self.recipe is not None:
            self._recipe(self.recipe)

    @property
    def folder(self) -> Path:
        """The node's folder."""
        run = self.options.run
        return Path(self.settings.node.directory or (f"psyche-{run}" if run else "."))

    def _coordinator(self, url: str) -> None:
        from psyche_lightning.cli.owner import administer
        from psyche_lightning.doctor import connectivity

        self.progress("coordinator", 0.0)
        found, self.reading = connectivity.coordinator(url)
        self.findings += found
        if self.options.run is None or any(one.verdict is Verdict.PROBLEM for one in found):
            return
        area = connectivity.AREA
        try:
            self.status = administer(url, self.options.run).status()
        except CoordinatorError as error:
            missing = error.code == "UnknownRun" and not self.options.run_named
            verdict = Verdict.UNKNOWN if missing else Verdict.PROBLEM
            self.findings.append(Finding(area, "run", str(error), verdict, "give its name with --run"))
            return
        phase, members = self.status["phase"].replace("_", " "), connectivity.members(self.status)
        self.findings.append(Finding(area, self.options.run, f"{phase}, {counted(len(members), 'node')}"))

    def _peers(self, status: Mapping[str, Any]) -> None:
        from psyche_lightning.doctor import connectivity
        from psyche_lightning.protocol.state import scope_of

        assert self.options.run is not None
        assert self.options.coordinator is not None
        far = connectivity.is_far(self.options.coordinator)
        scope = scope_of(self.options.run, bytes.fromhex(status["incarnation"]))
        make = _transport(self.settings)
        try:
            address = asyncio.run(connectivity.own_address(make, scope))
            self.findings.append(connectivity.address_finding(address, far=far))
        except TransportError as error:
            self.findings.append(connectivity.listening_problem(error))
        own = connectivity.own_key(self.folder)
        members = connectivity.members(status)
        addresses = {key: row["address"] for key, row in members.items() if key != own and row["address"]}
        if not addresses:
            return
        try:  # another port, because a node on this machine may use the usual one
            self.reached = asyncio.run(
                connectivity.reach(_transport(self.settings, port=0), scope, addresses, self.progress)
            )
        except TransportError as error:
            self.findings.append(Finding(connectivity.AREA, "peers", str(error), Verdict.PROBLEM, "see 'own address'"))
        self.findings += map(connectivity.peer_finding, self.reached)

    def _link(self, invitation: Invitation, number: int) -> None:
        from psyche_lightning.doctor import connectivity, link
        from psyche_lightning.plugins import load_plugins

        name = invitation.scheme if invitation.scheme in load_plugins().transports() else None
        area = connectivity.LINK if number == 1 else f"{connectivity.LINK} {number}"
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
        self.findings += connectivity.link_findings(found, area)

    def _nat(self) -> None:
        from psyche_lightning.doctor import connectivity

        seen = "" if self.reading is None else self.reading.seen
        own = connectivity.way_out(self.options.coordinator) if seen and self.options.coordinator else ""
        found = connectivity.nat_finding(seen, own, self.links)
        self.findings += [] if found is None else [found]

    def _recipe(self, recipe: Recipe) -> None:
        from psyche_lightning.doctor import machine, prediction
        from psyche_lightning.doctor.speed import measure
        from psyche_lightning.recipe.estimate import estimate

        self.progress("the model's size", 0.0)
        size = estimate(recipe)
        shape = prediction.run_shape(recipe, self.status, self.options.nodes)
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
        options = self.options
        network = prediction.network(
            self.settings.node.transport_options,
            links=self.links,
            reading=self.reading,
            url=options.coordinator,
            answered=[one.link.answered for one in self.reached if one.link.answered is not None],
            upload=options.upload,
            download=options.download,
            round_trip=None if options.latency is None else options.latency / 1e3,
        )
        conditions = prediction.conditions(recipe, shape, network, self.speed, size.payload, written)
        self.prediction, rows = prediction.findings(conditions, network, self.speed, shape)
        self.findings += rows

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON."""
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
    """Replace infinite numbers by None, because JSON has no infinity."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def _resolve(arguments: list[str], twin: bool) -> tuple[Recipe | None, Recipe]:
    """The recipe, if one is named, and a recipe with this node's connection settings."""
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
        raise ConfigError("--twin is an option of a recipe; also name the recipe")
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


def _of_run(link: str, run: str | None, overrides: list[str]) -> tuple[Recipe | None, Recipe, list[Finding]]:
    """The recipe of a run, as :func:`_resolve`; without it, a row that says why there is none."""
    from psyche_lightning.doctor.connectivity import AREA
    from psyche_lightning.lightning.entry import terms_of
    from psyche_lightning.recipe.joining import has_recipe, recipe_of

    name = run or JoinLink.parse(link).run
    if not name:
        return None, _resolve(overrides, False)[1], []
    try:
        terms = terms_of(link, name)
    except CoordinatorError:  # which the examination of the coordinator tells
        return None, _resolve(overrides, False)[1], []
    if has_recipe(terms):
        recipe = recipe_of(name, terms, overrides)
        return recipe, recipe, []
    text = f"run {name!r} was created without a recipe, so its speed is not predicted"
    return None, _resolve(overrides, False)[1], [Finding(AREA, "recipe", text, Verdict.UNKNOWN, "name its recipe")]


def _invitations(texts: list[str]) -> list[Invitation]:
    from psyche_lightning.doctor.link import Invitation

    return [Invitation.parse(text) for text in texts]


def _transport(settings: Recipe, *, name: str | None = None, **options: Any) -> Callable[[], Transport]:
    """Returns a factory of transports with this machine's options; options given here win."""
    from psyche_lightning.plugins import load_plugins

    factory = load_plugins().transports()[name or settings.node.transport]
    given = {**settings.node.transport_options, **options}
    factory(given)  # refuse a wrong option before anything is measured
    return lambda: factory(given)


async def _listen(make: Callable[[], Transport], make_back: Callable[[], Transport]) -> None:
    from psyche_lightning.doctor.link import listen

    stop = asyncio.Event()
    system.on_stop(stop.set)

    def announce(invitation: Invitation) -> None:
        print(f"on the other machine:\n\n    psyche doctor --peer '{invitation}'\n")
        print("Anyone who has this line can measure the link until you press Ctrl-C.", flush=True)

    await listen(make, make_back, announce, stop)


@contextlib.contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[str, float], None]]:
    """Show on a terminal what is being measured."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    bar = Progress(TextColumn("{task.description}"), BarColumn(), console=console, transient=True, **redirections())
    bar.disable = not console.is_terminal
    with bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, done: bar.update(task, description=what, completed=done)


def _show(console: Console, findings: list[Finding]) -> None:
    """Print one table, with advice below each finding."""
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
