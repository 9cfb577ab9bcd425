"""Waits with a time limit that never lose a cancellation, unlike ``asyncio.wait_for`` of Python 3.10 and 3.11."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

_T = TypeVar("_T")


async def within(seconds: float, work: Awaitable[_T]) -> _T:
    """Await ``work``, and cancel it after ``seconds``.

    Raises:
        asyncio.TimeoutError: ``work`` took longer.
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


async def is_set_within(event: asyncio.Event, seconds: float) -> bool:
    """Returns whether the event is set within ``seconds``."""
    try:
        return await within(seconds, event.wait())
    except asyncio.TimeoutError:
        return event.is_set()


async def wait_or_set(event: asyncio.Event, seconds: float | None) -> None:
    """Wait for the event, and set it after ``seconds`` (None: never)."""
    timer = None if seconds is None else asyncio.get_running_loop().call_later(max(seconds, 0.0), event.set)
    try:
        await event.wait()
    finally:
        if timer is not None:
            timer.cancel()
