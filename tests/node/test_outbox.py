"""What is due, how often, and what is said."""

from __future__ import annotations

from psyche_lightning.node.events import SetPeers
from psyche_lightning.node.notices import RatesDiffer, TakesLast
from psyche_lightning.node.outbox import Outbox


def due_times(out: Outbox, key: object, until: int, **options: float) -> list[float]:
    """The whole seconds at which something is due, when it is asked for in each."""
    start, found = out.now, []
    for second in range(until):
        out.now = start + second
        if out.due(key, **options):
            found.append(out.now)
    return found


def test_what_is_repeated_is_due_at_once_and_then_ever_more_rarely() -> None:
    assert due_times(Outbox(2.0, 15.0), "key", 60) == [0.0, 2.0, 6.0, 14.0, 29.0, 44.0, 59.0]


def test_what_is_to_come_later_counts_from_the_first_question() -> None:
    out = Outbox(2.0, 15.0)
    out.now = 100.0
    assert due_times(out, "key", 12, after=3.0) == [103.0, 105.0, 109.0]
    assert out.attempts("key") == 3


def test_keys_are_due_by_themselves() -> None:
    out = Outbox(2.0, 15.0)
    assert out.due(("fetch", 1))
    assert out.due(("fetch", 2))
    assert not out.due(("fetch", 1))
    assert out.attempts(("fetch", 1)) == 1
    assert out.attempts("unknown") == 0


def test_once_is_once() -> None:
    out = Outbox(2.0, 15.0)
    assert out.once("key")
    out.now = 1e9
    assert not out.once("key")
    assert out.once("another key")
    assert out.attempts("key") == 1


def test_once_in_some_seconds_is_due_again_when_they_are_over() -> None:
    out = Outbox(2.0, 15.0)
    assert out.once("key", every=5.0)
    out.now = 4.9
    assert not out.once("key", every=5.0)
    out.now = 5.0
    assert out.once("key", every=5.0)
    assert not out.once("key", every=5.0)


def test_what_is_forgotten_is_due_at_once_and_counts_from_zero() -> None:
    out = Outbox(2.0, 15.0)
    out.due("key")
    out.due("other")
    out.forget("key")
    out.forget("unknown")
    assert out.attempts("key") == 0
    assert out.due("key")
    assert not out.due("other")


def test_only_the_named_keys_are_kept() -> None:
    out = Outbox(2.0, 15.0)
    for key in ("kept", "dropped"):
        out.due(key)
    out.keep_only(("kept", "unknown"))
    assert not out.due("kept")
    assert out.due("dropped")


def test_what_was_due_four_longest_intervals_ago_is_forgotten() -> None:
    out = Outbox(2.0, 15.0)
    out.due("old")  # again at 2
    out.now = 1.0
    out.due("young")  # again at 3
    out.once("for ever")
    out.now = 62.0
    out.prune()
    assert out.attempts("old") == 0
    assert out.attempts("young") == 1
    assert not out.once("for ever")


def test_effects_come_out_once_in_order() -> None:
    out = Outbox(2.0, 15.0)
    effects = [SetPeers(()), RatesDiffer(), SetPeers(((b"key", "address"),))]
    for effect in effects:
        out.emit(effect)
    assert out.take() == effects
    assert out.take() == []


def test_the_same_notice_is_given_out_once_an_epoch_and_another_at_once() -> None:
    out = Outbox(2.0, 15.0)
    for notice in (RatesDiffer(), TakesLast(b"one"), RatesDiffer(), TakesLast(b"other"), TakesLast(b"one")):
        out.say(notice)
    assert out.take() == [RatesDiffer(), TakesLast(b"one"), TakesLast(b"other")]
    out.new_epoch()
    out.say(RatesDiffer())
    assert out.take() == [RatesDiffer()]
