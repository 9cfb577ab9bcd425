"""``psyche observe``: a time line from event files, the terminal program on it, and what it prints for scripts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from support.killed import NODES, STEPS, killed

from psyche_lightning.chronicle.entry import COORDINATOR, SIMULATOR, Entry, Kind, line_of
from psyche_lightning.chronicle.reader import find_books
from psyche_lightning.chronicle.writer import Chronicle
from psyche_lightning.cli import main
from psyche_lightning.observe.app import Help, Observer
from psyche_lightning.observe.timeline import Mark, Timeline

LOST = 3
"""The round in which a node is killed."""


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    path.write_bytes(b"".join(line_of(entry.values()) for entry in killed()))
    return path


@pytest.fixture
def line(trace: Path) -> Timeline:
    return Timeline(find_books([trace]))


@pytest.fixture
def folders(trace: Path, tmp_path: Path) -> Path:
    """The same history as each would have written it, in a folder of its own, as a demo has them."""
    [book] = find_books([trace])
    files: dict[str, Chronicle] = {}
    for entry in book.news():
        if entry.node not in files:
            files[entry.node] = Chronicle(tmp_path / entry.node, node=entry.node, run=entry.run, segment=2_000)
        files[entry.node].add(entry)
    for each in files.values():
        each.close()
    return tmp_path


def the_kill(line: Timeline) -> tuple[Entry, str]:
    [kill] = [entry for entry in line.entries if entry.kind is Kind.FAULT and "is killed" in entry.text]
    return kill, kill.about[0]


def test_it_shows_when_and_why_a_node_ended(line: Timeline) -> None:
    kill, victim = the_kill(line)
    [end] = [one for one in line.ends if one.node == victim and one.time < kill.time + 1]
    assert kill.time - 3 < end.time <= kill.time
    assert f"{SIMULATOR}, {kill.time - end.time:.1f} s later: {victim} is killed" in end.text
    assert f"{victim} is gone: no connection" in end.text
    place = line.place_of(end)
    assert place is not None
    assert line.mark(victim, place) & Mark.GONE
    assert end in line.faults()
    assert {one.node for one in line.ends} == {victim}  # all others left


def test_nodes_by_rounds(line: Timeline) -> None:
    _, victim = the_kill(line)
    assert line.nodes[0] == COORDINATOR
    assert len(line.nodes) == 1 + NODES
    assert SIMULATOR not in line.nodes
    assert [moment.place for moment in line.moments] == [(0, height) for height in range(STEPS + 1)]
    assert [moment.step for moment in line.moments] == [*range(1, STEPS + 1), None]
    others = [node for node in line.nodes if node not in (victim, COORDINATOR)]
    assert {line.mark(node, (0, LOST)).state for node in others} == {"applied"}
    assert line.mark(COORDINATOR, (0, LOST)).state == "decided"
    assert any(line.mark(victim, (0, height)) & Mark.ABSENT for height in (LOST, LOST + 1))
    assert line.mark(victim, (0, LOST + 2)) == Mark(0)
    mine = line.of_round((0, 3), others[0])
    assert {Kind.OPENED, Kind.TRAINED, Kind.RECEIVED, Kind.DECIDED, Kind.APPLIED} <= {entry.kind for entry in mine}
    assert all(others[0] in (entry.node, *entry.about) for entry in mine)


def test_a_queue_of_waits_says_for_whom_each_was(line: Timeline) -> None:
    kill, victim = the_kill(line)
    node = next(node for node in line.nodes if node not in (victim, COORDINATOR))
    waits = line.waits(node)
    assert [wait.time for wait in waits] == sorted(wait.time for wait in waits)
    assert any(wait.about == (victim,) and wait.time > kill.time for wait in waits)
    assert all(wait.seconds is not None for wait in waits[:-1])  # those that are over are there once
    assert all((line.place_of(wait) or (0, 0)) <= (0, 2) for wait in line.waits(node, (0, 2)))


def test_folders_give_what_the_trace_gives_and_older_files_are_read_when_asked_for(
    folders: Path, line: Timeline
) -> None:
    def key(entry: Entry) -> tuple[float, str, str]:
        return entry.time, entry.node, entry.text

    some = Timeline(find_books([folders]), recent=10)
    assert not some.whole
    newest = len(some.entries)
    assert newest < len(line.entries)
    while some.more():
        pass
    assert some.whole
    assert sorted(some.entries, key=key) == sorted(line.entries, key=key)
    assert [moment.place for moment in some.moments] == [moment.place for moment in line.moments]
    assert [one.text for one in some.ends] == [one.text for one in line.ends]
    for node in line.nodes:
        assert [some.mark(node, m.place) for m in some.moments] == [line.mark(node, m.place) for m in line.moments]


def test_a_node_that_starts_again_without_having_left_was_killed(tmp_path: Path) -> None:
    for time, kind in [
        (1.0, Kind.START),
        (5.0, Kind.TRAINED),
        (9.0, Kind.START),
        (12.0, Kind.LEAVE),
        (20.0, Kind.START),
    ]:
        files = Chronicle(tmp_path, node="aabb", run="run")
        files.add(Entry(time, kind, epoch=0, round=0, step=1))
        files.close()
    line = Timeline(find_books([tmp_path]))
    assert [(end.time, end.node) for end in line.ends] == [(5.0, "aabb")]  # the life that goes on may be well


def observing(line: Timeline, act: Callable[[Observer, Any], Awaitable[None]], *, live: bool = False) -> None:
    async def run() -> None:
        app = Observer(line, live=live)
        async with app.run_test(size=(100, 30)) as pilot:
            await act(app, pilot)

    asyncio.run(run())


def test_keys_go_to_faults_rounds_nodes_and_waits(line: Timeline) -> None:
    _, victim = the_kill(line)

    async def act(app: Observer, pilot: Any) -> None:
        assert app.grid.place == (0, STEPS)
        await pilot.press("home")
        assert app.grid.place == (0, 0)
        await pilot.press("f")
        assert (app.view, app.grid.node) == ("around", victim)
        assert app.grid.place == (0, LOST)
        assert any(entry in line.ends for entry in app.shown)
        assert "ends here without leaving" in str(app.query_one("#detail").render())
        await pilot.press("w")
        assert {(entry.kind, entry.node) for entry in app.shown} == {(Kind.WAIT, victim)}
        await pilot.press("left", "n", "up")
        assert app.grid.place == (0, LOST - 1)
        assert app.shown
        assert all(app.grid.node in (entry.node, *entry.about) for entry in app.shown)
        await pilot.press("g", "0", "/", "2", "enter", "r")
        assert app.grid.place == (0, 2)
        assert {line.place_of(entry) for entry in app.shown} == {(0, 2)}
        await pilot.press("slash", *"decided", "enter")
        assert {entry.kind for entry in app.shown} == {Kind.DECIDED}
        await pilot.press("escape", "e")
        assert app.shown == line.faults()
        await pilot.press("question_mark")
        assert isinstance(app.screen, Help)
        await pilot.press("escape", "end")
        assert app.grid.place == (0, STEPS)

    observing(line, act)


def test_a_round_of_an_older_file_is_found(folders: Path) -> None:
    line = Timeline(find_books([folders]), recent=10)
    assert line.moments[0].place > (0, 0)

    async def act(app: Observer, pilot: Any) -> None:
        await pilot.press("g", "0", "enter")
        assert app.grid.place == (0, 0)
        await pilot.press("g", "9", "9", "enter")
        assert app.grid.place == (0, 0)
        assert line.whole

    observing(line, act)


def test_older_files_are_read_while_the_newest_are_shown(folders: Path, line: Timeline) -> None:
    some = Timeline(find_books([folders]), recent=10)

    async def act(app: Observer, pilot: Any) -> None:
        chosen = app.grid.place
        while not some.whole:
            await pilot.pause(0.05)
        assert app.grid.place == chosen
        assert len(some.entries) == len(line.entries)

    observing(some, act, live=True)


def test_the_fault_before_is_found_in_an_older_file(folders: Path) -> None:
    line = Timeline(find_books([folders]), recent=10)

    async def act(app: Observer, pilot: Any) -> None:
        before: float | None = -1.0
        while app._moment != before:
            before = app._moment
            await pilot.press("F")
        assert line.whole
        assert app._moment == line.faults()[0].time

    observing(line, act)


@pytest.mark.parametrize("key", ["q", "ctrl+c"])
def test_keys_that_end_it(line: Timeline, key: str) -> None:
    async def act(app: Observer, pilot: Any) -> None:
        await pilot.press(key)
        await pilot.pause()
        assert not app.is_running

    observing(line, act)


def test_it_follows_a_run_that_goes_on(tmp_path: Path) -> None:
    files = Chronicle(tmp_path, node="aabb", run="run")
    files.add(Entry(1.0, Kind.OPENED, epoch=0, round=0, step=1))
    line = Timeline(find_books([tmp_path]))

    async def act(app: Observer, pilot: Any) -> None:
        assert app.grid.place == (0, 0)
        files.add(Entry(2.0, Kind.OPENED, epoch=0, round=1, step=2))
        app.follow()
        await pilot.pause()
        assert app.grid.place == (0, 1)
        await pilot.press("left")
        files.add(Entry(3.0, Kind.OPENED, epoch=0, round=2, step=3))
        app.follow()
        assert app.grid.place == (0, 0)  # who looks at something is not led away

    observing(line, act)


def test_an_empty_file_shows_no_round(tmp_path: Path) -> None:
    Chronicle(tmp_path, node="aabb", run="run").close()

    async def act(app: Observer, pilot: Any) -> None:
        await pilot.press("left", "f", "w", "n", "r", "home", "end")
        assert app.shown == []

    observing(Timeline(find_books([tmp_path])), act)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["observe", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_json_filters_and_can_be_opened_again(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = printed(capsys, str(trace), "--json")
    rows = [json.loads(text) for text in everything]
    assert len(rows) > 400
    victim = next(row["about"][0] for row in rows if "is killed" in row.get("text", ""))
    waits = [
        json.loads(text) for text in printed(capsys, str(trace), "--json", "--kind", "wait,fault", "--node", victim)
    ]
    assert {row["kind"] for row in waits} == {"wait", "fault"}
    assert all(victim in (row["node"], *row.get("about", [])) for row in waits)
    round_ = [json.loads(text) for text in printed(capsys, str(trace), "--json", "--round", "0/3")]
    assert {(row["epoch"], row["round"]) for row in round_} == {(0, 3)}
    assert len(round_) == sum(row.get("round") == 3 for row in rows)
    again = tmp_path / "again.jsonl"
    again.write_text("\n".join(everything) + "\n")
    assert Timeline(find_books([again])).moments == Timeline(find_books([trace])).moments


def test_lines_for_people_leave_out_what_is_the_same_in_each_round(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = printed(capsys, str(trace))
    assert len(lines) < 80
    assert any("ends here without leaving" in text for text in lines)
    assert not [text for text in lines if "  promise  " in text]
    assert [text for text in printed(capsys, str(trace), "--kind", "promise") if " promise " in text]


def test_a_picture(trace: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.svg"
    assert main(["observe", str(trace), "--svg", str(picture)]) == 0
    text = picture.read_text()
    assert text.startswith("<svg")
    assert "ends&#160;here&#160;without&#160;leaving" in text


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--kind", "wiat"], "--kind wiat: there is no such kind. Did you mean"),
        (["--round", "x"], "'x' is no round; give its number, or its epoch and number"),
        (["--run", "smi"], "there are no events of run 'smi'. Did you mean"),
    ],
)
def test_mistakes_are_explained(
    trace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], error: str
) -> None:
    assert main(["observe", str(trace), *arguments]) == 1
    assert error in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--json"], ["--kind", "fault"]])
def test_a_file_of_something_else_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    (tmp_path / "other").write_bytes(b"root:x:0\n\0\xff\n[1]\n")
    assert main(["observe", str(tmp_path / "other"), *options]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "other holds no events; give folders of nodes" in " ".join(told.err.split())


def test_without_textual_it_says_what_to_install(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "psyche_lightning.observe.app", None)
    assert main(["observe", str(trace), "--svg", str(tmp_path / "picture.svg")]) == 1
    assert "pip install 'psyche-lightning[observe]'" in capsys.readouterr().err
