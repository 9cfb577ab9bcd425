from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche_lightning.transports.throttle import Throttle, TokenBucket, Waiter

asks = st.lists(st.tuples(st.floats(0, 3), st.integers(1, 20_000), st.booleans()), min_size=1, max_size=60)


def run(bucket: TokenBucket, wanted: list[tuple[float, int, bool]]) -> list[tuple[float, int, bool]]:
    """Ask at the given times and follow the bucket's own word on when to look again; ``(time, size, urgent)``."""
    granted: list[tuple[float, int, bool]] = []
    due: list[tuple[int, bool]] = []
    waiting, now = sorted(wanted), 0.0
    while waiting or len(granted) < len(wanted):
        while waiting and waiting[0][0] <= now:
            _, size, urgent = waiting.pop(0)
            bucket.enqueue(Waiter(size, lambda one=(size, urgent): due.append(one)), urgent=urgent)  # type: ignore[misc]
        left = bucket.grant(now)
        granted += [(now, *one) for one in due]
        due.clear()
        ahead = [waiting[0][0]] if waiting else []
        if left is not None:
            ahead.append(now + left)
        if ahead:
            now = min(ahead)
    return granted


@given(wanted=asks, rate=st.floats(1000, 1e6))
def test_the_rate_holds_over_any_time_span(wanted: list[tuple[float, int, bool]], rate: float) -> None:
    bucket = TokenBucket(rate, 0.0)
    granted = run(bucket, wanted)
    for i, (begin, _, _) in enumerate(granted):
        total, largest = 0, 0
        for now, size, _ in granted[i:]:
            total, largest = total + size, max(largest, size)
            assert total <= rate * (now - begin) + bucket.burst + largest + 1


@given(wanted=asks, rate=st.floats(1000, 1e6))
def test_the_rate_is_used_fully_while_anyone_waits(wanted: list[tuple[float, int, bool]], rate: float) -> None:
    granted = run(TokenBucket(rate, 0.0), [(0.0, size, urgent) for _, size, urgent in wanted])
    total = sum(size for _, size, _ in granted)
    assert granted[-1][0] <= total / rate + 0.002 * len(granted)


def test_urgent_waiters_come_first_and_the_others_in_order() -> None:
    order: list[str] = []
    bucket = TokenBucket(10_000, 0.0)
    for name, urgent in (("a", False), ("b", False), ("c", True), ("d", False), ("e", True)):
        bucket.enqueue(Waiter(10_000, lambda name=name: order.append(name)), urgent=urgent)  # type: ignore[misc]
    now = 0.0
    while (left := bucket.grant(now)) is not None:
        now += left
    assert order == ["c", "e", "a", "b", "d"]


def test_unrequested_bytes_cost_a_bounded_time_and_refunds_count() -> None:
    bucket = TokenBucket(10_000, 0.0)
    for _ in range(100):
        bucket.charge(1_000_000, 0.0)
    granted: list[int] = []
    bucket.enqueue(Waiter(1, lambda: granted.append(1)), urgent=False)
    assert bucket.grant(0.0) == pytest.approx(1.0)
    bucket.refund(10_001, 0.0)
    assert bucket.grant(0.0) is None
    assert granted


def test_waiters_that_give_up_are_skipped() -> None:
    async def main() -> None:
        now = 0.0
        throttle = Throttle(1000.0, clock=lambda: now)
        await throttle.acquire(50_000)
        waiting = [asyncio.ensure_future(throttle.acquire(1)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        waiting[1].cancel()
        await asyncio.sleep(0)
        assert not waiting[2].done()
        now = 100.0
        throttle.refund(1)
        await waiting[2]
        throttle.close()

    asyncio.run(main())


def test_without_a_limit_nobody_waits() -> None:
    async def main() -> None:
        throttle = Throttle(None)
        await throttle.acquire(1 << 60)
        throttle.charge(1 << 60)
        throttle.refund(5)
        assert not throttle.limited

    asyncio.run(main())


def test_a_lower_rate_gives_smaller_blocks() -> None:
    assert Throttle(None).block == Throttle(1e9).block == 65536
    assert Throttle(1e6).block == 50_000
    assert Throttle(1).block == 4096
