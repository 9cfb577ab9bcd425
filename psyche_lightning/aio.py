"""Waits with a limit that never lose a cancellation, as ``asyncio.wait_for`` of Python 3.10 and 3.11 can."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

_T = TypeVar("_T")


async def within(seconds: float, work: Awaitable[_T]) -> _T:
    """Await ``work``, which is cancelled after ``seconds``.

    Raises:
        asyncio.TimeoutError: it took longer.
    """
    task = asyncio.current_task()
    assert task is not None
    expired = False

    def expire() -> None:
        nonlocal expired
        expired = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, expire)
    try:
        return await work
    except asyncio.CancelledError:
        if not expired or (hasattr(task, "uncancel") and task.uncancel() > 0):
            raise
        raise asyncio.TimeoutError from None
    finally:
        timer.cancel()


async def happens(event: asyncio.Event, seconds: float) -> bool:
    """Whether the event is set within the time."""
    try:
        return await within(seconds, event.wait())
    except asyncio.TimeoutError:
        return event.is_set()


async def news(event: asyncio.Event, seconds: float | None) -> None:
    """Return when the event is set, or after so many seconds (None: never); the event is set then, too."""
    timer = None if seconds is None else asyncio.get_running_loop().call_later(max(seconds, 0.0), event.set)
    try:
        await event.wait()
    finally:
        if timer is not None:
            timer.cancel()
