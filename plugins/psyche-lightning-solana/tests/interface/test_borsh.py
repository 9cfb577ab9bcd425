"""One description, three forms: borsh is canonical, memory keeps the values, and what is wrong is named."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psyche_lightning_solana.borsh import BOOL, F32, U8, Array, Fixed, FixedVector, Option, Reader, String, Type, Vector
from psyche_lightning_solana.interface import PROGRAMS
from psyche_lightning_solana.types import CHECKPOINT, CONFIG, MODEL, OPTIMIZER, WITNESS_METADATA
from solana_support.values import any_value

from psyche_lightning.errors import ConfigError, WireError

ARGUMENTS = [spec.arguments for program in PROGRAMS.values() for spec in program.instructions.values()]
TYPES: list[Type] = [*ARGUMENTS, *(kind for program in PROGRAMS.values() for kind in program.accounts.values())]


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.sampled_from(TYPES))
def test_values_come_back(seed: int, kind: Type) -> None:
    data = kind.write(any_value(kind, Random(seed)))
    assert kind.write(kind.decode(data)) == data


@settings(max_examples=400)
@given(st.integers(0, 2**32), st.sampled_from(TYPES))
def test_what_a_decoder_takes_is_what_the_encoder_writes(seed: int, kind: Type) -> None:
    random = Random(seed)
    data = bytearray(kind.write(any_value(kind, random)))
    for _ in range(random.randint(1, 3)):
        if data:
            data[random.randrange(len(data))] = random.choice([0, 1, 2, 255])
    if random.random() < 0.3:
        del data[random.randrange(len(data) + 1) :]
    try:
        value = kind.decode(bytes(data))
    except WireError:
        return
    if not _has_unused_elements(kind):
        assert kind.write(value) == data


def _has_unused_elements(kind: Type) -> bool:
    """Psyche's vectors have room that they do not use, with any bytes in it."""
    return "metadata" in getattr(kind, "fields", {}) and kind.fields["metadata"] is WITNESS_METADATA  # type: ignore[attr-defined]


@settings(max_examples=100)
@given(st.integers(0, 2**32), st.sampled_from([MODEL, OPTIMIZER, CHECKPOINT, CONFIG]))
def test_memory_keeps_the_values(seed: int, kind: Type) -> None:
    value = any_value(kind, Random(seed))
    packed = kind.pack(value)
    assert len(packed) == kind.size
    assert kind.unpack(packed) == kind.decode(kind.write(value))
    assert kind.pack(kind.unpack(packed)) == packed


def test_a_toml_run_configuration() -> None:
    """The model of the 40B run, as TOML gives it."""
    llm: dict[str, Any] = {
        "architecture": "HfDeepseek",
        "data_type": "Pretraining",
        "max_seq_len": 2048,
        "cold_start_warmup_steps": 100,
        "data_location": {
            "Http": {
                "token_size_in_bytes": "TwoBytes",
                "shuffle": {"Seeded": list(range(32))},
                "location": {"Gcp": {"bucket_name": "b", "filter_directory": "d"}},
            }
        },
        "checkpoint": {"Hub": {"repo_id": "org/model-init"}},
        "lr_schedule": {"Constant": {"base_lr": 2e-4, "warmup_init_lr": 0.0, "warmup_steps": 2000}},
        "optimizer": {
            "Distro": {
                "clip_grad_norm": 1.0,
                "compression_decay": 0.995,
                "compression_chunk": 64,
                "compression_topk": 4,
                "quantize_1bit": True,
            }
        },
    }
    back = MODEL.unpack(MODEL.pack({"LLM": llm}))["LLM"]
    assert back["data_location"]["Http"]["shuffle"] == {"Seeded": bytes(range(32))}
    assert back["optimizer"]["Distro"]["weight_decay"] is None
    assert back["lr_schedule"] == llm["lr_schedule"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "Model is one of LLM"),
        ({"LLM": 3}, "LLM has the fields max_seq_len"),
        ({"LLM": {"max_seq_len": 1, "typo": 2}}, "LLM has no field 'typo'"),
        ({"LLM": {"max_seq_len": 1}}, "LLM lacks the field 'cold_start_warmup_steps'"),
    ],
)
def test_a_model_that_is_none(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MODEL.write(value)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (U8, 256, "256 does not fit into a u8"),
        (U8, -1, "does not fit"),
        (U8, True, "was given for a u8"),
        (U8, 1.0, "was given for a u8"),
        (F32, float("nan"), "NaN"),
        (F32, 1e39, "does not fit"),
        (BOOL, 1, "it is true or false"),
        (Fixed(4), "hello", "at most 4"),
        (Fixed(4), "a\0b", "without a zero"),
        (String(2), "abc", "at most 2 fit"),
        (CHECKPOINT, "Nowhere", "Checkpoint is one of Ephemeral, Dummy, Hub"),
        (CHECKPOINT, {"Hub": {"repo_id": 3}}, "repo_id: 3 was given for a text"),
        (CHECKPOINT, {"Ephemeral": {}}, "Checkpoint is one of"),
        (FixedVector("Few", U8, 2, 0), [1, 2, 3], "there is room for 2"),
        (Array(U8, 2), [1], "2 values were expected"),
    ],
)
def test_values_that_do_not_fit(kind: Type, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind.write(value)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (BOOL, b"\2"),
        (Option(U8), b"\2\0"),
        (F32, b"\0\0\xc0\x7f"),
        (String(9), b"\x02\0\0\0\xff\xff"),
        (String(1), b"\x02\0\0\0ab"),
        (Fixed(3), b"a\0b"),
        (Vector(U8), b"\xff\xff\xff\xff"),
        (FixedVector("Few", U8, 2, 0), b"\0\0" + (3).to_bytes(8, "little")),
        (CHECKPOINT, b"\6"),
        (U8, b""),
        (U8, b"\0\0"),
    ],
)
def test_bytes_that_are_no_value(kind: Type, data: bytes) -> None:
    with pytest.raises(WireError):
        kind.decode(data)


def test_a_reader_says_where_it_stands() -> None:
    reader = Reader(b"abc")
    reader.take(2)
    assert reader.left == 1
    with pytest.raises(WireError, match="5 bytes were expected at place 2 and 1 are left"):
        reader.take(5)
