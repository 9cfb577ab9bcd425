"""What a node remembers for its repair: fingerprints, snapshots, offers, and from where a replay may begin."""

from __future__ import annotations

import pytest
from support.core import LAYOUT

from psyche_lightning.node.agreement import EpochLog
from psyche_lightning.node.repair import MAX_OFFERS, Base, Repair
from psyche_lightning.node.settings import Settings
from psyche_lightning.protocol.state import Checkpoint
from psyche_lightning.wire.canonical import sha256

SETTINGS = Settings(False, 2, LAYOUT, 64, tensors=("a", "b"))
START = Base(0, sha256(b"start"))


def base(applied: int, name: str = "run") -> Base:
    return Base(applied, sha256(name.encode(), bytes([applied])))


def epoch(*named: Base) -> EpochLog:
    """An epoch of which these parameters are on record."""
    log = EpochLog(0, START.digest, 1, 2)
    for one in named:
        log.name(Checkpoint(one.digest, one.applied))
    return log


# --- what differs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "tensor"),
    [
        pytest.param(b"1" * 8 + b"2" * 8, b"1" * 8 + b"2" * 8, None, id="nothing differs"),
        pytest.param(b"1" * 8 + b"2" * 8, b"1" * 8 + b"3" * 8, "b", id="the second differs"),
        pytest.param(b"1" * 8 + b"2" * 8, b"4" * 8 + b"3" * 8, "a", id="both differ: the first is named"),
        pytest.param(b"1" * 24, b"1" * 16 + b"2" * 8, "number 2", id="one without a name"),
    ],
)
def test_a_replay_names_the_first_tensor_that_was_not_what_it_is_now(
    before: bytes, after: bytes, tensor: str | None
) -> None:
    repair = Repair(SETTINGS)
    assert repair.fingerprint(3, before) is None
    assert repair.differ(4)
    assert repair.fingerprint(3, after) == tensor


def test_only_the_first_difference_of_a_replay_is_named() -> None:
    repair = Repair(SETTINGS)
    for applied in (1, 2, 3):
        repair.fingerprint(applied, b"1" * 8)
    repair.differ(4)
    assert repair.fingerprint(1, b"1" * 8) is None
    assert repair.fingerprint(2, b"2" * 8) == "a"
    assert repair.fingerprint(3, b"2" * 8) is None


def test_what_is_on_record_is_not_compared_any_more() -> None:
    repair = Repair(SETTINGS)
    for applied in (1, 2, 3):
        repair.fingerprint(applied, b"1" * 8)
    repair.confirm(2)
    assert repair.confirmed == 2
    repair.differ(4)
    assert [repair.fingerprint(applied, b"2" * 8) for applied in (1, 2, 3)] == [None, None, "a"]


@pytest.mark.parametrize(
    ("differences", "answers", "stuck"),
    [
        pytest.param([4], [True], None, id="the first time a replay may help"),
        pytest.param([4, 4], [True, False], 3, id="the same difference again: it did not help"),
        pytest.param([4, 6], [True, True], None, id="another difference is another replay"),
    ],
)
def test_a_difference_is_replayed_once(differences: list[int], answers: list[bool], stuck: int | None) -> None:
    repair = Repair(SETTINGS)
    assert [repair.differ(applied) for applied in differences] == answers
    assert repair.stuck == stuck


# --- what is not to be had --------------------------------------------------------------------------------------------


def test_waiting_for_a_round_counts_from_when_it_was_the_next() -> None:
    repair = Repair(SETTINGS)
    assert [repair.waited(3, now) for now in (10.0, 12.0)] == [0.0, 2.0]
    assert [repair.waited(4, now) for now in (13.0, 20.0)] == [0.0, 7.0]


PEER, LIAR = b"peer", b"liar"


def test_offers_are_kept_once_and_the_latest_ones_of_each_peer_only() -> None:
    repair = Repair(SETTINGS)
    for applied in (4, 2, 4, 6):
        repair.hear(PEER, base(applied))
    assert repair.offers == {PEER: [base(4), base(2), base(6)]}
    for applied in range(10, 11 + MAX_OFFERS):
        repair.hear(LIAR, base(applied))
    assert repair.offers == {PEER: [base(4), base(2), base(6)], LIAR: [base(11 + each) for each in range(MAX_OFFERS)]}


@pytest.mark.parametrize(
    ("own", "applied", "wanted"),
    [
        pytest.param([], 1, True, id="none so far"),
        pytest.param([4], 11, False, id="the last is young"),
        pytest.param([4], 12, True, id="four digests later"),
        pytest.param([4, 8], 12, False, id="the newest counts"),
    ],
)
def test_a_snapshot_that_a_peer_asks_for_is_not_taken_too_often(own: list[int], applied: int, wanted: bool) -> None:
    repair = Repair(SETTINGS)
    for each in own:
        repair.keep(base(each))
    repair.ask(applied)
    assert repair.wanted is wanted


def test_a_snapshot_that_was_taken_is_not_wanted_any_more() -> None:
    repair = Repair(SETTINGS)
    repair.ask(1)
    repair.keep(base(2))
    assert not repair.wanted
    assert repair.own == [base(2)]


# --- where to begin ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "confirmed", "offers", "named", "stuck", "found"),
    [
        pytest.param([], 0, [], [], None, [START], id="nothing but the start of the epoch"),
        pytest.param([2, 4, 6], 4, [], [], None, [4, 2, START], id="own ones, the newest on record first"),
        pytest.param([6], 4, [], [], None, [START], id="own ones that are not on record are not used"),
        pytest.param([], 0, [4], [], None, [START], id="an offer that no record can prove is not used"),
        pytest.param([], 0, [2, 4], [2, 4], None, [4, 2, START], id="those on record, the newest first"),
        pytest.param([2], 2, [8], [8], None, [2, 8, START], id="own ones before those of peers"),
        pytest.param([6], 4, [8], [8], None, [START, 8], id="with own ones not on record, the start before peers"),
        pytest.param([2], 2, [2], [2], None, [2, START], id="each once"),
        pytest.param([2, 4], 4, [8], [8], 4, [8], id="a node that is stuck needs later ones"),
        pytest.param([], 0, [], [], -1, [START], id="stuck before the first round: any will do"),
        pytest.param([], 0, [2, 4], [6], None, [START, 4, 2], id="older offers are tried last, the newest first"),
        pytest.param([], 0, [8], [6], None, [START], id="an offer beyond the record cannot be tried"),
        pytest.param([], 0, [2, 4], [6], 2, [4], id="who is stuck tries a later one"),
    ],
)
def test_where_a_replay_may_begin(
    own: list[int], confirmed: int, offers: list[int], named: list[int], stuck: int | None, found: list[int | Base]
) -> None:
    repair = Repair(SETTINGS)
    for applied in own:
        repair.keep(base(applied))
    repair.confirm(confirmed)
    for applied in offers:
        repair.hear(PEER, base(applied))
    repair.stuck = stuck
    bases = repair.bases(epoch(*map(base, named)))
    assert bases == [one if isinstance(one, Base) else base(one) for one in found]


@pytest.mark.parametrize(
    ("which", "proven"),
    [
        pytest.param(START, True, id="the start of the epoch"),
        pytest.param(base(2), True, id="an own one"),
        pytest.param(base(4), True, id="on record"),
        pytest.param(base(4, "forged"), False, id="others are on record"),
        pytest.param(base(3), False, id="not on record"),
    ],
)
def test_what_needs_no_trial(which: Base, proven: bool) -> None:
    repair = Repair(SETTINGS)
    repair.keep(base(2))
    assert repair.proven(epoch(base(4)), which) is proven


def test_an_offer_whose_trial_failed_is_forgotten_and_a_trial_ends_on_record() -> None:
    repair = Repair(SETTINGS)
    for one in (base(2, "forged"), base(3)):
        repair.hear(PEER, one)
    repair.trial = base(2, "forged")
    repair.refuse(base(2, "forged"))
    assert (repair.offers, [repair.trial]) == ({PEER: [base(3)]}, [None])
    repair.hear(LIAR, base(2, "forged"))
    assert repair.offers == {PEER: [base(3)], LIAR: []}
    repair.trial = base(3)
    repair.confirm(4)
    assert (repair.offers[PEER], [repair.trial]) == ([base(3)], [None])


def test_snapshots_of_before_a_restart_are_tried_unless_they_are_on_record() -> None:
    """The parameters may have been wrong when they were stored."""
    repair = Repair(SETTINGS)
    repair.remember([base(6), base(2), base(4)])
    known = epoch()
    assert repair.bases(known) == [START]
    known.named[4] = base(4).digest
    assert repair.bases(known) == [base(4), base(2), START]
    assert [repair.proven(known, each) for each in (base(2), base(4), base(6))] == [False, True, False]
    repair.refuse(base(2))
    assert repair.bases(known) == [base(4), START]


@pytest.mark.parametrize(
    ("own", "confirmed", "cut", "left"),
    [
        pytest.param([], 0, 0, [], id="nothing is kept"),
        pytest.param([2], 9, 0, [2], id="one snapshot is not enough: a replay may need the start"),
        pytest.param([2, 4], 9, 2, [2, 4], id="with two, nothing before the first is needed"),
        pytest.param([2, 4], 2, 0, [2, 4], id="a snapshot that nobody confirmed does not count"),
        pytest.param([2, 4, 6, 8], 6, 4, [4, 6, 8], id="from the last but one that was confirmed on"),
    ],
)
def test_what_is_outdated(own: list[int], confirmed: int, cut: int, left: list[int]) -> None:
    repair = Repair(SETTINGS)
    for applied in own:
        repair.keep(base(applied))
    repair.confirm(confirmed)
    assert repair.outdated() == cut
    assert repair.own == [base(applied) for applied in left]
