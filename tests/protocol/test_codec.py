from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from psyche_lightning.errors import WireError
from psyche_lightning.protocol.codec import (
    diff,
    from_json,
    patch,
    round_from_json,
    round_to_json,
    state_from_json,
    state_to_json,
)
from psyche_lightning.protocol.state import (
    Checkpoint,
    Client,
    ClientStatus,
    CoordinatorConfig,
    Phase,
    Round,
    RunState,
    WitnessProof,
    WitnessRecord,
)

KEYS = tuple(bytes([i]) * 32 for i in range(1, 4))
RECORD = WitnessRecord(WitnessProof(1, 2), b"m" * 32, b"p" * 192, b"b" * 192)
STATE = RunState(
    "a run",
    phase=Phase.ROUND_TRAIN,
    phase_start=1.1,
    config=CoordinatorConfig(warmup_time=7),
    gathered_at=0.1,
    rounds=(Round(4, 5, 2**64 - 1, 30, 6, KEYS, 0, (RECORD,)), Round(1, 2, 3, 12, 6, KEYS)),
    needed=2,
    warmup_witnesses=(RECORD,),
    clients=(Client(KEYS[0], KEYS[1], "host:1"), Client(KEYS[1], KEYS[2], "", ClientStatus.DROPPED, 9)),
    checkpoint=Checkpoint(b"d" * 32, 4),
    checkpoint_votes=((KEYS[0], 4, b"d" * 32),),
    holders=KEYS,
    nonce=77,
    incarnation=bytes(range(16)),
)


def through_text(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_states_round_trip_exactly() -> None:
    assert state_from_json(through_text(state_to_json(STATE, blooms=True))) == STATE
    assert state_from_json(through_text(state_to_json(RunState("r")))) == RunState("r")
    assert json.dumps(state_to_json(STATE)["config"]).startswith('{"warmup_time": 7.0,')
    assert list(state_to_json(STATE))[:3] == ["run_id", "phase", "phase_start"]


def test_the_weights_of_equal_shares_are_left_out() -> None:
    assert "weights" not in json.dumps(state_to_json(STATE))
    weighed = replace(STATE.rounds[0], weights=(256, 64, 1))
    assert through_text(round_to_json(weighed))["weights"] == [256, 64, 1]
    assert round_from_json(through_text(round_to_json(weighed, blooms=True))) == weighed
    change = diff(round_to_json(STATE.rounds[0]), round_to_json(weighed))
    assert change == {"weights": [256, 64, 1]}
    assert patch(round_to_json(weighed), diff(round_to_json(weighed), round_to_json(STATE.rounds[0]))) == round_to_json(
        STATE.rounds[0]
    )


def test_nodes_do_not_get_the_bloom_filters() -> None:
    view = state_to_json(STATE)
    assert "participants" not in json.dumps(view)
    bare = replace(RECORD, participants=b"", broadcasts=b"")
    assert state_from_json(view).rounds[0].witnesses == (bare,)
    assert round_from_json(round_to_json(STATE.rounds[0])) == replace(STATE.rounds[0], witnesses=(bare,))
    assert round_from_json(round_to_json(STATE.rounds[0], blooms=True)) == STATE.rounds[0]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["phase"], 5, r"RunState\.phase is '5'; expected one of \[0, 1, 2, 3, 4, 6, 7\]"),
        (["needed"], -1, r"RunState\.needed"),
        (["phase"], 8, r"RunState\.phase is '8'; expected one of \[0, 1,"),
        (["phase"], True, "expected one of"),
        (["nonce"], -1, r"RunState\.nonce"),
        (["nonce"], 2**64, "whole number"),
        (["nonce"], 1.0, "whole number"),
        (["nonce"], None, "whole number"),
        (["phase_start"], float("nan"), "finite"),
        (["phase_start"], 10**400, "finite"),
        (["phase_start"], "1", "finite"),
        (["run_id"], "x" * 5000, "text of at most"),
        (["run_id"], 5, "text"),
        (["pending_pause"], 1, "true or false"),
        (["clients", 0, "signer"], "AB" * 32, r"RunState\.clients\[0\]\.signer .* hex of 32 bytes"),
        (["clients", 0, "signer"], "ab" * 31, "hex of 32 bytes"),
        (["clients", 0, "node"], "²" * 64, "hex of 32 bytes"),
        (["clients", 0, "status"], 4, "one of"),
        (["clients", 0], [], "an object"),
        (["clients"], {}, "a list"),
        (["clients"], [None] * 70000, "a list of at most"),
        (["rounds", 0, "clients", 1], "00", r"RunState\.rounds\[0\]\.clients\[1\]"),
        (["rounds", 0, "height"], 5, "belongs in another slot"),
        (["rounds", 0, "witnesses", 0, "proof", "index"], "2", r"witnesses\[0\]\.proof\.index"),
        (["rounds", 0, "witnesses", 0, "participants"], "00", "192 bytes"),
        (["checkpoint", "digest"], "00" * 31, "hex of 0 or 32 bytes"),
        (["checkpoint_votes", 0], ["00" * 32, 1], "3 values"),
        (["head"], 2, "head is 2 of 2 rounds"),
        (["rounds", 0, "weights"], [1, 2], "a round has no weights, or one of 1 to 256 for each of its clients"),
        (["rounds", 0, "weights"], [1, 0, 1], "a round has no weights, or one of 1 to 256"),
        (["rounds", 0, "weights"], [1, 257, 1], "a round has no weights, or one of 1 to 256"),
        (["rounds", 0, "weights"], [1, 1.0, 1], "expected a whole number"),
        (["config", "extra"], 1, "expected only warmup_time"),
    ],
)
def test_other_values_are_refused(path: list[Any], value: Any, message: str) -> None:
    data = through_text(state_to_json(STATE, blooms=True))
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(WireError, match=message):
        state_from_json(data)


def test_missing_values_are_refused() -> None:
    data = state_to_json(STATE)
    for name in data:
        if name != "gathered_at":
            with pytest.raises(WireError, match=rf"RunState\.{name} is 'missing'"):
                state_from_json({key: value for key, value in data.items() if key != name})
    with pytest.raises(WireError, match="an object"):
        state_from_json([])
    five = {**data, "rounds": [*data["rounds"], *data["rounds"], data["rounds"][0]]}
    with pytest.raises(WireError, match="at most 4"):
        state_from_json(five)


def test_any_class_of_the_state_can_be_read() -> None:
    assert from_json(Checkpoint, {"digest": "", "step": 3}) == Checkpoint(b"", 3)


scalars = st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=2)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=4)
)
objects = st.dictionaries(st.sampled_from("abcd"), json_values, max_size=4)


def lists_stay(old: Any, new: Any) -> bool:
    """Whether no list becomes an object, which a change cannot say."""
    if isinstance(old, dict) and isinstance(new, dict):
        return all(lists_stay(old[name], new[name]) for name in old.keys() & new.keys())
    if isinstance(old, list) and isinstance(new, list):
        return all(lists_stay(a, b) for a in old for b in new)
    return not (isinstance(old, list) and isinstance(new, dict))


@given(objects, objects)
@example({"a": 0.0}, {"a": -0.0})
def test_a_change_leads_from_old_to_new(old: dict[str, Any], new: dict[str, Any]) -> None:
    if not lists_stay(old, new):
        return
    before = copy.deepcopy(old)
    change = through_text(diff(old, new))
    assert json.dumps(patch(old, change), sort_keys=True) == json.dumps(new, sort_keys=True)
    assert old == before
    assert (change == {}) == (json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True))


def test_changes_are_small() -> None:
    base = state_to_json(STATE)
    more = replace(STATE.rounds[1], witnesses=(RECORD,))
    after = state_to_json(replace(STATE, rounds=(STATE.rounds[0], more), nonce=78))
    change = diff(base, after)
    assert change["rounds"]["at"].keys() == {"1"}
    assert len(json.dumps(change)) < 300
    many = tuple(Client(bytes([i]) * 32, bytes([i]) * 32) for i in range(200))
    full, fewer = (state_to_json(replace(STATE, clients=who)) for who in (many, many[:3] + many[4:]))
    assert diff(full, fewer) == {"clients": {"splice": [3, 1, []]}}


@pytest.mark.parametrize(
    "change",
    [
        [],
        {"missing": None},
        {"rounds": {}},
        {"rounds": {"other": 1}},
        {"rounds": {"at": []}},
        {"rounds": {"at": {"2": 1}}},
        {"rounds": {"at": {"-1": 1}}},
        {"rounds": {"at": {"²": 1}}},
        {"rounds": {"splice": [0, 1]}},
        {"rounds": {"splice": {}}},
        {"rounds": {"splice": [0, True, []]}},
        {"rounds": {"splice": [2, 1, []]}},
        {"rounds": {"splice": [1, -1, []]}},
        {"rounds": {"splice": [-1, 1, []]}},
    ],
)
def test_changes_that_do_not_fit_are_refused(change: Any) -> None:
    with pytest.raises(WireError):
        patch(state_to_json(STATE), change)
