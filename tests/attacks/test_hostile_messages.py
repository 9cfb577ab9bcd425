"""What a member signs ends no other node, whatever numbers it puts there: the core only answers, files or refuses."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.core import LAYOUT, Scene, of

from psyche_lightning.errors import WireError
from psyche_lightning.node import events as ev
from psyche_lightning.protocol.messages import Ask, Attest, Buffers, Message, Offer, Result, Stuck
from psyche_lightning.protocol.requests import Withdraw

MOST = (1 << 64) - 1
NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 7, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 63, MOST])
HASHES = st.sampled_from([bytes(32), b"h" * 32, bytes([255]) * 32, LAYOUT])
BITS = st.sampled_from([0, 1, 0x3F800000, 0x7F800000, 0x7FC00000, 0x80000000, 0xFFFFFFFF])
RESULTS = st.builds(
    Result,
    *[NUMBERS] * 6,
    HASHES,
    NUMBERS,
    HASHES,
    st.lists(BITS, min_size=1, max_size=64).map(tuple),
    BITS,
    NUMBERS,
    st.lists(st.tuples(NUMBERS, NUMBERS), max_size=3).map(tuple),
)
LISTS = st.lists(HASHES, max_size=4, unique=True).map(lambda hashes: b"".join(sorted(hashes)))
MESSAGES = st.one_of(
    RESULTS,
    st.builds(Attest, NUMBERS, NUMBERS, LISTS),
    st.builds(Ask, NUMBERS, NUMBERS, NUMBERS),
    st.builds(Buffers, NUMBERS, HASHES),
    st.builds(Offer, NUMBERS, NUMBERS, HASHES),
    st.builds(Stuck, NUMBERS, NUMBERS, NUMBERS),
)


@pytest.mark.parametrize("overlap", [False, True])
@settings(max_examples=40)
@given(messages=st.lists(MESSAGES, min_size=1, max_size=12), near=st.booleans(), over=st.booleans())
def test_the_others_train_on_whatever_a_member_signs(
    overlap: bool, messages: list[Message], near: bool, over: bool
) -> None:
    """Some of the results fit the round but for a few fields; some messages come after the epoch's end."""
    scene = Scene(4, settings={"overlap": overlap, "keep_bytes": 0})
    scene.begin()
    scene.play(2)
    if over:
        for i in (1, 2):
            scene.ask(i, Withdraw())
        scene.obey(scene.see())
    for message in messages:
        changes: dict[str, Any] = {}
        if near and isinstance(message, Result):
            changes = {"lrs": message.lrs, "size": message.size, "payload": message.payload, "tokens": message.tokens}
        try:
            envelope = scene.result(3, **changes) if changes and not over else scene.seal(message, 3)
        except WireError:
            continue  # nobody can sign it
        scene.obey(scene.give(ev.Received(envelope)), but=(ev.Fetch,))
        scene.obey(scene.tick(3.0), but=(ev.Fetch,))
    if not over:
        step = scene.state.step
        scene.play(2)
        assert scene.state.step > step
        assert not of(scene.tick(1.0), ev.Diagnose)
