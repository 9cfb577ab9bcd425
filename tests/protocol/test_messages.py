from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche_lightning.errors import WireError
from psyche_lightning.protocol.messages import (
    MAX_MESSAGE_SIZE,
    PURPOSE,
    Ask,
    Attest,
    Buffers,
    Message,
    Result,
    open_envelope,
    seal,
)
from psyche_lightning.wire.canonical import pack, unpack
from psyche_lightning.wire.identity import Identity, verify

NODE = Identity(b"\x07" * 32)
RESULT = Result(1, 2, 3, 4, 9, 0, b"p" * 32, 700, b"l" * 32, (0x3C23D70A,), 0x40000000, 6)

u32 = st.integers(0, 2**32 - 1)
hashes = st.binary(min_size=32, max_size=32)
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(Ask, u32, u32, u32),
    st.builds(Buffers, u32, hashes),
    st.builds(lambda listed: Attest(0, 1, b"".join(sorted(listed))), st.sets(hashes, max_size=40)),
    st.builds(
        lambda a, n, blob, layout, lrs: Result(0, 1, 2, a, a + n, 0, blob, 9, layout, lrs, 0, 1),
        u32, u32, hashes, hashes, st.lists(u32, min_size=1, max_size=8).map(tuple),
    ),
)  # fmt: skip


@given(messages)
def test_sealed_messages_are_opened(message: Message) -> None:
    envelope = seal(NODE, "run", message)
    assert open_envelope(envelope.raw, "run") == envelope
    assert envelope.sender == NODE.public


@given(messages, st.data())
def test_a_changed_bit_is_refused(message: Message, data: st.DataObject) -> None:
    raw = bytearray(seal(NODE, "run", message).raw)
    place = data.draw(st.integers(0, len(raw) * 8 - 1))
    raw[place // 8] ^= 1 << place % 8
    with pytest.raises(WireError):
        open_envelope(bytes(raw), "run")


@given(st.binary(max_size=400))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(WireError):
        open_envelope(noise, "run")


@given(st.binary(max_size=200))
def test_signed_noise_is_refused_or_canonical(noise: bytes) -> None:
    raw = NODE.public + NODE.sign(PURPOSE, "run", noise) + noise
    try:
        envelope = open_envelope(raw, "run")
    except WireError:
        return
    assert seal(NODE, "run", envelope.message).raw == raw


def test_a_signature_counts_for_its_run_only() -> None:
    with pytest.raises(WireError, match="wrong signature"):
        open_envelope(seal(NODE, "run", RESULT).raw, "other run")


def test_a_signature_counts_for_its_purpose_only() -> None:
    signature = NODE.sign("one purpose", "run", b"text")
    assert verify(NODE.public, "one purpose", "run", b"text", signature)
    assert not verify(NODE.public, "one purposerun", "", b"text", signature)
    assert not verify(NODE.public, "another", "run", b"text", signature)


def test_a_message_under_anothers_name_is_refused() -> None:
    raw = seal(NODE, "run", RESULT).raw
    with pytest.raises(WireError, match="wrong signature"):
        open_envelope(Identity(b"\x08" * 32).public + raw[32:], "run")


def test_too_long_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(WireError, match="bytes"):
        open_envelope(bytes(MAX_MESSAGE_SIZE + 1), "run")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"start": 10}, "empty"),
        ({"payload": b"short"}, "32"),
        ({"lrs": ()}, "learning rates"),
        ({"lrs": (1 << 32,)}, "32-bit"),
        ({"epoch": -1}, "unsigned"),
        ({"epoch": True}, "unsigned"),
        ({"size": 1 << 64}, "unsigned"),
    ],
)
def test_values_out_of_range_are_not_even_sealed(change: dict[str, Any], text: str) -> None:
    with pytest.raises(WireError, match=text):
        seal(NODE, "run", replace(RESULT, **change))


def test_a_list_out_of_order_is_refused() -> None:
    with pytest.raises(WireError, match="ascending"):
        seal(NODE, "run", Attest(0, 0, b"\x02" * 32 + b"\x01" * 32))


def test_the_commitment_covers_every_field_run_and_trainer() -> None:
    commitments = {RESULT.commitment("run", NODE.public), RESULT.commitment("r", NODE.public)}
    commitments.add(RESULT.commitment("run", b"\x01" * 32))
    for field in fields(Result):
        value = getattr(RESULT, field.name)
        other = value + 1 if isinstance(value, int) else (1, 2) if isinstance(value, tuple) else b"z" * 32
        commitments.add(replace(RESULT, **{field.name: other}).commitment("run", NODE.public))
    assert len(commitments) == 3 + len(fields(Result))


@pytest.mark.parametrize(
    "raw",
    [
        b"\xcd\x00\x01",  # a u16 for 1, which fits in a byte
        b"\xdc\x00\x01\x01",  # a 16-bit array length for one element
        b"\xd9\x01a",  # an 8-bit text length for one letter
        b"\x81\x01\x02",  # a map
        b"\xc7\x01\x05a",  # an extension type
        b"\x01\x01",  # something after the value
        b"\xdd\xff\xff\xff\xff",  # an array that claims four thousand million elements
        b"\xc6\xff\xff\xff\xff",  # bytes that claim four gigabytes
        b"\x91" * 600,  # nested too deep
        b"",
    ],
)
def test_other_encodings_and_claims_are_refused(raw: bytes) -> None:
    with pytest.raises(WireError):
        unpack(raw, max_size=1000)


@given(st.recursive(st.one_of(st.integers(0, 2**64 - 1), st.binary(max_size=9), st.text(max_size=9)), st.lists))
def test_a_value_has_one_encoding(value: Any) -> None:
    assert unpack(pack(value), max_size=1 << 16) == value


def test_a_key_is_neither_shown_nor_told() -> None:
    secret = b"\x07" * 32
    assert secret.hex() not in repr(NODE)
    assert NODE.public.hex() == "ea4a6c63e29c520abef5507b132ec5f9954776aebebe7b92421eea691446d22c"
