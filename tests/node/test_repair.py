"""What a node remembers for its repair: fingerprints, snapshots, offers, and from where a replay may begin."""

from __future__ import annotations

import pytest
from support.core import KEYS, LAYOUT, NODES, RUN

from psyche_lightning.node.agreement import EpochLog
from psyche_lightning.node.repair import MAX_OFFERS, Base, Repair
from psyche_lightning.node.rounds import RoundLog
from psyche_lightning.node.settings import Settings
from psyche_lightning.protocol.messages import Attest, seal
from psyche_lightning.protocol.state import CoordinatorConfig, Round
from psyche_lightning.wire.canonical import sha256

SETTINGS = Settings(False, 2, LAYOUT, 64, tensors=("a", "b"))
START = Base(0, sha256(b"start"))


def base(applied: int, name: str = "run") -> Base:
    return Base(applied, sha256(name.encode(), bytes([applied])))


def epoch(*proven: Base, voters: int = 2) -> EpochLog:
    """An epoch of 3 nodes, in which so many witnesses hold these parameters."""
    log = EpochLog(0, START.digest)
    for height in range(12):
        round_ = Round(height, height + 1, 7, 6 * height, 6, KEYS[:3])
        known = log.rounds[height] = RoundLog.open(round_, KEYS[:3], CoordinatorConfig(), RUN, LAYOUT, 64)
        for one in proven:
            if one.applied == height:
                for node in NODES[:voters]:
                    known.add_attest(seal(node, RUN, Attest(0, height, b"", one.applied, one.digest)))
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
    assert repair.differ(4, replay=True)
    assert repair.fingerprint(3, after) == tensor


def test_only_the_first_difference_of_a_replay_is_named() -> None:
    repair = Repair(SETTINGS)
    for applied in (1, 2, 3):
        repair.fingerprint(applied, b"1" * 8)
    repair.differ(4, replay=True)
    assert repair.fingerprint(1, b"1" * 8) is None
    assert repair.fingerprint(2, b"2" * 8) == "a"
    assert repair.fingerprint(3, b"2" * 8) is None


def test_what_a_quorum_confirmed_is_not_compared_any_more() -> None:
    repair = Repair(SETTINGS)
    for applied in (1, 2, 3):
        repair.fingerprint(applied, b"1" * 8)
    repair.confirm(2)
    assert repair.confirmed == 2
    repair.differ(4, replay=True)
    assert [repair.fingerprint(applied, b"2" * 8) for applied in (1, 2, 3)] == [None, None, "a"]


@pytest.mark.parametrize(
    ("differences", "replay", "answers", "stuck"),
    [
        pytest.param([4], True, [True], None, id="the first time a replay may help"),
        pytest.param([4, 4], True, [True, False], 3, id="the same difference again: it did not help"),
        pytest.param([4, 6], True, [True, True], None, id="another difference is another replay"),
        pytest.param([4], False, [False], 3, id="who guessed an agreed set cannot replay"),
    ],
)
def test_a_difference_is_replayed_once(
    differences: list[int], replay: bool, answers: list[bool], stuck: int | None
) -> None:
    repair = Repair(SETTINGS)
    assert [repair.differ(applied, replay=replay) for applied in differences] == answers
    assert repair.stuck == stuck


# --- what is not to be had --------------------------------------------------------------------------------------------


def test_waiting_for_a_round_counts_from_when_it_was_the_next() -> None:
    repair = Repair(SETTINGS)
    assert [repair.waited(3, now) for now in (10.0, 12.0)] == [0.0, 2.0]
    assert [repair.waited(4, now) for now in (13.0, 20.0)] == [0.0, 7.0]


def test_offers_are_kept_once_in_order_and_the_newest_only() -> None:
    repair = Repair(SETTINGS)
    for applied in (4, 2, 4, 6):
        repair.hear(base(applied))
    assert repair.offers == [base(2), base(4), base(6)]
    for applied in range(10, 10 + MAX_OFFERS):
        repair.hear(base(applied))
    assert len(repair.offers) == MAX_OFFERS
    assert repair.offers[0] == base(10)


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
    ("own", "confirmed", "offers", "proven", "stuck", "found"),
    [
        pytest.param([], 0, [], [], None, [START], id="nothing but the start of the epoch"),
        pytest.param([2, 4, 6], 4, [], [], None, [4, 2, START], id="own ones, the newest that is confirmed first"),
        pytest.param([6], 4, [], [], None, [START], id="own ones that nobody confirmed are not used"),
        pytest.param([], 0, [4], [], None, [START], id="an offer without proof is not used"),
        pytest.param([], 0, [2, 4], [2, 4], None, [4, 2, START], id="proven offers, the newest first"),
        pytest.param([2], 2, [8], [8], None, [2, 8, START], id="own ones before those of peers"),
        pytest.param([6], 4, [8], [8], None, [START, 8], id="with own ones unconfirmed, the start before peers"),
        pytest.param([2], 2, [2], [2], None, [2, START], id="each once"),
        pytest.param([2, 4], 4, [8], [8], 4, [8], id="a node that is stuck needs later ones"),
        pytest.param([], 0, [], [], -1, [START], id="stuck before the first round: any will do"),
    ],
)
def test_where_a_replay_may_begin(
    own: list[int], confirmed: int, offers: list[int], proven: list[int], stuck: int | None, found: list[int | Base]
) -> None:
    repair = Repair(SETTINGS)
    for applied in own:
        repair.keep(base(applied))
    repair.confirm(confirmed)
    for applied in offers:
        repair.hear(base(applied))
    repair.stuck = stuck
    bases = repair.bases(epoch(*map(base, proven)))
    assert bases == [one if isinstance(one, Base) else base(one) for one in found]


@pytest.mark.parametrize(
    ("proven", "stuck", "found"),
    [
        pytest.param([], None, [6, 4, 2], id="the newest first"),
        pytest.param([4], None, [6, 2], id="what is proven needs no more proof"),
        pytest.param([], 4, [6], id="what is not later than the round that cannot be applied is of no use"),
    ],
)
def test_which_offers_are_to_be_proven(proven: list[int], stuck: int | None, found: list[int]) -> None:
    repair = Repair(SETTINGS)
    for applied in (2, 4, 6):
        repair.hear(base(applied))
    repair.stuck = stuck
    assert repair.unproven(epoch(*map(base, proven))) == [base(applied) for applied in found]


def test_an_offer_of_other_parameters_than_a_quorum_s_is_never_proven() -> None:
    repair = Repair(SETTINGS)
    repair.hear(base(4, "forged"))
    log = epoch(base(4))
    assert repair.bases(log) == [START]
    assert repair.unproven(log) == [base(4, "forged")]
    assert repair.unproven(epoch(base(4, "forged"), voters=1)) == [base(4, "forged")]


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
