"""What callers of a coordinator's server may ask for, and how many connections they may have.

Honest nodes and people stay far below all of it. A node that asks for more is answered later, which harms nobody; a
program that does is refused. Addresses stand for callers that have proved nothing, and a /64 of IPv6 for one address.
Behind a proxy all callers have its address: what it lets pass is its own matter.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from psyche_lightning.crowd import network
from psyche_lightning.errors import CoordinatorError
from psyche_lightning.server.channel import SYNC
from psyche_lightning.transports.limits import Bucket

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

REQUEST_RATE, REQUEST_STORE = 100.0, 2000.0
"""Units that a node's requests cost in a second, and in advance; see :func:`cost`."""
FRAME_UNIT = 8 * 1024
"""Bytes of a frame that cost as much as one more request."""
COSTS = {"terms": 10.0, "rounds": 25.0, "join": 25.0, "accuse": 25.0, "health_check": 5.0, SYNC: 10.0}
"""What the answers to some requests cost; those to the others, nothing beside the frame."""
MAX_FRAME_OF_OTHERS = 256 * 1024
"""Bytes of a frame that is not a ``join``, which alone holds a manifest."""
MAX_FRAME_OF_PAGES = 1024
"""Bytes of a frame from a page, which has nothing to say."""
CALL_RATE, CALL_STORE = 200.0, 2000.0
"""Units that the HTTP requests from an address cost in a second, and in advance."""
ANSWER_UNIT = 16 * 1024
"""Bytes of an answer over HTTP that cost as much as one more request."""
MAX_KNOWN = 4096
"""Nodes, and addresses, whose requests are counted."""
BODY_SECONDS = 30.0
"""Seconds for the body of a request."""
MAX_STRANGERS, MAX_STRANGERS_OF_HOST = 256, 64
"""Websockets of watchers and of nodes that are no members, in all and from one address."""
MAX_RUNS = 256
MAX_ARCHIVED = 200
"""Closed runs whose history is kept; for one more, the oldest goes."""


class Buckets:
    """A bucket for each of the callers that were seen last.

    Args:
        rate: units a second.
        store: units in advance.
    """

    def __init__(self, rate: float, store: float) -> None:
        self._rate = rate
        self._store = store
        self._known: OrderedDict[Any, Bucket] = OrderedDict()

    def of(self, caller: Any) -> Bucket:
        """The caller's bucket."""
        now = asyncio.get_running_loop().time()
        bucket = self._known.pop(caller, None) or Bucket(self._rate, self._store, now)
        self._known[caller] = bucket
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        bucket.fill(now)
        return bucket


class Callers:
    """Counts the HTTP requests from each address."""

    def __init__(self) -> None:
        self._buckets = Buckets(CALL_RATE, CALL_STORE)

    @web.middleware
    async def check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A middleware.

        Raises:
            CoordinatorError: ``TooManyRequests`` (retryable).
        """
        bucket = self._buckets.of(network(request.remote or ""))
        if bucket.left <= 0:
            raise CoordinatorError(
                "too many requests from this address; try again in a few seconds",
                code="TooManyRequests",
                retryable=True,
            )
        bucket.left -= 1.0
        answer = await handler(request)
        if isinstance(answer, web.Response):
            bucket.left -= (answer.content_length or 0) / ANSWER_UNIT
        return answer


def cost(name: str) -> float:
    """What a node's request costs beside its frame."""
    return COSTS.get(name, 0.0)


def frame_cost(size: int) -> float:
    """What a node's frame of ``size`` bytes costs."""
    return 1.0 + size / FRAME_UNIT
