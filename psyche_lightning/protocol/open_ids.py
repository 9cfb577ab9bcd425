"""Data ids whose batch was not agreed, and who trains them again: derived by everyone from the agreed sets.

Ids of the round with optimizer step *s* that are in no agreed result are due with step *s + 3*, the first round for
which every node is sure to know them in time, with and without overlap. Steps count over epochs, so what is open when
an epoch ends is trained in the next one. A round takes at most as many of them as it has samples of its own, the oldest
first, so that a run in trouble is never asked for more than twice its work.

In memory ids are half-open, as Python's ranges are. What nodes send and write down has the first and the last id;
:func:`closed` and :func:`half_open` are the way there and back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

AGAIN_AFTER = 3
"""Training rounds from the one whose batch was not agreed to the one that trains it again."""

Interval = tuple[int, int]
"""A stretch of data ids ``(start, stop)``: from ``start`` on, up to ``stop`` and without it."""
OpenIds = tuple[tuple[int, int, int], ...]
"""``(step with which they are due, start, stop)``, ascending, without neighbours of one step that touch."""


def closed(intervals: Iterable[Interval]) -> tuple[tuple[int, int], ...]:
    """The stretches as ``(first id, last id)``, as they are sent and written down."""
    return tuple((start, stop - 1) for start, stop in intervals)


def half_open(stretches: Iterable[Sequence[int]]) -> tuple[Interval, ...]:
    """The stretches that :func:`closed` gave, in memory again."""
    return tuple((first, last + 1) for first, last in stretches)


def shown(intervals: Sequence[Interval], most: int = 4) -> str:
    """The stretches for people, the last id included, such as ``3-5, 9``; at most so many of them."""
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in closed(intervals[:most])]
    return ", ".join([*texts, *(["..."] if len(intervals) > most else [])]) or "none"


def merged(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """The same ids as disjoint stretches in ascending order, none next to another."""
    out: list[Interval] = []
    for start, stop in sorted(intervals):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return tuple(out)


def count(intervals: Iterable[Interval]) -> int:
    """How many ids there are."""
    return sum(stop - start for start, stop in intervals)


def take(open_ids: OpenIds, step: int, limit: int) -> tuple[tuple[Interval, ...], OpenIds]:
    """What the round with that step trains again, and what stays open; a round that drains (step 0) takes nothing."""
    taken: list[Interval] = []
    rest: list[tuple[int, int, int]] = []
    for due, start, stop in open_ids:
        here = min(stop - start, limit) if step and due <= step else 0
        limit -= here
        if here:
            taken.append((start, start + here))
        if start + here < stop:
            rest.append((due, start + here, stop))
    return merged(taken), tuple(rest)


def reopen(open_ids: OpenIds, step: int, intervals: Iterable[Interval]) -> OpenIds:
    """With the ids of the round with that step that are in no agreed result."""
    added = ((step + AGAIN_AFTER, start, stop) for start, stop in merged(intervals))
    return tuple(sorted((*open_ids, *added)))


def assign_again(
    intervals: Sequence[Interval], shares: Sequence[tuple[int, int, int]]
) -> dict[int, tuple[Interval, ...]]:
    """Divide ids that are trained again among a round's trainers, as evenly as can be.

    Args:
        intervals: the ids, as :func:`take` gives them.
        shares: the round's own samples, as :func:`~psyche_lightning.protocol.assignment.assign` divides them.

    Returns:
        The stretches of each client that gets any. The remainder goes to those with the smaller shares of their own.
    """
    trainers = [client for client, _, _ in reversed(shares)]
    base, remainder = divmod(count(intervals), len(trainers))
    queue = list(reversed(intervals))
    found: dict[int, tuple[Interval, ...]] = {}
    for place, client in enumerate(trainers):
        size = base + (place < remainder)
        own: list[Interval] = []
        while size:
            start, stop = queue.pop()
            here = min(size, stop - start)
            own.append((start, start + here))
            size -= here
            if start + here < stop:
                queue.append((start + here, stop))
        if own:
            found[client] = merged(own)
    return found


def batches(shares: Sequence[tuple[int, int, int]], again: Sequence[Interval]) -> dict[int, tuple[Interval, ...]]:
    """All ids of each trainer of a round: its own share first, then what it trains again."""
    more = assign_again(again, shares) if again else {}
    return {client: ((start, stop), *more.get(client, ())) for client, start, stop in shares}
