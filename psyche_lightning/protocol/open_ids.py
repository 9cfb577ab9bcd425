"""Data ids whose batch was not agreed, and who trains them again; every party derives this from the agreed sets.

Ids of the round with optimizer step *s* that are in no agreed result are due with step *s + 3*. That is the first round
for which every node surely knows them in time, with and without overlap. Steps count over epochs, so ids that are open
when an epoch ends are trained in the next one. A round takes at most as many of them as it has samples of its own, the
oldest first, so that a run in trouble never does more than twice its work.

In memory, ids are half-open intervals, like Python's ranges. Messages and files have the first and the last id;
:func:`closed` and :func:`half_open` convert between the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from psyche_lightning.protocol.assignment import divide

AGAIN_AFTER = 3
"""Training rounds from the one whose batch was not agreed to the one that trains it again."""

Interval = tuple[int, int]
"""A range of data ids ``(start, stop)``, with ``start`` and without ``stop``."""
OpenIds = tuple[tuple[int, int, int], ...]
"""``(step with which they are due, start, stop)``, ascending; intervals of one step do not touch."""


def closed(intervals: Iterable[Interval]) -> tuple[tuple[int, int], ...]:
    """The intervals as ``(first id, last id)``, as in messages and files."""
    return tuple((start, stop - 1) for start, stop in intervals)


def half_open(stretches: Iterable[Sequence[int]]) -> tuple[Interval, ...]:
    """The inverse of :func:`closed`."""
    return tuple((first, last + 1) for first, last in stretches)


def shown(intervals: Sequence[Interval], most: int = 4) -> str:
    """The intervals for people, with the last id, such as ``3-5, 9``; at most ``most`` of them."""
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in closed(intervals[:most])]
    return ", ".join([*texts, *(["..."] if len(intervals) > most else [])]) or "none"


def merged(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """The same ids as disjoint, ascending intervals that do not touch."""
    out: list[Interval] = []
    for start, stop in sorted(intervals):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return tuple(out)


def count(intervals: Iterable[Interval]) -> int:
    """The number of ids."""
    return sum(stop - start for start, stop in intervals)


def take(open_ids: OpenIds, step: int, limit: int) -> tuple[tuple[Interval, ...], OpenIds]:
    """The ids that the round with that step trains again, and those that stay open; drain rounds (step 0) take none."""
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
    """The open ids with those of the round with that step that are in no agreed result."""
    added = ((step + AGAIN_AFTER, start, stop) for start, stop in merged(intervals))
    return tuple(sorted((*open_ids, *added)))


def assign_again(
    intervals: Sequence[Interval], shares: Sequence[tuple[int, int, int]], weights: Sequence[int] = ()
) -> dict[int, tuple[Interval, ...]]:
    """Divide ids that are trained again among a round's trainers, by the same weights as the round's own samples.

    Args:
        intervals: the ids, as :func:`take` gives them.
        shares: the round's own samples, as :func:`~psyche_lightning.protocol.assignment.assign` divides them.
        weights: as of :func:`~psyche_lightning.protocol.assignment.assign`.

    Returns:
        The intervals of each client that gets any. A remainder goes to the clients with smaller shares of their own.
    """
    trainers = [client for client, _, _ in reversed(shares)]
    sizes = divide(count(intervals), [weights[client] for client in trainers] if weights else [1] * len(trainers))
    queue = list(reversed(intervals))
    found: dict[int, tuple[Interval, ...]] = {}
    for client, size in zip(trainers, sizes, strict=True):
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


def batches(
    shares: Sequence[tuple[int, int, int]], again: Sequence[Interval], weights: Sequence[int] = ()
) -> dict[int, tuple[Interval, ...]]:
    """All ids of each trainer of a round: first its own share, then the ids that it trains again."""
    more = assign_again(again, shares, weights) if again else {}
    return {client: ((start, stop), *more.get(client, ())) for client, start, stop in shares}
