"""The log: how a line looks, whose it is, who hears it, and how often what lasts is said."""

from __future__ import annotations

import asyncio
import logging
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest

from psyche_lightning import logs
from psyche_lightning.logs import LogHandler, Outage, Speaker, duration, next_reminder, speaking

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d"


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """One that only we hear, and nobody speaks yet."""
    logger = logging.getLogger("psyche_lightning.tests.voice")
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    with speaking("-", "-"):
        yield logger
    logger.handlers.clear()


@pytest.fixture
def lines(logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """What the handler wrote since it was asked last."""
    logger.addHandler(LogHandler("stdout"))
    return lambda: capsys.readouterr().out.splitlines()


def test_a_line_has_time_level_run_node_and_is_never_wrapped(
    logger: logging.Logger, lines: Callable[[], list[str]]
) -> None:
    with speaking("demo", "0a1b2c3d"):
        logger.warning("long %s", "word " * 100)
    (line,) = lines()
    assert re.fullmatch(STAMP + r" WARNING demo 0a1b2c3d long (word ){100}", line)


def test_who_is_nobody_yet_has_dashes(logger: logging.Logger, lines: Callable[[], list[str]]) -> None:
    logger.info("hello")
    assert lines()[0].endswith(" INFO    - - hello")


def test_what_others_send_cannot_make_lines_or_colours(logger: logging.Logger, lines: Callable[[], list[str]]) -> None:
    logger.info("it said: %s", "bye\n2026-01-01 INFO\r\x1b[31mred\x9b\u2028")
    (line,) = lines()
    assert line.endswith(r"it said: bye\n2026-01-01 INFO\r\x1b[31mred\x9b\u2028")


def test_a_traceback_follows_in_indented_lines(logger: logging.Logger, lines: Callable[[], list[str]]) -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logger.exception("failed")
    first, *rest = lines()
    assert first.endswith(" ERROR   - - failed")
    assert rest[0] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") for line in rest)


def test_tasks_and_callbacks_of_a_node_speak_for_it_also_on_another_thread(
    logger: logging.Logger, lines: Callable[[], list[str]]
) -> None:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def work(word: str) -> None:
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(logger.info, f"{word} by callback")
        await asyncio.create_task(talk(word))

    async def talk(word: str) -> None:
        logger.info(word)

    for number in range(2):
        with speaking("run", f"node{number}"):
            asyncio.run_coroutine_threadsafe(work(f"word {number}"), loop).result(10)
    logger.info("nobody")
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()
    told = {tuple(line.split(" ", 3)[2:]) for line in (" ".join(line.split()) for line in lines())}
    assert told == {
        *(("run", f"node{n} word {n}{rest}") for n in range(2) for rest in ("", " by callback")),
        ("-", "- nobody"),
    }


def test_a_handler_of_ones_own_gets_run_and_node(logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(Speaker())
    handler.setFormatter(logging.Formatter("%(run)s/%(node)s: %(message)s"))
    logger.addHandler(handler)
    with speaking("demo", "0a1b2c3d"):
        logger.info("hello")
    assert capsys.readouterr().out == "demo/0a1b2c3d: hello\n"


def test_the_command_hears_us_plugins_and_warnings_and_leaves_logging_as_it_was(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours, plugin, other = (logging.getLogger(name) for name in ("psyche_lightning.x", "some_plugin.x", "other.x"))
    before = list(logging.getLogger().handlers), logging.getLogger("psyche_lightning").level
    with speaking("-", "-"), logs.handled("stdout", ["some_plugin"]):
        for logger in (ours, plugin, other):
            logger.info("hello")
            logger.debug("details")
        other.warning("careful")
        logs.tell_more(["some_plugin"])
        plugin.debug("details")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old\nway", stacklevel=1)
    told = [line.split("- - ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert told[:4] == ["hello", "some_plugin.x: hello", "other.x: careful", "some_plugin.x: details"]
    assert re.fullmatch(r".*test_logs\.py:\d+: UserWarning: old", told[4])
    assert (list(logging.getLogger().handlers), logging.getLogger("psyche_lightning").level) == before


NODE = "psyche_lightning.node"
OURS = "logging.getLogger('psyche_lightning')"
SCRIPT = """
import logging, sys
from psyche_lightning.logs import ensure_heard, speaking
logger = logging.getLogger("psyche_lightning.node")
if {before!r}: exec({before!r})
ensure_heard()
ensure_heard()
with speaking("demo", "0a1b2c3d"):
    logger.info("joined")
    if {between!r}: exec({between!r})
    logger.warning("lost")
"""


@pytest.mark.parametrize(
    ("before", "between", "expected"),
    [
        ("", "", ["demo 0a1b2c3d joined", "demo 0a1b2c3d lost"]),
        # Whatever the user has configured decides alone, before or while we speak.
        ("logging.basicConfig()", "", [f"WARNING:{NODE}:lost"]),
        (
            "logging.basicConfig(level='INFO')",
            "",
            ["INFO:psyche_lightning.node:joined", f"WARNING:{NODE}:lost"],
        ),
        ("", "logging.basicConfig()", ["demo 0a1b2c3d joined", f"WARNING:{NODE}:lost"]),
        ("logging.getLogger('psyche_lightning').addHandler(logging.StreamHandler())", "", ["lost"]),
        (
            "logging.getLogger('psyche_lightning').addHandler(logging.NullHandler())",
            "",
            ["demo 0a1b2c3d joined", "demo 0a1b2c3d lost"],
        ),
        ("logging.getLogger('psyche_lightning').setLevel('ERROR')", "", []),
    ],
)
def test_in_a_script_the_users_handlers_replace_ours_and_no_line_comes_twice(
    before: str, between: str, expected: list[str]
) -> None:
    script = SCRIPT.format(before=before, between=between)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert [re.sub(rf"^{STAMP} \w+ +", "", line) for line in done.stderr.splitlines()] == expected
    assert done.stdout == ""


def test_a_node_goes_on_when_nobody_reads_its_output_any_more() -> None:
    script = """
import logging, sys, time
from psyche_lightning.logs import handled
with handled("stdout"):
    for number in range(100_000):
        logging.getLogger("psyche_lightning").info("line %d", number)
print("done", file=sys.stderr)
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().endswith("line 0\n")
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read().startswith("done\n")  # Python itself may say that it could not flush
    child.wait(60)
    child.stderr.close()


# --- what lasts -----------------------------------------------------------------------------------------------------


class Told:
    """An outage whose clock the test moves."""

    def __init__(self, logger: logging.Logger, caplog: pytest.LogCaptureFixture, **options: float) -> None:
        self.now = 100.0
        self.outage = Outage(logger, "the server", clock=lambda: self.now, **options)  # type: ignore[arg-type] # a level is an int
        logger.addHandler(caplog.handler)
        self._caplog = caplog

    def fails(self, seconds: float, every: float = 1.0) -> list[str]:
        """Fails for some time; gives what was said."""
        self._caplog.clear()
        for _ in range(round(seconds / every)):
            self.outage.fails("refused")
            self.now += every
        return self.said

    def works(self) -> list[str]:
        self._caplog.clear()
        self.outage.works()
        return self.said

    @property
    def said(self) -> list[str]:
        return [f"{record.levelname}: {record.getMessage()}" for record in self._caplog.records]


def test_what_does_not_answer_is_told_at_once_then_ever_rarer_and_when_it_is_back(
    logger: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    told = Told(logger, caplog)
    assert told.works() == []
    assert told.fails(700) == [
        "WARNING: lost the server: refused; trying again",
        "WARNING: the server is still away after 15 s: refused",
        "WARNING: the server is still away after 30 s: refused",
        "WARNING: the server is still away after 1 min: refused",
        "WARNING: the server is still away after 2 min: refused",
        "WARNING: the server is still away after 5 min: refused",
        "WARNING: the server is still away after 10 min: refused",
    ]
    assert told.works() == ["WARNING: the server is back after 11 min 40 s"]
    assert told.works() == []
    told.now += 60.0
    assert told.fails(1) == ["WARNING: lost the server: refused; trying again"]


def test_what_was_never_reached(logger: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    assert Told(logger, caplog).fails(3) == ["WARNING: cannot reach the server: refused; trying again"]


def test_what_may_take_a_while_is_told_when_it_takes_longer(
    logger: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    told = Told(logger, caplog, allowance=15.0, level=logging.INFO)
    assert told.fails(15) == []
    assert told.fails(1) == ["INFO: cannot reach the server: refused; trying again"]
    assert told.works() == ["INFO: the server is back after 16 s"]


def test_what_comes_and_goes_is_told_as_rarely(logger: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    told = Told(logger, caplog)
    told.works()
    said = []
    for _ in range(60):
        said += told.fails(1) + told.works()
        told.now += 1.0
    assert said == [
        "WARNING: lost the server: refused; trying again",
        "WARNING: the server is back after 1 s",
        "WARNING: the server has come and gone for 16 s: refused",
        "WARNING: the server is back after 17 s",
        "WARNING: the server has come and gone for 30 s: refused",
        "WARNING: the server is back after 31 s",
        "WARNING: the server has come and gone for 1 min: refused",
        "WARNING: the server is back after 1 min 1 s",
    ]


def test_reminders_become_rarer() -> None:
    times = [0.0]
    while times[-1] < 1500:
        times.append(next_reminder(times[-1]))
    assert times == [0, 15, 30, 60, 120, 300, 600, 900, 1200, 1500]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (7200, "2 h")],
)
def test_time_spans(seconds: float, text: str) -> None:
    assert duration(seconds) == text
