"""What proves that a trainer signed two results for one batch (invariant I5)."""

from __future__ import annotations

from psyche_lightning.errors import CoordinatorError, WireError
from psyche_lightning.wire.messages import Result, open_envelope


def equivocator(run_id: str, first: bytes, second: bytes) -> bytes:
    """The node key of the trainer that signed both.

    Args:
        run_id: the run.
        first: one signed result, as it was gossiped.
        second: the other.

    Raises:
        CoordinatorError: they prove nothing (``InvalidAccusation``).
    """
    try:
        one, other = open_envelope(first, run_id), open_envelope(second, run_id)
    except WireError as error:
        raise CoordinatorError(f"the proof cannot be read: {error}", code="InvalidAccusation") from error
    a, b = one.message, other.message
    same = isinstance(a, Result) and isinstance(b, Result) and (a.epoch, a.height) == (b.epoch, b.height)
    if not same or one.sender != other.sender or a == b:
        raise CoordinatorError(
            "a proof of equivocation is two different results of one trainer for one round", code="InvalidAccusation"
        )
    return one.sender
