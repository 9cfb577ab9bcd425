"""Requests between node and server: what travels follows from their fields, and is what it was."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from psyche_lightning.errors import CoordinatorError, WireError
from psyche_lightning.protocol.evals import Measure
from psyche_lightning.protocol.manifest import manifest_digest, manifest_text
from psyche_lightning.protocol.requests import (
    MAX_FIGURES,
    REQUESTS,
    Accuse,
    Evaluated,
    Figure,
    GetRounds,
    GetTerms,
    HealthCheck,
    Join,
    Report,
    Request,
    Terms,
    WarmupWitness,
    Withdraw,
    Witness,
    decode,
    encode,
    wire_types,
)
from psyche_lightning.protocol.state import CoordinatorConfig, Round, WitnessProof, WitnessRecord
from psyche_lightning.wire.canonical import pack, unpack

MANIFEST = {"model": {"layers": 2, "name": "m"}, "data": {"seed": 3}}
TEXT, DIGEST = manifest_text(MANIFEST), manifest_digest(MANIFEST)
TRAVELS: list[tuple[Request[Any], str, list[Any]]] = [
    (GetTerms(), "terms", []),
    (Join("host:1", MANIFEST), "join", ["host:1", DIGEST, TEXT]),
    (Join("host:1", MANIFEST, "eu-west"), "join", ["host:1", DIGEST, TEXT, "eu-west"]),
    (Withdraw(), "withdraw", []),
    (WarmupWitness(1, 2, b"d" * 32), "warmup_witness", [1, 2, b"d" * 32]),
    (
        Witness(
            *(1, 5, WitnessProof(3, 4, True), b"m" * 32, b"p" * 192, b"b" * 192, 6, b"d" * 32),
            Report(7, 2.5, 10.0, 20, 30, (Figure("norm/0", 6, 0.5),)),
        ),
        "witness",
        [
            1,
            5,
            3,
            4,
            True,
            b"m" * 32,
            b"p" * 192,
            b"b" * 192,
            6,
            b"d" * 32,
            [7, 2.5, 10.0, 20, 30, [["norm/0", 6, 0.5]]],
        ],
    ),
    (HealthCheck(1, 5, (b"k" * 32, b"l" * 32)), "health_check", [1, 5, [b"k" * 32, b"l" * 32]]),
    (Accuse(b"one", b"two"), "accuse", [b"one", b"two"]),
    (
        Evaluated("sums", 6, 20, 3, (Measure("acc", 1.0, 2.0), Measure("p", -3.5, 2.0, True))),
        "evaluated",
        ["sums", 6, 20, 3, [["acc", 1.0, 2.0, False], ["p", -3.5, 2.0, True]]],
    ),
    (GetRounds(1, 3), "rounds", [1, 3]),
]


IDS = [f"{name} of {len(values)}" for _, name, values in TRAVELS]


@pytest.mark.parametrize(("request_", "name", "values"), TRAVELS, ids=IDS)
def test_a_request_travels_as_its_fields_and_arrives_as_it_was(request_: Request[Any], name: str, values: Any) -> None:
    assert (request_.name, encode(request_)) == (name, values)
    received = unpack(pack(encode(request_)), max_size=1 << 20)
    assert decode(name, received, {}) == request_


def test_every_request_is_in_the_table_above() -> None:
    assert {type(request) for request, _, _ in TRAVELS} == set(REQUESTS.values())


def test_a_manifest_that_the_server_holds_need_not_travel() -> None:
    values = encode(Join("a", MANIFEST), held=True)
    assert values == ["a", DIGEST, ""]
    assert decode("join", values, {DIGEST: MANIFEST}) == Join("a", MANIFEST)
    with pytest.raises(CoordinatorError, match="does not hold this manifest") as caught:
        decode("join", values, {})
    assert caught.value.code == "ManifestNeeded"


@pytest.mark.parametrize(
    ("digest", "text"),
    [
        (DIGEST, "{"),
        (DIGEST, "[1]"),
        (DIGEST, "[" * 100_000),
        (DIGEST, json.dumps(MANIFEST)),  # not the canonical form
        (bytes(32), TEXT),
    ],
    ids=["no JSON", "no object", "deep", "spaces", "other digest"],
)
def test_a_manifest_is_what_its_digest_says(digest: bytes, text: str) -> None:
    with pytest.raises(CoordinatorError, match="manifest cannot be read") as caught:
        decode("join", ["a", digest, text], {})
    assert caught.value.code == "InvalidManifest"


@pytest.mark.parametrize("name", [name for name, kind in REQUESTS.items() if wire_types(kind)])
def test_fields_of_another_number_or_type_are_refused_by_name(name: str) -> None:
    values = next(values for _, other, values in TRAVELS if other == name)
    for wrong in (values[:-1], [*values, 0], [None, *values[1:]], None, tuple(values)):
        with pytest.raises(WireError, match=rf"^{name} takes \("):
            decode(name, wrong, {})
    with pytest.raises(WireError, match="unknown request 'x'; known are terms, join, "):
        decode("x", [], {})


def named(*figures: Any) -> list[Any]:
    return [1, 1.0, 1.0, 0, 0, list(figures)]


@pytest.mark.parametrize(
    "figures",
    [
        [1],
        [1, 1.0, 1.0, 0, 0],
        [-1, 1.0, 1.0, 0, 0, []],
        [1, 1, 1.0, 0, 0, []],
        [1, 1.0, 1.0, 0, "x", []],
        [True] * 6,
        named("norm"),
        named(["norm", 1]),
        named(["norm", 1, 2]),
        named(["norm", -1, 1.0]),
        named(["norm", 1, math.nan]),
        named(["norm", 1, math.inf]),
        named(["", 1, 1.0]),
        named(["norm/0/1", 1, 1.0]),
        named(["<b>", 1, 1.0]),
        named(["n" * 49, 1, 1.0]),
        named(*[[f"norm/{i}", 1, 1.0] for i in range(MAX_FIGURES + 1)]),
    ],
)
def test_figures_of_another_shape_are_refused(figures: list[Any]) -> None:
    with pytest.raises(CoordinatorError, match="report") as caught:
        decode("witness", [0, 0, 0, 0, True, b"", b"", b"", 0, b"", figures], {})
    assert caught.value.code == "InvalidRequest"


def test_keys_are_bytes() -> None:
    with pytest.raises(CoordinatorError, match="signers of health_check is a list of keys"):
        decode("health_check", [0, 0, [b"", "x"]], {})


def test_answers_travel_as_json() -> None:
    terms = Terms(CoordinatorConfig(total_steps=5), ("global_batch_size",), MANIFEST)
    assert GetTerms.answer_from_json(json.loads(json.dumps(GetTerms.answer_to_json(terms)))) == terms
    record = WitnessRecord(WitnessProof(0, 1), b"m" * 32)
    rounds = (Round(4, 5, 7, 30, 6, (b"k" * 32, b"l" * 32), witnesses=(record,)),)
    assert GetRounds.answer_from_json(json.loads(json.dumps(GetRounds.answer_to_json(rounds)))) == rounds
    assert HealthCheck.answer_from_json(json.loads(json.dumps(HealthCheck.answer_to_json(2)))) == 2
