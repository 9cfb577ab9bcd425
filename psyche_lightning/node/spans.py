"""The parts of a node's rounds as OpenTelemetry spans; the program that trains says where they go.

Below ``round`` are ``compute``, ``encode``, ``send``, ``collect``, ``verify`` and ``apply``.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from psyche_lightning.version import __version__

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

OPEN_ROUNDS = 8
"""Rounds that may be under way, such as with overlap; of more, the oldest ends unfinished."""


class NoSpans:
    """Makes no spans."""

    def begin(self, step: int, name: str, **attributes: int | str) -> None:
        """A part of a step's round begins; the round itself, if this is its first."""

    def end(self, step: int, name: str) -> None:
        """It ends; nothing happens where it did not begin."""

    def part(self, step: int, name: str, **attributes: int | str) -> contextlib.AbstractContextManager[None]:
        """A part of a round that several threads may do at once; of a round that is over, it is left out."""
        return contextlib.nullcontext()

    def over(self, step: int) -> None:
        """The round is over: its results are applied."""


class RoundSpans(NoSpans):
    """Makes the spans of one node's rounds; any thread may call it.

    Args:
        tracer: makes spans.
        attributes: of each ``round``, such as the run and the node.
        now: nanoseconds since 1970.
    """

    def __init__(self, tracer: Tracer, attributes: Mapping[str, str], now: Callable[[], int] = time.time_ns) -> None:
        self._tracer = tracer
        self._attributes = dict(attributes)
        self._now = now
        self._lock = threading.Lock()
        self._rounds: OrderedDict[int, tuple[Span, Context, dict[str, Span]]] = OrderedDict()
        self._last = 0

    def begin(self, step: int, name: str, **attributes: int | str) -> None:
        """See :class:`NoSpans`."""
        with self._lock:
            _, above, parts = self._round(step)
            parts[name] = self._tracer.start_span(name, above, attributes=attributes, start_time=self._now())

    def end(self, step: int, name: str) -> None:
        """See :class:`NoSpans`."""
        with self._lock:
            if step in self._rounds and (part := self._rounds[step][2].pop(name, None)) is not None:
                part.end(self._now())

    @contextlib.contextmanager
    def part(self, step: int, name: str, **attributes: int | str) -> Iterator[None]:
        """See :class:`NoSpans`."""
        with self._lock:
            span = None
            if step in self._rounds or step > self._last:
                above = self._round(step)[1]
                span = self._tracer.start_span(name, above, attributes=attributes, start_time=self._now())
        try:
            yield
        except BaseException as error:
            if span is not None:
                span.record_exception(error)
            raise
        finally:
            if span is not None:
                span.end(self._now())

    def over(self, step: int) -> None:
        """See :class:`NoSpans`."""
        with self._lock:
            if step in self._rounds:
                self._end(step)

    def _round(self, step: int) -> tuple[Span, Context, dict[str, Span]]:
        from opentelemetry.trace import set_span_in_context

        if step not in self._rounds:
            root = self._tracer.start_span(
                "round", attributes={**self._attributes, "psyche.step": step}, start_time=self._now()
            )
            self._rounds[step] = root, set_span_in_context(root), {}
            if len(self._rounds) > OPEN_ROUNDS:
                self._end(next(iter(self._rounds)))
        return self._rounds[step]

    def _end(self, step: int) -> None:
        root, _, parts = self._rounds.pop(step)
        self._last = max(self._last, step)
        now = self._now()
        for span in (*parts.values(), root):
            span.end(now)


def spans_of(run: str, node: str) -> NoSpans:
    """The spans of a node's rounds; none unless this program has set up OpenTelemetry.

    Args:
        run: the run's name.
        node: the node's key in hex.
    """
    if "opentelemetry.sdk.trace" not in sys.modules:
        return NoSpans()
    from opentelemetry.trace import get_tracer

    return RoundSpans(get_tracer("psyche_lightning", __version__), {"psyche.run": run, "psyche.node": node})
