"""``psyche plan``: proposes how the nodes of a run exchange, for a link and a time."""

from __future__ import annotations

import math
import re
import shlex
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from psyche_lightning.cli.console import stdout
from psyche_lightning.cli.doctor import progress_bar
from psyche_lightning.doctor.finding import count, duration, scaled, size
from psyche_lightning.errors import ConfigError, counted
from psyche_lightning.json_text import json_text

if TYPE_CHECKING:
    from psyche_lightning.doctor.plan import Option, Setting
    from psyche_lightning.doctor.prediction import Network
    from psyche_lightning.doctor.speed import TrainingSpeed
    from psyche_lightning.recipe import Recipe

_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_RATE = r"(\d+(?:\.\d+)?)([kMG]?)(?:bit(?:/s)?)?"
_LINK = re.compile(f"{_RATE}(?:/{_RATE})?")
_TRIP = re.compile(r"(\d+(?:\.\d+)?)(ms|s)?")
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)([kMG]?)B?")
SLOWEST = 1000.0
"""Bits a second from which on a number is a link; fewer lack their suffix."""
FASTER = 1.25
"""From this factor of tokens a second on, a setting that is not proposed is named."""
WIDTH = 78


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of an installed recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Values for the recipe's keys, such as lr=1e-3."),
    ] = None,
    *,
    nodes: Annotated[int, typer.Option(help="Nodes that train, each with such a device and link.")],
    link: Annotated[
        str,
        typer.Option(
            metavar="UP[/DOWN]", help="Each node's link in bits a second, such as 20M or 20M/100M (k, M or G)."
        ),
    ],
    hours: Annotated[float, typer.Option(help="How long the run may last.")],
    round_trip: Annotated[
        str, typer.Option(metavar="MS", help="There and back between nodes, in ms, or such as 0.1s.")
    ] = "100",
    tokens_per_second: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="One node's speed alone, if it is not this machine's, which is measured."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="BYTES", help="A node's memory, such as 24G, if it is not this machine's.")
    ] = None,
    price: Annotated[
        float | None, typer.Option(metavar="DOLLARS", help="Price of a GB that a node sends; no dollars without it.")
    ] = None,
    twin: Annotated[bool, typer.Option("--twin", help="Plan for the recipe's CPU-sized twin.")] = False,
    seconds: Annotated[float, typer.Option(min=1, max=120, help="About the most seconds to measure.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Propose k, local steps, overlap and batch for a link and a time, with the speed and the traffic of each choice.

    It measures this machine's speed on the recipe's model, and predicts rounds as `psyche doctor` does.

    Examples:
        psyche plan mla-200m --nodes 4 --link 20M --hours 48
        psyche plan tokens --nodes 8 --link 50M/200M --hours 72 --price 0.09
    """
    for name, value in (("--nodes", nodes), ("--hours", hours), ("--tokens-per-second", tokens_per_second)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} is {value}; choose a number above 0")
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError(f"--price is {price}; choose the dollars of a GB, such as 0.09")
    upload, download = parse_link(link)
    ask = _Ask(
        recipe, list(overrides or ()), twin, nodes, upload, download, parse_trip(round_trip), hours,
        tokens_per_second, None if memory is None else parse_memory(memory), price,
    )  # fmt: skip
    console = stdout()
    with progress_bar(Console(quiet=True) if as_json else console) as progress:
        found = _plan(ask, seconds, progress)
    if as_json:
        print(json_text(found.as_json(), 2))
    else:
        found.show(console)
    if found.chosen is None:
        raise typer.Exit(1)


def parse_link(text: str) -> tuple[float, float]:
    """Upload and download in bytes a second, of ``20M`` or ``20M/100M`` bits a second.

    Raises:
        ConfigError: the text has another form, or is less than 1 kbit/s.
    """
    found = _LINK.fullmatch(text.strip())
    if found is None:
        raise ConfigError(
            f"--link {text!r} is no link; write bits a second with one of the suffixes k, M and G, such as 20M, or "
            "20M/100M for upload and download"
        )
    up, down = found.group(1, 2), found.group(3, 4) if found[3] else found.group(1, 2)
    rates = [float(number) * _PREFIXES[prefix] for number, prefix in (up, down)]
    if min(rates) < SLOWEST:
        raise ConfigError(
            f"--link {text} is {min(rates):g} bits a second, too few for any run; add a suffix such as in 20M"
        )
    return rates[0] / 8, rates[1] / 8


def parse_trip(text: str) -> float:
    """Seconds of ``100``, ``100ms`` or ``0.1s``.

    Raises:
        ConfigError: the text has another form.
    """
    found = _TRIP.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"--round-trip {text!r} is no time; write milliseconds such as 100, or 0.1s")
    return float(found[1]) * (1.0 if found[2] == "s" else 1e-3)


def parse_memory(text: str) -> int:
    """Bytes of ``24G`` or ``24GB``.

    Raises:
        ConfigError: the text has another form, or is 0.
    """
    found = _AMOUNT.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise ConfigError(f"--memory {text!r} is no amount of memory; write bytes with k, M or G, such as 24G")
    return int(float(found[1]) * _PREFIXES[found[2]])


@dataclass(frozen=True)
class _Ask:
    """What is asked for; rates in bytes a second."""

    recipe: str
    overrides: list[str]
    twin: bool
    nodes: int
    upload: float
    download: float
    round_trip: float
    hours: float
    tokens_per_second: float | None
    memory: int | None
    price: float | None

    def load(self, more: Sequence[str] = ()) -> Recipe:
        """The recipe with further overrides."""
        from psyche_lightning.recipe import load_recipe

        return load_recipe(self.recipe, [*self.overrides, *more], twin=self.twin)


def _plan(ask: _Ask, seconds: float, progress: Callable[[str, float], None]) -> _Plan:
    from psyche_lightning.doctor import machine, plan, prediction
    from psyche_lightning.doctor.speed import measure_all
    from psyche_lightning.recipe.estimate import estimate, meta_model, muon_matrices

    base = ask.load()
    progress("the model's size", 0.0)
    model = meta_model(base)
    device, _ = machine.choose_device(base)
    settings, left_out = list(plan.SETTINGS), []
    if not muon_matrices(base, model):
        settings = [one for one in settings if one.optimizer != "muon"]
        left_out.append("Muon: the model has no hidden matrices that it trains.")
    if base.trainer.gradients == "streamed":
        settings = [one for one in settings if one.optimizer != "muon" and not one.local_steps]
        left_out.append("Muon and local steps: they need gradients that are kept (trainer.gradients).")
    if base.trainer.precision == "16-mixed":
        settings = [one for one in settings if not one.local_steps]
        left_out.append("Local steps: they do not work with 16-mixed.")

    def with_setting(setting: Setting) -> tuple[Setting, Recipe]:
        values = {**setting.values(base), **plan.batch(base, ask.nodes, setting.steps)}
        return setting, ask.load(plan.overrides(base, values))

    recipes = [(plan.own_setting(base), base), *map(with_setting, settings)]
    sizes = [estimate(recipe, model) for _, recipe in recipes]
    memory = ask.memory
    here = machine.free_memory(device)
    if memory is None and ask.tokens_per_second is None:
        memory = here
    folder = Path(base.node.directory or f"psyche-{base.name}")
    share = plan.batch(base, ask.nodes, 1)["run.global_batch_size_end"] // ask.nodes
    speeds = measure_all(
        [recipe for _, recipe in recipes],
        sizes[0],
        device,
        nodes=ask.nodes,
        most=share,
        fits=here is None or sum(sizes[0].memory.values()) <= here,
        seconds=seconds,
        tokens_per_second=ask.tokens_per_second,
        progress=progress,
    )
    network = prediction.network(
        base.node.transport_options, links=[], reading=None, url=None, answered=[], upload=ask.upload,
        download=ask.download, round_trip=ask.round_trip,
    )  # fmt: skip
    written = machine.write_seconds(folder)

    def predicted(setting: Setting, recipe: Recipe, number: int) -> Option:
        return plan.option(
            setting, recipe, sizes[number], speeds[number], network, nodes=ask.nodes, seconds=3600 * ask.hours,
            memory=memory, write_seconds=written,
        )  # fmt: skip

    options = [predicted(setting, recipe, number) for number, (setting, recipe) in enumerate(recipes)]
    chosen = plan.choose(options)
    made = _Plan(ask, base, network, speeds[0], options, chosen, left_out)
    if chosen is None:
        return made
    number = options.index(chosen)
    if not chosen.setting.overlap and ask.nodes > 1:
        twin = replace(chosen.setting.unmeasured, overlap=True)
        if twin not in [one.setting.unmeasured for one in options]:
            options.insert(number + 1, predicted(twin, ask.load([*made.differing(), "run.overlap=true"]), number))
    made.lasting = plan.overrides(chosen.recipe, plan.lasting(chosen))
    ask.load(made.proposed())  # the recipe accepts them
    return made


@dataclass
class _Plan:
    """What is proposed, and among what it was chosen."""

    ask: _Ask
    base: Recipe
    network: Network
    speed: TrainingSpeed
    options: list[Option]
    chosen: Option | None
    left_out: list[str]
    lasting: Sequence[str] = ()

    def differing(self) -> list[str]:
        """The chosen setting's values that differ from the recipe's."""
        from psyche_lightning.doctor import plan

        if self.chosen is None or self.chosen.recipe is self.base:
            return []
        setting = self.chosen.setting
        return plan.overrides(
            self.base, {**setting.values(self.base), **plan.batch(self.base, self.ask.nodes, setting.steps)}
        )

    def proposed(self) -> list[str]:
        """All values to write behind the recipe, besides the given ones."""
        return [*self.differing(), *self.lasting]

    @property
    def command(self) -> list[str]:
        """The words of a command that trains with them."""
        twin = ["--twin"] * self.ask.twin
        return ["psyche", "train", self.ask.recipe, *twin, *self.ask.overrides, *self.proposed()]

    @property
    def dollars(self) -> float | None:
        """Price of what all nodes send with the chosen setting."""
        if self.ask.price is None or self.chosen is None:
            return None
        return self.ask.price * self.chosen.sent * self.ask.nodes / 1e9

    def as_json(self) -> dict[str, Any]:
        """All figures; bytes, seconds, tokens and dollars."""
        from psyche_lightning.doctor import plan

        ask, chosen = self.ask, self.chosen
        made = None
        if chosen is not None:
            made = {
                **chosen.as_json(),
                "overrides": self.proposed(),
                "command": shlex.join(self.command),
                "dollars": self.dollars,
                "not_measured": list(plan.unmeasured(chosen, self.base)),
            }
        return {
            "recipe": self.base.name,
            "nodes": ask.nodes,
            "hours": ask.hours,
            "price": ask.price,
            "network": asdict(self.network),
            "speed": asdict(self.speed),
            "tokens_per_second_of_a_node": self.base.data.seq_len / self.speed.sample_seconds,
            "all_reduce_loss": plan.ALL_REDUCE_LOSS,
            "losses_measured_with": plan.CONDITIONS,
            "settings": [one.as_json() for one in self.options],
            "left_out": self.left_out,
            "chosen": made,
        }

    def show(self, console: Console) -> None:
        """Print the table, and below it what is chosen, why, and what limits it."""
        from psyche_lightning.doctor import plan
        from psyche_lightning.doctor.prediction import limit_of, parts_of

        ask, chosen, wide = self.ask, self.chosen, console.soft_wrap
        alone = self.base.data.seq_len / self.speed.sample_seconds

        def say(name: str, text: str, style: str = "") -> None:
            if wide:
                lines = [text]
            else:
                lines = textwrap.wrap(text, console.width - 10, break_long_words=False, break_on_hyphens=False)
            for number, line in enumerate(lines):
                console.print(Text.assemble((f"{name if not number else '':<10}", "bold"), (line, style)))

        def rate(value: float) -> str:
            return f"{scaled(8 * value, (' bit', ' kbit', ' Mbit', ' Gbit'))}/s"

        link = f"{rate(ask.upload)} up, {rate(ask.download)} down, {duration(ask.round_trip)} there and back"
        say("run", f"{self.base.name}, {counted(ask.nodes, 'node')}, {ask.hours:g} h")
        say("link", link)
        say("speed", f"{tokens_text(alone)} of one node alone: {self.speed.how}")
        console.print()
        console.print(self._table())
        console.print()
        note = (
            "•: the recipe as it is. fewer: times fewer bytes than an all-reduce at each step. busy: share of the time "
            "in which a node computes. sent: bytes of a node in all. gap: nats a byte above AdamW with an "
            f"all-reduce, as measured by `psyche bench quality` ({plan.CONDITIONS}); - was not measured."
        )
        say("", note, "dim")
        for reason in self.left_out:
            say("", f"Left out: {reason}", "dim")
        console.print()
        if chosen is None:
            say("chosen", self._why_none(), "bold red")
            return
        setting, given = chosen.setting, chosen.given
        samples = f"{counted(given.samples, 'sample')} of {counted(given.seq_len, 'token')} a round"
        overlap = "overlap" if setting.overlap else "no overlap"
        say("chosen", f"{setting.form}, {setting.density}, {overlap}, {samples}", "bold green")
        say(
            "why",
            f"The most tokens/s of the settings whose measured loss is at most {plan.NEAR} above that of AdamW with an "
            f"all-reduce; of those within {1 - plan.ALIKE:.0%} of it, the lowest ({setting.gap:+.3f} after "
            f"{setting.trained:,} steps).",
        )
        total = f"{count(chosen.tokens)} tokens in {chosen.rounds:,} rounds"
        say("gives", f"{tokens_text(chosen.prediction.tokens_per_second)} of {counted(ask.nodes, 'node')}, {total}")
        say("round", f"{duration(chosen.prediction.round_seconds)}: {parts_of(given, chosen.prediction)}")
        what, share = limit_of(chosen.prediction)
        say("limit", f"{what}, {share:.0%} of a round; a node computes {chosen.prediction.utilization:.0%} of the time")
        traffic = f"{size(chosen.sent)} sent by a node, {size(chosen.sent * ask.nodes)} by all"
        if self.dollars is None:
            say("traffic", f"{traffic}; --price says what that costs")
        else:
            say("traffic", f"{traffic}: ${self.dollars:,.2f} at ${ask.price:g} a GB")
        have = "not compared, as --memory is not given" if chosen.memory is None else f"{size(chosen.memory)} there"
        parts = ", ".join(f"{name} {size(amount)}" for name, amount in chosen.estimate.memory.items())
        copied = f"{size(chosen.estimate.copied)} of main memory while a checkpoint is written"
        say("memory", f"{size(chosen.needed)} without activations ({parts}), and {copied}; {have}")
        if setting.rate is not None:
            say(
                "rate",
                f"not planned: there the best one was {setting.rate:g}, and 0.004 for AdamW with an all-reduce; the "
                f"recipe has optimizer.lr={self.base.optimizer.lr:g}",
            )
        faster = max(self.options, key=lambda one: one.prediction.tokens_per_second * one.fits)
        more = faster.prediction.tokens_per_second / chosen.prediction.tokens_per_second
        if more > FASTER:
            above = "was not measured"
            if faster.setting.gap is not None:
                above = f"was {faster.setting.gap:.3f} above that of the all-reduce"
            name = f"{faster.setting.form}, {faster.setting.density}"
            say("faster", f"{name}: {more:.3g} times the tokens/s, but its loss {above}")
        for number, text in enumerate(plan.unmeasured(chosen, self.base)):
            say("unknown" if not number else "", text)
        console.print()
        print(shell_lines(self.command))

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("")
        table.add_column("", no_wrap=True)
        table.add_column("k", no_wrap=True)
        for name in ("fewer", "busy", "tokens/s", "tokens", "sent", "gap"):
            table.add_column(name, justify="right", no_wrap=True)
        for one in self.options:
            found = one.prediction
            cells = [
                "→" if one is self.chosen else "•" if one.recipe is self.base else "",
                one.setting.form,
                one.setting.density,
                "-" if one.fewer is None else f"{one.fewer:,.0f}",
                f"{found.utilization:.0%}",
                count(found.tokens_per_second),
                count(one.tokens) if one.fits else "too",
                size(one.sent) if one.fits else "large",
                "-" if one.setting.gap is None else f"{one.setting.gap:+.3f}",
            ]
            style = "bold green" if one is self.chosen else "" if one.setting.proposed else "dim"
            table.add_row(*cells, style=style)
        return table

    def _why_none(self) -> str:
        some = [one for one in self.options if one.setting.proposed]
        if some and not any(one.fits for one in some):
            need, have = min(one.needed for one in some), some[0].memory or 0
            return f"nothing: memory limits. The model needs {size(need)} without activations; there are {size(have)}."
        shortest = min((one.prediction.round_seconds for one in some), default=math.inf)
        return f"nothing: no round fits into {self.ask.hours:g} h; the shortest takes {duration(shortest)}."


def tokens_text(rate: float) -> str:
    """Tokens a second for people."""
    return f"{rate:,.0f} tokens/s" if rate >= 100 else f"{rate:.3g} tokens/s"


def shell_lines(words: Sequence[str]) -> str:
    """A command in lines that a shell reads as one, and a terminal of 80 columns shows whole."""
    lines, line = [], ""
    for word in map(shlex.quote, words):
        if line and len(line) + len(word) + 1 > WIDTH - 2:
            lines.append(f"{line} \\")
            line = "   "
        line += f" {word}" if line else word
    return "\n".join([*lines, line])
