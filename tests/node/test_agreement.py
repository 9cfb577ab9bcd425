"""The agreed set, and what a node refuses to file."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_lightning.errors import WireError
from psyche_lightning.node.agreement import AgreedSet, EpochLog, Unknown, agreed_set
from psyche_lightning.node.rates import Rates
from psyche_lightning.node.rounds import MAX_ENTRIES_PER_BATCH, MAX_LISTS, RoundLog
from psyche_lightning.protocol.merkle import EMPTY_ROOT, merkle_root
from psyche_lightning.protocol.messages import Envelope, Result, seal
from psyche_lightning.protocol.open_ids import closed
from psyche_lightning.protocol.state import Checkpoint, CoordinatorConfig, Round, WitnessProof, WitnessRecord
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import Identity

LAYOUT = b"L" * 32
NODES = [Identity(bytes([n + 1]) * 32) for n in range(5)]
KEYS = tuple(node.public for node in NODES)
NEEDED = 3


def make_log(clients: int = 4, batch: int = 8) -> RoundLog:
    round_ = Round(height=3, step=4, seed=11, data_index=100, batch_size=batch, clients=KEYS[:clients])
    log = RoundLog.open(round_, KEYS[:clients], CoordinatorConfig(), NEEDED, "run", LAYOUT, 1000)
    log.assign(())
    return log


def result(log: RoundLog, index: int, **changes: object) -> Envelope:
    (start, end), *_ = closed(log.batches[index])
    made = Result(0, 3, 4, start, end, 0, sha256(bytes([index])), 500, LAYOUT, (7,), 0, 2)
    return seal(NODES[index], "run", replace(made, **changes))  # type: ignore[arg-type]


def file(log: RoundLog, *who: int, verified: bool = True) -> list[bytes]:
    """The commitments of these trainers' results, which are here; with their payloads or not."""
    found = []
    for index in who:
        entry = log.add_result(result(log, index))
        assert entry is not None
        found.append(entry.commitment)
        if verified:
            log.settle(entry)
    return sorted(found)


def report(log: RoundLog, root: bytes, *who: int) -> None:
    """These witnesses report a root; it replaces what they reported before."""
    records = {record.proof.index: record for record in log.round.witnesses}
    records |= {index: WitnessRecord(WitnessProof(0, index), root) for index in who}
    log.round = replace(log.round, witnesses=tuple(records.values()))


# --- the agreed set ---------------------------------------------------------------------------------------------------


def test_the_results_are_those_of_this_node_s_own_list_when_that_is_the_decided_one() -> None:
    log = make_log()
    hashes = file(log, 0, 1, 2)
    report(log, merkle_root(hashes), 0, 1, 2)
    outcome = agreed_set(log, log)
    assert isinstance(outcome, AgreedSet)
    assert [entry.commitment for entry in outcome.entries] == hashes
    assert outcome.trained == {0, 1, 2}


def test_results_that_this_node_has_and_the_decided_list_lacks_do_not_count() -> None:
    log = make_log()
    hashes = sorted(file(log, 0, 1))
    file(log, 2, 3)
    log.add_list(KEYS[4], hashes)  # from anybody
    report(log, merkle_root(hashes), 1, 2, 3)
    outcome = agreed_set(log, log)
    assert isinstance(outcome, AgreedSet)
    assert [entry.commitment for entry in outcome.entries] == hashes


def test_a_received_list_counts_also_for_results_whose_payload_is_not_here() -> None:
    log = make_log()
    hashes = file(log, 0, 1, 2, 3, verified=False)
    log.add_list(KEYS[1], hashes)
    report(log, merkle_root(hashes), 1, 2, 3)
    outcome = agreed_set(log, log)
    assert isinstance(outcome, AgreedSet)
    assert [entry.verified for entry in outcome.entries] == [False] * 4


def test_a_list_that_is_not_here_is_unknown_and_so_is_one_with_results_that_are_not() -> None:
    log = make_log()
    hashes = [*file(log, 0), sha256(b"somebody's")]
    report(log, merkle_root(hashes), 1, 2, 3)
    assert agreed_set(log, log) == Unknown()
    log.add_list(KEYS[1], hashes)
    assert agreed_set(log, log) == Unknown(results=True)


@pytest.mark.parametrize(
    "roots",
    [
        pytest.param([], id="nobody reported"),
        pytest.param([(b"\1" * 32, 0, 1)], id="half of the witnesses are no quorum"),
        pytest.param([(b"\1" * 32, 0, 1), (b"\2" * 32, 2, 3)], id="two lists with two reports each"),
        pytest.param([(EMPTY_ROOT, 0, 1, 2)], id="a quorum verified nothing"),
    ],
)
def test_without_a_decided_list_there_are_no_results(roots: list[tuple[bytes, int]]) -> None:
    log = make_log()
    file(log, 0, 1, 2, 3)
    for root, *who in roots:
        report(log, root, *who)
    assert agreed_set(log, log) == AgreedSet()


def test_the_reports_of_the_next_round_decide_with_overlap() -> None:
    log, after = make_log(), make_log()
    hashes = file(log, 0, 1)
    report(log, merkle_root(hashes), 0, 1, 2)
    assert agreed_set(log, after) == AgreedSet()
    report(after, merkle_root(hashes), 0, 1, 2)
    outcome = agreed_set(log, after)
    assert isinstance(outcome, AgreedSet)
    assert len(outcome.entries) == 2


@settings(max_examples=60)
@given(st.sets(st.integers(0, 3)), st.permutations(range(4)), st.sets(st.integers(0, 3)))
def test_the_outcome_does_not_depend_on_the_order_of_arrival_or_on_what_else_is_here(
    listed: set[int], order: list[int], verified: set[int]
) -> None:
    outcomes = []
    for arrival, here in ((range(4), set(range(4))), (order, verified)):
        log = make_log()
        known = {index: file(log, index, verified=index in here)[0] for index in arrival}
        hashes = sorted(known[index] for index in listed)
        log.add_list(KEYS[0], hashes)
        report(log, merkle_root(hashes), 0, 1, 3)
        outcome = agreed_set(log, log)
        assert isinstance(outcome, AgreedSet)
        outcomes.append(([entry.commitment for entry in outcome.entries], outcome.lrs))
    assert outcomes[0] == outcomes[1]


def bits(rate: float) -> int:
    return int.from_bytes(struct.pack("<f", rate), "little")


@pytest.mark.parametrize(
    ("rates", "agreed"),
    [
        pytest.param([[0.1], [0.1], [0.1], [5.0]], [0.1], id="who is alone with a large one moves nothing"),
        pytest.param([[5.0], [5.0], [0.1], [0.1]], [0.1], id="the lower one of two in the middle"),
        pytest.param([[1e-39], [1.0], [3.0]], [1.0], id="by value, also of very small numbers"),
        pytest.param([[0.0], [0.0], [0.5], [0.25]], [0.0], id="zero is a rate"),
        pytest.param([[1.0, 8.0], [2.0, 4.0], [3.0, 6.0]], [2.0, 6.0], id="each group by itself"),
    ],
)
def test_the_lower_median_of_the_learning_rates_is_agreed(rates: list[list[float]], agreed: list[float]) -> None:
    log = make_log()
    log.rates = Rates(len(agreed))
    for index, groups in enumerate(rates):
        entry = log.add_result(result(log, index, lrs=tuple(map(bits, groups))))
        assert entry is not None
        log.settle(entry)
    report(log, merkle_root(log.own()[0]), 0, 1, 2)
    outcome = agreed_set(log, log)
    assert isinstance(outcome, AgreedSet)
    assert outcome.lrs == tuple(map(bits, agreed))


# --- what is filed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"layout": b"M" * 32}, "other shapes"),
        ({"start": 0, "end": 1}, "was assigned"),
        ({"step": 9}, "of step 9"),
        ({"size": 1001}, "payload of 1001 bytes"),
        ({"size": 0}, "payload of 0 bytes"),
    ],
)
def test_a_result_that_does_not_fit_is_refused(changes: dict[str, object], text: str) -> None:
    log = make_log()
    with pytest.raises(WireError, match=text):
        log.add_result(result(log, 0, **changes))


def test_a_result_of_a_stranger_is_refused() -> None:
    log = make_log()
    with pytest.raises(WireError, match="not a member"):
        log.add_result(seal(NODES[4], "run", result(log, 0).message))


def test_who_signs_two_results_is_in_no_list_of_this_node() -> None:
    log = make_log()
    (third,) = file(log, 1)
    for nonce in (0, 1):
        entry = log.add_result(result(log, 0, nonce=nonce))
        assert entry is not None
        log.settle(entry)
    assert log.own()[0] == (third,)
    assert log.missing == {0, 2, 3}
    assert log.hopeless == {0}


def test_the_lists_of_one_sender_are_bounded() -> None:
    log = make_log()
    lists = [[sha256(bytes([n]))] for n in range(MAX_LISTS + 1)]
    for each in lists:
        log.add_list(KEYS[1], each)
        log.add_list(KEYS[1], each)
    assert [log.list_of(merkle_root(each)) for each in lists] == [*map(tuple, lists[:-1]), None]
    log.add_list(KEYS[2], lists[-1])
    assert log.list_of(merkle_root(lists[-1])) == tuple(lists[-1])


def test_repetition_changes_nothing_and_a_flood_is_bounded() -> None:
    log = make_log()
    assert log.add_result(result(log, 0)) is not None
    assert log.add_result(result(log, 0)) is None
    for nonce in range(50):
        log.add_result(result(log, 0, nonce=nonce))
    assert len(log.of(0)) == MAX_ENTRIES_PER_BATCH


def test_the_parameters_on_record_are_named_by_the_rounds_of_this_epoch() -> None:
    epoch = EpochLog(2, b"D" * 32, first_step=11, needed=NEEDED)
    for checkpoint in (Checkpoint(b"", 12), Checkpoint(b"old", 9), Checkpoint(b"D" * 32, 10), Checkpoint(b"new", 14)):
        epoch.name(checkpoint)
    assert epoch.named == {0: b"D" * 32, 4: b"new"}


# --- the ids of an epoch ----------------------------------------------------------------------------------------------


def make_epoch(rounds: int, open_ids: tuple[tuple[int, int, int], ...] = ()) -> EpochLog:
    """Rounds of 8 samples by 4 nodes, of which nothing is decided yet."""
    epoch = EpochLog(0, b"D" * 32, 1, NEEDED)
    for height in range(rounds):
        round_ = Round(height, height + 1, seed=height, data_index=8 * height, batch_size=8, clients=KEYS[:4])
        epoch.rounds[height] = RoundLog.open(round_, KEYS[:4], CoordinatorConfig(), NEEDED, "run", LAYOUT, 1000)
    epoch.start(0, open_ids)
    return epoch


def agreed(log: RoundLog, trainers: set[int], tokens: int = 1) -> AgreedSet:
    entries = []
    for index in sorted(trainers):
        (start, end), *again = closed(log.batches[index])
        height = log.round.height
        made = Result(0, height, height + 1, start, end, 0, b"P" * 32, 5, LAYOUT, (7,), 0, tokens, tuple(again))
        entry = log.add_result(seal(NODES[index], "run", made))
        assert entry is not None
        entries.append(entry)
    return AgreedSet(tuple(entries), (7,))


def test_ids_that_were_not_agreed_are_assigned_again_three_rounds_later() -> None:
    epoch = make_epoch(6)
    assert [log.round.height for log in epoch.assign()] == [0, 1, 2]
    lost = epoch.rounds[0].batches[2]
    epoch.close(agreed(epoch.rounds[0], {0, 1, 3}))
    [third] = epoch.assign()
    assert third.round.height == 3
    extra = sorted(interval for batch in third.batches.values() for interval in batch[1:])
    assert [i for interval in extra for i in range(*interval)] == list(range(*lost[0]))
    for height in (1, 2):
        record = epoch.close(agreed(epoch.rounds[height], {0, 1, 2, 3}))
        assert record.again == ()
    assert epoch.open_at[3] == ((4, *lost[0]),)
    assert epoch.close(agreed(third, {0, 1, 2, 3})).again == lost
    assert epoch.open_at[4] == ()


def test_an_abstention_is_agreed_and_its_ids_stay_open() -> None:
    epoch = make_epoch(1)
    epoch.assign()
    epoch.close(agreed(epoch.rounds[0], {0, 1, 2, 3}, tokens=0))
    assert epoch.open_at[1] == ((4, 0, 8),)


def test_what_was_open_before_the_epoch_is_trained_in_its_first_rounds() -> None:
    epoch = make_epoch(3, open_ids=((1, 900, 902), (3, 950, 951)))
    epoch.assign()
    assert [epoch.again(height) for height in range(3)] == [((900, 902),), (), ((950, 951),)]


def test_a_round_trains_no_more_ids_again_than_it_has_of_its_own() -> None:
    epoch = make_epoch(3, open_ids=((1, 900, 920),))
    epoch.assign()
    assert [epoch.again(height) for height in range(3)] == [((900, 908),), ((908, 916),), ((916, 920),)]


def test_starting_over_from_other_open_ids_assigns_and_files_anew() -> None:
    epoch = make_epoch(2)
    epoch.assign()
    log = epoch.rounds[0]
    agreed(log, {0, 1})
    epoch.start(0, ((1, 900, 901),))
    assert [found.round.height for found in epoch.assign()] == [0, 1]
    assert len(epoch.early[0]) == 2
    assert not log.entries
    assert sum(len(batch) for batch in log.batches.values()) == 5
