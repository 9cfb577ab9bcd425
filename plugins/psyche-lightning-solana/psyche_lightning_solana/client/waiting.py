"""Waiting with a limit. ``asyncio.wait_for`` may swallow a cancellation before Python 3.12; these do not."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_Result = TypeVar("_Result")


async def within(seconds: float, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of ``work``, which is cancelled when it takes longer.

    Raises:
        asyncio.TimeoutError: it did.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait((task,), timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not done:
        task.cancel()
        await asyncio.wait((task,))
        raise asyncio.TimeoutError
    return task.result()


async def news(event: asyncio.Event, seconds: float | None) -> None:
    """Return when the event is set, or after so many seconds; it is set then, too."""
    timer = None if seconds is None else asyncio.get_running_loop().call_later(max(seconds, 0.0), event.set)
    try:
        await event.wait()
    finally:
        if timer is not None:
            timer.cancel()
