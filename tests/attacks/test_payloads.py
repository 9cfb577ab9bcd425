"""Hand-made payloads that an attacker might send; each is refused with its reason."""

import tracemalloc
from math import comb

import pytest

from psyche_lightning.distro import STEPS_VERSION, DistroConfig, decode
from psyche_lightning.errors import PayloadError

CONFIG = DistroConfig(chunk=8, k=2)  # words of 11 bits, each followed by two signs
HEADER = bytes.fromhex("0203000200000001")


def bits(text: str) -> bytes:
    """Bits and zeros up to a whole byte."""
    text = text.replace(" ", "")
    return int(text + "0" * (-len(text) % 8), 2).to_bytes(-(-len(text) // 8), "big")


def test_the_untouched_payload_is_accepted():
    votes = decode(HEADER + bits("01100010000 01"), 1, CONFIG)
    assert (votes.positions.tolist(), votes.signs.tolist()) == ([[3, 40]], [[1, -1]])
    last = decode(HEADER + bits("11111100000 01"), 1, CONFIG)  # 2016 = C(64, 2)
    assert last.positions.tolist() == [[62, 63]]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "ends after 0 bytes"),
        (HEADER[:7], "ends after 7 bytes"),
        (b"\x01" + HEADER[1:] + bits("01100010000 01"), "version 1; this run.s is 2"),
        (b"\x02\x06" + HEADER[2:] + bytes(2), "log2 of the chunk side is 6; this run's is 3"),
        (b"\x02\x03\xff\xff" + HEADER[4:] + bytes(2), "k is 65535; this run's is 2"),
        (HEADER[:4] + b"\xff\xff\xff\xff" + bytes(2), "number of chunks is 4294967295; this run's is 1"),
        (HEADER, "has 8 bytes; 10 are expected"),
        (HEADER + bytes(1), "has 9 bytes; 10 are expected"),
        (HEADER + bytes(3), "has 11 bytes; 10 are expected"),
        (HEADER + bits("11111100001 00"), "chunk 0 .*beyond the number of sets"),
        (HEADER + bits("11111111111 11"), "chunk 0 .*beyond the number of sets"),
        (HEADER + bits("00000000000 01"), "chunk 0 .*signs but no votes"),
        (HEADER + bits("00000000000 10"), "chunk 0 .*signs but no votes"),
        (HEADER + bits("01100010000 01 001"), "not padded with zeros"),
    ],
)
def test_refused(payload, reason):
    with pytest.raises(PayloadError, match=reason):
        decode(payload, 1, CONFIG)


def grouped(first: int, second: int, fields: str) -> bytes:
    """Two chunks of side 32 with k = 4: a word of 47 bits, then 3 low bits and a sign for each of 8 votes."""
    return bytes.fromhex("0205000400000002") + bits(f"{first + second * (comb(131, 4) + 1):047b}" + fields)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (grouped(1, 0, "0000 0010 0100 0100" + "0000" * 4), "chunk 0 .*do not ascend"),  # 0 1 2 2
        (grouped(1, 1, "0000 0010 0100 0110" + "0000 0010 0110 0100"), "chunk 1 .*do not ascend"),
        (grouped(1, 0, "0000 0010 0100 0110" + "0000 0000 0010 0000"), "chunk 1 .*low bits or signs but no votes"),
        (grouped(0, 1, "0001" + "0000" * 3 + "0000 0010 0100 0110"), "chunk 0 .*low bits or signs but no votes"),
        (grouped(0, comb(131, 4) + 1, "0000" * 4 + "0000 0010 0100 0110"), "chunk 0 .*beyond the number of sets"),
    ],
)
def test_refused_in_a_group(payload, reason):
    config = DistroConfig(chunk=32, k=4)
    decode(grouped(1, 1, "0000 0010 0100 0110" * 2), 2, config)
    with pytest.raises(PayloadError, match=reason):
        decode(payload, 2, config)


def test_the_chunks_that_the_last_group_lacks_cast_no_votes():
    config = DistroConfig(chunk=32, k=4)
    payload = bytearray(grouped(1, 1, "0000 0010 0100 0110" * 2))
    payload[7] = 1
    with pytest.raises(PayloadError, match="votes beyond the last chunk"):
        decode(bytes(payload), 1, config)
    payload = bytearray(grouped(1, 0, "0000 0010 0100 0110" + "0000" * 4))
    payload[7] = 1
    assert decode(bytes(payload), 1, config).positions.tolist() == [[0, 1, 2, 3]]


def test_a_huge_claim_allocates_nothing():
    payload = HEADER[:4] + b"\xff\xff\xff\xff" + bytes(100)
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError):
            decode(payload, 1, CONFIG)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


STEPS = bytes.fromhex("0303000200000001")  # the same chunk's votes, then five bits of exponent and two of magnitude


def test_the_untouched_payload_of_local_steps_is_accepted():
    votes = decode(STEPS + bits("01100010000 01 000") + bits("10010 10"), 1, CONFIG, version=STEPS_VERSION)
    assert (votes.positions.tolist(), votes.signs.tolist()) == ([[3, 40]], [[2, -1]])
    assert votes.exponents.tolist() == [18]
    most = decode(STEPS + bits("01100010000 01 000") + bits("11111 11"), 1, CONFIG, version=STEPS_VERSION)
    assert (most.signs.tolist(), most.exponents.tolist()) == ([[2, -2]], [31])


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (HEADER + bits("01100010000 01"), "version 2; this run's is 3"),
        (b"\x04" + STEPS[1:] + bytes(3), "version 4; this run's is 3"),
        (STEPS + bytes(2), "has 10 bytes; 11 are expected"),
        (STEPS + bytes(4), "has 12 bytes; 11 are expected"),
        (STEPS + bits("11111100001 00 000") + bits("10010 10"), "chunk 0 .*beyond the number of sets"),
        (STEPS + bits("01100010000 01 001") + bits("10010 10"), "byte of the payload's votes is not padded"),
        (STEPS + bits("01100010000 01 000") + bits("10010 10 1"), "byte of the payload's magnitudes is not padded"),
        (STEPS + bits("01100010000 01 000") + bits("10010 11"), "chunk 0 .*all 2, which is 1 with the next exponent"),
        (STEPS + bits("00000000000 00 000") + bits("00001 00"), "chunk 0 .*exponent or magnitudes but no votes"),
        (STEPS + bits("00000000000 00 000") + bits("00000 01"), "chunk 0 .*exponent or magnitudes but no votes"),
        (STEPS + bits("00000000000 01 000") + bits("00000 00"), "chunk 0 .*signs but no votes"),
    ],
)
def test_refused_of_local_steps(payload, reason):
    with pytest.raises(PayloadError, match=reason):
        decode(payload, 1, CONFIG, version=STEPS_VERSION)
