"""Clocks: one that never steps, and how far this machine's is from a server's, by the Date header of HTTP answers.

The same answers say from which address the requests came.
"""

from __future__ import annotations

import email.utils
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.link import JoinLink
from psyche_lightning.protocol.owner import ClockReading
from psyche_lightning.server.admin import check_url
from psyche_lightning.server.tls import Door

LOOKS = 8
SPREAD = 0.13
"""Seconds between looks, so that together they see the server's second begin."""
TIMEOUT = 5.0
SEEN = "X-Psyche-Seen"
"""Header of answers with the IP address from which the request came."""


def steady(
    wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
) -> Callable[[], float]:
    """Returns a clock that begins with the wall clock's seconds since 1970, and never steps with it."""
    ahead = wall() - monotonic()
    return lambda: ahead + monotonic()


@dataclass(frozen=True)
class Look:
    """One answer: when this machine sent and received, and the server's time in between, in whole seconds."""

    sent: float
    received: float
    said: float


def combine(looks: Sequence[Look]) -> ClockReading:
    """Combine several answers.

    A clock that said ``s`` was in ``[s, s + 1)`` at some time between sending and receiving. So it is ahead by more
    than ``s - received`` and by less than ``s + 1 - sent``; each answer narrows the range.
    """
    low = max(look.said - look.received for look in looks)
    high = min(look.said + 1 - look.sent for look in looks)
    return ClockReading((low + high) / 2, abs(high - low) / 2, min(look.received - look.sent for look in looks))


def read_clock(
    url: str,
    *,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
    looks: int = LOOKS,
) -> ClockReading:
    """Ask a server a few times; takes about a second.

    Args:
        url: URL of the server.
        clock: seconds since 1970.
        sleep: waits for a number of seconds.
        looks: how often to ask.

    Raises:
        ConfigError: the URL is malformed.
        CoordinatorError: the server does not answer, or does not tell the time.
    """
    link, seen = JoinLink.parse(url), ""
    url, door = check_url(url), Door(link)
    found = []
    for number in range(looks):
        if number:
            sleep(SPREAD)
        request = urllib.request.Request(f"{url}/v1/runs", method="HEAD")
        sent = clock()
        try:
            with door.open(request, TIMEOUT) as answer:
                received, said, seen = clock(), answer.headers["Date"], answer.headers.get(SEEN, "")
        except urllib.error.HTTPError as error:  # an error answer has a date, too
            received, said = clock(), error.headers["Date"]
            error.close()
        except OSError as error:
            raise CoordinatorError(
                f"cannot reach {url}: {getattr(error, 'reason', error)}", code="Unreachable", retryable=True
            ) from error
        try:
            found.append(Look(sent, received, email.utils.parsedate_to_datetime(said or "").timestamp()))
        except (TypeError, ValueError):
            raise CoordinatorError(f"{url} does not tell the time", code="NoClock") from None
    return replace(combine(found), seen=seen)
