"""The agreed set, and what a node refuses to file."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_lightning.errors import WireError
from psyche_lightning.node.agreement import AgreedSet, EpochLog, Undecided, decide
from psyche_lightning.node.rounds import MAX_ENTRIES_PER_BATCH, RoundLog
from psyche_lightning.protocol.merkle import attest_root
from psyche_lightning.protocol.messages import Attest, Envelope, Result, seal
from psyche_lightning.protocol.open_ids import closed
from psyche_lightning.protocol.state import CoordinatorConfig, Round, WitnessProof, WitnessRecord
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import Identity

LAYOUT = b"L" * 32
NODES = [Identity(bytes([n + 1]) * 32) for n in range(5)]
KEYS = tuple(node.public for node in NODES)


def make_log(clients: int = 4, batch: int = 8) -> RoundLog:
    round_ = Round(height=3, step=4, seed=11, data_index=100, batch_size=batch, clients=KEYS[:clients])
    log = RoundLog.open(round_, KEYS[:clients], CoordinatorConfig(), "run", LAYOUT, 1000)
    log.assign(())
    return log


def result(log: RoundLog, index: int, **changes: object) -> Envelope:
    (start, end), *_ = closed(log.batches[index])
    made = Result(0, 3, 4, start, end, 0, sha256(bytes([index])), 500, LAYOUT, (7,), 0, 2)
    return seal(NODES[index], "run", replace(made, **changes))  # type: ignore[arg-type]


def attest(log: RoundLog, index: int, hashes: list[bytes], record: bool = True) -> None:
    message = Attest(0, 3, b"".join(sorted(hashes)), 0, b"")
    log.add_attest(seal(NODES[index], "run", message))
    if record:
        proof = WitnessProof(0, index)
        log.round = replace(
            log.round, witnesses=(*log.round.witnesses, WitnessRecord(proof, attest_root(message), True))
        )


def test_a_quorum_of_lists_agrees() -> None:
    log = make_log()
    entries = [log.add_result(result(log, index)) for index in range(4)]
    hashes = [entry.commitment for entry in entries if entry]
    for index in (0, 1, 2):
        attest(log, index, hashes if index else hashes[:3])
    outcome = decide(log, log)
    assert isinstance(outcome, AgreedSet)
    assert [entry.commitment for entry in outcome.entries] == sorted(hashes[:3])
    assert outcome.lrs == (7,)


def test_half_of_the_expected_witnesses_is_no_quorum() -> None:
    log = make_log()
    entry = log.add_result(result(log, 0))
    assert entry is not None
    for index in (0, 1):
        attest(log, index, [entry.commitment])
    assert decide(log, log) == AgreedSet()


def test_a_list_that_did_not_arrive_keeps_the_round_open_only_while_it_matters() -> None:
    log = make_log()
    entries = [log.add_result(result(log, index)) for index in range(4)]
    hashes = [entry.commitment for entry in entries if entry]
    for index in range(3):
        attest(log, index, hashes[:2] if index else hashes)
    missing = Attest(0, 3, b"".join(sorted(hashes)), 0, b"")
    record = WitnessRecord(WitnessProof(0, 3), attest_root(missing), True)
    log.round = replace(log.round, witnesses=(*log.round.witnesses, record))
    # Two commitments have three votes, two have one: with the fourth list still two, so nothing is open.
    assert isinstance(decide(log, log), AgreedSet)
    log.attests.pop(2)
    assert decide(log, log) == Undecided(lists=(2, 3))


def test_a_list_with_another_root_than_its_record_counts_as_absent() -> None:
    log = make_log()
    entry = log.add_result(result(log, 0))
    assert entry is not None
    for index in range(3):
        attest(log, index, [entry.commitment])
    log.attests[1] = {}
    attest(log, 1, [], record=False)
    assert decide(log, log) == Undecided(lists=(1,))


def test_two_agreed_results_of_one_trainer_exclude_both() -> None:
    log = make_log()
    one, other, third = (
        log.add_result(result(log, 0)),
        log.add_result(result(log, 0, nonce=1)),
        log.add_result(result(log, 1)),
    )
    assert one
    assert other
    assert third
    for index in range(3):
        attest(log, index, [one.commitment, other.commitment, third.commitment])
    outcome = decide(log, log)
    assert isinstance(outcome, AgreedSet)
    assert outcome.entries == (third,)
    for entry in (one, other, third):
        log.settle(entry)
    assert log.verified() == [third]
    assert log.missing == {0, 2, 3}
    assert log.hopeless == {0}


def test_an_agreed_result_that_is_unknown_here_is_asked_for() -> None:
    log = make_log()
    for index in range(3):
        attest(log, index, [b"\x01" * 32])
    assert decide(log, log) == Undecided(results=True)


def test_the_most_frequent_learning_rate_wins() -> None:
    log = make_log()
    rates = [(5,), (9,), (9,), (5,)]
    entries = [log.add_result(result(log, index, lrs=rates[index])) for index in range(4)]
    hashes = [entry.commitment for entry in entries if entry]
    for index in range(4):
        attest(log, index, hashes)
    outcome = decide(log, log)
    assert isinstance(outcome, AgreedSet)
    assert outcome.lrs == (5,)  # two each: the smaller bits, so that all nodes choose alike


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


def test_strangers_and_those_who_are_no_witnesses_are_refused() -> None:
    log = make_log()
    stranger = seal(NODES[4], "run", result(log, 0).message)
    with pytest.raises(WireError, match="not a member"):
        log.add_result(stranger)
    with pytest.raises(WireError, match="not a witness"):
        log.add_attest(seal(NODES[4], "run", Attest(0, 3, b"", 0, b"")))


def test_repetition_changes_nothing_and_a_flood_is_bounded() -> None:
    log = make_log()
    assert log.add_result(result(log, 0)) is not None
    assert log.add_result(result(log, 0)) is None
    for nonce in range(50):
        log.add_result(result(log, 0, nonce=nonce))
    assert len(log.of(0)) == MAX_ENTRIES_PER_BATCH


@settings(max_examples=60)
@given(st.lists(st.sets(st.integers(0, 3)), min_size=4, max_size=4), st.permutations(range(4)))
def test_the_outcome_does_not_depend_on_the_order_of_arrival(lists: list[set[int]], order: list[int]) -> None:
    outcomes = []
    for arrival in (range(4), order):
        log = make_log()
        for index in arrival:
            log.add_result(result(log, index))
        known = {entry.trainer: entry.commitment for entry in log.entries.values()}
        for index in range(4):
            attest(log, index, [known[i] for i in lists[index]])
        log.attests = {index: log.attests[index] for index in arrival}
        outcome = decide(log, log)
        assert isinstance(outcome, AgreedSet)
        outcomes.append([entry.commitment for entry in outcome.entries])
    assert outcomes[0] == outcomes[1]


def test_only_a_quorum_of_witnesses_makes_a_digest_the_runs() -> None:
    log = make_log()
    epoch = EpochLog(0, b"", {3: log})
    theirs = b"\x01" * 32
    for index in (0, 1):
        log.add_attest(seal(NODES[index], "run", Attest(0, 3, b"", 3, theirs)))
    assert epoch.quorum_digest(3, span=1) is None
    log.add_attest(seal(NODES[2], "run", Attest(0, 3, b"", 3, theirs)))
    assert epoch.quorum_digest(3, span=1) == theirs
    assert epoch.quorum_digest(2, span=1) is None
    assert epoch.quorum_digest(6, span=1) is None


def make_epoch(rounds: int, open_ids: tuple[tuple[int, int, int], ...] = ()) -> EpochLog:
    """Rounds of 8 samples by 4 nodes, of which nothing is decided yet."""
    epoch = EpochLog(0, b"D" * 32)
    for height in range(rounds):
        round_ = Round(height, height + 1, seed=height, data_index=8 * height, batch_size=8, clients=KEYS[:4])
        epoch.rounds[height] = RoundLog.open(round_, KEYS[:4], CoordinatorConfig(), "run", LAYOUT, 1000)
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
