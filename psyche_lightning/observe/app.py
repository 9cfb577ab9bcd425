"""The terminal program that shows a time line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import DataTable, Footer, Input, Static

from psyche_lightning.chronicle.entry import COORDINATOR, Entry, Kind
from psyche_lightning.errors import counted
from psyche_lightning.observe.timeline import AROUND, Mark, Place, Timeline, clock, what
from psyche_lightning.text import plain

LOOK = 1.0
"""Seconds between looks for news."""
AHEAD = 100_000
"""Entries up to which older files are read without being asked for, as soon as the newest are shown."""
PAUSE = 0.05
"""Seconds between two of these files, in which keys are heard."""
ROWS = 2000
"""Most entries in the list; a filter finds others."""
NAME = 13
"""Columns of a node's name."""
VIEWS = {
    "round": "what happened in the round",
    "node": "what the node did in the round",
    "waits": "its waits, one after the other",
    "around": "all that happened around this moment",
    "faults": "all faults",
}
HELP = """\
left, right        a round back, a round on          up, down     another node
[, ]               ten rounds back, on               home, end    first round, newest round
f, F               next, previous fault              g            go to a round, such as 12 or 0/12
r                  what happened in the round        n            what the node did in it
w                  the node's queue of waits         a            all that happened around this moment
e                  all faults                        /            show only what contains a text
page up, page down the list                          ?            this help
q, Ctrl-C          quit

Marks, from the least to the most:  o under way   = handed in   + decided   # applied
                                    - absent   ~ late   ! trouble   X gone
A list in which `end` is chosen follows a run that goes on."""
_SIGNS: Sequence[tuple[Mark, str, str]] = (
    (Mark.GONE, "X", "bold white on red"),
    (Mark.TROUBLE, "!", "bold red"),
    (Mark.LATE, "~", "yellow"),
    (Mark.ABSENT, "-", "bold yellow"),
    (Mark.APPLIED, "#", "green"),
    (Mark.DECIDED, "+", "green"),
    (Mark.TRAINED, "=", "cyan"),
    (Mark.OPENED, "o", "dim"),
)


def sign(mark: Mark) -> tuple[str, str]:
    """A mark's character and style."""
    return next(((char, style) for one, char, style in _SIGNS if mark & one), (".", "dim"))


class Grid(Widget):
    """Nodes by rounds, each with a mark; the chosen one is shown in reverse.

    Args:
        line: the time line.
    """

    DEFAULT_CSS = "Grid { height: auto; max-height: 45%; }"

    def __init__(self, line: Timeline) -> None:
        super().__init__()
        self.line = line
        self.at = max(0, len(line.moments) - 1)
        self.row = 0

    @property
    def node(self) -> str:
        """The chosen node."""
        nodes = self.line.nodes
        return nodes[min(self.row, len(nodes) - 1)] if nodes else ""

    @property
    def place(self) -> Place | None:
        """The chosen round."""
        return self.line.moments[self.at].place if self.line.moments else None

    def render(self) -> Text:
        """The part of the table around the chosen round."""
        moments, nodes = self.line.moments, self.line.nodes
        width = max(1, self.size.width - NAME - 1)
        first = max(0, min(self.at - width // 2, len(moments) - width))
        shown = moments[first : first + width]
        scale = [" "] * len(shown)
        for column, moment in enumerate(shown):
            label = str(moment.place[1])
            begins = column == 0 or moment.place[0] != shown[column - 1].place[0]
            if moment.place[1] % 10 == 0 or begins:
                label = f"{moment.place[0]}/{label}" if begins else label
                if column + len(label) <= len(scale) and all(
                    each == " " for each in scale[max(0, column - 1) : column]
                ):
                    scale[column : column + len(label)] = label
        out = Text(f"{'epoch/round':<{NAME}}" + "".join(scale), style="dim", no_wrap=True)
        # As many rows as there is room for, with the chosen one among them.
        room = max(1, self.size.height - 1) if self.size.height else len(nodes)
        top = max(0, min(self.row - room // 2, len(nodes) - room))
        for row, node in enumerate(nodes[top : top + room], top):
            out.append("\n")
            out.append(f"{plain(node)[: NAME - 1]:<{NAME}}", style="bold reverse" if row == self.row else "")
            for column, moment in enumerate(shown, first):
                char, style = sign(self.line.mark(node, moment.place))
                chosen = column == self.at
                out.append(char, style=f"{style} reverse" if chosen and row == self.row else style)
        return out

    def get_content_height(self, container: object, viewport: object, width: int) -> int:
        """One row for each node, and the scale."""
        return len(self.line.nodes) + 1

    def move(self, rounds: int = 0, nodes: int = 0) -> None:
        """Choose another round or node."""
        self.at = max(0, min(self.at + rounds, len(self.line.moments) - 1))
        self.row = max(0, min(self.row + nodes, len(self.line.nodes) - 1))
        self.refresh(layout=True)


class Help(ModalScreen[None]):
    """The keys."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark,enter", "dismiss", "close")]
    DEFAULT_CSS = "Help { align: center middle; } Help Static { width: auto; padding: 1 2; background: $surface; }"

    def compose(self) -> ComposeResult:
        """A text in the middle."""
        yield Static(Text(HELP))


class Observer(App[None]):
    """Shows a time line, and follows it.

    Args:
        line: the time line.
        took: how long it took to read; for the title.
        live: whether to look for news.
    """

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #title { background: $primary; color: $text; height: 1; }
    #detail { height: auto; max-height: 9; padding: 0 1; border-top: solid $primary; }
    #ask { dock: bottom; display: none; }
    DataTable { height: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "move(-1)", "rounds", key_display="←→"),
        Binding("right", "move(1)", show=False),
        Binding("left_square_bracket", "move(-10)", show=False),
        Binding("right_square_bracket", "move(10)", show=False),
        Binding("home", "first", show=False),
        Binding("end", "last", "newest"),
        Binding("up", "node(-1)", "nodes", key_display="↑↓"),
        Binding("down", "node(1)", show=False),
        Binding("f", "fault(1)", "next fault"),
        Binding("F", "fault(-1)", show=False),
        Binding("r", "view('round')", "round"),
        Binding("n", "view('node')", "node"),
        Binding("w", "view('waits')", "waits"),
        Binding("a", "view('around')", "around"),
        Binding("e", "view('faults')", "faults"),
        Binding("g", "ask('go to round: ')", "go to"),
        Binding("slash", "ask('/')", "filter"),
        Binding("pageup", "page(-1)", show=False),
        Binding("pagedown", "page(1)", show=False),
        Binding("question_mark", "help", "help"),
        Binding("escape", "forget", show=False),
        Binding("q,ctrl+c", "quit", "quit"),
    ]

    def __init__(self, line: Timeline, took: float = 0.0, *, live: bool = True) -> None:
        super().__init__()
        self.line = line
        self.grid = Grid(line)
        self.shown: list[Entry] = []
        self.view = "round"
        self.filter = ""
        self._took = took
        self._live = live
        self._moment: float | None = None
        self._asked = ""

    def compose(self) -> ComposeResult:
        """Title, table of nodes and rounds, what is known of the chosen one, and a list of entries."""
        yield Static(id="title")
        yield self.grid
        yield VerticalScroll(Static(id="detail"), id="details")
        yield DataTable(cursor_type="row", id="list")
        yield Input(id="ask")
        yield Footer()

    def on_mount(self) -> None:
        """Choose the newest fault, or else the newest round."""
        self.query_one("#details").styles.height = "auto"
        table = self._table
        table.add_columns("time", "who", "round", "kind", "seconds", "what")
        table.can_focus = False
        self._look()
        if self._live:
            self.set_interval(LOOK, self.follow)
            self.call_after_refresh(self._read_ahead)

    def _read_ahead(self) -> None:
        """Read the next older files, and go on with the ones before them once the keys have been heard."""
        if len(self.line.entries) < AHEAD and self._read_older():
            self._look()
            self.grid.refresh(layout=True)
            self.set_timer(PAUSE, self._read_ahead)

    @property
    def _table(self) -> DataTable[Text]:
        return self.query_one("#list", DataTable)

    async def picture(self, size: tuple[int, int]) -> str:
        """Draw what is shown at first, without a terminal; returns it as SVG.

        Args:
            size: columns and lines.
        """
        while len(self.line.entries) < AHEAD and self.line.more():
            pass
        async with self.run_test(size=size) as pilot:
            faults = self.line.faults()
            if faults:
                self.go_to(faults[0])
            await pilot.pause()
            # Without its links to fonts on another host.
            return re.sub(r"@font-face \{.*?\}\s*", "", self.export_screenshot(title="psyche observe"), flags=re.DOTALL)

    # --- keys ---------------------------------------------------------------------------------------------------------

    def action_move(self, rounds: int) -> None:
        """Go some rounds back or on; before the first one, older files are read."""
        while self.grid.at + rounds < 0 and self._read_older():
            pass
        self.grid.move(rounds=rounds)
        self._moment = None
        self._look("round" if self.view in ("around", "faults") else None)

    def action_node(self, nodes: int) -> None:
        """Choose another node."""
        self.grid.move(nodes=nodes)
        self._look()

    def action_first(self) -> None:
        """Go to the first round."""
        while self._read_older():
            pass
        self.action_move(-len(self.line.moments))

    def action_last(self) -> None:
        """Go to the newest round."""
        self.action_move(len(self.line.moments))

    def action_view(self, view: str) -> None:
        """Show something else in the list."""
        self._look(view)

    def action_fault(self, way: int) -> None:
        """Go to the next or the previous fault, and show what happened around it."""
        now = self._moment
        if now is None:
            now = self.line.moments[self.grid.at].began if self.line.moments else 0.0
        faults = self.line.faults()
        found = [fault for fault in faults if (fault.time > now if way > 0 else fault.time < now)]
        while not found and way < 0 and self._read_older():
            found = [fault for fault in self.line.faults() if fault.time < now]
        if not found:
            self.bell()
            return
        self.go_to(found[0] if way > 0 else found[-1])

    def go_to(self, entry: Entry) -> None:
        """Choose an entry's node and round, and show what happened around it."""
        place, nodes = self.line.place_of(entry), self.line.nodes
        places = [moment.place for moment in self.line.moments]
        if place in places:
            self.grid.at = places.index(place)
        names = [name for name in self.line.concerned(entry) if name in nodes]
        if names:
            self.grid.row = nodes.index(names[0])
        self._moment = entry.time
        self.grid.refresh(layout=True)
        self._look("around")

    def action_page(self, way: int) -> None:
        """Leaf through the list."""
        table = self._table
        if way > 0:
            table.action_page_down()
        else:
            table.action_page_up()

    def action_help(self) -> None:
        """Show the keys."""
        self.push_screen(Help())

    def action_ask(self, what: str) -> None:
        """Let the user type a round or a text."""
        self._asked = what
        field = self.query_one("#ask", Input)
        field.value, field.placeholder = "", what
        field.styles.display = "block"
        field.focus()

    def action_forget(self) -> None:
        """Forget the filter."""
        self._close_field()
        self.filter = ""
        self._look()

    def _close_field(self) -> None:
        field = self.query_one("#ask", Input)
        field.styles.display = "none"
        self.set_focus(None)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Go to the round that was typed, or show what contains the text."""
        self._close_field()
        text = event.value.strip()
        if self._asked == "/":
            self.filter = text
        elif text:
            self._seek(text)
        self._look()

    def _seek(self, text: str) -> None:
        epoch, _, height = text.rpartition("/")
        if not height.isdecimal() or (epoch and not epoch.isdecimal()):
            self.notify(f"{text!r} is no round, such as 12 or 0/12", severity="warning")
            return
        while True:
            for index, moment in enumerate(self.line.moments):
                if moment.place[1] == int(height) and (not epoch or moment.place[0] == int(epoch)):
                    self.grid.at = index
                    self.action_move(0)
                    return
            if not self._read_older():
                break
        self.notify(f"there is no round {text}", severity="warning")

    # --- what is shown ------------------------------------------------------------------------------------------------

    def _read_older(self) -> bool:
        """Read older files; the chosen round stays chosen."""
        before, chosen = len(self.line.moments), self.grid.place
        read = self.line.more()
        if chosen is not None:
            self.grid.at = next(at for at, moment in enumerate(self.line.moments) if moment.place == chosen)
        return read and (len(self.line.moments) > before or self._read_older())

    def follow(self) -> None:
        """Show what was written since the last look."""
        newest = self.grid.at >= len(self.line.moments) - 1
        if self.line.news():
            if newest and self.view in ("round", "node", "waits"):
                self.grid.at = max(0, len(self.line.moments) - 1)
            self.grid.refresh(layout=True)
            self._look()

    def _look(self, view: str | None = None) -> None:
        """Show what is chosen."""
        self.view = view or self.view
        grid, place = self.grid, self.grid.place
        self.query_one("#title", Static).update(self._title())
        self.query_one("#detail", Static).update(self._detail())
        match self.view:
            case "waits":
                found = self.line.waits(grid.node, place)
            case "around":
                moment = self._moment
                if moment is None:
                    moment = self.line.moments[grid.at].began if place is not None else 0.0
                found = [*self.line.between(moment - AROUND, moment + AROUND)]
                found += [end for end in self.line.ends if abs(end.time - moment) <= AROUND]
                found.sort(key=lambda entry: entry.time)
            case "faults":
                found = self.line.faults()
            case "node":
                found = [] if place is None else self.line.of_round(place, grid.node)
            case _:
                found = self.line.entries[-ROWS:] if place is None else self.line.of_round(place)
        if self.filter:
            wanted = self.filter.casefold()
            found = [
                one
                for one in found
                if wanted in f"{one.node} {one.kind.value} {' '.join(one.about)} {one.text}".casefold()
            ]
        self.shown = found[-ROWS:]
        self._fill()

    def _fill(self) -> None:
        table = self._table
        table.clear()
        for entry in self.shown:
            style = "bold red" if entry.kind.bad else "yellow" if entry.kind in (Kind.LATE, Kind.ABSENT) else ""
            place = self.line.place_of(entry)
            seconds = "" if entry.seconds is None else f"{entry.seconds:.2f}"
            table.add_row(
                Text(clock(entry.time)),
                Text(plain(entry.node)),
                Text("" if place is None else f"{place[0]}/{place[1]}"),
                Text(entry.kind.value, style=style),
                Text(seconds, justify="right"),
                Text(what(entry), style=style),
            )
        if self._moment is not None and self.view == "around":
            rows = [index for index, entry in enumerate(self.shown) if entry.time <= self._moment]
            table.move_cursor(row=rows[-1] if rows else 0)
            table.scroll_to(y=max(0, (rows[-1] if rows else 0) - 4), animate=False)
        elif self.view in ("waits", "faults"):
            table.move_cursor(row=len(self.shown) - 1)

    def _title(self) -> Text:
        line = self.line
        writers = len([name for name in line.nodes if name != COORDINATOR])
        title = f" run {line.run}: {counted(writers, 'node')}, {counted(len(line.moments), 'round')}, "
        title += f"{counted(len(line.entries), 'event')}"
        title += f" in {self._took:.1f} s" if self._took else ""
        title += "" if line.whole else ", and older ones"
        title += f", {counted(line.damaged, 'torn line')}" if line.damaged else ""
        others = [run for run in line.runs if run != line.run]
        title += f"; other runs: {', '.join(others[:4])}" if others else ""
        return Text(plain(title), no_wrap=True, overflow="ellipsis")

    def _detail(self) -> Text:
        """What is known of the chosen node in the chosen round."""
        grid, line, place = self.grid, self.line, self.grid.place
        if place is None:
            return Text("no round yet")
        moment = line.moments[grid.at]
        mark = line.mark(grid.node, place)
        mine = line.of_round(place, grid.node)
        out = Text()
        out.append(f"{plain(grid.node)}", style="bold")
        step = "a drain round" if moment.step is None else f"step {moment.step}"
        out.append(f" in round {place[1]} of epoch {place[0]} ({step}, from {clock(moment.began)}): ")
        out.append(mark.state or "nothing known", style=sign(mark)[1])
        own = {entry.kind: entry for entry in mine if entry.node == grid.node}
        times = [
            f"{kind.value} after {entry.seconds:.2f} s"
            for kind in (Kind.TRAINED, Kind.DECIDED, Kind.APPLIED)
            if (entry := own.get(kind)) is not None and entry.seconds is not None
        ]
        waited = sum(entry.seconds or 0.0 for entry in mine if entry.node == grid.node and entry.kind is Kind.WAIT)
        times += [f"waited {waited:.2f} s"] if waited else []
        out.append(f"\n{', '.join(times)}" if times else "")
        for entry in [one for one in mine if one.kind is Kind.ABSENT and grid.node in one.about][:1]:
            out.append(f"\n{plain(entry.text)}", style="yellow")
        for end in [one for one in line.ends if one.node == grid.node and line.place_of(one) == place]:
            out.append(f"\n{plain(end.text)}", style="bold red")
        shown = f"{VIEWS[self.view]}" + (f" that contain {self.filter!r}" if self.filter else "")
        out.append(f"\nshown: {shown}", style="dim")
        return out
