"""Logging of the package: the format of a log line, its run and node, and when to repeat it.

Every module logs with ``logging.getLogger(__name__)``. The ``psyche`` command handles all records while it
runs (:func:`handled`); in a user's script, the user's handlers do, or ours if there are none
(:func:`ensure_heard`).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from typing import Literal, TextIO, TypedDict

from psyche_lightning.text import plain

OURS = "psyche_lightning"
"""The package's root logger; a plugin's has the name of the plugin's package."""
REMINDERS = (15.0, 30.0, 60.0, 120.0, 300.0)
"""Seconds after which to repeat a lasting outage; after the last, repeat at multiples of it."""
STEADY = 10.0
"""Seconds of success before the next failure counts as a new outage."""

Stream = Literal["stdout", "stderr"]
_speaker: ContextVar[tuple[str, str]] = ContextVar("psyche_speaker", default=("-", "-"))


# --- run and node ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def speaking(run: str, node: str) -> Iterator[None]:
    """Label records logged within with this run and node; tasks and callbacks that begin within inherit it.

    Args:
        run: the run's name.
        node: the node's key, shortened.
    """
    before = _speaker.get()
    _speaker.set((run, node))
    try:
        yield
    finally:
        _speaker.set(before)  # not reset: a notebook may end in a different context


class Speaker(logging.Filter):
    """Gives each record the attributes ``run`` and ``node``, ``"-"`` for none; for your own handlers."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Passes every record."""
        if not hasattr(record, "node"):
            record.run, record.node = _speaker.get()
        return True


# --- format ---------------------------------------------------------------------------------------------------------


class LineFormatter(logging.Formatter):
    """One line per record: local time with UTC offset, level, run, node, message.

    Control characters, which may come from peers, are escaped. A traceback follows in indented lines.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line; :class:`Speaker` labels the record first."""
        when = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        text = record.getMessage()
        if record.name == "py.warnings":
            text = text.partition("\n")[0]  # the second line shows the code that warned
        elif not record.name.startswith(OURS):
            text = f"{record.name}: {text}"
        run, node = getattr(record, "run", "-"), getattr(record, "node", "-")
        lines = [f"{when} {record.levelname:<7} {plain(run)} {node} {plain(text)}"]
        if record.exc_info:
            lines += [f"    {plain(line)}" for line in self.formatException(record.exc_info).splitlines()]
        return "\n".join(lines)


class LogHandler(logging.Handler):
    """Writes lines to the current standard output or error, which active progress bars replace.

    Args:
        stream: which one.
    """

    def __init__(self, stream: Stream = "stderr") -> None:
        super().__init__()
        self._stream = stream
        self.addFilter(Speaker())
        self.setFormatter(LineFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the line at once."""
        try:
            stream: TextIO = getattr(sys, self._stream)
            stream.write(self.format(record) + "\n")
            stream.flush()
        except BrokenPipeError:
            pass  # a node continues when no one reads its output
        except Exception:
            self.handleError(record)


class Redirections(TypedDict):
    """Arguments of rich's displays: whether they redirect a stream while active."""

    redirect_stdout: bool
    redirect_stderr: bool


def redirections() -> Redirections:
    """A display redirects lines to a terminal, but not those to a file or a pipe."""
    return Redirections(redirect_stdout=sys.stdout.isatty(), redirect_stderr=sys.stderr.isatty())


# --- handlers -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def handled(stream: Stream, packages: Iterable[str] = ()) -> Iterator[None]:
    """Handles all records of the process; for the ``psyche`` command. Python's warnings become records, too.

    Args:
        stream: where lines go.
        packages: plugins' packages, which get our level.
    """
    handler, root = LogHandler(stream), logging.getLogger()
    before = {logging.getLogger(name): logging.getLogger(name).level for name in (OURS, *packages)}
    root.addHandler(handler)
    logging.captureWarnings(True)
    for logger in before:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, old in before.items():
            logger.setLevel(old)
        logging.captureWarnings(False)
        root.removeHandler(handler)


def tell_more(packages: Iterable[str] = ()) -> None:
    """Also handles debug records, until :func:`handled` ends."""
    for name in (OURS, *packages):
        logging.getLogger(name).setLevel(logging.DEBUG)


class Aside(logging.Handler):
    """A handler that shows nobody anything: others still have to."""


class _LastResort(LogHandler):
    """Our handler in a user's script: silent when another handles the record."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(lambda record: not _handlers(logging.getLogger(record.name), but=self))


def ensure_heard(packages: Iterable[str] = ()) -> None:
    """Shows nodes' records in a process without configured logging; else changes nothing.

    Args:
        packages: plugins' packages.
    """
    for name in (OURS, *packages):
        logger = logging.getLogger(name)
        if not _handlers(logger):
            logger.addHandler(_LastResort())
            if logger.level == logging.NOTSET:
                logger.setLevel(logging.INFO)


def _handlers(logger: logging.Logger, but: logging.Handler | None = None) -> list[logging.Handler]:
    """The handlers of a logger's records."""
    found: list[logging.Handler] = []
    here: logging.Logger | None = logger
    while here is not None:
        found += [one for one in here.handlers if one is not but and not isinstance(one, (logging.NullHandler, Aside))]
        here = here.parent if here.propagate else None
    return found


# --- outages --------------------------------------------------------------------------------------------------------


def next_reminder(lasted: float) -> float:
    """When to next report an outage that has lasted this long; in seconds from its start."""
    last = REMINDERS[-1]
    return next(due for due in itertools.chain(REMINDERS, itertools.count(2 * last, last)) if due > lasted)


def duration(seconds: float) -> str:
    """A time span as people read it, such as ``42 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


class Outage:
    """Logs that a service does not answer: at once, then at intervals, and when it is back.

    A service that comes and goes has one outage, also logged at intervals. Call :meth:`fails` at each failed
    attempt, and :meth:`works` at each other.

    Args:
        logger: logs the lines.
        what: the service, such as ``"the coordinator at http://..."``.
        level: of the first line; later lines are warnings.
        allowance: seconds without a log line until the first success.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        logger: logging.Logger,
        what: str,
        *,
        level: int = logging.WARNING,
        allowance: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._what = what
        self._level = level
        self._allowance = allowance
        self._clock = clock
        self._reached = False
        self._began: float | None = None
        self._back: float | None = None
        self._due = 0.0
        self._told = logging.NOTSET

    def fails(self, why: object) -> None:
        """An attempt failed, or a connection ended."""
        now = self._clock()
        flaps = self._back is not None and now - self._back < STEADY
        if self._began is None or (self._back is not None and not flaps):
            self._began = now
            self._due = 0.0 if self._reached else self._allowance
        self._back = None
        lasted = now - self._began
        if lasted < self._due:
            return
        self._due = next_reminder(lasted)
        if flaps:
            self._tell(logging.WARNING, f"%s has come and gone for {duration(lasted)}: %s", why)
        elif self._told:
            self._tell(logging.WARNING, f"%s is still away after {duration(lasted)}: %s", why)
        elif self._reached:
            self._tell(self._level, "lost %s: %s; trying again", why)
        else:
            self._tell(self._level, "cannot reach %s: %s; trying again", why)

    def works(self) -> None:
        """An attempt succeeded."""
        self._reached = True
        if self._began is None or self._back is not None:
            return
        self._back = self._clock()
        if self._told:
            # At the level of its loss, so that the same readers see it.
            self._logger.log(self._told, "%s is back after %s", self._what, duration(self._back - self._began))
            self._told = logging.NOTSET

    def _tell(self, level: int, text: str, why: object) -> None:
        self._logger.log(level, text, self._what, why)
        self._told = max(self._told, level)
